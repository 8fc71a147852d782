"""`--preview` shows a likeness of the finished picture and does not change it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file

from tiler.decoding.colours import LONGEST, fit_colours, paint, reduced
from tiler.diffusion import flow, schedulers
from tiler.errors import BudgetExceeded, ModelError, TilerError
from tiler.jobs.coding import encode
from tiler.jobs.manifest import picture_of
from tiler.planning.resolve import fill
from tiler.request import Decode, RenderRequest, Scheduler

LEVELS = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "epsilon",
}


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test learns the colours itself."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def likeness(picture: Path, preview: Path) -> float:
    """The correlation between two pictures' means of 32×32 pixels."""
    small = [np.asarray(Image.open(p).convert("RGB").resize((8, 8), Image.Resampling.BOX)) for p in (picture, preview)]
    return float(np.corrcoef(small[0].ravel(), small[1].ravel())[0, 1])


@pytest.mark.parametrize("channels", [4, 16])
def test_colours_that_are_affine_are_found(channels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    want = torch.rand(channels + 1, 3, generator=generator) * 20
    want[-1] = 128
    latents = torch.randn(1, channels, 24, 20, generator=generator)
    means = (latents[0].reshape(channels, -1).T @ want[:-1] + want[-1]).reshape(24, 20, 3)
    pixels = means.numpy().repeat(8, 0).repeat(8, 1).round().clip(0, 255).astype(np.uint8)
    assert torch.allclose(fit_colours(latents, pixels), want, atol=0.3)  # of 256 levels; pixels are whole numbers


def test_a_picture_of_one_colour_is_no_reason_to_fail() -> None:
    colours = fit_colours(torch.zeros(1, 4, 2, 2), np.full((16, 16, 3), 77, np.uint8))
    assert (paint(torch.zeros(1, 4, 2, 2), colours) == 77).all()


@pytest.mark.parametrize(("height", "width"), [(8, 8), (1, 600), (1030, 20), (2048, 2048)])
def test_previews_are_about_512_pixels_across(height: int, width: int) -> None:
    painted = paint(torch.zeros(1, 4, height, width), torch.ones(5, 3))
    assert LONGEST / 2 < max(painted.shape) <= LONGEST
    assert (painted == 1).all()


@pytest.mark.parametrize("name", [name for name in Scheduler if name is not Scheduler.AUTO])
def test_what_is_shown_is_the_picture_without_its_noise(name: Scheduler) -> None:
    """With every scheduler, a correct prediction leads to the picture itself."""
    generator = torch.Generator().manual_seed(1)
    noise, picture = (torch.randn(1, 4, 4, 4, generator=generator) for _ in range(2))
    schedule = schedulers.build(name, LEVELS, 8)
    seen: list[torch.Tensor] = []
    schedule.on_step = lambda step, denoised: seen.append(denoised())
    first, behind = map(schedule.calls.first_of, (4, 5))
    latents = schedule.start(noise, picture, first)
    for call in range(first, behind):
        schedule.model_input(latents, call)
        latents = schedule.step(noise, call, latents, generator)
    assert len(seen) == 1
    # A consistency model's own estimate keeps a little of the latents.
    assert torch.allclose(seen[0], picture, atol=0.02 if name is Scheduler.LCM else 1e-4)


@pytest.mark.parametrize("name", [Scheduler.EULER, Scheduler.DPMPP_2M, Scheduler.UNIPC, Scheduler.LCM])
def test_what_is_shown_of_flow_matching_is_the_picture(name: Scheduler) -> None:
    generator = torch.Generator().manual_seed(1)
    noise, picture = (torch.randn(1, 16, 4, 4, generator=generator) for _ in range(2))
    schedule = flow.build(name, {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, 8)
    seen: list[torch.Tensor] = []
    schedule.on_step = lambda step, denoised: seen.append(denoised())
    latents = schedule.start(noise, picture, 4)
    schedule.step(noise - picture, 4, latents, generator)
    assert torch.allclose(seen[0], picture, atol=1e-4)


def test_a_preview_is_like_the_picture_and_changes_nothing_of_it(in_process, tmp_path: Path) -> None:
    common = "render", "misty mountains in indigo blue", "--size", 256, "--steps", 3, "--seed", 7
    assert in_process(*common, "-o", "a.png").code == 0
    ran = in_process(*common, "-o", "b.png", "--preview", "p.png")
    assert ran.code == 0, ran.err
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert likeness(tmp_path / "a.png", tmp_path / "p.png") > 0.95
    assert {p.name for p in tmp_path.iterdir()} == {"a.png", "b.png", "p.png"}


def test_without_a_guide_a_small_picture_is_decoded_first_and_a_preview_is_replaced(
    in_process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiler.previewing.SHIPPED", "none.json")
    common = "render", "a red sun", "--size", 256, "--steps", 3, "--seed", 7, "--no-guide", "--preview", "p.jpg"
    ran = in_process(*common, "-o", "a.png")
    assert "preview: done" in ran.err
    assert likeness(tmp_path / "a.png", tmp_path / "p.jpg") > 0.9
    ran = in_process(*common, "--preview-interval", 9, "-o", "b.png")
    assert ran.code == 0, ran.err
    assert "preview: done" not in ran.err  # its colours are known by now


@pytest.mark.parametrize(("height", "width"), [(64, 48), (130, 100), (300, 7)])
def test_latents_are_reduced_by_means(height: int, width: int) -> None:
    latents = torch.randn(1, 4, height, width, generator=torch.Generator().manual_seed(3))
    want = torch.nn.functional.avg_pool2d(latents, -(-max(height, width) // 64))
    assert torch.allclose(reduced(latents, 64), want, atol=1e-6)


def test_a_tiny_autoencoder_decodes_previews_and_changes_nothing_of_the_picture(
    in_process, tiny: Path, tmp_path: Path
) -> None:
    """What is shown last is what diffusers decodes of the final latents."""
    torch.manual_seed(0)
    vae = AutoencoderTiny(latent_channels=4).eval()
    vae.save_pretrained(tmp_path / "taesd")
    common = "render", "misty mountains", "--model", tiny, "--size", 64, "--steps", 2, "--seed", 7, "--no-guide"
    assert in_process(*common, "-o", "a.png", "--save-latents", "a.safetensors").code == 0
    ran = in_process(*common, "-o", "b.png", "--preview", "p.png", "--tiny-vae", "taesd")
    assert ran.code == 0, ran.err
    assert "preview: done" not in ran.err  # no colours are learnt
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with torch.no_grad():
        decoded = vae.decode(load_file(tmp_path / "a.safetensors")["latents"]).sample
    want = (decoded[0] / 2 + 0.5).clamp(0, 1).mul(255).round().permute(1, 2, 0).numpy()
    assert abs(np.asarray(Image.open(tmp_path / "p.png")) - want).max() <= 1


def test_a_preview_that_cannot_be_made_does_not_end_the_render(
    in_process, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A note says it once. The ceiling still counts."""
    common = "render", "x", "--model", tiny, "--size", 64, "--steps", 3, "--seed", 7, "--no-guide"
    assert in_process(*common, "-o", "a.png").code == 0
    failing: list[TilerError] = [ModelError("taesd: the file is gone")]

    def decode(*given: object) -> np.ndarray:
        raise failing[0]

    monkeypatch.setattr("tiler.previewing.paint", decode)
    ran = in_process(*common, "-o", "b.png", "--preview", "p.png")
    assert ran.code == 0 and ran.err.count("the preview could not be made") == 1, ran.err
    assert "taesd: the file is gone" in ran.err
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    failing[0] = BudgetExceeded("the ceiling was reached")
    assert in_process(*common, "-o", "c.png", "--preview", "p.png").code == 5


def test_a_job_goes_on_with_or_without_a_tiny_autoencoder_for_previews() -> None:
    said = {"prompt": "x", "model": "mini", "size": 64, "seed": 1, "output": Path("x.png")}
    plain = fill(RenderRequest(**said))
    with_preview = fill(RenderRequest(**said, preview=Path("p.png"), tiny_vae="taesd"))
    assert picture_of(plain) == picture_of(with_preview)
    both = fill(RenderRequest(**said, preview=Path("p.png"), tiny_vae="taesd", decode=Decode.TINY))
    assert both.preview_vae == both.tiny_vae == "taesd"
    assert encode(RenderRequest(**said, preview=Path("-")))["preview"] == "-"  # no file's name, wherever it goes on


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--preview", "p.pdf"), "previews are written as .png or .jpg"),
        (("--preview", "-"), "--preview - needs a terminal on standard error; give a file"),
        (("--preview", "-", "--count", 2, "-o", "{seed}.png"), "--preview - shows one picture"),
        (("--tiny-vae", "taesd"), "--decode tiny and --tiny-vae FOLDER go together"),
        (("--preview", "mine.png"), "mine.png exists; give --force to replace it, or another --preview"),
        (("--preview", "none/p.png"), "none does not exist"),
        (("--preview", "x.png", "-o", "x.png"), "--output and --preview name the same file"),
        (("--preview", "p.png", "--preview-interval", 0), "--preview-interval 0 is out of range"),
    ],
)
def test_previews_that_cannot_be_written_are_exit_2(in_process, tmp_path: Path, options, message: str) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "a boat")
    Image.new("RGB", (8, 8)).save(tmp_path / "mine.png", pnginfo=info)
    ran = in_process("render", "x", "--size", 64, *options)
    assert ran.code == 2, ran.err
    assert message in ran.err
