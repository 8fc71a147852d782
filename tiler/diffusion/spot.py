"""Repaint a spot of a picture: the part of the canvas that takes part, the cells in it that change, and the way in
which the result is put back into the picture.

Outside the mask, the latents of every step are those of the picture with that step's noise (Lugmayr et al. 2022,
arXiv:2201.09865, equation 8), so that the painted part fits its surroundings. In pixels the mask fades inwards, so that
no pixel outside it changes.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tiler.decoding import FACTOR
from tiler.diffusion.calls import Calls
from tiler.diffusion.poster import Poster
from tiler.diffusion.schedulers import DiffusersSchedule, SchedulerState

_FADE = 2.5  # latents, over which the repainted part fades in inside the mask
_DEEP = 3  # latents up to which the distance to the mask's border is measured


@dataclass(frozen=True, kw_only=True, eq=False)
class Spot:
    """The box of the canvas that contains every tile under the mask, in latents; `cells` (height, width) bool are the
    latents under the mask. `whole` is the size of the complete canvas, (height, width); `crop` is the number of its
    pixels above and left of the picture."""

    top: int
    left: int
    height: int
    width: int
    cells: np.ndarray
    whole: tuple[int, int]
    crop: tuple[int, int]

    @property
    def box(self) -> tuple[int, int, int, int]:
        """The first row, first column, height and width of the box, in pixels of the picture; it may extend beyond the
        picture."""
        down, across = self.crop
        return FACTOR * self.top - down, FACTOR * self.left - across, FACTOR * self.height, FACTOR * self.width


def find_spot(cells: np.ndarray, tile: tuple[int, int], patch: int, crop: tuple[int, int] = (0, 0)) -> Spot:
    """The box around `cells`, (h, w) bool of the complete canvas, that tiles of (height, width) latents fill. It
    includes some of the picture around the mask, and along an axis on which the mask is short it is as long as one
    tile."""
    begins, sides = [], []
    for axis in (0, 1):
        marked = np.flatnonzero(cells.any(axis=1 - axis))
        first, last, length = int(marked[0]), int(marked[-1]) + 1, cells.shape[axis]
        around = tile[axis] // 16 if last - first <= tile[axis] - tile[axis] // 8 else tile[axis] // 8
        side = min(length, max(tile[axis], -(-(last - first + 2 * around) // patch) * patch))
        begins.append(min(max(0, (first + last - side) // 2 // patch * patch), length - side))
        sides.append(side)
    (top, left), (height, width) = begins, sides
    inside = cells[top : top + height, left : left + width]
    return Spot(
        top=top, left=left, height=height, width=width, cells=inside, whole=(cells.shape[0], cells.shape[1]), crop=crop
    )


class AroundSpot:
    """A `Schedule` that resets the latents outside a spot's cells to those of the picture at every step."""

    def __init__(self, schedule: DiffusersSchedule, spot: Spot, reference: Tensor, noise: Tensor) -> None:
        """`reference` holds the picture's latents in the box, `noise` the noise that is added to them: (1, C, h, w)
        fp32."""
        self._schedule, self._reference, self._noise = schedule, reference, noise
        self._cells = torch.from_numpy(spot.cells)

    @property
    def calls(self) -> Calls:
        return self._schedule.calls

    @property
    def timesteps(self) -> Tensor:
        return self._schedule.timesteps

    def start(self, noise: Tensor, reference: Tensor | None, begin: int) -> Tensor:
        return self._schedule.start(noise, reference, begin)

    def model_input(self, latents: Tensor, step: int) -> Tensor:
        return self._schedule.model_input(latents, step)

    def step(self, noise_pred: Tensor, step: int, latents: Tensor, generator: torch.Generator) -> Tensor:
        after = self._schedule.step(noise_pred, step, latents, generator)
        return torch.where(self._cells, after, self._schedule.noised(self._reference, self._noise, step + 1))

    def state(self) -> SchedulerState:
        return self._schedule.state()

    def restore(self, state: SchedulerState) -> None:
        self._schedule.restore(state)


