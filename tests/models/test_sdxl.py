"""SDXL against diffusers' own pipeline, UNet and schedulers, on a tiny checkpoint in its layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from tiler import Budget, RenderRequest, events, models, render
from tiler.memory.process import read_rss
from tiler.models.family import Part, Role, read_family
from tiler.models.few_steps import sign_of_few_steps
from tiler.models.samples import Place, Prompt
from tiler.models.sdxl import time_ids
from tiler.planning import render as planner
from tiler.planning.resolve import resolve as resolve_request
from tiler.request import GuideUpscale, Layout, Mask, Precision, Preset, TileConditioning
from tiler.run import streamed
from tiler.weights.checkpoint import resolve

SIDE = 128  # pixels of a tile of the tiny checkpoint


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import make_checkpoint

    return make_checkpoint.make("tiny-sdxl", tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def pipe(sdxl: Path) -> Any:
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl, variant="fp16", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def change(folder: Path, file: str, **values: object) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def ask(model: Path, folder: Path, name: str = "x", **values: Any) -> RenderRequest:
    defaults: dict[str, Any] = {
        "prompt": "a sailing boat", "model": str(model), "size": SIDE, "num_inference_steps": 3, "seed": 11,
        "output": folder / f"{name}.png", "save_latents": folder / f"{name}.safetensors", "force": True,
    }  # fmt: skip
    return RenderRequest(**(defaults | values))


def roomy() -> Budget:
    return Budget(read_rss().now + 2_000_000_000)


def rendered(request: RenderRequest) -> Tensor:
    render(request, roomy())
    assert request.save_latents is not None
    return load_file(request.save_latents)["latents"]


ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
CASES: dict[str, tuple[str | None, float, str, dict[str, object]]] = {
    "no negative prompt": (None, 5.0, "EulerDiscreteScheduler", {}),
    "empty negative prompt": ("", 5.0, "EulerDiscreteScheduler", {}),
    "negative prompt": ("fog", 5.0, "EulerDiscreteScheduler", {}),
    "guidance off": (None, 1.0, "EulerDiscreteScheduler", {}),
    "zero SNR": ("fog", 5.0, "EulerDiscreteScheduler", ZERO_SNR),
    "zero SNR, DDIM": ("fog", 5.0, "DDIMScheduler", ZERO_SNR),
    "steps_offset 0": (None, 5.0, "EulerDiscreteScheduler", {"steps_offset": 0}),
    "Turbo": (None, 0.0, "EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "Lightning": (None, 0.0, "EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    "LCM": (None, 1.0, "LCMScheduler", {}),
    "by strips": ("fog", 5.0, "EulerDiscreteScheduler", {}),
}


def go_by_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """As at 1024 px, where joined tensors are large."""
    monkeypatch.setattr(models.sdxl, "WHOLE_ELEMENTS", 0)
    monkeypatch.setattr(models.strips, "STRIP_ELEMENTS", 1)


@pytest.mark.parametrize("name", CASES)
def test_one_tile_is_what_diffusers_pipeline_gives(
    sdxl: Path, pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    import diffusers

    if name == "by strips":
        go_by_strips(monkeypatch)
    negative, scale, cls, values = CASES[name]
    folder = shutil.copytree(sdxl, tmp_path / "model")
    change(folder, "scheduler/scheduler_config.json", _class_name=cls, **values)
    pipe.scheduler = getattr(diffusers, cls).from_pretrained(folder / "scheduler")
    settings = {"negative_prompt": negative, "guidance_scale": scale, "num_inference_steps": 3}
    want = pipe(
        "a sailing boat", width=SIDE, height=SIDE, generator=torch.Generator().manual_seed(11), output_type="latent",
        **settings,
    ).images  # fmt: skip
    got = rendered(ask(folder, tmp_path, guide=False, **settings))
    assert got.dtype == torch.float32
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


def encoded(folder: Path, prompts: list[str | None], warn: Callable[[str], None]) -> list[Prompt]:
    family = read_family(resolve(str(folder)))

    @contextmanager
    def opened(part: Part) -> Iterator[Any]:
        module = part.build()
        with streamed(module, family.checkpoint.weights(part.name), part.aliases):
            yield module

    with torch.no_grad():
        return family.encode(prompts, opened, warn)


def test_an_absent_negative_prompt_is_an_empty_one_where_the_checkpoint_says_so(sdxl: Path, tmp_path: Path) -> None:
    zeros, empty = encoded(sdxl, [None, ""], pytest.fail)
    assert zeros.pooled is not None and empty.pooled is not None
    assert not zeros.tokens.any() and not zeros.pooled.any()
    assert zeros.tokens.shape == empty.tokens.shape and zeros.pooled.shape == empty.pooled.shape
    folder = shutil.copytree(sdxl, tmp_path / "model")
    change(folder, "model_index.json", force_zeros_for_empty_prompt=False)
    absent, given = encoded(folder, [None, ""], pytest.fail)
    assert absent.pooled is given.pooled and torch.equal(given.tokens, empty.tokens)


@torch.no_grad()
def test_an_encoder_that_was_lent_before_gives_the_same_states(sdxl: Path) -> None:
    """transformers adds hooks to a module whose hidden states are requested; planning requests them first."""
    family = read_family(resolve(str(sdxl)))
    for part in family.encoders:
        module, found = part.build(), []
        for _ in range(2):
            with streamed(module, family.checkpoint.weights(part.name), part.aliases):
                found.append(module(torch.arange(77)[None], output_hidden_states=True).hidden_states)
        assert len(found[0]) == len(found[1]) == part.config["num_hidden_layers"] + 1
        assert all(map(torch.equal, *found))


def test_a_long_prompt_goes_on_in_chunks(sdxl: Path) -> None:
    """The first chunk is what truncation would leave; both encoders have the same number of chunks."""
    long, short = encoded(sdxl, ["a " * 75 + "boat", "a " * 75], pytest.fail)
    assert long.tokens.shape[1] == 2 * 77 and torch.equal(long.tokens[:, :77], short.tokens)
    assert long.pooled is not None and short.pooled is not None and torch.equal(long.pooled, short.pooled)


def test_a_normalised_vae_is_decoded_as_the_pipeline_does(sdxl: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionXLPipeline

    folder = shutil.copytree(sdxl, tmp_path / "model")
    change(folder, "vae/config.json", latents_mean=[-1.6, 2.0, 3.0, -2.0], latents_std=[8.0, 5.0, 6.0, 4.0])
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, variant="fp16", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    want = pipe(
        "a sailing boat", width=SIDE, height=SIDE, num_inference_steps=1, generator=torch.Generator().manual_seed(11)
    ).images[0]
    render(ask(folder, tmp_path, guide=False, num_inference_steps=1, guidance_scale=5.0), roomy())
    got = Image.open(tmp_path / "x.png")
    assert np.abs(np.asarray(got).astype(int) - np.asarray(want).astype(int)).max() <= 1
    spec, latents = read_family(resolve(str(folder))).vae, torch.randn(1, 4, 3, 3)
    assert torch.allclose(spec.scale(spec.unscale_(latents.clone())), latents, atol=1e-5)


@pytest.mark.parametrize("conditioning", list(TileConditioning))
@torch.no_grad()
def test_four_tiles_under_a_guide_are_what_a_plain_loop_gives(
    sdxl: Path, pipe: Any, tmp_path: Path, conditioning: TileConditioning
) -> None:
    from diffusers import EulerDiscreteScheduler

    steps, begin, canvas, tile = 4, 2, 24, 16  # latents: tiles begin at 0 and 8
    whole = (192, 192, 0, 0, 192, 192)
    encoded = pipe.encode_prompt("a sailing boat", negative_prompt="fog")
    tokens, pooled = torch.cat([encoded[1], encoded[0]]), torch.cat([encoded[3], encoded[2]])

    def denoise(side: int, reference: Tensor | None) -> Tensor:
        scheduler = EulerDiscreteScheduler.from_pretrained(sdxl / "scheduler")
        scheduler.set_timesteps(steps)
        first = 0 if reference is None else begin
        scheduler.set_begin_index(first)
        x = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(11))
        x = x * scheduler.init_noise_sigma if reference is None else scheduler.add_noise(
            reference, x, scheduler.timesteps[begin : begin + 1])  # fmt: skip
        for t in scheduler.timesteps[first:]:
            scaled, total, count = scheduler.scale_model_input(x, t), torch.zeros_like(x), torch.zeros_like(x)
            for top in range(0, side - tile + 1, 8):
                for left in range(0, side - tile + 1, 8):
                    ids = (8 * side, 8 * side, 8 * top, 8 * left, SIDE, SIDE)
                    ids = whole if side == canvas and conditioning == "none" else ids
                    crop = (..., slice(top, top + tile), slice(left, left + tile))
                    added = {"text_embeds": pooled, "time_ids": torch.tensor([ids] * 2, dtype=torch.float32)}
                    without, given = pipe.unet(
                        scaled[crop].repeat(2, 1, 1, 1), t, encoder_hidden_states=tokens, added_cond_kwargs=added
                    ).sample.split(1)
                    total[crop] += without + 5.0 * (given - without)
                    count[crop] += 1
            x = scheduler.step(total / count, t, x).prev_sample
        return x

    guide = F.interpolate(denoise(tile, None), size=(canvas, canvas), mode="bicubic")
    want = denoise(canvas, guide)
    asked = ask(
        sdxl, tmp_path, size=192, num_inference_steps=steps, negative_prompt="fog", mask=Mask.CONSTANT,
        guide_upscale=GuideUpscale.LATENT, tile_conditioning=conditioning,
    )  # fmt: skip
    got = rendered(asked)
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


def test_guidance_that_is_an_input_is_what_diffusers_pipeline_gives(sdxl: Path, tmp_path: Path) -> None:
    from diffusers import LCMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    folder = shutil.copytree(sdxl, tmp_path / "model")
    base = UNet2DConditionModel.from_pretrained(folder / "unet", variant="fp16")
    unet = UNet2DConditionModel.from_config(base.config, time_cond_proj_dim=16)
    assert unet.load_state_dict(base.state_dict(), strict=False).missing_keys == ["time_embedding.cond_proj.weight"]
    unet.half().save_pretrained(folder / "unet", variant="fp16")
    change(folder, "scheduler/scheduler_config.json", _class_name="LCMScheduler")
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, variant="fp16", torch_dtype=torch.float32)
    pipe.scheduler = LCMScheduler.from_pretrained(folder / "scheduler")
    pipe.set_progress_bar_config(disable=True)
    want = pipe(
        "a sailing boat", width=SIDE, height=SIDE, generator=torch.Generator().manual_seed(11), output_type="latent",
        num_inference_steps=4, guidance_scale=8.0,
    ).images  # fmt: skip
    request = ask(folder, tmp_path, guide=False, num_inference_steps=None)
    assert render(request, roomy()).report["denoiser_samples"] == 4
    got = load_file(tmp_path / "x.safetensors")["latents"]
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


def test_a_tile_is_told_its_place_modulo_the_canvas() -> None:
    place = Place(768 + 2048, 2048 + 512, 1024, 1024, (2048, 1536))
    assert time_ids(place, TileConditioning.PLACE) == (2048, 1536, 768, 1024, 1024, 1024)
    assert time_ids(place, TileConditioning.NONE) == (2048, 1536, 0, 0, 2048, 1536)


def test_the_picture_and_the_report_say_what_tiles_were_told(sdxl: Path, tmp_path: Path) -> None:
    asked = ask(sdxl, tmp_path, num_inference_steps=1, tile_conditioning=TileConditioning.NONE)
    assert render(asked, roomy()).report["tile_conditioning"] == "none"
    assert json.loads(Image.open(tmp_path / "x.png").text["tiler"])["tile_conditioning"] == "none"  # type: ignore[attr-defined]


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.INT8])
def test_same_bytes_whatever_the_batch(
    sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Precision
) -> None:
    found = []
    for batch in (1, 5):
        monkeypatch.setattr(planner, "MAX_BATCH", batch)
        settings = {
            "num_inference_steps": 1,
            "guide": False,
            "layout": Layout.SHIFT,
            "precision": precision,
            "cache_dir": tmp_path,
        }
        found.append(rendered(ask(sdxl, tmp_path, str(batch), size=192, **settings)))
    assert torch.equal(*found)


def test_int8_is_near_fp32_also_by_strips(sdxl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_by_strips(monkeypatch)
    for module in ("tiler.compute.layers", "tiler.models.unet"):
        monkeypatch.setattr(f"{module}.SMALL", 500)
    exact, near = (
        rendered(ask(sdxl, tmp_path, guide=False, num_inference_steps=1, precision=precision, cache_dir=tmp_path))
        for precision in (Precision.FP32, Precision.INT8)
    )
    assert 0 < (near - exact).norm() < 0.1 * exact.norm()


def test_the_second_encoder_stays_as_it_is_stored(sdxl: Path) -> None:
    family = read_family(resolve(str(sdxl)))
    first, second = family.encoders
    assert first.quantise("text_model.encoder.layers.0.mlp.fc1.weight")
    assert not second.quantise("text_model.encoder.layers.0.mlp.fc1.weight")
    denoiser = family.part(Role.DENOISER)
    assert not denoiser.quantise("add_embedding.linear_1.weight")
    assert denoiser.quantise("down_blocks.1.resnets.0.conv1.weight")


@pytest.mark.parametrize(
    ("name", "scheduler", "sign"),
    [
        ("stabilityai/sdxl-turbo", {}, "turbo"),
        ("some/DreamShaperXL_Lightning", {}, "Lightning"),
        ("./models/LCM-sdxl/", {}, "LCM"),
        ("some/Hyper-SD", {}, "Hyper"),
        ("tianweiy/DMD2", {}, "DMD2"),
        ("hyperrealistic/xl", {}, None),
        ("turbo/sdxl-base", {}, None),
        ("x", {"_class_name": "LCMScheduler"}, "scheduler is LCM"),
        ("x", {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}, "Euler a"),
        ("x", {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "leading"}, None),
        ("x", {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}, None),
    ],
)
def test_few_step_models_are_known_by_name_or_scheduler(name: str, scheduler: dict[str, str], sign: str | None) -> None:
    found = sign_of_few_steps(name, scheduler)
    assert found is None if sign is None else sign in str(found)


def test_a_few_step_model_takes_four_steps_without_guidance_and_says_so(sdxl: Path, tmp_path: Path) -> None:
    folder, notes = shutil.copytree(sdxl, tmp_path / "sdxl-turbo"), list[str]()
    family, base = read_family(resolve(str(folder))), read_family(resolve(str(sdxl)))
    for preset in Preset:
        filled = resolve_request(RenderRequest(prompt="x", preset=preset), family)
        assert (filled.num_inference_steps, filled.guidance_scale) == (4, 1.0)
        assert resolve_request(RenderRequest(prompt="x", preset=preset), base).guidance_scale == 5.0
    said = resolve_request(RenderRequest(prompt="x", num_inference_steps=8, guidance_scale=2.0), family)
    assert (said.num_inference_steps, said.guidance_scale) == (8, 2.0)

    def listen(event: events.Event) -> None:
        notes.extend([event.text] if isinstance(event, events.Note) else [])

    asked = ask(folder, tmp_path, num_inference_steps=None, size=SIDE)
    report = render(asked, roomy(), listen).report
    assert report["denoiser_samples"] == 4
    assert any("few-step" in note and "turbo" in note for note in notes)


def test_the_plan_says_what_is_read(sdxl: Path, in_process: Any) -> None:
    ran = in_process("plan", "x", "--model", sdxl, "--size", SIDE, "--json")
    assert ran.code == 0, ran.err
    facts = json.loads(ran.out)["read_bytes"]
    assert list(facts) == ["text_encoder", "text_encoder_2", "unet"]
    files = {part: next((sdxl / part).glob("*.safetensors")).stat().st_size for part in facts}
    assert facts["unet"] == pytest.approx(files["unet"], rel=0.1)
    tables = 2 * 48 * (5000 + 77)  # fp16, of the second encoder
    assert facts["text_encoder_2"] == pytest.approx(files["text_encoder_2"] - tables, rel=0.1)


def test_quantize_and_decode_know_it(sdxl: Path, in_process: Any, tmp_path: Path) -> None:
    ran = in_process("quantize", sdxl, "--cache-dir", tmp_path / "packed")
    assert ran.code == 0, ran.err
    latents = rendered(ask(sdxl, tmp_path, num_inference_steps=1, guide=False))
    assert latents.shape == (1, 4, 16, 16)
    ran = in_process("decode", tmp_path / "x.safetensors", "--model", sdxl, "-o", tmp_path / "y.png")
    assert ran.code == 0, ran.err
    assert np.array_equal(*(np.asarray(Image.open(tmp_path / name)) for name in ("x.png", "y.png")))
