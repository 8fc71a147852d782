"""`--repaint`: pixels outside the mask keep their bytes, and only tiles under the mask are denoised."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from tiler import Budget, RenderRequest, events, render
from tiler.diffusion import flow, schedulers
from tiler.diffusion.poster import Poster, mask_rows
from tiler.diffusion.spot import AroundSpot, find_spot, opacity
from tiler.diffusion.tiles import Whole
from tiler.errors import BudgetExceeded, UsageError
from tiler.memory.process import read_rss
from tiler.output.png_strips import read_strips
from tiler.planning.resolve import fill
from tiler.request import Layout, Preset, Scheduler

HEIGHT, WIDTH = 203, 300
STEPS = 2
COMMON = ("a boat", "--steps", STEPS, "--seed", 5, "--precision", "fp32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with poster.png and poster.jpg, a mask with two spots, and one of half its size."""
    path = tmp_path_factory.mktemp("repaint")
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    pixels = np.stack([x * 255 // WIDTH, y * 255 // HEIGHT, (x * y) % 256], -1).astype(np.uint8)
    Image.fromarray(pixels).save(path / "poster.png")
    Image.fromarray(pixels).save(path / "poster.jpg", quality=80)
    mask = Image.new("L", (WIDTH, HEIGHT))
    ImageDraw.Draw(mask).ellipse((20, 30, 61, 70), fill=255)
    mask.save(path / "spot.png")
    ImageDraw.Draw(mask).rectangle((230, 120, 250, 140), fill=200)
    mask.save(path / "spots.png")
    mask.resize((WIDTH // 2, HEIGHT // 2), Image.Resampling.NEAREST).save(path / "small.png")
    Image.new("L", (WIDTH, HEIGHT)).save(path / "black.png")
    Image.new("L", (HEIGHT, WIDTH), 255).save(path / "turned.png")
    return path


def pixels_of(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def starts(length: int, tile: int, overlap: int) -> list[int]:
    """The starts of the fewest tiles that cover a length."""
    count = 1 if length <= tile else math.ceil((length - tile) / (tile - overlap)) + 1
    return [0] if count == 1 else [round(i * (length - tile) / (count - 1)) for i in range(count)]


@pytest.mark.parametrize(("guide", "mask"), [("poster.png", "spots.png"), ("poster.jpg", "small.png")])
def test_outside_the_mask_nothing_changes_and_tiles_are_those_under_it(
    in_process, tiny: Path, folder: Path, tmp_path: Path, guide: str, mask: str
) -> None:
    options = (*COMMON, "--model", tiny, "--guide", folder / guide, "--repaint", folder / mask, "--strength", 1)
    plan = in_process("plan", *options, "--json").json
    ran = in_process("render", *options, "-o", "x.png", "--json")
    assert ran.code == 0, ran.err
    before, after = pixels_of(folder / guide), pixels_of(tmp_path / "x.png")
    own = np.asarray(Image.open(folder / mask))
    rows, columns = ((2 * np.arange(n) + 1) * m // (2 * n) for n, m in zip((HEIGHT, WIDTH), own.shape, strict=True))
    black = own[rows][:, columns] == 0
    assert (after[black] == before[black]).all()
    assert abs(after - before)[~black].mean() > 5
    box = plan["repaint"]
    tile, cells = 8, np.zeros((box["height"] // 8, box["width"] // 8), bool)
    for row, column in np.argwhere(~black):
        cells[(row - box["top"]) // 8, (column - box["left"]) // 8] = True
    tops, lefts = (starts(side, tile, tile // 4) for side in cells.shape)
    under = sum(cells[top : top + tile, left : left + tile].any() for top in tops for left in lefts)
    assert 0 < under < len(tops) * len(lefts)
    assert (plan["tiles"], ran.json["tiles"]) == (under, under)
    assert plan["denoiser_samples"] == ran.json["denoiser_samples"] == under * 2 * STEPS


def test_a_small_spot_is_one_tile_and_comes_back_by_from(in_process, tiny: Path, folder: Path, tmp_path: Path) -> None:
    for name in ("poster.png", "spot.png"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    options = ("--model", tiny, "--guide", "poster.png", "--repaint", "spot.png")
    ran = in_process("render", *COMMON, *options, "-o", "x.png", "--json")
    assert (ran.json["width"], ran.json["height"]) == (WIDTH, HEIGHT)
    env = {"TILER_MODEL_DIRS": str(tiny.parent), "TILER_SIZE": "512", "TILER_WRAP": "x"}
    assert in_process("render", "--from", "x.png", "-o", "y.png", env=env).code == 0
    assert (tmp_path / "x.png").read_bytes() == (tmp_path / "y.png").read_bytes()
    # Another spot of that picture, which says of itself a guide and a mask.
    again = ("--from", "x.png", "--guide", "x.png", "--repaint", folder / "small.png", "-o", "z.png")
    assert in_process("render", *again, env=env).code == 0
    assert Image.open(tmp_path / "z.png").size == (WIDTH, HEIGHT)


def test_a_job_of_a_spot_goes_on(tiny: Path, folder: Path, tmp_path: Path) -> None:
    def paint(name: str, phase: str = "") -> bytes:
        def stop(event: events.Event) -> None:
            if isinstance(event, events.Progress) and event.name == phase:
                raise BudgetExceeded("enough")

        request = RenderRequest(
            prompt="a boat", model=str(tiny), num_inference_steps=3, seed=5, scheduler=Scheduler.EULER_A, strength=0.8,
            guide_image=folder / "poster.png", repaint=folder / "spots.png", output=tmp_path / name,
        )  # fmt: skip
        render(request, Budget(read_rss().now + 2_000_000_000), stop)
        return (tmp_path / name).read_bytes()

    for phase in ("guide picture", "canvas", "decode"):
        with pytest.raises(BudgetExceeded):
            paint("x.png", phase)
    assert paint("x.png") == paint("whole.png")
    assert {path.name for path in tmp_path.iterdir()} == {"x.png", "whole.png"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--repaint", "spot.png"), "give that with --guide IMG"),
        (("--guide", "poster.png", "--repaint", "none.png"), "none.png: no such file"),
        (("--guide", "poster.png", "--repaint", "black.png"), "no part of this mask is white"),
        (("--guide", "poster.png", "--repaint", "turned.png"), "a mask of 203×300 pixels does not fit"),
        (("--guide", "poster.png", "--repaint", "spot.png", "--size", 64), "leave out --size"),
        (("--guide", "poster.png", "--repaint", "spot.png", "--scale", 2), "leave out --scale"),
        (("--guide", "poster.png", "--repaint", "spot.png", "--wrap", "x"), "leave out --wrap"),
        (("--guide", "poster.png", "--repaint", "spot.png", "--layout", "shift"), "leave out --layout shift"),
        (("--guide", "poster.png", "--repaint", "spot.png", "--layout", "jitter"), "leave out --layout jitter"),
        (("--guide", "poster.png", "--repaint", "spot.png", "--save-latents", "z.safetensors"), "--save-latents"),
    ],
)
def test_what_does_not_go_with_a_spot_is_one_line(in_process, folder: Path, options, message: str) -> None:
    here = [folder / word if str(word).endswith(".png") else word for word in options]
    ran = in_process("plan", "a boat", *[w for w in here if w != "--save-latents" and w != "z.safetensors"])
    if "--save-latents" in options:
        ran = in_process("render", "a boat", *here)
    assert ran.code == 2 and message in ran.err and len(ran.err.strip().splitlines()) == 1, ran.err


def test_tiles_of_a_spot_never_move_whatever_the_model_says(folder: Path) -> None:
    asked = RenderRequest(prompt="a boat", guide_image=folder / "poster.png", repaint=folder / "spot.png")
    own: dict[str, Any] = {
        "num_inference_steps": 3, "guidance_scale": 1.0, "guidance_interval": (0.0, 1.0), "strength": 0.5,
        "scheduler": Scheduler.AUTO, "layout": Layout.JITTER,
    }  # fmt: skip
    assert fill(asked, own).layout is Layout.GRID
    assert fill(replace(asked, preset=Preset.FAST), own).layout is Layout.GRID


def test_a_spot_that_memory_does_not_hold_is_one_line(
    in_process, tiny: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiler.planning.render.IN_MEMORY_BYTES", 0)
    options = ("--guide", folder / "poster.png", "--repaint", folder / "spot.png")
    ran = in_process("plan", "a boat", "--model", tiny, *options)
    assert ran.code == 2 and "spot.png: the masked spot takes" in ran.err and len(ran.err.strip().splitlines()) == 1, (
        ran.err
    )


def test_a_mask_that_ends_early_is_one_line(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "poster.jpg").read_bytes()
    (tmp_path / "mask.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match=r"mask.jpg: the picture is damaged .*; take another copy"):
        list(mask_rows(tmp_path / "mask.jpg", (HEIGHT, WIDTH)))


def test_a_poster_above_the_limit_of_guides_is_read_by_strips(
    in_process, tiny: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiler.diffusion.guide_picture.MAX_GUIDE_PIXELS", 10_000)
    monkeypatch.setattr("tiler.output.png_strips._STRIP_PIXELS", 10 * WIDTH)
    with Poster(folder / "poster.png", tmp_path, print) as poster:
        assert (poster[40:90] == pixels_of(folder / "poster.png")[40:90]).all()
    rows = list(mask_rows(folder / "spots.png", (HEIGHT, WIDTH)))
    assert len(rows) > 10
    assert (np.concatenate(rows) == np.asarray(Image.open(folder / "spots.png"))).all()
    options = (*COMMON, "--model", tiny, "--repaint", folder / "spot.png", "-o", "x.jpg")
    ran = in_process("render", *options, "--guide", folder / "poster.png")
    assert ran.code == 0 and "encoded again as jpeg" in ran.err
    ran = in_process("render", *options, "--guide", folder / "poster.jpg")
    assert ran.code == 2 and "too large" in ran.err


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "LA", "RGBA"])
def test_strips_of_every_kind_of_png_are_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    monkeypatch.setattr("tiler.output.png_strips._STRIP_PIXELS", 500)
    rng = np.random.default_rng(1)
    smooth = np.add.outer(np.arange(60), np.arange(47))[..., None] * [1, 2, 3, 4]
    pixels = (smooth + rng.integers(0, 9, smooth.shape)).astype(np.uint8)
    picture = Image.fromarray(pixels if "A" in mode else pixels[..., :3])
    picture.convert(mode).save(tmp_path / "x.png")
    strips = list(read_strips(tmp_path / "x.png"))
    assert len(strips) == 6
    rows = np.concatenate([np.asarray(strip.convert("RGBA")) for strip in strips])
    assert (rows == np.asarray(Image.open(tmp_path / "x.png").convert("RGBA"))).all()
    (tmp_path / "x.png").write_bytes((tmp_path / "x.png").read_bytes()[:-900])
    with pytest.raises(ValueError, match="ends"):
        list(read_strips(tmp_path / "x.png"))


LEVELS: dict[str, Any] = {
    "num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
    "prediction_type": "epsilon",
}  # fmt: skip
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}


FOR_FLOW = (Scheduler.EULER, Scheduler.HEUN, Scheduler.DPMPP_2M, Scheduler.UNIPC, Scheduler.LCM)
KINDS = [(name, False) for name in Scheduler if name is not Scheduler.AUTO] + [(name, True) for name in FOR_FLOW]


@pytest.mark.parametrize(("name", "is_flow"), KINDS)
def test_outside_the_mask_latents_are_the_picture_s_at_every_step(name: Scheduler, is_flow: bool) -> None:
    def schedule() -> schedulers.DiffusersSchedule:
        return flow.build(name, FLOW, 8) if is_flow else schedulers.build(name, LEVELS, 8)

    generator = torch.Generator().manual_seed(1)
    noise, picture = (torch.randn(1, 4, 16, 16, generator=generator) for _ in range(2))
    cells = np.zeros((16, 16), bool)
    cells[4:7, 5:8] = True
    around = AroundSpot(schedule(), find_spot(cells, (16, 16), 1), picture, noise)
    begin = around.calls.first_of(3)
    outside, latents = torch.from_numpy(~cells), around.start(noise, picture, begin)
    for step in range(begin, around.calls.count):
        assert torch.allclose(latents[..., outside], schedule().start(noise, picture, step)[..., outside], atol=1e-5)
        prediction = torch.randn(latents.shape, generator=generator)
        around.model_input(latents, step)
        latents = around.step(prediction, step, latents, generator)
    assert (latents[..., outside] == picture[..., outside]).all()
    assert (latents[..., ~outside] != picture[..., ~outside]).all()


def test_a_spot_fades_inwards_and_thin_ones_are_seen() -> None:
    cells = np.zeros((20, 20), bool)
    cells[2:12, 2:12] = cells[16, 3:15] = True
    shown = opacity(cells)
    assert (shown[~cells] == 0).all() and (shown[cells] > 0).all()
    assert shown[2, 7] < shown[3, 7] < shown[6, 7] == 1
    assert (shown[16, 3:15] == 1).all()
    assert (opacity(np.ones((9, 9), bool)) == 1).all()  # a picture's border is no mask's


@pytest.mark.parametrize("at", [(0, 0), (30, 41), (63, 63), (12, 60)])
def test_the_box_holds_the_spot_and_lies_on_the_canvas(at: tuple[int, int]) -> None:
    cells = np.zeros((64, 64), bool)
    cells[at] = True
    spot = find_spot(cells, (16, 16), 2)
    assert (spot.height, spot.width) == (16, 16) and spot.cells.sum() == 1
    assert 0 <= spot.top <= 48 and 0 <= spot.left <= 48 and spot.top % 2 == spot.left % 2 == 0
    assert spot.cells[at[0] - spot.top, at[1] - spot.left]
    assert spot.box == (8 * spot.top, 8 * spot.left, 128, 128)


def test_a_tile_hears_where_it_lies_in_the_whole_picture(tiny: Path) -> None:
    from tiler.models import family as families
    from tiler.planning.resolve import fill
    from tiler.planning.tiling import plan_tiling

    family = families.open_family(RenderRequest(model=str(tiny)))
    regions = plan_tiling(fill(RenderRequest(prompt="x", width=WIDTH, height=HEIGHT)), family).regions
    part = regions.over(np.ones(regions.canvas, bool), Whole(3, 4, 100, 200))
    assert regions[5].place == Whole(regions[5].top, regions[5].left, *regions.canvas)
    assert part[5].place == Whole(regions[5].top + 3, regions[5].left + 4, 100, 200)
