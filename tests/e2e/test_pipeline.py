"""Complete renders in this process, against StableDiffusionPipeline and against each other."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, HeunDiscreteScheduler, StableDiffusionPipeline
from PIL import Image, ImageCms
from safetensors.torch import load_file

from tiler import Budget, Region, RenderRequest, events, render
from tiler.errors import BudgetExceeded
from tiler.memory.process import read_rss
from tiler.planning import fit
from tiler.planning import render as planner
from tiler.request import GuideUpscale, Layout, Precision, Scheduler, Wrap


def ask(model: Path | str, folder: Path, name: str = "x", **values: Any) -> RenderRequest:
    defaults: dict[str, Any] = {
        "prompt": "a sailing boat",
        "model": str(model),
        "width": 64,
        "height": 64,
        "num_inference_steps": 3,
        "seed": 11,
        "output": folder / f"{name}.png",
        "save_latents": folder / f"{name}.safetensors",
        "force": True,
    }
    return RenderRequest(**(defaults | values))


def roomy() -> Budget:
    return Budget(read_rss().now + 2_000_000_000)


@pytest.mark.parametrize(
    ("kind", "scheduler", "cls"),
    [
        ("tiny", Scheduler.DDIM, DDIMScheduler),
        ("tiny", Scheduler.EULER_A, EulerAncestralDiscreteScheduler),
        ("tiny", Scheduler.HEUN, HeunDiscreteScheduler),
        ("tiny-sd2", Scheduler.DDIM, DDIMScheduler),
    ],
)
def test_one_tile_is_what_stable_diffusion_pipeline_gives(
    checkpoints: Path, tmp_path: Path, kind: str, scheduler: Scheduler, cls: Any
) -> None:
    folder = checkpoints / kind
    pipe = StableDiffusionPipeline.from_pretrained(
        folder, variant="fp16", torch_dtype=torch.float32, safety_checker=None, feature_extractor=None
    )
    pipe.scheduler = cls.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    settings = {"negative_prompt": "fog", "num_inference_steps": 3, "guidance_scale": 6.0, "width": 64, "height": 64}
    latents = pipe(
        "a sailing boat", generator=torch.Generator().manual_seed(11), output_type="latent", **settings
    ).images
    image = pipe("a sailing boat", generator=torch.Generator().manual_seed(11), **settings).images[0]
    render(ask(folder, tmp_path, scheduler=scheduler, negative_prompt="fog", guidance_scale=6.0, guide=False), roomy())
    got = load_file(tmp_path / "x.safetensors")["latents"]
    assert got.dtype == torch.float32
    assert (got - latents).abs().max() <= 1e-4 * latents.abs().max()
    difference = np.abs(np.asarray(Image.open(tmp_path / "x.png")).astype(int) - np.asarray(image).astype(int))
    assert difference.max() <= 1


@pytest.mark.parametrize(
    ("batches", "settings"),
    [
        ((1, 5, 16), {}),
        ((1, 16), {"layout": Layout.SHIFT, "guidance_interval": (0.0, 0.7), "attention_window": 6}),
        ((1, 16), {"precision": Precision.INT8, "cache_dir": Path("packed")}),
    ],
)
def test_same_seed_same_bytes_whatever_the_plan(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batches: tuple[int, ...], settings: dict[str, object]
) -> None:
    """A low ceiling means small batches and streamed weights, a high one large batches and weights kept in memory."""
    monkeypatch.chdir(tmp_path)
    files = []
    for batch in batches:
        monkeypatch.setattr(planner, "MAX_BATCH", batch)
        if batch < 16:
            monkeypatch.setattr(fit, "_choose_resident", lambda *args: {})
        name = f"batch{batch}"
        asked = ask(tiny, tmp_path, name, width=104, height=72, num_inference_steps=2, **settings)
        report = render(asked, roomy()).report
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
        latents = load_file(tmp_path / f"{name}.safetensors")["latents"]
        files.append((latents, np.asarray(Image.open(tmp_path / f"{name}.png")), report))
    for latents, pixels, _ in files[1:]:
        assert torch.equal(latents, files[0][0])
        assert np.array_equal(pixels, files[0][1])
    reads = [report["weight_bytes_read"] for _, _, report in files]
    assert sorted(set(reads), reverse=True) == reads


def test_sizes_that_are_no_multiples_are_cropped(tiny: Path, tmp_path: Path) -> None:
    render(ask(tiny, tmp_path, width=131, height=77, num_inference_steps=1), roomy())
    assert Image.open(tmp_path / "x.png").size == (131, 77)
    assert load_file(tmp_path / "x.safetensors")["latents"].shape == (1, 4, 10, 17)


def test_the_picture_carries_its_parameters(tiny: Path, tmp_path: Path) -> None:
    render(ask(tiny, tmp_path, prompt='a "boat", at sea: 1\nSteps: 99', negative_prompt="fog", width=128), roomy())
    image = Image.open(tmp_path / "x.png")
    lines = image.text["parameters"].split("\n")  # type: ignore[attr-defined]
    assert lines[:3] == ['a "boat", at sea: 1', "Steps: 99", "Negative prompt: fog"]
    assert lines[-1].startswith(
        "Steps: 3, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 11, Size: 128x64, Model: "
    )
    asked = json.loads(image.text["tiler"])  # type: ignore[attr-defined]
    assert asked["seed"] == 11 and asked["precision"] == "fp32"
    profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
    assert "sRGB" in ImageCms.getProfileDescription(profile)


def test_a_users_picture_rules_at_strength_zero(tiny: Path, tmp_path: Path) -> None:
    """Nothing is denoised: the result is the picture after encoding and decoding, and the UNet never runs."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(tmp_path / "guide.png")
    result = render(ask(tiny, tmp_path, guide_image=tmp_path / "guide.png", strength=0.0, width=96), roomy())
    assert result.report["denoiser_calls"] == 0
    render(ask(tiny, tmp_path, "half", guide_image=tmp_path / "guide.png", strength=0.7, width=96), roomy())
    kept, changed = (load_file(tmp_path / f"{n}.safetensors")["latents"] for n in ("x", "half"))
    assert (kept - changed).abs().mean() > 0.05


