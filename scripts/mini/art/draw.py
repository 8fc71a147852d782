"""A view of a scene as a picture of any size."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from art.boat import draw_boat
from art.canvas import EVERYWHERE, Canvas
from art.land import draw_layer
from art.noise import F
from art.scene import WET, Layer, Scene, Style, View
from art.sky import draw_sky
from art.water import draw_water

_PIGMENT = {Style.WOODBLOCK: 0.018, Style.INK: 0.045, Style.WATERCOLOUR: 0.05, Style.SCREEN: 0.012}


class Drawing(NamedTuple):
    pixels: np.ndarray  # (height, width, 3) uint8
    things: np.ndarray  # (height, width) uint8, indices in THINGS


def draw(scene: Scene, view: View | None = None, width: int = 256, height: int = 256) -> Drawing:
    """`view` None is the whole scene. A closer view shows finer detail of the same things."""
    view = view or View(x0=0.0, y0=0.0, x1=scene.aspect, y1=1.0)
    px, py = (view.x1 - view.x0) / width, (view.y1 - view.y0) / height
    x, y = view.x0 + px * (np.arange(width) + 0.5), view.y0 + py * (np.arange(height) + 0.5)
    canvas = Canvas(scene, x, y, (px, py))
    back = [layer for layer in scene.layers if not layer.front]
    if scene.terrain in WET:
        dry = canvas.below(-EVERYWHERE, scene.horizon + 4 * py)
        if dry.stop > dry.start:
            _draw_above(canvas.cut(dry), back)
        draw_water(canvas, back, _draw_above)
    else:
        _draw_above(canvas, back)
    for layer in scene.layers:
        if layer.front:
            draw_layer(canvas, layer)
    if scene.boat is not None:
        draw_boat(canvas, scene.boat)
    _tint(canvas)
    pixels = np.clip(canvas.image * 255 + 0.5, 0, 255).astype(np.uint8).transpose(1, 2, 0)
    return Drawing(np.ascontiguousarray(pixels), canvas.things)


def _draw_above(canvas: Canvas, layers: list[Layer]) -> None:
    """Sky and land."""
    draw_sky(canvas)
    for layer in layers:
        draw_layer(canvas, layer)


def _tint(canvas: Canvas) -> None:
    """Pigment and paper: broad and weak, so that an autoencoder keeps it at every zoom."""
    style = canvas.scene.style
    tint = 1 + F(_PIGMENT[style]) * canvas.wash
    if style is Style.WOODBLOCK:
        tint += F(0.016) * canvas.grain
    canvas.image *= tint
