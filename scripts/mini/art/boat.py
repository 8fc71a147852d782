"""A sailing boat and its reflection."""

from __future__ import annotations

import numpy as np

from art.canvas import Canvas
from art.colour import mix
from art.noise import Array, F
from art.scene import Boat, Thing


def draw_boat(canvas: Canvas, boat: Boat) -> None:
    palette, size = canvas.palette, boat.size
    waterline = canvas.scene.horizon + 0.05 + 0.5 * size
    rows = canvas.below(waterline - 1.2 * size, waterline + 0.75 * size)
    if rows.stop <= rows.start:
        return
    # In lengths of the boat from its mast's foot; x runs towards the light.
    x = (canvas.x - boat.x).astype(F)[None, :] / F(size)
    y = (canvas.y[rows] - waterline).astype(F)[:, None] / F(size)
    ahead = x * F(canvas.scene.tone.lit)
    soft = F(1.4 * canvas.px / size)
    belly = 0.10 * np.sin(np.clip((y + 1.05) / 0.95, 0, 1) * np.pi)
    hull = _inside(soft, y + 0.07, 0.08 - y, 0.46 - np.abs(x + 0.02) - y * 0.9)
    jib = _inside(soft, -0.03 - ahead, ahead + (y + 0.86) * 0.42 + belly * 0.4, -0.16 - y)
    main = _inside(soft, ahead + 0.02, (y + 1.0) * 0.52 - ahead + belly * 0.6, -0.12 - y)
    sail = mix(palette.snow, palette.light, 0.2) if boat.sail < 0.6 else mix(palette.sun, palette.leaves[0], 0.5)
    canvas.paint(rows, hull, canvas.colour(mix(palette.land[1], palette.water, 0.15)), Thing.BOAT)
    canvas.paint(rows, jib, canvas.colour(mix(sail, palette.land[0], 0.3)), Thing.BOAT)
    canvas.paint(rows, main, canvas.colour(sail), Thing.BOAT)
    ripples = np.clip(1 - np.abs(np.sin(y * 26 + 3 * canvas.warp[rows])) * 0.7, 0, 1)
    mirrored = _inside(soft, ahead + 0.05, (0.66 - y) * 0.4 - ahead, y - 0.09)
    canvas.paint(rows, (mirrored * ripples * F(0.45)).astype(F), canvas.colour(sail))


def _inside(soft: np.floating, *distances: Array) -> Array:
    """1 where all distances to edges are positive, with an edge `soft` wide."""
    return np.clip(np.minimum.reduce(np.broadcast_arrays(*distances)) / soft + F(0.5), 0, 1)
