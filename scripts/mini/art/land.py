"""One layer of land: its colours by light, woods, snow, an inked edge and mist."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from art.canvas import Canvas
from art.colour import mix
from art.ground import Ground, cover, find_ground
from art.light import light
from art.noise import Array, F, smoothstep
from art.palettes import Palette
from art.scene import Layer, Ridge, Style, Terrain, Thing
from art.trees import draw_fringe, draw_pines

_THINGS = {Ridge.PINES: Thing.PINES, Ridge.WOODS: Thing.WOODS}  # elsewhere land
_EDGES = {
    Style.WOODBLOCK: (0.0045, 0.4),
    Style.WATERCOLOUR: (0.007, 0.22),
}  # width and strength of a line along the ridge
_MIST = {Ridge.DUNES: 0.45, Ridge.HILLS: 0.75}  # how much mist lies on them


def draw_layer(canvas: Canvas, layer: Layer) -> None:
    ground = find_ground(canvas, layer)
    if ground is None:
        return
    mask, fringe = _silhouette(ground)
    leaves = _leaves(ground) if layer.ridge is Ridge.WOODS else None
    lit = light(ground) if leaves is None else leaves.lit
    if canvas.scene.style is Style.SCREEN:  # three flat tones
        lit = (0.55 * np.tanh(9 * (lit - 0.28)) + 0.45 * np.tanh(9 * (lit + 0.3))) * 0.8
    ink = canvas.scene.style is Style.INK
    lit = lit * F(canvas.scene.tone.relief * (1.15 - 0.75 * layer.depth) * (0.75 if ink else 1.0))
    snow = _snow(ground, lit) if layer.snow else None
    if fringe is not None:
        lit = np.where(ground.under < 0, F(-0.6), lit)
    up, down = np.maximum(lit, 0), np.maximum(-lit, 0)
    base, bright, dark = (canvas.colour(shade) for shade in _shades(canvas, layer))
    planes = [base[k] + up * (bright[k] - base[k]) + down * (dark[k] - base[k]) for k in range(3)]
    if leaves is not None:
        _lay(planes, leaves.share, canvas.colour(mix(canvas.palette.leaves[0], canvas.palette.land[1], 0.12)))
    if snow is not None:
        white, shadow = _snow_colours(canvas)
        shade = np.clip(down * 1.2 - up * 0.3, 0, 1)
        _lay(planes, snow, [white[k] + shade * (shadow[k] - white[k]) for k in range(3)])
    edge = _edge(ground)
    if edge is not None:
        _lay(planes, edge, dark * F(0.7))
    mist = _mist(ground)
    _lay(planes, mist, canvas.colour(_fog(canvas.palette, layer)))
    canvas.paint(ground.rows, mask, planes, _THINGS.get(layer.ridge, Thing.LAND))
    _tell(ground, mask, fringe, snow, mist)


def _lay(planes: list[Array], mask: Array, colour: Array | list[Array]) -> None:
    for plane, value in zip(planes, colour, strict=True):
        plane += mask * (value - plane)


def _silhouette(ground: Ground) -> tuple[Array, Array | None]:
    """The layer's mask, trees included, and that of a fringe of trees above bare land."""
    mask = cover(ground)
    if ground.layer.ridge is Ridge.PINES:
        return np.maximum(mask, draw_pines(ground)), None
    if not ground.trees:
        return mask, None
    trees = draw_fringe(ground)
    return np.maximum(mask, trees), trees * (mask < 0.5)


class _Shades(NamedTuple):
    """The layer's own colour, where light falls, and in shade; (3,) sRGB."""

    base: Array
    light: Array
    dark: Array


def _shades(canvas: Canvas, layer: Layer) -> _Shades:
    p, depth = canvas.palette, layer.depth
    far, near = p.land
    if layer.ridge is Ridge.WOODS:
        middle, dark = (mix(leaf, near, 0.12) for leaf in p.leaves[1:])
        return _Shades(base=dark, light=middle, dark=mix(dark, near, 0.7))
    base = mix(far, near, depth**0.9)
    if layer.ridge is Ridge.DUNES:
        base = mix(mix(mix(p.mist, p.light, 0.55), far, 0.35 + 0.65 * depth), near, 0.05 + 0.4 * depth)
        return _Shades(base=base, light=mix(base, p.light, 0.75), dark=mix(base, near, 0.6))
    if layer.ridge is Ridge.HILLS and canvas.scene.terrain is Terrain.HILLS:
        base = mix(base, p.leaves[1], 0.45)
    return _Shades(base=base, light=mix(base, p.light, 0.75), dark=mix(base, mix(near, p.sky[0], 0.25), 0.62))


