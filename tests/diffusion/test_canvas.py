"""Tiles, masks and the canvas against closed formulas and a plain float64 reference."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tiler.diffusion import schedulers
from tiler.diffusion.canvas import Conditions, denoise, first_step, initial_noise
from tiler.diffusion.guide import GuideSize, guide_size, upscale
from tiler.diffusion.tiles import (
    Text2ImageRegion,
    even_starts,
    guide_tiles,
    mask_profile,
    plan_tiles,
    tiles_of_step,
)
from tiler.errors import NumericalError, UsageError
from tiler.models.family import read_family
from tiler.plan.tiling import plan_tiling
from tiler.request import Layout, Mask, Region, RenderRequest, Scheduler, Wrap
from tiler.weights.checkpoint import resolve

CONFIG = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "steps_offset": 1,
}


def request(**values: Any) -> RenderRequest:
    return RenderRequest(**({"prompt": "base", "output": Path("x.png"), "width": 128, "height": 128} | values))


@given(length=st.integers(8, 400), tile=st.integers(8, 96), overlap=st.integers(0, 95))
def test_tiles_cover_evenly(length: int, tile: int, overlap: int) -> None:
    if overlap >= tile or length < tile:
        return
    starts = even_starts(length, tile, overlap)
    assert starts[0] == 0
    assert starts[-1] == length - tile
    gaps = [b - a for a, b in pairwise(starts)]
    assert all(gap <= tile - overlap for gap in gaps)
    assert not gaps or max(gaps) - min(gaps) <= 1
    # One tile fewer could not keep the overlap.
    assert len(starts) == 1 or (len(starts) - 2) * (tile - overlap) < length - tile


@given(length=st.integers(8, 400), tile=st.integers(8, 96), overlap=st.integers(0, 95))
def test_tiles_go_round(length: int, tile: int, overlap: int) -> None:
    if overlap >= tile or length < tile:
        return
    starts = even_starts(length, tile, overlap, wraps=True)
    gaps = [b - a for a, b in pairwise([*starts, starts[0] + length])]
    assert max(gaps) <= tile - overlap
    assert max(gaps) - min(gaps) <= 1


def test_the_guides_latents_are_enlarged_as_torch_does_and_wrap() -> None:
    latents = torch.randn(1, 4, 8, 12)
    whole, neither = GuideSize(8, 12, 8.0, 12.0), (False, False)
    want = torch.nn.functional.interpolate(latents, size=(20, 30), mode="bicubic")
    assert torch.allclose(upscale(latents, whole, (20, 30), neither), want, atol=1e-5)
    middle = upscale(latents, GuideSize(8, 12, 8.0, 6.0), (20, 16), neither)
    assert torch.allclose(middle, upscale(latents, whole, (20, 32), neither)[..., 8:24], atol=1e-5)
    rolled = upscale(latents.roll((4, 6), (2, 3)), whole, (20, 30), (True, True))
    assert torch.allclose(rolled.roll((-10, -15), (2, 3)), upscale(latents, whole, (20, 30), (True, True)), atol=1e-5)


def test_2048_takes_25_tiles() -> None:
    assert even_starts(256, 64, 16) == [0, 48, 96, 144, 192]


@pytest.mark.parametrize("n", [1, 7, 8, 63, 64])
def test_mask_formulas(n: int) -> None:
    gaussian, quartic = mask_profile(Mask.GAUSSIAN, n), mask_profile(Mask.QUARTIC, n)
    for k in range(n):
        assert gaussian[k].item() == pytest.approx(
            math.exp(-((k - (n - 1) / 2) ** 2) / (0.02 * n * n)) / math.sqrt(0.02 * math.pi), rel=1e-12
        )
        u = 1.99 * k / max(1, n - 1) - 0.995
        assert quartic[k].item() == pytest.approx(15 / 16 * (1 - u * u) ** 2, rel=1e-12)
    assert torch.equal(gaussian, gaussian.flip(0))


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(8, 70), width=st.integers(8, 70), tile=st.tuples(st.integers(5, 8), st.integers(5, 8)), overlap=st.integers(0, 4),
    mask=st.sampled_from(list(Mask)), wrap=st.sampled_from(list(Wrap)), with_region=st.booleans(), with_base=st.booleans(),
)  # fmt: skip
def test_weights_sum_to_one(
    height: int,
    width: int,
    tile: tuple[int, int],
    overlap: int,
    mask: Mask,
    wrap: Wrap,
    with_region: bool,
    with_base: bool,
) -> None:
    region = Region(prompt="r", rows=(0, 8 * height), cols=(0, 64), mask=Mask.QUARTIC, mask_weight=3.0)
    regions = (region,) if with_region else ()
    if not regions or not with_base:
        regions = (*regions, Region(prompt="all", rows=(0, 8 * height), cols=(0, 8 * width)))
    asked = request(
        prompt="base" if with_base else None, width=8 * width, height=8 * height, mask=mask, wrap=wrap, regions=regions
    )
    total = torch.zeros(height, width, dtype=torch.float64)
    for placed in plan_tiles(asked, canvas=(height, width), tile=tile, overlap=overlap):
        assert bool((placed.weights >= 0).all())
        total[placed.crop] += placed.weights.double()
    assert (total - 1).abs().max() <= 1e-6


def test_the_top_level_prompt_leaves_a_region_to_itself() -> None:
    """Deep inside a region only the region speaks; at its border the base fades in."""
    region = Region(prompt="r", rows=(0, 256), cols=(0, 256))
    placed = plan_tiles(request(width=384, height=384, regions=(region,)), canvas=(48, 48), tile=(8, 8), overlap=2)
    share = torch.zeros(48, 48)
    for tile in placed:
        if tile.condition == 0:
            share[tile.crop] += tile.weights
    assert share[:28, :28].max() == 0
    assert share[33:, :].min() == pytest.approx(1)
    assert 0 < share[10, 30] < 1


def test_regions_that_cannot_be() -> None:
    small = Region(prompt="small", rows=(0, 56), cols=(0, 128))
    with pytest.raises(UsageError, match="smaller than a tile"):
        plan_tiles(request(regions=(small,)), canvas=(16, 16), tile=(8, 8), overlap=2)
    half = Region(prompt="half", rows=(0, 128), cols=(0, 64))
    with pytest.raises(UsageError, match="no region covers the canvas at row 0, column 64"):
        plan_tiles(request(prompt=None, regions=(half,)), canvas=(16, 16), tile=(8, 8), overlap=2)
    with pytest.raises(UsageError, match="overlap"):
        plan_tiles(request(), canvas=(16, 16), tile=(8, 8), overlap=8)
    with pytest.raises(UsageError, match="outside"):
        request(regions=(Region(prompt="r", rows=(0, 256), cols=(0, 64)),))
    for rows in ((64, 0), (0, 0), (-8, 64), (0, 63)):
        with pytest.raises(UsageError):
            Region(prompt="r", rows=rows, cols=(0, 64))


def fake_predict(xs: list[Tensor], t: Tensor, texts: list[Tensor]) -> Tensor:
    """A made-up model: nonlinear in x and in the prompt, and it sees its tile's surroundings."""
    x, embeds = torch.cat(xs), torch.cat(texts)
    return torch.tanh(x + embeds.mean(dim=(1, 2)).view(-1, 1, 1, 1)) * 0.7 + 0.1 * x.roll(1, dims=3)


