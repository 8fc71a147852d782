"""Tiles and masks against closed formulas."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tiler.diffusion.tiles import Text2ImageRegion, even_starts, mask_profile, plan_tiles, tiles_of_step
from tiler.errors import UsageError
from tiler.models.family import read_family
from tiler.plan.resolve import fill
from tiler.plan.tiling import plan_tiling
from tiler.request import Layout, Mask, Region, RenderRequest, ResolvedRequest, Wrap
from tiler.weights.checkpoint import resolve


def request(**values: Any) -> ResolvedRequest:
    return fill(RenderRequest(**({"prompt": "base", "width": 128, "height": 128, "seed": 0} | values)))


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


def steps_of(asked: ResolvedRequest, size: tuple[int, int]) -> list[tuple[Text2ImageRegion, ...]]:
    tiles = plan_tiles(asked, canvas=size, tile=(8, 8), overlap=2)
    return [tiles_of_step(tiles, asked, number) for number in range(asked.num_inference_steps)]


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
