"""Lakes and seas: what stands above, mirrored, under waves in perspective, with the light of sun or moon on them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from art.canvas import Canvas
from art.colour import mix
from art.noise import Array, F, noise2, smoothstep
from art.scene import Disc, Layer, Ridge, Style, Terrain, Thing

_CLARITY = {Terrain.LAKE: 0.8, Terrain.SEA: 0.5, Terrain.ISLANDS: 0.6}  # how much of the reflection is seen
_WAVES = {Terrain.LAKE: 0.22, Terrain.SEA: 0.4, Terrain.ISLANDS: 0.34}  # how strong they are


def draw_water(canvas: Canvas, layers: list[Layer], draw_above: Callable[[Canvas, list[Layer]], None]) -> None:
    """Below the horizon. `draw_above` draws sky and land on a canvas."""
    scene, palette, h = canvas.scene, canvas.palette, canvas.scene.horizon
    rows = canvas.below(h)
    if rows.stop <= rows.start:
        return
    y = canvas.y[rows]
    down = ((y - h) / max(1e-6, 1.05 - h)).astype(F)[:, None]  # 0 at the horizon, 1 at the foot of the picture
    lake = scene.terrain is Terrain.LAKE
    planes = _reflection(canvas, layers, h - (y - h) * (1.0 if lake else 1.25), draw_above)
    clarity = _CLARITY[scene.terrain]
    depth = F(1 - clarity) + F(clarity) * np.clip(down * (0.75 if lake else 1.35), 0, 1) * F(0.75)
    _lay(planes, depth, canvas.colour(palette.water))
    waves = _waves(canvas, y)
    amount, soft = _WAVES[scene.terrain], 0.16 if scene.style is Style.SCREEN else 0.5
    crest = smoothstep(0.25, 0.25 + soft, waves) * F(amount) * (1 - 0.35 * down)
    trough = smoothstep(0.2, 0.2 + soft, -waves) * F(amount * 0.9) * (0.35 + 0.65 * down)
    _lay(planes, crest, canvas.colour(mix(palette.sky[2], palette.glow, 0.3)))
    _lay(planes, trough, canvas.colour(mix(palette.water, palette.land[1], 0.45)))
    for disc in scene.discs:
        _lay(planes, _glitter(canvas, disc, y, waves), canvas.colour(mix(palette.sun, palette.glow, 0.25)))
    canvas.image[:, rows] = planes
    canvas.things[rows] = Thing.WATER.number
    haze = np.exp(-(((y - h) / max(0.006, canvas.px)) ** 2)).astype(F)[:, None] * F(0.35)
    canvas.paint(rows, haze * np.ones((1, len(canvas.x)), F), canvas.colour(palette.mist))


def _lay(planes: Array, mask: Array, colour: Array) -> None:
    for plane, value in zip(planes, colour, strict=True):
        plane += mask * (value - plane)


def _reflection(
    canvas: Canvas, layers: list[Layer], y: Array, draw_above: Callable[[Canvas, list[Layer]], None]
) -> Array:
    """(3, len(y), W): the heights `y` above the horizon, upside down. Rocks that stand in the water have none."""
    mirror = Canvas(canvas.scene, canvas.x, y, canvas.pixel, mirrored=True)
    shore = canvas.scene.horizon + 0.05
    draw_above(mirror, [layer for layer in layers if layer.ridge is not Ridge.STACKS or layer.base < shore])
    return mirror.image


def _waves(canvas: Canvas, y: Array) -> Array:
    """Longer waves nearby, shorter ones towards the horizon; (len(y), W)."""
    base = 3.4 / (0.035 + (y - canvas.scene.horizon) * 0.9)

    def weights(frequency: float) -> Array:
        octave = np.log2(np.maximum(frequency / base, 1e-6))
        return np.where(octave < 0, np.clip(1 + octave, 0, 1), 0.62 ** np.maximum(octave, 0))

    return noise2(canvas.x, y, canvas.pixel, canvas.seed(400), 1.0, 10.0, row_weights=weights)


def _glitter(canvas: Canvas, disc: Disc, y: Array, waves: Array) -> Array:
    """A path of light below the disc, wider nearby, broken by waves."""
    width = (0.4 * disc.radius + 0.02 + 0.22 * (y - canvas.scene.horizon)).astype(F)[:, None]
    near = np.exp(-(((canvas.x - disc.x).astype(F)[None, :] / width) ** 2))
    full = 0.75 if canvas.scene.style is Style.SCREEN else 1.0
    return smoothstep(0.55, full, near * 0.8 + 0.62 * waves + 0.05) * near ** F(0.35) * F(0.9)