def reference_canvas(
    latents: Tensor, placed: list[tuple[int, int, int, int, float, Tensor]], conditions: Conditions, steps: int
) -> Tensor:
    """Mixture of Diffusers written down: all predictions, all masks, float64, DDIM's formula (Song et al. 2021, eq. 12)."""
    scheduler = DDIMScheduler.from_config(CONFIG)
    scheduler.set_timesteps(steps)
    alphas = scheduler.alphas_cumprod.double()
    x = latents.double()
    for t in scheduler.timesteps.tolist():
        top, bottom = torch.zeros_like(x), torch.zeros_like(x)
        for row, col, size, condition, scale, mask in placed:
            crop = (..., slice(row, row + size), slice(col, col + size))
            u = fake_predict([x[crop]], t, [conditions.uncond[condition : condition + 1].double()])
            c = fake_predict([x[crop]], t, [conditions.cond[condition : condition + 1].double()])
            top[crop] += mask * (u + scale * (c - u))
            bottom[crop] += mask
        eps = top / bottom
        before = t - 1000 // steps
        a, b = alphas[t], alphas[before] if before >= 0 else scheduler.final_alpha_cumprod.double()
        x = b.sqrt() * (x - (1 - a).sqrt() * eps) / a.sqrt() + (1 - b).sqrt() * eps
    return x


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_a_canvas_of_several_regions_equals_the_formula(batch: int) -> None:
    left = Region(prompt="l", rows=(0, 128), cols=(0, 96), guidance_scale=3.0, mask=Mask.QUARTIC, mask_weight=2.0)
    right = Region(prompt="r", rows=(0, 128), cols=(64, 160), guidance_scale=5.0)
    asked = request(prompt=None, width=160, height=128, regions=(left, right))
    generator = torch.Generator().manual_seed(5)
    conditions = Conditions(torch.randn(2, 4, 6, generator=generator), torch.randn(2, 4, 6, generator=generator))
    noise, rng = initial_noise((1, 4, 16, 20), 9)
    tiles = plan_tiles(asked, canvas=(16, 20), tile=(8, 8), overlap=2)
    schedule = schedulers.build(Scheduler.DDIM, CONFIG, 5)
    states = list(denoise(noise, [tiles] * 5, conditions, schedule, fake_predict, rng, batch=batch))
    got = states[-1].latents
    placed = []
    for first, kind, weight, condition, scale in ((0, Mask.QUARTIC, 2.0, 0, 3.0), (8, Mask.GAUSSIAN, 1.0, 1, 5.0)):
        mask = weight * torch.outer(mask_profile(kind, 8), mask_profile(kind, 8))
        for row in (0, 4, 8):
            for col in (0, 4):
                placed.append((row, first + col, 8, condition, scale, mask))
    want = reference_canvas(noise, placed, conditions, 5)
    assert got is not None
    assert (got.double() - want).abs().max() <= 2e-5 * want.abs().max()