def test_the_guides_latents_can_be_enlarged_without_the_autoencoder(tiny: Path, tmp_path: Path) -> None:
    seen: list[str] = []

    def note(event: events.Event) -> None:
        seen.extend([event.name] if isinstance(event, events.PhaseStarted) else [])

    render(ask(tiny, tmp_path, width=128, guide_upscale=GuideUpscale.LATENT, num_inference_steps=2), on_event=note)
    assert seen == ["encode prompts", "guide", "canvas", "decode"]  # with it there is one more: test_events_…


def test_copies_of_a_picture_that_wraps_join(tmp_path: Path) -> None:
    """From the guide to the decoder: neighbours differ as much across the join as elsewhere along the decoder's
    grid."""

    def at_join(wrap: Wrap) -> list[float]:
        # With the seed of `ask`, 11, it draws a streak along the join.
        render(ask("mini", tmp_path, width=264, height=264, num_inference_steps=2, wrap=wrap, seed=1), roomy())
        picture = np.asarray(Image.open(tmp_path / "x.png"), float)
        steps = (np.abs(picture - np.roll(picture, 1, axis)).mean(axis=(1 - axis, 2)) for axis in (0, 1))
        return [float(step[0] / step[8::8].mean()) for step in steps]

    rows, cols = at_join(Wrap.NONE)
    assert min(rows, cols) > 2
    assert max(at_join(Wrap.XY)) < 2


