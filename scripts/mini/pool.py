"""The pool of drawings that training learns from: shards of whole scenes, and of crops of other scenes.

A shard is two files: `i000.npy`, pictures (2·part, H, W, 3) uint8; `m000.npz`, what they show. Its first half are whole
scenes, the second crops; every third shard has whole scenes of another shape only, since the guide of a banner has the
banner's shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi, sin
from pathlib import Path
from typing import NamedTuple

import art
import numpy as np
from art import THINGS, Disc, Scene, View

HELD_OUT = 10_000_000  # scenes from this seed on are for judging
HELD_OUT_SHARD = 900
SIDE = 256  # px
PLACE = 16  # px of a place of a layout, each way
_OTHER_SHAPES = ((160, 448), (320, 224), (224, 320), (192, 352), (352, 192))  # (H, W) px, of about SIDE² pixels
_CROP_SEEDS = 5_000_000
_CROP_SIDES = (0.5, 0.25, 0.25, 0.125, 0.125, 0.0625)  # of the picture's width
_EDGE_SIDES = (0.25, 0.125, 0.125)
_EDGES = 0.35  # share of a disc's scenes whose crop shows its edge
_PLAIN = 0.3  # share of crops that may be plain


class Notes(NamedTuple):
    """What the pictures of a shard show."""

    layout: np.ndarray  # (2·part, H/16, W/16) uint8: the index in THINGS at the middle of each place
    shares: np.ndarray  # (2·part, 9) fp32: the part of the picture that each of THINGS takes


@dataclass(frozen=True, kw_only=True)
class Pool:
    folder: Path
    part: int = 500  # whole scenes in a shard, and crops

    def shards(self) -> list[int]:
        """Those drawn for training."""
        return [k for p in sorted(self.folder.glob("i???.npy")) if (k := int(p.stem[1:])) < HELD_OUT_SHARD]

    def has(self, shard: int) -> bool:
        return self._path(shard).exists()

    def shape(self, shard: int) -> tuple[int, int]:
        """Height and width of its pictures, multiples of 32 px."""
        if shard % 3 == 2 and shard < HELD_OUT_SHARD:
            return _OTHER_SHAPES[shard // 3 % len(_OTHER_SHAPES)]
        return SIDE, SIDE

    def whole(self, shard: int) -> int:
        """How many of its pictures, from the first, are whole scenes."""
        return self.part if self.shape(shard) == (SIDE, SIDE) else 2 * self.part

    def scene(self, shard: int, i: int) -> Scene:
        """The scene of picture `i` of a shard: the second half shows other scenes than the first."""
        first = (HELD_OUT if shard >= HELD_OUT_SHARD else 0) + shard % HELD_OUT_SHARD * self.part
        height, width = self.shape(shard)
        return art.compose(first + i if i < self.part else _CROP_SEEDS + first + i - self.part, width / height)

    def pictures(self, shard: int) -> np.ndarray:
        return np.load(self._path(shard), mmap_mode="r")

    def notes(self, shard: int) -> Notes:
        kept = np.load(self.folder / f"m{shard:03d}.npz")
        return Notes(kept["layout"], kept["shares"])

    def draw(self, shard: int) -> bool:
        """Whether it had to be drawn."""
        path = self._path(shard)
        if self.has(shard):
            return False
        self.folder.mkdir(parents=True, exist_ok=True)
        rng, count = np.random.default_rng(1000 + shard), 2 * self.part
        height, width = self.shape(shard)
        pictures = np.empty((count, height, width, 3), np.uint8)
        layout = np.empty((count, height // PLACE, width // PLACE), np.uint8)
        shares = np.empty((count, len(THINGS)), np.float32)
        for i in range(count):
            scene = self.scene(shard, i)
            view = None if i < self.whole(shard) else choose_view(rng, scene)
            drawing = art.draw(scene, view, width, height)
            pictures[i] = drawing.pixels
            layout[i] = drawing.things[PLACE // 2 :: PLACE, PLACE // 2 :: PLACE]
            shares[i] = shares_of(drawing.things)
        np.savez(self.folder / f"m{shard:03d}.npz", layout=layout, shares=shares)
        temporary = path.with_suffix(".tmp.npy")
        np.save(temporary, pictures)
        temporary.rename(path)
        return True

    def _path(self, shard: int) -> Path:
        return self.folder / f"i{shard:03d}.npy"


def choose_view(rng: np.random.Generator, scene: Scene) -> View:
    """A square part of the scene: often a disc's edge, which tiles of a large canvas must go on with, and plain sky as
    often as tiles are plain, so that they learn to leave it so; else more than one flat colour."""
    if scene.discs and rng.random() < _EDGES:
        return _view_of_edge(rng, scene, scene.discs[0])
    plain = rng.random() < _PLAIN
    for _ in range(4):
        side = float(rng.choice(_CROP_SIDES)) * rng.uniform(0.85, 1.15)
        view = _view_at(scene, rng.uniform(0, scene.aspect), rng.uniform(0, 1), side)
        if plain or art.draw(scene, view, 24, 24).pixels.std(axis=(0, 1)).max() > 9:
            break
    return view


def _view_of_edge(rng: np.random.Generator, scene: Scene, disc: Disc) -> View:
    """Some point of the edge lies well inside."""
    side = float(rng.choice(_EDGE_SIDES)) * rng.uniform(0.85, 1.15)
    angle, (x, y) = rng.uniform(0, 2 * pi), rng.uniform(-0.3, 0.3, 2) * side
    return _view_at(scene, disc.x + disc.radius * cos(angle) + x, disc.y + disc.radius * sin(angle) + y, side)


def _view_at(scene: Scene, x: float, y: float, side: float) -> View:
    """The square around a point, moved into the scene."""
    x0 = min(max(x - side / 2, 0), scene.aspect - side)
    y0 = min(max(y - side / 2, 0), 1 - side)
    return View(x0=x0, y0=y0, x1=x0 + side, y1=y0 + side)


def shares_of(things: np.ndarray) -> np.ndarray:
    """(9,) the part that each of THINGS takes of a drawing's `things`."""
    return np.bincount(things.ravel(), minlength=len(THINGS)).astype(np.float32) / things.size
