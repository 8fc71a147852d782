"""Tiles and masks against closed formulas."""

from __future__ import annotations

import gc
import math
import tracemalloc
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tiler.diffusion.layouts import even_starts, plan_tiles, tiles_of_step
from tiler.diffusion.masks import MASKS_KEPT, mask_profile
from tiler.diffusion.tiles import Tiles
from tiler.errors import UsageError
from tiler.models.family import read_family
from tiler.planning.resolve import fill
from tiler.planning.tiling import plan_tiling
from tiler.request import Layout, Mask, Region, RenderRequest, ResolvedRequest, Wrap
from tiler.weights.checkpoint import resolve


def request(**values: Any) -> ResolvedRequest:
    return fill(
        RenderRequest(
            **({"seed": 0} | {"prompt": "base", "output": Path("x.png"), "width": 128, "height": 128} | values)
        )
    )


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
    height=st.integers(8, 44), width=st.integers(8, 44), tile=st.tuples(st.integers(5, 8), st.integers(5, 8)), overlap=st.integers(0, 4),
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


def test_without_an_unconditional_half_the_scale_is_the_same_at_every_step() -> None:
    """An embedded guidance scale is an input: a tile is one sample, inside and outside the guidance interval."""
    asked = request(guidance_scale=3.5, guidance_interval=(0.0, 0.5), num_inference_steps=4)
    tiles = plan_tiles(asked, canvas=(16, 16), tile=(8, 8), overlap=2)
    for unconditional, samples, scales in ((True, [2, 2, 1, 1], [3.5, 3.5, 1, 1]), (False, [1] * 4, [3.5] * 4)):
        steps = [tiles_of_step(replace(tiles, unconditional=unconditional), asked, number) for number in range(4)]
        assert [step[0].samples for step in steps] == samples
        assert [step[0].guidance_scale for step in steps] == scales
        assert [step.samples for step in steps] == [n * len(tiles) for n in samples]
        assert [step.samples_of(2) for step in steps] == [2 * n for n in samples]
        assert steps[0].sample_numbers() == [n for n in range(len(tiles)) for _ in range(samples[0])]


def whole_canvas(asked: ResolvedRequest, canvas: tuple[int, int], tile: tuple[int, int], tiles: Tiles) -> list[Tensor]:
    """Every tile's normalised mask, computed from one table as large as the canvas, in float64."""
    total, masks = torch.zeros(canvas, dtype=torch.float64), []
    rest = torch.ones(canvas, dtype=torch.float64)
    rows, cols = torch.arange(canvas[0]), torch.arange(canvas[1])
    for region in asked.regions:
        depth = []
        for at, span, length, wraps in zip(
            (rows, cols), (region.rows, region.cols), canvas, asked.wrap.axes, strict=True
        ):
            first, last = span[0] // 8, span[1] // 8
            ends = wraps and last - first < length
            low = at - first + 1.0 if first > 0 or ends else torch.full((length,), 1e9)
            high = last - at - 0.0 if last < length or ends else torch.full((length,), 1e9)
            depth.append(torch.minimum(low, high).double().masked_fill((at < first) | (at >= last), 0))
        inside = torch.minimum(depth[0][:, None], depth[1][None])
        rest = torch.minimum(rest, (1 - inside / (tiles.ramp + 1)).clamp_min(0))
    for placed in tiles:
        of_base = asked.prompt is not None and placed.condition == 0
        region = None if of_base else asked.regions[placed.condition - (asked.prompt is not None)]
        kind = asked.mask if region is None else region.mask or asked.mask
        mask = torch.outer(mask_profile(kind, tile[0]), mask_profile(kind, tile[1]))
        mask = mask * (1.0 if region is None else region.mask_weight)
        masks.append(mask * rest[placed.crop] if region is None else mask)
        total[placed.crop] += masks[-1]
    return [(mask / total[placed.crop]).float() for mask, placed in zip(masks, tiles, strict=True)]


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(8, 44), st.integers(8, 44)), tile=st.tuples(st.integers(5, 8), st.integers(5, 8)),
    overlap=st.integers(0, 4), mask=st.sampled_from(list(Mask)), wrap=st.sampled_from(list(Wrap)),
    layout=st.sampled_from(list(Layout)), with_region=st.booleans(), with_base=st.booleans(),
)  # fmt: skip
def test_masks_made_tile_by_tile_are_those_of_the_whole_canvas(
    size: tuple[int, int], tile: tuple[int, int], overlap: int, mask: Mask, wrap: Wrap, layout: Layout, with_region: bool, with_base: bool
) -> None:  # fmt: skip
    height, width = size
    regions: tuple[Region, ...] = ()
    if with_region:
        regions = (Region(prompt="r", rows=(0, 8 * height), cols=(0, 64), mask=Mask.QUARTIC, mask_weight=3.0),)
    if not with_base:
        regions = (*regions, Region(prompt="all", rows=(0, 8 * height), cols=(0, 8 * width)))
    layout = Layout.GRID if regions else layout
    asked = request(
        prompt="base" if with_base else None, width=8 * width, height=8 * height, mask=mask, wrap=wrap, regions=regions,
        layout=layout,
    )  # fmt: skip
    tiles = plan_tiles(asked, canvas=size, tile=tile, overlap=overlap)
    for placed, want in zip(tiles, whole_canvas(asked, size, tile, tiles), strict=True):
        assert torch.equal(placed.weights, want)