def test_batch_does_not_change_a_bit() -> None:
    tiles = plan_tiles(request(width=200, height=136), canvas=(17, 25), tile=(8, 8), overlap=3)
    conditions = Conditions(torch.randn(1, 4, 6), torch.randn(1, 4, 6))
    results = []
    for batch in (1, 2, 5, 7):
        noise, rng = initial_noise((1, 4, 17, 25), 1)
        schedule = schedulers.build(Scheduler.EULER_A, CONFIG, 4)
        states = list(
            denoise(
                schedule.start(noise, None, 0),
                [tiles] * 4,
                conditions,
                schedule,
                fake_predict,
                rng,
                batch=batch,
            )
        )
        results.append(states[-1].latents)
    assert all(torch.equal(r, results[0]) for r in results)


@pytest.mark.parametrize("of", ["canvas", "guide"])
def test_a_canvas_that_wraps_has_no_beginning(of: str) -> None:
    """Rolled by the tiles' stride, noise becomes the rolled picture: no pixel is nearer to a border than another."""
    conditions = Conditions(torch.randn(1, 4, 6), torch.randn(1, 4, 6))

    def predict(xs: list[Tensor], t: Tensor, texts: list[Tensor]) -> Tensor:
        sides = (torch.linspace(0, 1, n) for n in xs[0].shape[2:])  # the model knows where in its tile a pixel lies
        return fake_predict(xs, t, texts) * torch.outer(*sides)

    def picture(noise: Tensor, wrap: Wrap) -> Tensor:
        asked, size = request(width=96, height=144, wrap=wrap), (18, 12)
        tiles = (
            plan_tiles(asked, canvas=size, tile=(8, 8), overlap=2) if of == "canvas" else guide_tiles(size, wrap, 7.5)
        )
        schedule = schedulers.build(Scheduler.DPMPP_2M, CONFIG, 3)
        states = denoise(noise, [tiles] * 3, conditions, schedule, predict, torch.Generator(), batch=3)
        latents = list(states)[-1].latents
        assert latents is not None
        return latents

    noise, _ = initial_noise((1, 4, 18, 12), 3)
    for wrap, stride in ((Wrap.XY, (6, 6) if of == "canvas" else (9, 6)), (Wrap.X, (0, 6))):
        rolled = picture(noise.roll(stride, (2, 3)), wrap)
        assert torch.allclose(rolled, picture(noise, wrap).roll(stride, (2, 3)), atol=1e-4)
        assert not torch.allclose(rolled, picture(noise, Wrap.NONE).roll(stride, (2, 3)), atol=1e-2)


