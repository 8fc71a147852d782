"""Stars, aurora and clouds."""

from __future__ import annotations

import numpy as np

from art.canvas import EVERYWHERE, Canvas
from art.colour import mix
from art.noise import Array, F, hashed, noise1, noise2, smoothstep
from art.scene import Style, Thing

_STARLIGHT = np.array([1.0, 0.98, 0.92], F)
_STAR_LEVELS = 7
_GREEN, _VIOLET = np.array([0.36, 0.92, 0.66], F), np.array([0.55, 0.42, 0.85], F)
_CLOUD_SOFTNESS = {Style.WOODBLOCK: 0.3, Style.INK: 0.9, Style.WATERCOLOUR: 0.6, Style.SCREEN: 0.08}


def draw_stars(canvas: Canvas) -> None:
    """A star at most in each cell of a grid, and fainter ones in grids twice as fine, as far as pixels can show
    them."""
    limit = canvas.scene.horizon * 0.9
    rows = canvas.below(-EVERYWHERE, limit)
    if rows.stop <= rows.start:
        return
    x, y = canvas.x, canvas.y[rows]
    fall = np.clip((limit - y) / limit * 1.6, 0, 1).astype(F)[:, None]
    cell, level = 1 / 9, 0
    while cell * 0.09 > 0.4 * canvas.px and level < _STAR_LEVELS:
        mask = _stars(canvas, x, y, cell, level)
        canvas.paint(rows, (mask * fall * F(0.95 * 0.82**level)).astype(F), _STARLIGHT)
        cell, level = cell / 2, level + 1


def _stars(canvas: Canvas, x: Array, y: Array, cell: float, level: int) -> Array:
    """The mask of one grid's stars, (len(y), len(x))."""
    seed = canvas.seed(31 * level)
    ix, iy = np.floor(x / cell).astype(np.int64), np.floor(y / cell).astype(np.int64)
    cells = np.arange(ix.min(), ix.max() + 1)[None, :], np.arange(iy.min(), iy.max() + 1)[:, None]
    centre_x, centre_y = (0.5 + 0.32 * hashed(*cells, seed + k) for k in (1, 2))
    exists = hashed(*cells, seed + 4) > (0.15 if level else 0.3)
    size = np.clip(0.075 * (0.35 + 0.65 * np.abs(hashed(*cells, seed + 3))), 0, 1) * exists
    row, column = iy - iy.min(), ix - ix.min()
    dx = (x / cell - ix).astype(F)[None, :] - centre_x[row][:, column]
    dy = (y / cell - iy).astype(F)[:, None] - centre_y[row][:, column]
    distance = np.sqrt(dx * dx + dy * dy) * F(cell)
    radius = size[row][:, column] * F(cell)
    inside = np.clip((radius - distance) / (1.6 * canvas.px) + 0.5, 0, 1)
    return inside * (radius > 0) * np.clip(radius / (0.6 * canvas.px), 0, 1)


def draw_aurora(canvas: Canvas) -> None:
    """Two curtains, green below and violet above, bright along their lower edges."""
    x, px, y = canvas.x, canvas.px, canvas.y.astype(F)[:, None]
    for k in range(2):
        seed = canvas.seed(200) + k
        path = 0.34 + 0.1 * k - 0.12 * noise1(x, px, seed, 1.1, 0.45, 3)
        rays = 0.55 + 0.45 * noise1(x, px, seed + 5, 5.0, 0.62)
        height = 0.16 + 0.07 * noise1(x, px, seed + 9, 2.0, 0.5, 3)
        up = (path[None, :] - y).astype(F)
        light = np.where(up > 0, np.exp(-up / np.maximum(height, 0.05)[None, :]), np.exp(up / 0.018))
        light = light * np.clip(rays, 0.05, 1.2)[None, :] * F(0.62 - 0.2 * k)
        violet = np.clip(up / 0.25, 0, 1)
        colour = [_GREEN[j] + violet * (_VIOLET[j] - _GREEN[j]) for j in range(3)]
        canvas.paint(slice(None), np.clip(light, 0, 0.85).astype(F), colour)


def draw_clouds(canvas: Canvas) -> None:
    """Flatter and smaller towards the horizon, as in perspective. Over a disc they are thin veils: a shredded sun in
    the data would teach shredded suns."""
    scene, palette, h = canvas.scene, canvas.palette, canvas.scene.horizon
    rows = canvas.below(-EVERYWHERE, h)
    if rows.stop <= rows.start:
        return
    x, y = canvas.x, canvas.y[rows]
    kind = scene.tone.cloud
    base = (1.9, 1.2, 2.6)[kind] / (0.55 + 0.9 * (h - y) / h)
    stretch, gain, centre = (3.2, 5.5, 1.9)[kind], (0.5, 0.5, 0.55)[kind], (0.45, 0.6, 0.55)[kind]

    def weights(frequency: float) -> Array:
        octave = np.log2(np.maximum(frequency / base, 1e-6))
        return np.where(octave < -0.5, np.clip(1.5 + octave, 0, 1), gain ** np.maximum(octave, 0))

    seed = canvas.seed(300)
    n = noise2(x, y, canvas.pixel, seed, 1.0, stretch, row_weights=weights)
    below = noise2(x, y + 0.018, canvas.pixel, seed, 1.0, stretch, octaves=5, row_weights=weights)
    window = (0.25 - 1.6 * np.abs((y / h) - centre)).astype(F)[:, None]
    density = n + window + F(scene.tone.cover)
    opacity = smoothstep(0.1, 0.1 + _CLOUD_SOFTNESS[scene.style], density) * F(0.6 if scene.style is Style.INK else 0.9)
    for disc in scene.discs:
        distance = np.sqrt((x - disc.x).astype(F)[None, :] ** 2 + (y - disc.y).astype(F)[:, None] ** 2)
        opacity *= F(0.12) + F(0.88) * smoothstep(0.95 * disc.radius, 1.9 * disc.radius, distance)
    shade = np.clip(0.5 - 0.9 * (n - below) - 0.25 * density, 0, 1)
    if scene.style is Style.SCREEN:
        shade = smoothstep(0.45, 0.53, shade)
    light, dark = canvas.colour(palette.cloud), canvas.colour(mix(palette.cloud, palette.sky[1], 0.55))
    canvas.paint(rows, opacity, [light[k] + shade * (dark[k] - light[k]) for k in range(3)], Thing.CLOUDS)