class _Leaves(NamedTuple):
    lit: Array
    share: Array  # of the first leaf colour


def _leaves(ground: Ground) -> _Leaves:
    leaf = ground.canvas.leaf[ground.rows]
    lit = np.clip(0.75 * leaf + 0.35, -1, 1) * np.exp(-np.clip(ground.under, 0, 1) * 2.0)
    hue = smoothstep(-0.5, 0.6, ground.canvas.wash[ground.rows])
    share = hue * np.clip(0.35 + 0.65 * leaf, 0.1, 1) * F(0.8) * (ground.under < 0.4)
    return _Leaves(lit=lit, share=share)


def _snow(ground: Ground, lit: Array) -> Array:
    """Above a line that wavers with the gullies."""
    layer, cone = ground.layer, ground.layer.ridge is Ridge.CONE
    line = F(layer.base - layer.height * (0.52 if cone else 0.45))
    gully = ground.warp * F(0.09 if cone else 0.06) + lit * F(0.05)
    above = line - ground.y + gully + 0.25 * (line - ground.ridge[None, :]) * (1 if cone else 0.4)
    return smoothstep(-0.012, 0.012, above) * F(0.92)


def _snow_colours(canvas: Canvas) -> tuple[Array, Array]:
    """In light and in shade."""
    p = canvas.palette
    shadow = mix(mix(p.snow, p.sky[0], 0.45), p.land[0], 0.25)
    return canvas.colour(mix(p.snow, p.light, 0.15)), canvas.colour(shadow)


def _edge(ground: Ground) -> Array | None:
    """A drawn line along the ridge, in the styles that have one; (rows, W)."""
    style = ground.canvas.scene.style
    if style not in _EDGES or ground.layer.ridge is Ridge.WOODS:
        return None
    width, strength = _EDGES[style]
    line = np.clip(1 - np.abs(ground.under - F(0.4 * width)) / F(width), 0, 1)
    pressure = np.clip(0.8 + 0.7 * ground.warp, 0, 1)
    return line * F(strength) * pressure * F(min(1.0, width / ground.canvas.px))


def _fog(p: Palette, layer: Layer) -> Array:
    return mix(p.mist, p.cloud, 0.5) if layer.bank else mix(p.mist, p.sky[2], 0.3 * (1 - layer.depth))


def _mist(ground: Ground) -> Array:
    """Thicker towards the foot of the layer."""
    canvas, layer, scene = ground.canvas, ground.layer, ground.canvas.scene
    n = canvas.mist[ground.rows]
    if layer.front:
        return np.zeros_like(n)
    if layer.bank:  # a sea of clouds swallows the foot
        top = F(layer.base - 0.06)
        return smoothstep(-0.03, 0.05, ground.y - top + 0.05 * n + 0.03 * canvas.wash[ground.rows]) * F(0.97)
    ink = scene.style is Style.INK
    strength = scene.tone.mist * (1.0 - 0.55 * layer.depth) + 0.25 * layer.misty + 0.3 * ink
    strength *= (0.4 if layer.depth >= 0.98 else 1.0) * _MIST.get(layer.ridge, 1.0)
    span = layer.height * (1.0 if layer.misty or ink else 1.5) + layer.trees
    return smoothstep(0.02, 1.0, ground.under * F(1 / span) + F(0.22) * n) * F(min(0.97, strength))


def _tell(ground: Ground, mask: Array, fringe: Array | None, snow: Array | None, mist: Array) -> None:
    """Note what lies on the land."""
    things = ground.canvas.things[ground.rows]
    if fringe is not None:
        things[fringe > 0.5] = Thing.PINES.number
    if snow is not None:
        things[(mask * snow * (1 - mist)) > 0.45] = Thing.SNOW.number
    if ground.layer.bank:
        things[(mask * mist) > 0.6] = Thing.CLOUDS.number