def test_guidance_of_one_runs_no_unconditional_half() -> None:
    tiles = plan_tiles(request(guidance_scale=1.0), canvas=(16, 16), tile=(8, 8), overlap=2)
    calls: list[int] = []

    def predict(x: list[Tensor], t: Tensor, embeds: list[Tensor]) -> Tensor:
        calls.append(len(x))
        return fake_predict(x, t, embeds)

    schedule = schedulers.build(Scheduler.DDIM, CONFIG, 1)
    noise, rng = initial_noise((1, 4, 16, 16), 1)
    list(
        denoise(
            noise, [tiles], Conditions(torch.zeros(1, 4, 6), torch.zeros(1, 4, 6)), schedule, predict, rng, batch=100
        )
    )
    assert calls == [len(tiles)]


def steps_of(asked: RenderRequest, size: tuple[int, int]) -> list[tuple[Text2ImageRegion, ...]]:
    tiles = plan_tiles(asked, canvas=size, tile=(8, 8), overlap=2)
    return [tiles_of_step(tiles, asked, number) for number in range(asked.num_inference_steps)]


def canvas_of(steps: list[tuple[Text2ImageRegion, ...]], size: tuple[int, int], predict: Any = fake_predict) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    conditions = Conditions(torch.randn(1, 4, 6, generator=generator), torch.randn(1, 4, 6, generator=generator))
    noise, rng = initial_noise((1, 4, *size), 1)
    schedule = schedulers.build(Scheduler.DDIM, CONFIG, len(steps))
    latents = list(denoise(noise, steps, conditions, schedule, predict, rng, batch=3))[-1].latents
    assert latents is not None
    return latents


def test_guidance_works_in_its_interval_alone() -> None:
    """Kynkäänniemi et al. 2024: outside, the conditional prediction is taken as it is."""
    size, counts = (16, 16), {}
    for interval in ((0.0, 1.0), (0.2, 0.6), (0.9, 1.0)):
        asked = request(num_inference_steps=10, guidance_interval=interval)
        counts[interval] = [sum(tile.samples for tile in step) for step in steps_of(asked, size)]
    assert counts[0.0, 1.0] == [18] * 10
    assert counts[0.2, 0.6] == [9] * 2 + [18] * 4 + [9] * 4
    assert counts[0.9, 1.0] == [9] * 9 + [18]
    plain = [tuple(plan_tiles(request(), canvas=size, tile=(8, 8), overlap=2))] * 10
    assert torch.equal(canvas_of(steps_of(request(num_inference_steps=10), size), size), canvas_of(plain, size))
    unguided = [tuple(plan_tiles(request(guidance_scale=1.0), canvas=size, tile=(8, 8), overlap=2))] * 10
    mixed = canvas_of(unguided[:2] + plain[:4] + unguided[:4], size)
    got = canvas_of(steps_of(request(num_inference_steps=10, guidance_interval=(0.2, 0.6)), size), size)
    assert torch.equal(got, mixed)


