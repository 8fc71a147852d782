"""The effect of the prompt grammar on a picture, against a loop over diffusers' UNet."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from tests.models.rendering import ask, rendered
from tiler.request import Emphasis, Scheduler, ScheduleType
from tiler.request.wording import canvas_conditions, guide_conditions

STEPS = 4
SCALE = 6.0
LONG = "a lighthouse on a cliff above the waves and gulls in the wind over the harbour at dawn as the mate told"


@pytest.fixture(scope="module")
def pipe(tiny: Path) -> Any:
    pipe = StableDiffusionPipeline.from_pretrained(
        tiny, variant="fp16", torch_dtype=torch.float32, safety_checker=None, feature_extractor=None
    )
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    return pipe


@torch.no_grad()
def loop(pipe: Any, by_step: list[list[tuple[str, float]]], negatives: list[str]) -> Tensor:
    """Each step with its own prompts and their factors: u + g · Σ f (c − u)."""

    def embedded(text: str) -> Tensor:
        return pipe.encode_prompt(text, "cpu", 1, False)[0]

    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    pipe.scheduler.set_timesteps(STEPS)
    for t, prompts, negative in zip(pipe.scheduler.timesteps, by_step, negatives, strict=True):
        u = pipe.unet(latents, t, embedded(negative)).sample
        apart = sum(f * (pipe.unet(latents, t, embedded(text)).sample - u) for text, f in prompts)
        latents = pipe.scheduler.step(u + SCALE * apart, t, latents).prev_sample
    return latents


BOAT, FOG = [("a boat", 1.0)], [("fog", 1.0)]


@pytest.mark.parametrize(
    ("prompt", "by_step"),
    [
        ("[a boat:fog:0.5]", [BOAT, BOAT, FOG, FOG]),
        ("[a boat|fog]", [BOAT, FOG, BOAT, FOG]),
        ("a boat AND fog :0.5", [[("a boat ", 1.0), (" fog", 0.5)]] * 4),
    ],
)
def test_prompts_change_by_step_and_join(
    pipe: Any, tiny: Path, tmp_path: Path, prompt: str, by_step: list[list[tuple[str, float]]]
) -> None:
    negatives = ["gulls", "gulls", "gulls", "rain"]
    settings = {"scheduler": Scheduler.DDIM, "num_inference_steps": STEPS, "guidance_scale": SCALE, "size": 64}
    got, report = rendered(ask(tiny, tmp_path, prompt=prompt, negative_prompt="[gulls:rain:3]", **settings))
    want = loop(pipe, by_step, negatives)
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()
    assert report["denoiser_samples"] == STEPS * (1 + len(by_step[0]))


def test_the_result_does_not_depend_on_how_samples_are_grouped(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Joined and long prompts, regions with prompts of other lengths, tiles: every batch size gives the same bytes."""
    from tiler import Region
    from tiler.planning import render as planner

    region = Region(
        prompt="fog (rain:1.3) AND gulls", rows=(0, 64), cols=(0, 64), negative_prompt=f"{LONG} BREAK boats"
    )
    found = []
    for batch in (1, 5):
        monkeypatch.setattr(planner, "MAX_BATCH", batch)
        asked = ask(
            tiny, tmp_path, prompt=f"[{LONG}|fog] AND rain", width=96, height=64, num_inference_steps=2,
            regions=(region,), guide=True,
        )  # fmt: skip
        found.append(rendered(asked)[0])
    assert torch.equal(*found)


def test_the_tiles_may_have_a_prompt_of_their_own(tiny: Path, tmp_path: Path) -> None:
    settings = {"width": 96, "height": 64, "guide": True, "num_inference_steps": 2, "strength": 0.5}
    plain = ask(tiny, tmp_path, **settings)
    other = replace(plain, canvas_prompt="fog")
    assert guide_conditions(other) == guide_conditions(plain) == canvas_conditions(plain) != canvas_conditions(other)
    assert not torch.equal(rendered(plain)[0], rendered(other)[0])
    assert "Hires prompt: fog" in Image.open(tmp_path / "x.png").text["parameters"]


def test_the_picture_says_how_its_prompt_was_read(tiny: Path, tmp_path: Path) -> None:
    asked = ask(
        tiny, tmp_path, prompt="a (boat:1.3)", clip_skip=2, emphasis=Emphasis.NO_NORM, size=64, num_inference_steps=2,
        scheduler=Scheduler.DPMPP_2M_SDE, schedule_type=ScheduleType.SGM_UNIFORM,
    )  # fmt: skip
    rendered(asked)
    said = Image.open(tmp_path / "x.png").text["parameters"]
    for field in ("a (boat:1.3)\n", "Clip skip: 2", "Emphasis: No norm", "Sampler: DPM++ 2M SDE", "type: SGM Uniform"):
        assert field in said
    latents = load_file(tmp_path / "x.safetensors")["latents"]
    assert not torch.equal(latents, rendered(replace(asked, clip_skip=None))[0])


@pytest.mark.parametrize(
    "words",
    [
        ("a boat", "--clip-skip", "30"),
        ("a boat", "--clip-skip", "0"),
        ("a boat", "--schedule-type", "cosine"),
        ("a boat", "--scheduler", "Euler a", "--schedule-type", "karras"),
        ("a boat", "--emphasis", "loud"),
        ("a <hypernet:inks:1>",),
        ("a AND b :-1",),
        ("a boat", "-n", "fog <lora:inks:1>"),
    ],
)
def test_what_cannot_be_read_is_exit_2(in_process: Any, tiny: Path, words: tuple[str, ...]) -> None:
    ran = in_process("render", *words, "--model", tiny, "--size", "64", "--steps", "1", "--no-guide")
    assert ran.code == 2, ran.err
