"""A layer of land on a canvas: where its ridge runs and how far under it each pixel lies."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from art.canvas import Canvas
from art.noise import Array, F
from art.ridges import profile
from art.scene import Layer


@dataclass(frozen=True, kw_only=True)
class Ground:
    canvas: Canvas
    layer: Layer
    rows: slice  # of the canvas that the layer may reach
    ridge: Array  # y of its ridge, (W,)
    trees: float  # height of trees along it

    @cached_property
    def y(self) -> Array:
        """(rows, 1) fp32."""
        return self.canvas.y[self.rows].astype(F)[:, None]

    @cached_property
    def under(self) -> Array:
        """How far under the ridge each pixel lies, (rows, W)."""
        return self.y - self.ridge[None, :]

    @cached_property
    def warp(self) -> Array:
        return self.canvas.warp[self.rows]


def find_ground(canvas: Canvas, layer: Layer) -> Ground | None:
    """None where the layer lies below the canvas."""
    ridge = profile(layer, canvas.x, canvas.px).astype(F)
    trees = layer.trees or (0.0 if layer.snow else layer.fringe)
    rows = canvas.below(float(ridge.min()) - trees * 1.5 - 2 * canvas.px)
    if rows.stop <= rows.start:
        return None
    return Ground(canvas=canvas, layer=layer, rows=rows, ridge=ridge, trees=trees)


def cover(ground: Ground) -> Array:
    """1 under the ridge, 0 above it, with a soft edge about a pixel wide whatever the slope; (rows, W)."""
    canvas = ground.canvas
    slope = np.gradient(ground.ridge) / F(canvas.pixel[0])
    width = F(1.3 * canvas.pixel[1]) * np.sqrt(1 + np.minimum(slope, 6.0) ** 2)
    return np.clip(ground.under / width[None, :] + F(0.5), 0, 1)
