"""Lit and shaded flanks: the slope of the ridge above, led down the mountain along wavering lines."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from art.ground import Ground
from art.noise import Array, F, fade, noise1
from art.ridges import profile
from art.scene import Ridge

_SHARP = 0.0015  # the finest detail of a ridge that shades the flank below it


@dataclass(frozen=True, kw_only=True)
class _Relief:
    contrast: float
    broad: float  # detail of the ridge, as a length, that shades the whole flank
    fan: float  # how far the lines turn away from a summit
    wander: float  # how far they waver
    lean: float = 0.0  # the slope at which they all run down
    rocky: bool = False


_RELIEFS = {
    Ridge.PEAKS: _Relief(contrast=1.9, broad=0.07, fan=0.55, wander=0.3, rocky=True),
    Ridge.CONE: _Relief(contrast=1.3, broad=0.05, fan=0.0, wander=0.25, rocky=True),
    Ridge.STACKS: _Relief(contrast=0.9, broad=0.05, fan=0.3, wander=0.3, rocky=True),
    Ridge.MESAS: _Relief(contrast=0.5, broad=0.03, fan=0.1, wander=0.15, rocky=True),
    Ridge.DUNES: _Relief(contrast=2.5, broad=0.05, fan=0.0, wander=0.12, lean=-0.75),
    Ridge.HILLS: _Relief(contrast=1.9, broad=0.05, fan=0.0, wander=0.12, lean=-0.9),
}


def light(ground: Ground) -> Array:
    """How each pixel under the ridge is lit, about −1 (shaded) to 1; (rows, W)."""
    relief = _RELIEFS.get(ground.layer.ridge)
    if relief is None:
        return 0.12 * ground.warp
    canvas, layer, tone = ground.canvas, ground.layer, ground.canvas.scene.tone
    under = np.clip(ground.under, 0, 1)
    step = max(canvas.pixel[0], 1e-6)
    margin = int((0.6 * layer.height + 0.2) / step) + 2  # lines may come from beside the view
    x = canvas.x[0] + step * (np.arange(-margin, len(canvas.x) + margin))
    broad = np.gradient(profile(layer, x, max(canvas.px, relief.broad)), step)
    at = _line_starts(ground, relief, broad[margin:-margin], under)
    index = np.clip((at - F(x[0])) * F(1 / step), 0, len(x) - 1).astype(np.int32)
    lit = np.tanh(-relief.contrast * broad * tone.lit).astype(F)[index]
    if relief.rocky:
        sharp = np.gradient(profile(layer, x, max(canvas.px, _SHARP)), step)
        edge = np.tanh(-0.9 * relief.contrast * sharp * tone.lit).astype(F)[index]
        lit = lit + np.exp(-under * F(1 / (0.05 + 0.12 * layer.height))) * F(0.6) * (edge - lit)
        lit = lit * F(0.7) - canvas.rock[ground.rows] * F(0.045 * tone.lit * tone.ridges)
    if layer.ridge is Ridge.MESAS:
        lit = lit + 0.35 * _strata(ground)
    if layer.ridge is Ridge.DUNES:
        lit = lit + _ripples(ground)
    reach = 1.0 if relief.rocky else 0.6
    return lit * np.exp(-under * F(1.0 / (1.1 * layer.height + 0.02)) * reach)


def _line_starts(ground: Ground, relief: _Relief, slope: Array, under: Array) -> Array:
    """The x on the ridge from which the line through each pixel comes down."""
    canvas, layer = ground.canvas, ground.layer
    if layer.ridge is Ridge.CONE:  # gullies run away from the summit
        away = (canvas.x - layer.centre).astype(F)[None, :] / (1 + 2.6 * under / F(layer.height))
        return F(layer.centre) + away + ground.warp * (F(0.012) + F(relief.wander) * under * 0.5)
    lean = relief.lean * canvas.scene.tone.lit
    out = np.tanh(2.0 * slope).astype(F)[None, :] * F(-relief.fan) - F(lean)
    return canvas.columns + out * under + ground.warp * (F(0.008) + F(relief.wander) * under)


def _strata(ground: Ground) -> Array:
    """Level bands of rock, as fine as the pixels show."""
    at, step = ground.y + 0.02 * ground.warp, ground.canvas.pixel[1]
    first = float(at.min())
    bands = noise1(np.arange(first, float(at.max()) + step, step), step, ground.layer.seed + 9, 10.0, 0.7)
    return bands[((at - first) * F(1 / step)).astype(np.int32)]


def _ripples(ground: Ground) -> Array:
    """Ripples in sand, closer together where it is far away; too fine to draw from far."""
    near = 0.3 + ground.layer.depth
    waves = np.sin(ground.y * (60 / near) + 3 * ground.warp)
    return F(0.16) * waves * fade(10 / near, ground.canvas.px) * np.clip(ground.under / 0.02, 0, 1)
