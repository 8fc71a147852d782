"""The positions of tiles: the layouts of a canvas and a guide, and the tiles of each step. All positions are latent
pixels."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import overload

from tiler.decoding import FACTOR
from tiler.diffusion.masks import Border
from tiler.diffusion.tiles import Layer, Tiles
from tiler.errors import UsageError
from tiler.request import MAX_STEPS, Layout, Mask, Region, ResolvedRequest, Wrap
from tiler.request.wording import canvas_conditions

# Any number of their multiples, modulo 1, fill the unit square evenly (M. Roberts' R2 sequence, 2018).
_STRIDES = 0.7548776662466927, 0.5698402909980532


def latents_of(pixels: int, patch: int = 1) -> int:
    """The number of latents that cover this many pixels, rounded up to a multiple of `patch`."""
    return -(-pixels // (FACTOR * patch)) * patch


def region_span(region: Region, patch: int = 1) -> tuple[tuple[int, int], tuple[int, int]]:
    """The region's rows and columns, (first, last + 1) in latents. Edges are rounded like the sides of the canvas, so
    that regions that cover the picture also cover the canvas."""
    rows, cols = ((latents_of(first, patch), latents_of(last, patch)) for first, last in (region.rows, region.cols))
    return rows, cols


class Steps(Sequence[Tiles]):
    """The tiles of denoiser calls in the steps `numbers` of a request's schedule; `last`, if given, holds those of its
    last step."""

    def __init__(
        self, tiles: Tiles, request: ResolvedRequest, numbers: Sequence[int], last: Tiles | None = None
    ) -> None:
        self._tiles, self._request, self._numbers = tiles, request, numbers
        self._last = last

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Tiles: ...
    @overload
    def __getitem__(self, index: slice) -> Steps: ...
    def __getitem__(self, index: int | slice) -> Tiles | Steps:
        if isinstance(index, slice):
            return Steps(self._tiles, self._request, self._numbers[index], self._last)
        number = self._numbers[index]
        if self._last is not None and number == self._request.num_inference_steps - 1:
            # No later step hides the tile borders of the last one: there tiles overlap in every layout.
            return tiles_of_step(self._last, replace(self._request, layout=Layout.GRID), number)
        return tiles_of_step(self._tiles, self._request, number)

    @property
    def samples(self) -> int:
        """The number of denoiser samples in all steps."""
        return sum(step.samples for step in self)


def even_starts(length: int, tile: int, overlap: int, wraps: bool = False) -> list[int]:
    """The start positions of the fewest evenly spaced tiles that cover `length` with at least `overlap` between
    neighbours. On an axis that `wraps`, the last tile and the first are neighbours."""
    if wraps:
        count = math.ceil(length / (tile - overlap))
        return [round(i * length / count) for i in range(count)]
    if length == tile:
        return [0]
    count = math.ceil((length - tile) / (tile - overlap)) + 1
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def jittered_starts(last: int, count: int, share: float, patch: int = 1) -> tuple[int, ...]:
    """The start positions of `count` tiles along an axis that does not wrap: one at 0, one at `last`, and the others
    between them, spaced as in a grid with one tile less and moved by `share` of that spacing, 0–1. All are multiples of
    `patch`."""
    pitch = last / patch / (count - 2)
    # Halves always go up: Python's round would send neighbours to the even side, one up and the next one down.
    return (0, *(patch * math.floor((share + k) * pitch + 0.5) for k in range(count - 2)), last)


def plan_tiles(
    request: ResolvedRequest, *, canvas: tuple[int, int], tile: tuple[int, int], overlap: int, patch: int = 1
) -> Tiles:
    """Plan every tile of the canvas with its normalised mask, in the order in which they are computed.

    `canvas` and `tile` are (height, width), `overlap` is the least overlap (of GRID), all in latent pixels and
    multiples of `patch`. Tiles also start at multiples of `patch`, so that all tiles share a transformer's patches.
    Condition 0 is the top-level prompt if there is one; the regions follow. Inside a region, the top-level prompt acts
    only within `overlap` of the region's border, fading inwards: it covers the rest of the canvas. Raises UsageError
    for regions that are too small or leave a hole.
    """
    if overlap >= min(tile):
        raise UsageError(f"--overlap {FACTOR * overlap} must be smaller than a tile ({FACTOR * min(tile)} pixels)")
    layers: list[Layer] = []
    prompts = [len(condition.prompts) for condition in canvas_conditions(request)]
    spans = [region_span(r, patch) for r in request.regions]
    borders = tuple(
        (_border(*rows, canvas[0], request.wrap.axes[0]), _border(*cols, canvas[1], request.wrap.axes[1]))
        for rows, cols in spans
    )
    if request.prompt is not None:
        spacing = (0, Wrap.XY) if request.layout is Layout.SHIFT else (overlap, request.wrap)
        rows, cols = _grid(canvas, tile, *spacing, patch=patch)
        if request.layout is Layout.JITTER:
            rows, cols = (
                starts if wraps or len(starts) == 1 else jittered_starts(starts[-1], len(starts) + 1, 0.5, patch)
                for starts, wraps in zip((rows, cols), request.wrap.axes, strict=True)
            )
        base = Layer(
            rows=rows, cols=cols, condition=0, guidance_scale=request.guidance_scale, kind=request.mask,
            fades=bool(borders), prompts=prompts[0],
        )  # fmt: skip
        layers.append(_speaking(base, Tiles(canvas=canvas, tile=tile, layers=(base,), borders=borders, ramp=overlap)))
    for number, (region, (rows, cols)) in enumerate(zip(request.regions, spans, strict=True), len(layers)):
        height, width = rows[1] - rows[0], cols[1] - cols[0]
        if height < tile[0] or width < tile[1]:
            raise UsageError(
                f"region {region.prompt!r} is {FACTOR * width}×{FACTOR * height} pixels, smaller than a tile of this model "
                f"({FACTOR * tile[1]}×{FACTOR * tile[0]}); enlarge it"
            )
        down, across = _grid((height, width), tile, overlap, patch=patch)
        layers.append(
            Layer(
                rows=tuple(rows[0] + top for top in down),
                cols=tuple(cols[0] + left for left in across),
                condition=number,
                guidance_scale=request.guidance_scale if region.guidance_scale is None else region.guidance_scale,
                kind=region.mask or request.mask,
                weight=region.mask_weight,
                prompts=prompts[number],
            )
        )
    if request.prompt is None:
        _check_cover(spans, canvas)
    return Tiles(canvas=canvas, tile=tile, layers=tuple(layers), borders=borders, ramp=overlap, patch=patch)


def guide_tiles(size: tuple[int, int], wrap: Wrap, guidance_scale: float, patch: int = 1, prompts: int = 1) -> Tiles:
    """The tiles of the guide's canvas of `size` (height, width) under the first prompt, which joins `prompts` prompts:
    one tile of that size. Along an axis that wraps there are two, shifted by half a picture, so that each hides the
    other's border."""
    kind = Mask.CONSTANT if wrap is Wrap.NONE else Mask.GAUSSIAN
    rows, cols = _grid(size, size, min(size) // 4 // patch * patch, wrap, patch)
    layer = Layer(rows=rows, cols=cols, condition=0, guidance_scale=guidance_scale, kind=kind, prompts=prompts)
    return Tiles(canvas=size, tile=size, layers=(layer,), patch=patch)


def tiles_of_step(tiles: Tiles, request: ResolvedRequest, number: int) -> Tiles:
    """The tiles of step `number` of the schedule, from 0.

    Outside the request's guidance interval the tiles have no guidance (Kynkäänniemi et al. 2024, arXiv:2404.07724), if
    guidance takes an unconditional half. In the layout SHIFT they are moved around the canvas by an offset drawn from
    seed and number (Frolov et al. 2024, arXiv:2407.15507); an axis with a single tile does not move. In the layout
    JITTER they lie between the tiles of the grid, by shares that are spread evenly over the steps.
    """
    low, high = request.guidance_interval
    down = across = 0
    if request.layout is Layout.SHIFT:
        height, width = tiles.canvas
        rng = random.Random(request.seed * MAX_STEPS + number)
        down, across = (tiles.patch * rng.randrange(side // tiles.patch) for side in (height, width))
        down, across = down if tiles.tile[0] < height else 0, across if tiles.tile[1] < width else 0
    if request.layout is Layout.JITTER:
        tiles, (down, across) = _jittered(tiles, request.wrap, number)
    return replace(tiles, shift=(down, across), guided=low <= number / request.num_inference_steps < high)


def _jittered(tiles: Tiles, wrap: Wrap, number: int) -> tuple[Tiles, tuple[int, int]]:
    """The tiles of the layout JITTER at step `number`, and the distances by which axes that wrap are moved around the
    canvas."""
    base, places, shift = tiles.layers[0], [], []
    for starts, wraps, stride in zip((base.rows, base.cols), wrap.axes, _STRIDES, strict=True):
        share, count = (0.5 + stride * number) % 1, len(starts)
        places.append(starts if wraps or count == 1 else jittered_starts(starts[-1], count, share, tiles.patch))
        shift.append(tiles.patch * round(share * starts[1] / tiles.patch) if wraps and count > 1 else 0)
    moved = replace(base, rows=places[0], cols=places[1])
    return replace(tiles, layers=(moved, *tiles.layers[1:])), (shift[0], shift[1])


def _grid(
    canvas: tuple[int, int], tile: tuple[int, int], overlap: int, wrap: Wrap = Wrap.NONE, patch: int = 1
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The start positions of tiles along both axes."""
    rows, cols = (
        tuple(patch * n for n in even_starts(canvas[i] // patch, tile[i] // patch, overlap // patch, wrap.axes[i]))
        for i in (0, 1)
    )
    return rows, cols


def _border(first: int, last: int, length: int, wraps: bool) -> Border:
    """Clip a region to the canvas: an edge of the canvas that does not wrap is not a border of the region."""
    parted = wraps and last - first < length
    return Border(first, last, first > 0 or parted, last < length or parted)


def _speaking(base: Layer, tiles: Tiles) -> Layer:
    """The numbers of the top-level prompt's tiles, without those that lie entirely inside regions."""
    if not tiles.borders:
        return base
    speaks = [bool((tiles.rest(*base.place(n)) > 0).any()) for n in range(len(base))]
    return base if all(speaks) else replace(base, present=tuple(n for n, heard in enumerate(speaks) if heard))


def _check_cover(spans: Sequence[tuple[tuple[int, int], tuple[int, int]]], canvas: tuple[int, int]) -> None:
    """Raise UsageError if no region covers some part of the canvas."""
    edges = [sorted({0, canvas[axis], *(end for span in spans for end in span[axis])}) for axis in (0, 1)]
    for top, _ in pairwise(edges[0]):
        for left, _ in pairwise(edges[1]):
            if not any(r[0] <= top < r[1] and c[0] <= left < c[1] for r, c in spans):
                raise UsageError(
                    f"no region covers the canvas at row {FACTOR * top}, column {FACTOR * left}; add a top-level prompt or "
                    "another region"
                )