class BoxPixels:
    """The picture's pixels in a spot's box, as the autoencoder reads them; beyond the picture its border pixels are
    repeated."""

    def __init__(self, poster: Poster, spot: Spot) -> None:
        top, left, height, width = spot.box
        self._poster, self._top, self.shape = poster, top, (height, width, 3)
        self._columns = np.clip(np.arange(left, left + width), 0, poster.shape[1] - 1)

    def __getitem__(self, rows: slice) -> np.ndarray:
        """The rows as (n, W, 3) uint8."""
        first, last, _ = rows.indices(self.shape[0])
        wanted = np.clip(np.arange(first, last) + self._top, 0, self._poster.shape[0] - 1)
        return self._poster[wanted[0] : wanted[-1] + 1][wanted - wanted[0]][:, self._columns]


def opacity(cells: np.ndarray) -> np.ndarray:
    """The share of the new picture in each latent's pixels: (h, w) fp32, rising from the mask's border inwards; it
    rises faster if a spot is thin."""
    depth, inside = np.zeros(cells.shape, np.float32), cells
    for _ in range(_DEEP):
        depth += inside
        inside = ~_grown(~inside)
    deepest = depth
    for _ in range(_DEEP):
        deepest = _grown(deepest)
    shown = (depth - 0.5) / np.clip(deepest - 0.5, 0.5, _FADE)
    return np.where(cells, np.clip(shown, 0, 1), 0).astype(np.float32)


def _grown(values: np.ndarray) -> np.ndarray:
    """The largest of each value and its eight neighbours, (h, w)."""
    around = np.pad(values, 1, mode="edge")
    height, width = values.shape
    parts = [around[i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return np.maximum.reduce(parts)


def _between(field: np.ndarray, first: int, last: int) -> np.ndarray:
    """Rows [first, last) of pixels of a field (h, w), each value of which stands for FACTOR × FACTOR pixels, by
    bilinear interpolation: (n, FACTOR·w)."""

    def places(pixels: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        at = np.clip((pixels + 0.5) / FACTOR - 0.5, 0, length - 1)
        low = np.minimum(at.astype(int), max(0, length - 2))
        return low, np.minimum(low + 1, length - 1), (at - low).astype(np.float32)

    low, high, share = places(np.arange(first, last), field.shape[0])
    rows = field[low] + share[:, None] * (field[high] - field[low])
    low, high, share = places(np.arange(FACTOR * field.shape[1]), field.shape[1])
    result: np.ndarray = rows[:, low] + share * (rows[:, high] - rows[:, low])
    return result


def put_back(
    rows: Generator[np.ndarray], mask: Iterator[np.ndarray], poster: Poster, spot: Spot
) -> Generator[np.ndarray]:
    """Yield the complete picture in strips (n, W, 3) uint8, top first: `poster` with `rows`, the decoded box, under the
    `mask`."""
    top, left, box_height, box_width = spot.box
    height, width = poster.shape[:2]
    shown, seen = opacity(spot.cells), _Rows(mask)
    inside = slice(max(0, left), min(width, left + box_width))  # of the picture's columns
    begin = max(0, top)
    yield from _as_they_are(poster, 0, begin)
    seen.skip(begin)
    row = top
    with closing(rows):
        for strip in rows:
            first, last = max(row, 0), min(row + len(strip), height)
            if first < last:
                share = _between(shown, first - top, last - top)[:, inside.start - left : inside.stop - left]
                share = share * (seen.take(last - first)[:, inside].astype(np.float32) / 255)
                old = poster[first:last]
                new = strip[first - row : last - row, inside.start - left : inside.stop - left].astype(np.float32)
                now = old[:, inside].astype(np.float32)
                old[:, inside] = np.rint(now + share[..., None] * (new - now)).astype(np.uint8)
                yield old
            row += len(strip)
    yield from _as_they_are(poster, min(top + box_height, height), height)


def _as_they_are(poster: Poster, first: int, last: int) -> Iterator[np.ndarray]:
    step = max(1, 2**20 // poster.shape[1])
    return (poster[row : min(row + step, last)] for row in range(first, last, step))


class _Rows:
    """Rows that arrive in strips and are taken in any number."""

    def __init__(self, strips: Iterator[np.ndarray]) -> None:
        self._strips, self._rest = strips, next(strips)

    def skip(self, count: int) -> None:
        while count > len(self._rest):
            count -= len(self._rest)
            self._rest = next(self._strips)
        self._rest = self._rest[count:]

    def take(self, count: int) -> np.ndarray:
        """The next `count` rows, (count, W)."""
        while len(self._rest) < count:
            self._rest = np.concatenate([self._rest, next(self._strips)])
        taken, self._rest = self._rest[:count], self._rest[count:]
        return taken
