"""Tiles, the layers of tiles on a canvas, and the guidance of each tile, in latent pixels.

Tiles are created on demand, without a table: a canvas of 32,768 pixels has 7,225 of them at each step.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from tiler.diffusion.masks import Border, Neighbours, normalised, offsets, rest_of_canvas
from tiler.request import Mask


class Whole(NamedTuple):
    """The larger canvas that a canvas is a part of: the part's position in it, and its height and width."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Text2ImageRegion:
    """One tile of the canvas under one prompt.

    `condition` is the index of the encoded (prompt, negative prompt) pair. `weights` is the normalised mask m_r / Σ
    m_r, (tile height, tile width) fp32; over all tiles the weights sum to 1 at every canvas pixel. Tiles share it, so
    it must not be modified. A tile that extends beyond the border continues at the opposite side of `canvas`, (height,
    width). If the canvas is a part of a `whole`, the model receives the tile's position in the whole.
    """

    top: int
    left: int
    height: int
    width: int
    condition: int
    guidance_scale: float
    weights: Tensor
    canvas: tuple[int, int]
    unconditional: bool = True
    prompts: int = 1
    whole: Whole | None = None

    @property
    def samples(self) -> int:
        """Denoiser samples per step: one for each of the joined `prompts`, plus an unconditional one, unless guidance
        is off or the family embeds it."""
        return _samples(self.guidance_scale, self.unconditional, self.prompts)

    @property
    def crop(self) -> tuple[Tensor, Tensor]:
        """Indexes for the last two dimensions of a canvas."""
        rows, cols = _crop(self.top, self.left, (self.height, self.width), self.canvas)
        return rows[:, None], cols

    @property
    def place(self) -> Whole:
        """The tile's first row and column in the complete picture, and that picture's height and width."""
        top, left, height, width = self.whole or Whole(0, 0, *self.canvas)
        return Whole(top + self.top % self.canvas[0], left + self.left % self.canvas[1], height, width)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """The tiles of one prompt, at every combination of `rows` and `cols`; with `present`, only the tiles with these
    numbers exist."""

    rows: tuple[int, ...]
    cols: tuple[int, ...]
    condition: int
    guidance_scale: float
    kind: Mask
    weight: float = 1.0
    fades: bool = False
    present: tuple[int, ...] | None = None
    prompts: int = 1

    def __len__(self) -> int:
        return len(self.rows) * len(self.cols) if self.present is None else len(self.present)

    def place(self, number: int) -> tuple[int, int]:
        """The (top, left) of a tile."""
        row, col = divmod(number if self.present is None else self.present[number], len(self.cols))
        return self.rows[row], self.cols[col]


