"""The pool of drawings that training learns from: shards of whole scenes, and of crops of other scenes.

A shard is two files: `i000.npy`, pictures (2·part, 256, 256, 3) uint8, whole scenes first; `m000.npz`, what they show.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import art
import numpy as np
from art import THINGS, Scene, View

HELD_OUT = 10_000_000  # scenes from this seed on are for judging
HELD_OUT_SHARD = 900
SIDE = 256  # px
PLACES = SIDE // 16  # of a layout, each way
_CROP_SEEDS = 5_000_000
_CROP_SIDES = (0.5, 0.25, 0.25, 0.125, 0.125, 0.0625)  # of the picture's width


class Notes(NamedTuple):
    """What the pictures of a shard show."""

    layout: np.ndarray  # (2·part, 16, 16) uint8: the index in THINGS at the middle of each place
    shares: np.ndarray  # (2·part, 9) fp32: the part of the picture that each of THINGS takes


@dataclass(frozen=True, kw_only=True)
class Pool:
    folder: Path
    part: int = 500  # whole scenes in a shard, and crops

    def shards(self) -> list[int]:
        """Those drawn for training."""
        return [k for p in sorted(self.folder.glob("i???.npy")) if (k := int(p.stem[1:])) < HELD_OUT_SHARD]

    def scene(self, shard: int, i: int) -> Scene:
        """The scene of picture `i` of a shard: crops (from `part` on) are of other scenes than the whole ones."""
        first = (HELD_OUT if shard >= HELD_OUT_SHARD else 0) + shard % HELD_OUT_SHARD * self.part
        return art.compose(first + i if i < self.part else _CROP_SEEDS + first + i - self.part)

    def pictures(self, shard: int) -> np.ndarray:
        return np.load(self._path(shard), mmap_mode="r")

    def notes(self, shard: int) -> Notes:
        kept = np.load(self.folder / f"m{shard:03d}.npz")
        return Notes(kept["layout"], kept["shares"])

    def draw(self, shard: int) -> bool:
        """Whether it had to be drawn."""
        path = self._path(shard)
        if path.exists():
            return False
        self.folder.mkdir(parents=True, exist_ok=True)
        rng, count = np.random.default_rng(1000 + shard), 2 * self.part
        pictures = np.empty((count, SIDE, SIDE, 3), np.uint8)
        layout = np.empty((count, PLACES, PLACES), np.uint8)
        shares = np.empty((count, len(THINGS)), np.float32)
        for i in range(count):
            scene = self.scene(shard, i)
            drawing = art.draw(scene, None if i < self.part else choose_view(rng, scene), SIDE, SIDE)
            pictures[i] = drawing.pixels
            layout[i] = drawing.things[8::16, 8::16]
            shares[i] = shares_of(drawing.things)
        np.savez(self.folder / f"m{shard:03d}.npz", layout=layout, shares=shares)
        temporary = path.with_suffix(".tmp.npy")
        np.save(temporary, pictures)
        temporary.rename(path)
        return True

    def _path(self, shard: int) -> Path:
        return self.folder / f"i{shard:03d}.npy"


def choose_view(rng: np.random.Generator, scene: Scene) -> View:
    """A square part of the scene that is seldom one flat colour."""
    for _ in range(4):
        side = float(rng.choice(_CROP_SIDES)) * rng.uniform(0.85, 1.15)
        x, y = rng.uniform(0, scene.aspect - side), rng.uniform(0, 1 - side)
        view = View(x0=x, y0=y, x1=x + side, y1=y + side)
        if rng.random() < 0.15 or art.draw(scene, view, 24, 24).pixels.std(axis=(0, 1)).max() > 9:
            break
    return view


def shares_of(things: np.ndarray) -> np.ndarray:
    """(9,) the part that each of THINGS takes of a drawing's `things`."""
    return np.bincount(things.ravel(), minlength=len(THINGS)).astype(np.float32) / things.size