@pytest.mark.parametrize("size", [(32, 24), (8, 40), (20, 16)])
def test_shifted_tiles_cover_the_canvas_once_at_every_step(size: tuple[int, int]) -> None:
    asked = request(width=8 * size[1], height=8 * size[0], num_inference_steps=12, layout=Layout.SHIFT)
    steps = steps_of(asked, size)
    count = math.ceil(size[0] / 8) * math.ceil(size[1] / 8)
    for step in steps:
        assert len(step) == count
        total = torch.zeros(size)
        for tile in step:
            total[tile.crop] += tile.weights
        assert torch.allclose(total, torch.ones(size), atol=1e-6)
    starts = {(step[0].top % size[0], step[0].left % size[1]) for step in steps}
    assert len(starts) > 6
    if size[0] == 8:
        assert {top for top, _ in starts} == {0}
    again = steps_of(asked, size)
    assert [(s[0].top, s[0].left) for s in steps] == [(s[0].top, s[0].left) for s in again]


def test_the_last_step_of_a_shifted_schedule_overlaps() -> None:
    """The borders of its tiles would stay in the picture."""
    family, size = read_family(resolve("mini")), {"width": 512, "height": 512}
    shifted, grid = (
        plan_tiling(request(layout=each, **size), family).canvas_steps for each in (Layout.SHIFT, Layout.GRID)
    )
    assert [len(step) for step in shifted[:-1]] == [4] * (len(grid) - 1)
    assert len(grid[-1]) == 9
    for a, b in zip(shifted[-1], grid[-1], strict=True):
        assert (a.top, a.left, a.guidance_scale) == (b.top, b.left, b.guidance_scale)
        assert torch.equal(a.weights, b.weights)


def test_a_shift_of_nothing_is_a_grid_without_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    size = (16, 24)
    asked = request(width=192, height=128, num_inference_steps=3, layout=Layout.SHIFT)
    moved = canvas_of(steps_of(asked, size), size)
    monkeypatch.setattr("random.Random.randrange", lambda self, n: 0)
    grid = [tuple(plan_tiles(request(width=192, height=128), canvas=size, tile=(8, 8), overlap=0))] * 3
    assert torch.equal(canvas_of(steps_of(asked, size), size), canvas_of(grid, size))
    assert not torch.allclose(moved, canvas_of(grid, size), atol=1e-3)


def test_noise_and_seeds() -> None:
    noise, _ = initial_noise((1, 4, 16, 24), 7)
    assert torch.equal(noise, torch.randn(1, 4, 16, 24, generator=torch.Generator().manual_seed(7)))
    crop = (slice(0, 8), slice(8, 16))
    mixed, _ = initial_noise((1, 4, 16, 24), 7, [(crop, 3)])
    assert torch.equal(mixed[:, :, :8, 8:16], torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3)))
    mixed[:, :, :8, 8:16] = noise[:, :, :8, 8:16]
    assert torch.equal(mixed, noise)


@pytest.mark.parametrize(
    ("steps", "strength", "begin"), [(50, 0.2, 40), (20, 0.5, 10), (20, 1.0, 0), (20, 0.0, 20), (3, 0.5, 1)]
)
def test_strength_is_the_share_that_the_canvas_denoises(steps: int, strength: float, begin: int) -> None:
    assert first_step(steps, strength) == begin


def test_guide_has_the_native_area_and_shows_the_canvass_aspect() -> None:
    assert guide_size((64, 64), 64, 8) is None
    square = guide_size((256, 256), 64, 8)
    assert square == (64, 64, 64.0, 64.0)
    wide = guide_size((128, 256), 64, 8)
    assert wide is not None
    assert wide.height % 8 == wide.width % 8 == 0
    assert wide.shown_width / wide.shown_height == pytest.approx(2)
    assert wide.height >= wide.shown_height > wide.height - 8
    assert wide.width >= wide.shown_width > wide.width - 8


def test_a_prediction_that_is_not_finite_stops_the_run() -> None:
    region = Text2ImageRegion(
        top=0, left=0, height=8, width=8, condition=0, guidance_scale=1.0, weights=torch.ones(8, 8), canvas=(8, 8)
    )
    schedule = schedulers.build(Scheduler.DDIM, CONFIG, 3)
    noise, rng = initial_noise((1, 4, 8, 8), 1)
    loop = denoise(
        noise,
        [[region]] * 3,
        Conditions(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1)),
        schedule,
        lambda x, t, e: x[0] * float("nan"),
        rng,
    )
    with pytest.raises(NumericalError, match="step 1, tile at row 0"):
        list(loop)
