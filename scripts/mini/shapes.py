"""Flat shapes in world units, of which scenes are made: y runs from 0 (top) to 1 (bottom), x from 0 to the aspect."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

Colour = tuple[int, int, int]


class View(NamedTuple):
    """A rectangle in world units."""

    x0: float
    y0: float
    x1: float
    y1: float


class Shape(NamedTuple):
    """One flat area. `kind` is polygon (points: N×2), disc (cx, cy, r) or bar (x, y, w, h; round ends)."""

    kind: str
    data: np.ndarray
    colour: Colour
    alpha: float
    tag: str


def mix(a: Colour, b: Colour, t: float) -> Colour:
    return tuple(round(x + (y - x) * t) for x, y in zip(a, b, strict=True))  # type: ignore[return-value]


def bounds(shape: Shape) -> View:
    """The shape's bounding box in world units."""
    d = shape.data
    if shape.kind == "polygon":
        return View(d[:, 0].min(), d[:, 1].min(), d[:, 0].max(), d[:, 1].max())
    if shape.kind == "disc":
        return View(d[0] - d[2], d[1] - d[2], d[0] + d[2], d[1] + d[2])
    return View(d[0], d[1], d[0] + d[2], d[1] + d[3])


def polygon(
    out: list[Shape], points: list[tuple[float, float]] | np.ndarray, colour: Colour, tag: str, alpha: float = 1.0
) -> None:
    out.append(Shape("polygon", np.asarray(points, dtype=np.float64), colour, alpha, tag))


def disc(out: list[Shape], x: float, y: float, r: float, colour: Colour, tag: str, alpha: float = 1.0) -> None:
    out.append(Shape("disc", np.array([x, y, r]), colour, alpha, tag))


def bar(out: list[Shape], x: float, y: float, w: float, h: float, colour: Colour, tag: str, alpha: float = 1.0) -> None:
    out.append(Shape("bar", np.array([x, y, w, h]), colour, alpha, tag))


def rect(
    out: list[Shape], x: float, y: float, w: float, h: float, colour: Colour, tag: str, alpha: float = 1.0
) -> None:
    polygon(out, [(x, y), (x + w, y), (x + w, y + h), (x, y + h)], colour, tag, alpha)