def tensors_alive() -> int:
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


@pytest.mark.parametrize("layout", list(Layout))
def test_a_canvas_of_32768_pixels_has_no_table_for_each_tile(layout: Layout) -> None:
    """7,225 tiles per step are planned and counted without a tensor, and denoised with a few for each kind of
    neighbourhood."""
    family = read_family(resolve("mini"))
    asked = request(width=32768, height=32768, num_inference_steps=50, layout=layout, guidance_interval=(0.0, 0.6))
    before = tensors_alive()
    tracemalloc.start()
    cut = plan_tiling(asked, family)
    counted = cut.canvas_samples
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()
    assert tensors_alive() == before
    first, last = cut.canvas_steps[0], cut.canvas_steps[-1]
    per_side = math.ceil((4096 - family.native) / (family.native * 3 // 4)) + 1
    assert len(last) == (per_side + (layout is Layout.JITTER)) ** 2
    guided = sum(n / 50 < 0.6 for n in range(cut.begin, 50))
    assert counted == len(first) * (25 - 1 + guided) + len(last)
    for number in (*range(0, len(first), 97), len(first) - 1):
        assert first[number].weights.shape == (family.native, family.native)
    for placed in last[:300]:
        assert placed.weights.shape == (family.native, family.native)
    assert tensors_alive() - before <= MASKS_KEPT


def test_samples_are_counted_without_making_tiles() -> None:
    left, right = (
        Region(prompt=p, rows=(0, 128), cols=c, guidance_scale=g)
        for p, c, g in (("l", (0, 96), 1.0), ("r", (64, 160), 5.0))
    )
    tiles = plan_tiles(
        request(prompt=None, width=160, height=128, regions=(left, right)), canvas=(16, 20), tile=(8, 8), overlap=2
    )
    each = [tile.samples for tile in tiles]
    assert tiles.samples == sum(each)
    assert [tiles.samples_of(n) for n in range(len(tiles) + 1)] == [sum(each[:n]) for n in range(len(tiles) + 1)]
    assert tiles.sample_numbers() == [number for number, samples in enumerate(each) for _ in range(samples)]
    assert sum(samples * count for samples, count in tiles.counts()) == sum(each)


def test_the_top_level_prompt_leaves_a_region_to_itself() -> None:
    """Deep inside a region only its own prompt acts; the top-level prompt fades in at its border."""
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
    for weight in (1e300, 0.0, -1.0, math.nan, math.inf):
        with pytest.raises(UsageError, match="mask_weight"):
            Region(prompt="heavy", rows=(0, 128), cols=(0, 128), mask_weight=weight)
    for rows in ((64, 0), (0, 0), (-8, 64), (0, 63)):
        with pytest.raises(UsageError):
            Region(prompt="r", rows=rows, cols=(0, 64))


def steps_of(asked: ResolvedRequest, size: tuple[int, int], patch: int = 1) -> list[Tiles]:
    tiles = plan_tiles(asked, canvas=size, tile=(8, 8), overlap=2, patch=patch)
    return [tiles_of_step(tiles, asked, number) for number in range(asked.num_inference_steps)]


@settings(max_examples=40, deadline=None)
@example(size=(2, 13), overlap=1, patch=1, wrap=Wrap.NONE)  # positions between two latents
@given(
    size=st.tuples(st.integers(2, 15), st.integers(2, 15)), overlap=st.integers(0, 2), patch=st.sampled_from([1, 2]),
    wrap=st.sampled_from(list(Wrap)),
)  # fmt: skip
def test_jittered_tiles_overlap_as_a_grids_and_never_reach_beyond_the_canvas(
    size: tuple[int, int], overlap: int, patch: int, wrap: Wrap
) -> None:
    """Sides are in patches; a tile has four. At every step there is one tile more along an axis than in a grid."""
    height, width = (4 * patch * max(1, side // 4) if side < 4 else patch * side for side in size)
    canvas, tile = (height, width), (4 * patch, 4 * patch)
    asked = request(width=8 * width, height=8 * height, num_inference_steps=7, layout=Layout.JITTER, wrap=wrap)
    tiles = plan_tiles(asked, canvas=canvas, tile=tile, overlap=overlap * patch, patch=patch)
    for number in range(7):
        step = tiles_of_step(tiles, asked, number)
        assert len(step) == len(tiles)
        total = torch.zeros(canvas, dtype=torch.float64)
        for axis, wraps in enumerate(wrap.axes):
            starts = sorted({(t.top, t.left)[axis] for t in step})
            assert all(start % patch == 0 for start in starts)
            if not wraps:
                assert starts[0] == 0 and starts[-1] == canvas[axis] - tile[axis]
                assert all(b - a <= tile[axis] - overlap * patch for a, b in pairwise(starts))
        for placed in step:
            total[placed.crop] += placed.weights.double()
        assert (total - 1).abs().max() <= 1e-6


def test_jittered_borders_lie_elsewhere_at_every_step() -> None:
    asked = request(width=2048, height=2048, num_inference_steps=7, layout=Layout.JITTER)
    steps = [{t.left for t in tiles_of_step(plan_tiles(asked, canvas=(256, 256), tile=(32, 32), overlap=8), asked, n)}
             for n in range(7)]  # fmt: skip
    inner = [start for step in steps for start in step if 0 < start < 224]
    assert len(inner) == 7 * 10
    assert max(inner.count(start) for start in inner) <= 2
    assert max(b - a for a, b in pairwise(sorted({0, *inner, 224}))) <= 8


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
    """Otherwise the borders of its tiles would stay in the picture."""
    family, size = read_family(resolve("mini")), {"width": 512, "height": 512}
    shifted, grid = (
        plan_tiling(request(layout=each, **size), family).canvas_steps for each in (Layout.SHIFT, Layout.GRID)
    )
    assert [len(step) for step in shifted[:-1]] == [4] * (len(grid) - 1)
    assert len(grid[-1]) == 9
    for a, b in zip(shifted[-1], grid[-1], strict=True):
        assert (a.top, a.left, a.guidance_scale) == (b.top, b.left, b.guidance_scale)
        assert torch.equal(a.weights, b.weights)


@settings(deadline=None, max_examples=60)
@given(
    sides=st.tuples(st.integers(128, 420), st.integers(128, 420)), layout=st.sampled_from(Layout),
    region=st.none() | st.tuples(st.integers(0, 6), st.integers(0, 6)), guide=st.booleans(), overlap=st.none() | st.integers(0, 9),
    wrap=st.sampled_from(Wrap),
)  # fmt: skip
def test_tiles_of_a_transformer_begin_at_whole_patches(
    sides: tuple[int, int], layout: Layout, region: tuple[int, int] | None, guide: bool, overlap: int | None, wrap: Wrap
) -> None:
    """With patches of 2 × 2 latents, the patches of all tiles coincide, and every canvas is covered once."""
    mini = read_family(resolve("mini"))
    family = replace(mini, traits=mini.traits._replace(native=16, granularity=2, patch=2))
    height, width = (side // 16 * 16 if wraps else side for side, wraps in zip(sides, wrap.axes, strict=True))
    regions, layout = (), Layout.GRID if region or overlap is not None else layout
    if region is not None:
        top, left = (8 * n for n in region)
        rows, cols = (top, min(top + 144, height // 8 * 8)), (left, min(left + 144, width // 8 * 8))
        if min(rows[1] - rows[0], cols[1] - cols[0]) < 136:
            return
        regions = (Region(prompt="r", rows=rows, cols=cols),)
    asked = request(
        width=width, height=height, layout=layout, regions=regions, guide=guide, wrap=wrap, num_inference_steps=3,
        overlap=None if overlap is None else 8 * overlap,
    )  # fmt: skip
    cut = plan_tiling(asked, family)
    assert cut.canvas == tuple(-(-side // 16) * 2 for side in (height, width))
    for step in (*cut.canvas_steps, *cut.guide_steps[:1]):
        total = torch.zeros(step.canvas)
        for tile in step:
            assert tile.top % 2 == tile.left % 2 == tile.height % 2 == tile.width % 2 == 0
            total[tile.crop] += tile.weights
        assert torch.allclose(total, torch.ones(step.canvas), atol=1e-5)


@pytest.mark.parametrize(
    ("width", "height", "canvas", "tile", "crop"),
    [
        (320, 320, (40, 40), (40, 40), (0, 0)),
        (512, 512, (64, 64), (64, 64), (0, 0)),
        (800, 480, (64, 100), (64, 64), (16, 0)),
        (800, 320, (40, 100), (40, 64), (0, 0)),
        (640, 384, (48, 80), (48, 80), (0, 0)),  # as 1360×768 is to a model of 1024 px
        (630, 380, (48, 80), (48, 80), (0, 5)),
        (704, 384, (48, 88), (48, 64), (0, 0)),
        (300, 800, (100, 40), (64, 40), (0, 10)),
        (100, 2048, (256, 32), (64, 32), (0, 78)),
    ],
)
def test_a_side_or_a_picture_below_the_native_one_is_one_tile(
    width: int, height: int, canvas: tuple[int, int], tile: tuple[int, int], crop: tuple[int, int]
) -> None:
    mini = read_family(resolve("mini"))
    family = replace(mini, traits=mini.traits._replace(native=64, granularity=8))
    cut = plan_tiling(request(width=width, height=height), family)
    assert (cut.canvas, cut.regions.tile, cut.crop) == (canvas, tile, crop)
    assert (cut.guide is None) == (canvas == tile)
    if cut.guide is not None:
        assert cut.guide.height * cut.guide.width <= 64 * 64 * 1.3


def test_regions_need_a_side_that_one_tile_fills() -> None:
    mini = read_family(resolve("mini"))
    family = replace(mini, traits=mini.traits._replace(native=64, granularity=8))
    region = Region(prompt="r", rows=(0, 800), cols=(0, 320))
    assert len(plan_tiling(request(width=320, height=800, prompt=None, regions=(region,)), family).regions) == 2
    with pytest.raises(UsageError, match="300 pixels; take 320"):
        plan_tiling(request(width=300, height=800, regions=(replace(region, cols=(0, 296)),)), family)
