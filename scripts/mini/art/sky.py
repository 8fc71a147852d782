"""The sky's gradient, and sun or moon with their glow."""

from __future__ import annotations

import numpy as np

from art.canvas import Canvas
from art.colour import to_oklab, to_srgb
from art.noise import Array, F, noise2, smoothstep
from art.scene import Body, Disc, Style, Thing
from art.weather import draw_aurora, draw_clouds, draw_stars

_WOBBLE = {Style.WOODBLOCK: 0.012, Style.INK: 0.05, Style.WATERCOLOUR: 0.06, Style.SCREEN: 0.008}  # of the gradient
_BANDS = 9.0  # of a screen print's sky
_EVERY_ROW = slice(None)


def draw_sky(canvas: Canvas) -> None:
    """Everything above the land; covers the whole canvas."""
    scene = canvas.scene
    _draw_gradient(canvas)
    for disc in scene.discs:
        _draw_glow(canvas, disc)
    if scene.stars and not canvas.mirrored:
        draw_stars(canvas)
    if scene.aurora:
        draw_aurora(canvas)
    if not canvas.mirrored:
        for disc in scene.discs:
            _draw_disc(canvas, disc)
    if scene.clouds:
        draw_clouds(canvas)


def _gradient(canvas: Canvas) -> Array:
    """(3, 512) colours from the top of the sky to the horizon."""
    tone = canvas.scene.tone
    top, middle, low = (to_oklab(colour) + tone.shift for colour in canvas.palette.sky)
    t = np.linspace(0, 1, 512)[:, None]
    upper = np.clip(t / tone.middle, 0, 1)
    lower = np.clip((t - tone.middle) / (1 - tone.middle), 0, 1)
    upper, lower = (u * u * (3 - 2 * u) * 0.5 + u * 0.5 for u in (upper, lower))
    colours = top + (middle - top) * upper + (low - middle) * lower
    if tone.bokashi and canvas.scene.style is Style.WOODBLOCK:
        colours = colours + (top * (0.72, 1.2, 1.2) - colours) * 0.85 * np.exp(-((t / 0.13) ** 2))
    return to_srgb(colours).T.astype(F)


def _draw_gradient(canvas: Canvas) -> None:
    style, table = canvas.scene.style, _gradient(canvas)
    t = (canvas.y / (canvas.scene.horizon * 1.02)).astype(F)[:, None] + F(_WOBBLE[style]) * canvas.mist
    if style is Style.SCREEN:
        band = np.floor(t * _BANDS)
        edge = np.clip((t * _BANDS - band - 0.5) / max(0.06, 2.2 * _BANDS * canvas.pixel[1]) + 0.5, 0, 1)
        t = (band + edge) / F(_BANDS)
    at = np.clip(t * 511, 0, 510.99)
    i = at.astype(np.int32)
    share = at - i
    for plane, colours in zip(canvas.image, table, strict=True):
        plane[:] = colours[i] + share * (colours[i + 1] - colours[i])
    canvas.things[:] = Thing.SKY.number


def _offsets(canvas: Canvas, disc: Disc) -> tuple[Array, Array, Array]:
    """x (1, W) and y (H, 1) from the disc's centre, and the distance (H, W)."""
    dx = (canvas.x - disc.x).astype(F)[None, :]
    dy = (canvas.y - disc.y).astype(F)[:, None]
    return dx, dy, np.sqrt(dx * dx + dy * dy)


def _draw_glow(canvas: Canvas, disc: Disc) -> None:
    """Fades away from the disc; a screen print has two rings."""
    distance, r = _offsets(canvas, disc)[2], disc.radius
    if canvas.scene.style is Style.SCREEN:
        inner, outer = (np.clip((size * r - distance) / (2 * canvas.px) + 0.5, 0, 1) for size in (1.45, 2.0))
        glow = F(canvas.palette.glowing * 0.5) * (0.6 * inner + 0.4 * outer)
    else:
        glow = F(canvas.palette.glowing * 0.9) * np.exp(-np.maximum(distance - F(r), 0) * F(1 / (1.1 * r + 0.05)))
    canvas.paint(_EVERY_ROW, glow, canvas.colour(canvas.palette.glow))


def _draw_disc(canvas: Canvas, disc: Disc) -> None:
    scene, palette, r = canvas.scene, canvas.palette, disc.radius
    dx, dy, distance = _offsets(canvas, disc)
    soft = 1.5 * canvas.px
    brush = 0.0015 * canvas.warp if scene.style in (Style.WATERCOLOUR, Style.INK) else 0
    mask = np.clip((r - distance + brush) / soft + 0.5, 0, 1)
    colour = canvas.colour(palette.sun)
    planes: list[Array] = list(colour)
    if scene.body is Body.CRESCENT:
        bite = np.sqrt((dx - F(0.42 * r * scene.tone.lit)) ** 2 + (dy + F(0.2 * r)) ** 2)
        mask = mask * np.clip((bite - 0.92 * r) / soft + 0.5, 0, 1)
    elif scene.body is Body.FULL_MOON:
        f = 0.45 / r
        seas = noise2(canvas.x - disc.x, canvas.y - disc.y, canvas.pixel, canvas.seed(11), f, f, 0.55)
        planes = _towards(colour, canvas.colour(palette.cloud), 0.16 * smoothstep(-0.1, 0.9, seas))
    elif scene.style is not Style.SCREEN:
        planes = _towards(colour, canvas.colour(palette.glow), np.clip((dy / F(r) + 1) * 0.5, 0, 1) * 0.35)
    canvas.paint(_EVERY_ROW, mask, planes, Thing.BODY)


def _towards(a: Array, b: Array, share: Array) -> list[Array]:
    """Planes of the colour `a` (3,), `share` of them `b`."""
    return [a[k] + share * (b[k] - a[k]) for k in range(3)]
