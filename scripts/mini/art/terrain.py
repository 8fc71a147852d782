"""The layers of land of each terrain, far to near."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from art.scene import Front, Layer, Ridge, Terrain

_FRONT_BASE = {Terrain.LAKE: 1.06, Terrain.MESAS: 1.04}  # y of the foot of what grows in front; 1.03 elsewhere


def plan_layers(
    rng: np.random.Generator, terrain: Terrain, horizon: float, aspect: float, front: Front, snow: bool
) -> tuple[Layer, ...]:
    return tuple(_Planner(rng, horizon, aspect, snow).layers(terrain, front))


class _Planner:
    """Draws layers from one generator: `layer` draws a seed after everything else about a layer was drawn."""

    def __init__(self, rng: np.random.Generator, horizon: float, aspect: float, snow: bool) -> None:
        self.rng, self.horizon, self.aspect, self.snow = rng, horizon, aspect, snow

    def layers(self, terrain: Terrain, front: Front) -> Iterator[Layer]:
        yield from {
            Terrain.MOUNTAINS: self.mountains,
            Terrain.MISTY: self.misty_mountains,
            Terrain.VOLCANO: self.volcano,
            Terrain.LAKE: self.lake_shore,
            Terrain.SEA: self.far_rocks,
            Terrain.ISLANDS: self.islands,
            Terrain.HILLS: self.hills,
            Terrain.DUNES: self.dunes,
            Terrain.MESAS: self.mesas,
            Terrain.FOREST: self.forest,
            Terrain.CLOUDS: self.above_clouds,
        }[terrain]()
        yield from self.in_front(front, _FRONT_BASE.get(terrain, 1.03))

    def layer(self, ridge: Ridge, depth: float, base: float, height: float, frequency: float, **more: Any) -> Layer:
        seed = int(self.rng.integers(1 << 30))
        return Layer(ridge=ridge, depth=depth, base=base, height=height, frequency=frequency, seed=seed, **more)

    def between(self, low: float, high: float) -> float:
        return self.rng.uniform(low, high)

    def sometimes(self, chance: float, low: float, high: float) -> float:
        """A length with this chance, else 0."""
        return self.between(low, high) if self.rng.random() < chance else 0.0

    def mountains(self) -> Iterator[Layer]:
        yield from self._range(int(self.rng.integers(2, 5)), self.horizon + 0.02, 0.97)

    def lake_shore(self) -> Iterator[Layer]:
        shore = self.horizon + 0.01
        yield from self._range(int(self.rng.integers(1, 4)), shore, shore)

    def _range(self, count: int, far: float, near: float) -> Iterator[Layer]:
        """Bare peaks whose feet go from `far` to `near`; nearer ones are lower, and the nearest has no snow."""
        for i in range(count):
            d = i / (count - 1) if count > 1 else 0.35
            height = self.between(0.26, 0.36) * (1 - d) + self.between(0.1, 0.2) * d
            yield self.layer(
                Ridge.PEAKS,
                depth=0.15 + 0.75 * d,
                base=(1 - d) * far + d * near,
                height=height,
                frequency=self.between(1.1, 1.7) + 0.8 * d,
                snow=self.snow and i < max(1, count - 1),
                fringe=self.sometimes(0.6, 0.016, 0.03) * (0.6 + 0.6 * d) if d > 0.3 else 0.0,
            )

    def misty_mountains(self) -> Iterator[Layer]:
        count = int(self.rng.integers(4, 7))
        for i in range(count):
            d = i / (count - 1)
            yield self.layer(
                Ridge.PEAKS,
                depth=0.05 + 0.9 * d,
                base=self.horizon - 0.12 + d * (1.08 - self.horizon),
                height=self.between(0.2, 0.32) * (1 - 0.35 * d),
                frequency=self.between(1.2, 2.2),
                misty=True,
                fringe=self.sometimes(0.6, 0.012, 0.03) * (0.6 + 0.7 * d) if d > 0.4 else 0.0,
            )

    def volcano(self) -> Iterator[Layer]:
        centre = self.aspect * self.between(0.33, 0.67)
        for _ in range(int(self.rng.integers(0, 2))):
            yield self.layer(Ridge.PEAKS, 0.1, self.horizon + 0.02, self.between(0.06, 0.12), self.between(2, 3))
        yield self.layer(
            Ridge.CONE,
            depth=self.between(0.3, 0.6),
            base=self.horizon + 0.03,
            height=self.between(0.33, 0.44),
            frequency=1.0,
            centre=centre,
            width=self.between(0.16, 0.22),
            snow=self.snow or self.rng.random() < 0.6,
        )
        count = int(self.rng.integers(1, 4))
        for i in range(count):
            d = (i + 1) / count
            yield self.layer(
                Ridge.PEAKS if self.rng.random() < 0.5 else Ridge.HILLS,
                depth=0.55 + 0.45 * d,
                base=self.horizon + 0.06 + 0.3 * d,
                height=self.between(0.05, 0.12),
                frequency=self.between(1.4, 2.4),
                fringe=self.sometimes(0.7, 0.015, 0.04),
            )

    def islands(self) -> Iterator[Layer]:
        count = int(self.rng.integers(1, 4))
        for i in range(count):
            height, frequency = self.between(0.1, 0.26), self.between(1.0, 1.6)
            yield self.layer(Ridge.STACKS, 0.2 + 0.55 * i / count, self.horizon + 0.004 + 0.03 * i, height, frequency)

    def far_rocks(self) -> Iterator[Layer]:
        if self.rng.random() < 0.5:
            depth, height, frequency = self.between(0.05, 0.2), self.between(0.04, 0.09), self.between(0.8, 1.2)
            yield self.layer(Ridge.STACKS, depth, self.horizon + 0.003, height, frequency)

    def hills(self) -> Iterator[Layer]:
        count = int(self.rng.integers(3, 6))
        if self.rng.random() < 0.5:
            yield self.layer(Ridge.PEAKS, 0.05, self.horizon + 0.03, self.between(0.1, 0.18), self.between(1.4, 2.0))
        for i in range(count):
            d = i / (count - 1)
            yield self.layer(
                Ridge.HILLS,
                depth=0.25 + 0.65 * d,
                base=self.horizon + d * 0.36,
                height=self.between(0.12, 0.22),
                frequency=self.between(1.1, 2.0),
                fringe=self.sometimes(0.5, 0.018, 0.035),
            )

    def dunes(self) -> Iterator[Layer]:
        count = int(self.rng.integers(3, 6))
        for i in range(count):
            d = i / (count - 1)
            height, frequency = self.between(0.12, 0.24), self.between(0.7, 1.3)
            yield self.layer(Ridge.DUNES, 0.1 + 0.75 * d, self.horizon + 0.02 + d * 0.36, height, frequency)

    def mesas(self) -> Iterator[Layer]:
        count = int(self.rng.integers(2, 4))
        for i in range(count):
            d = i / (count - 1)
            height, frequency = self.between(0.16, 0.28) * (1 - 0.3 * d), self.between(1.6, 2.5)
            yield self.layer(Ridge.MESAS, 0.15 + 0.6 * d, self.horizon + d * 0.17, height, frequency)
        yield self.layer(Ridge.HILLS, 0.9, self.horizon + 0.28, self.between(0.04, 0.08), self.between(1.0, 1.5))

    def forest(self) -> Iterator[Layer]:
        count = int(self.rng.integers(3, 6))
        if self.rng.random() < 0.6:
            height, frequency = self.between(0.14, 0.26), self.between(1.2, 1.8)
            yield self.layer(Ridge.PEAKS, 0.02, self.horizon - 0.05, height, frequency, misty=True)
        for i in range(count):
            d = i / (count - 1)
            yield self.layer(
                Ridge.PINES,
                depth=0.2 + 0.8 * d,
                base=self.horizon - 0.06 + d * (1.02 - self.horizon),
                height=self.between(0.1, 0.16),
                frequency=self.between(0.8, 1.3),
                misty=True,
                trees=0.05 + 0.17 * d * d + 0.03 * d,
            )

    def above_clouds(self) -> Iterator[Layer]:
        count = int(self.rng.integers(2, 4))
        for i in range(count):
            d = i / (count - 1)
            height, frequency = self.between(0.2, 0.3) * (1 - 0.3 * d), self.between(0.9, 1.4)
            yield self.layer(
                Ridge.PEAKS,
                0.2 + 0.6 * d,
                self.horizon + 0.06 + 0.2 * d,
                height,
                frequency,
                snow=self.snow and i == 0,
                bank=True,
            )

    def in_front(self, front: Front, base: float) -> Iterator[Layer]:
        if front is Front.PINES:
            height, frequency, trees = self.between(0.05, 0.12), self.between(0.7, 1.2), self.between(0.14, 0.26)
            yield self.layer(Ridge.PINES, 1.0, base + 0.02, height, frequency, trees=trees, front=True)
        elif front is Front.WOODS:
            yield self.layer(
                Ridge.WOODS, 0.95, base + 0.06, self.between(0.1, 0.16), self.between(0.7, 1.2), front=True
            )