@dataclass(frozen=True, kw_only=True, eq=False)
class Tiles(Sequence[Text2ImageRegion]):
    """Every tile of a canvas at one step, in the order in which they are computed; each is created when it is accessed.
    `tile` and `canvas` are (height, width); `shift` moves all tiles down and to the right around the canvas. All
    positions are multiples of `patch`. `unconditional` says whether guidance takes a second sample: otherwise the scale
    is an input of the model, the same at every step."""

    canvas: tuple[int, int]
    tile: tuple[int, int]
    layers: tuple[Layer, ...]
    borders: tuple[tuple[Border, Border], ...] = ()
    ramp: int = 0
    shift: tuple[int, int] = (0, 0)
    patch: int = 1
    guided: bool = True
    unconditional: bool = True
    whole: Whole | None = None

    def __len__(self) -> int:
        return sum(map(len, self.layers))

    @overload
    def __getitem__(self, index: int) -> Text2ImageRegion: ...
    @overload
    def __getitem__(self, index: slice) -> list[Text2ImageRegion]: ...
    def __getitem__(self, index: int | slice) -> Text2ImageRegion | list[Text2ImageRegion]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        ends = list(accumulate(map(len, self.layers)))
        number = range(len(self))[index]  # raises IndexError
        which = bisect_right(ends, number)
        layer = self.layers[which]
        top, left = layer.place(number - (ends[which] - len(layer)))
        return Text2ImageRegion(
            top=top + self.shift[0],
            left=left + self.shift[1],
            height=self.tile[0],
            width=self.tile[1],
            canvas=self.canvas,
            condition=layer.condition,
            guidance_scale=self._scale(layer),
            weights=self._weights(layer, top, left),
            unconditional=self.unconditional,
            prompts=layer.prompts,
            whole=self.whole,
        )

    def over(self, cells: np.ndarray, whole: Whole) -> Tiles:
        """Select the tiles that cover at least one of the set `cells`, (height, width) bool of the canvas; the canvas
        is a part of `whole`. Masks are normalised over all tiles, so they sum to 1 wherever cells are set."""
        layers = []
        for layer in self.layers:
            tops_and_lefts = (layer.place(number) for number in range(len(layer)))
            under = [cells[top : top + self.tile[0], left : left + self.tile[1]].any() for top, left in tops_and_lefts]
            layers.append(replace(layer, present=tuple(n for n, marked in enumerate(under) if marked)))
        return replace(self, layers=tuple(layers), whole=whole)

    def reaching(self, first: int, last: int) -> Iterator[int]:
        """The numbers of the tiles that reach into the rows [first, last) of the canvas, in order. Creates no tile."""
        before, (height, side) = 0, (self.canvas[0], self.tile[0])
        for layer in self.layers:
            across, numbers = len(layer.cols), layer.present
            for row, start in enumerate(layer.rows):
                top = start + self.shift[0]
                if (first - top) % height < side or (top - first) % height < last - first:
                    low, high = row * across, (row + 1) * across
                    if numbers is not None:
                        low, high = bisect_left(numbers, low), bisect_left(numbers, high)
                    yield from range(before + low, before + high)
            before += len(layer)

    @property
    def samples(self) -> int:
        """The number of denoiser samples of all tiles. Creates no tile."""
        return sum(tiles * samples for samples, tiles in self.counts())

    def samples_of(self, first: int) -> int:
        """The number of denoiser samples of the `first` tiles. Creates no tile."""
        ends = accumulate(map(len, self.layers), initial=0)
        before = (min(len(layer), max(0, first - end)) for layer, end in zip(self.layers, ends, strict=False))
        return sum(n * self._samples(layer) for layer, n in zip(self.layers, before, strict=True))

    def counts(self) -> list[tuple[int, int]]:
        """(samples per tile, number of such tiles) for each prompt, in order."""
        return [(self._samples(layer), len(layer)) for layer in self.layers]

    def sample_numbers(self) -> list[int]:
        """The number of the tile of each sample, in order."""
        per_tile = (samples for samples, tiles in self.counts() for _ in range(tiles))
        return [number for number, samples in enumerate(per_tile) for _ in range(samples)]

    def _scale(self, layer: Layer) -> float:
        return layer.guidance_scale if self.guided or not self.unconditional else 1.0

    def _samples(self, layer: Layer) -> int:
        return _samples(self._scale(layer), self.unconditional, layer.prompts)

    def _weights(self, layer: Layer, top: int, left: int) -> Tensor:
        neighbours = tuple(
            Neighbours(
                offsets(other.rows, top, self.tile[0], self.canvas[0]),
                offsets(other.cols, left, self.tile[1], self.canvas[1]),
                other.kind,
                other.weight,
                other.fades,
            )
            for other in self.layers
        )
        neighbours = tuple(n for n in neighbours if n.downs and n.acrosses)
        rest = self.rest(top, left) if any(n.fades for n in neighbours) else None
        return normalised((layer.kind, layer.weight, layer.fades), neighbours, self.tile, rest)

    def rest(self, top: int, left: int) -> Tensor:
        """The share of the top-level prompt at each latent of a tile."""
        return rest_of_canvas(self.borders, *_crop(top, left, self.tile, self.canvas), self.ramp)


def samples_before(steps: Sequence[Tiles], done: int, tiles: int) -> int:
    """The number of denoiser samples of the first `done` steps and of the first `tiles` tiles of the step after
    them."""
    now = steps[done].samples_of(tiles) if tiles else 0
    return sum(each.samples for each in steps[:done]) + now


def _samples(guidance_scale: float, unconditional: bool, prompts: int) -> int:
    return prompts + (1 if guidance_scale > 1 and unconditional else 0)


def _crop(top: int, left: int, tile: tuple[int, int], canvas: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The rows (h,) and columns (w,) of the canvas that a tile covers."""
    return torch.arange(top, top + tile[0]) % canvas[0], torch.arange(left, left + tile[1]) % canvas[1]