def test_regions_have_prompts_and_seeds_of_their_own(tiny: Path, tmp_path: Path) -> None:
    def latents(name: str, **region: Any) -> torch.Tensor:
        own = Region(**({"prompt": "a house", "rows": (0, 64), "cols": (0, 64)} | region))
        render(ask(tiny, tmp_path, name, width=160, guide=False, num_inference_steps=2, regions=(own,)), roomy())
        return load_file(tmp_path / f"{name}.safetensors")["latents"]

    base, other_prompt, other_seed = latents("a"), latents("b", prompt="a mountain"), latents("c", seed=5)
    for changed in (other_prompt, other_seed):
        assert (base - changed)[..., :4].abs().max() > 1e-3
        assert (base - changed)[..., :4].abs().mean() > 5 * (base - changed)[..., -4:].abs().mean()


def test_events_tell_the_phases_in_order(tiny: Path, tmp_path: Path) -> None:
    seen: list[events.Event] = []
    result = render(ask(tiny, tmp_path, width=128), roomy(), seen.append)
    names = [e.name for e in seen if isinstance(e, events.PhaseStarted)]
    assert (
        names
        == ["encode prompts", "guide", "guide picture", "canvas", "decode"]
        == [p["name"] for p in result.report["phases"]]
    )
    canvas = [e for e in seen if isinstance(e, events.Progress) and e.name == "canvas"]
    assert canvas[-1].done == canvas[-1].total == result.report["denoiser_samples"] - 6


def test_a_breach_in_mid_run_ends_it(tiny: Path, tmp_path: Path) -> None:
    hog: list[torch.Tensor] = []

    def on_event(event: events.Event) -> None:
        if isinstance(event, events.Progress) and event.name == "canvas":
            hog.append(torch.ones(40_000_000))

    with pytest.raises(BudgetExceeded, match="unet"):
        render(ask(tiny, tmp_path, width=128), Budget(read_rss().now + 120_000_000), on_event)
    assert not (tmp_path / "x.png").exists()
    assert list(tmp_path.glob(".tiler-*")) == []


def test_34_memory_close_to_the_ceiling_halves_the_batch(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = {"width": 128, "guide": False, "num_inference_steps": 2}
    render(ask(tiny, tmp_path, "whole", **common), roomy())
    notes: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr("tiler.memory.budget._SOFT", 0.0)
        patch.setattr("tiler.memory.budget.ALMOST", 0.0)
        render(ask(tiny, tmp_path, **common), roomy(), lambda e: notes.append(getattr(e, "text", "")))
    assert any("from here on the denoiser takes at most 1 sample" in note for note in notes)
    assert (tmp_path / "x.png").read_bytes() == (tmp_path / "whole.png").read_bytes()


def test_memory_does_not_grow_over_steps(tiny: Path, tmp_path: Path) -> None:
    """RSS after step 20 within 3.2 MB of RSS after step 2."""
    after: dict[int, int] = {}

    def on_event(event: events.Event) -> None:
        if isinstance(event, events.Progress) and event.name == "guide":
            after[event.done // 2] = read_rss().now

    render(ask(tiny, tmp_path, width=128, num_inference_steps=20, strength=0.03), roomy(), on_event)
    assert abs(after[20] - after[2]) <= 3_200_000


@pytest.mark.parametrize(("width", "height"), [(33, 50), (200, 24)])
def test_a_side_below_one_tile_is_the_middle_of_one(tiny: Path, tmp_path: Path, width: int, height: int) -> None:
    render(ask(tiny, tmp_path, width=width, height=height, num_inference_steps=2), roomy())
    got = np.asarray(Image.open(tmp_path / "x.png"))
    full = {"width": max(64, -(-width // 8) * 8), "height": max(64, height)}
    render(ask(tiny, tmp_path, "whole", num_inference_steps=2, **full), roomy())
    whole = np.asarray(Image.open(tmp_path / "whole.png"))
    top, left = (max(0, 64 - side) // 2 for side in (height, width))
    assert np.array_equal(got, whole[top : top + height, left : left + width])
