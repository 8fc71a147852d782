"""A view while it is drawn: colours, what each pixel shows, and the noise fields that all layers share."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from art.colour import to_oklab, to_srgb
from art.noise import Array, F, Fractal, noise2
from art.palettes import Palette
from art.scene import Scene, Thing

EVERYWHERE = 9.0  # below and above any y of a scene


class Canvas:
    """`x` (W,) and `y` (H,) are world coordinates of pixel centres, `pixel` their distances; `image` is (3, H, W)
    sRGB."""

    def __init__(self, scene: Scene, x: Array, y: Array, pixel: tuple[float, float], mirrored: bool = False) -> None:
        self.scene, self.x, self.y, self.pixel = scene, x, y, pixel
        self.mirrored = mirrored  # the reflection in water: neither discs nor stars, but the light on it
        self.image = np.empty((3, len(y), len(x)), F)
        self.things = np.zeros((len(y), len(x)), np.uint8)

    def cut(self, rows: slice) -> Canvas:
        """These rows as a canvas of their own on the same pixels."""
        part = Canvas(self.scene, self.x, self.y[rows], self.pixel, self.mirrored)
        part.image, part.things = self.image[:, rows], self.things[rows]
        return part

    @property
    def palette(self) -> Palette:
        return self.scene.palette

    @property
    def px(self) -> float:
        """The larger side of a pixel."""
        return max(self.pixel)

    @property
    def columns(self) -> Array:
        """`x` as (1, W) fp32."""
        return self.x.astype(F)[None, :]

    def below(self, top: float, bottom: float = EVERYWHERE) -> slice:
        """The rows between two heights (`y` may run either way)."""
        inside = np.flatnonzero((self.y > top) & (self.y < bottom))
        return slice(int(inside[0]), int(inside[-1]) + 1) if len(inside) else slice(0, 0)

    def colour(self, srgb: Array) -> Array:
        """(3,) with the scene's own small shift of colour."""
        return np.clip(to_srgb(to_oklab(srgb) + self.scene.tone.shift), 0, 1).astype(F)

    def paint(self, rows: slice, mask: Array, colour: Array | Sequence[Array], thing: Thing | None = None) -> None:
        """Lay `colour`, (3,) or three planes, over these rows where `mask` is above 0."""
        for plane, value in zip(self.image[:, rows], colour, strict=True):
            plane += mask * (value - plane)
        if thing is not None:
            self.things[rows][mask > 0.5] = thing.number

    def noise(self, field: int, fx: float, fy: float, gain: float, kind: Fractal = Fractal.SMOOTH) -> Array:
        """One of the scene's fields, (H, W)."""
        return noise2(self.x, self.y, self.pixel, self.seed(field), fx, fy, gain, kind=kind)

    def seed(self, field: int) -> int:
        """The seed of one of the scene's fields."""
        return self.scene.seed * 8 + field

    @cached_property
    def warp(self) -> Array:
        return self.noise(1, 4.0, 4.0, 0.55)

    @cached_property
    def rock(self) -> Array:
        return self.noise(2, 5.0, 3.2, 0.52, Fractal.RIDGED_SLOPE)

    @cached_property
    def mist(self) -> Array:
        return self.noise(3, 1.7, 5.0, 0.5)

    @cached_property
    def wash(self) -> Array:
        return self.noise(4, 3.0, 3.0, 0.62)

    @cached_property
    def grain(self) -> Array:
        return self.noise(5, 2.0, 48.0, 0.7)

    @cached_property
    def leaf(self) -> Array:
        return self.noise(6, 17.0, 24.0, 0.66, Fractal.BILLOWING)
