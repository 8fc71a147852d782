"""The pieces of a scene, from the sky to the birds: each appends its flat shapes, back to front."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from shapes import Colour, Shape, bar, disc, mix, polygon, rect

WATER = ("sea", "lake", "islands", "skyline by the water")  # the terrains that have some


@dataclass(frozen=True, kw_only=True)
class Palette:
    sky: tuple[Colour, Colour, Colour]
    land: tuple[Colour, Colour]
    water: tuple[Colour, Colour]
    body: Colour
    cloud: Colour
    light: Colour
    moon: bool = False
    stars: bool = False


def sky(out: list[Shape], p: Palette, aspect: float) -> None:
    bands = 9
    for i in range(bands):
        t = i / (bands - 1)
        colour = mix(p.sky[0], p.sky[1], t * 2) if t < 0.5 else mix(p.sky[1], p.sky[2], t * 2 - 1)
        rect(out, -0.1, i * 0.075, aspect + 0.2, 1.1 - i * 0.075, colour, "sky")


def stars(out: list[Shape], rng: np.random.Generator, p: Palette, aspect: float, horizon: float) -> None:
    for _ in range(int(45 * aspect)):
        x, y = rng.uniform(0, aspect), rng.uniform(0.01, horizon * 0.8) ** 1.15
        disc(out, x, y, rng.choice([0.0018, 0.0026, 0.0038]), mix(p.cloud, (255, 255, 255), 0.8), "stars", 0.9)


def body(
    out: list[Shape],
    rng: np.random.Generator,
    p: Palette,
    kind: str,
    side: str,
    aspect: float,
    horizon: float,
    low: bool,
) -> tuple[float, float, float] | None:
    if kind == "none":
        return None
    x = (
        aspect
        * {"left": rng.uniform(0.16, 0.28), "centre": rng.uniform(0.44, 0.56), "right": rng.uniform(0.72, 0.84)}[side]
    )
    big = kind == "big sun"
    r = rng.uniform(0.135, 0.18) if big else rng.uniform(0.06, 0.095)
    top = r + 0.05
    # Over ridges and roofs the disc stays mostly in view; over water and hills it may set.
    y = rng.uniform(top, horizon + 0.02 if low and big else horizon - 0.05 if low else max(top + 0.02, horizon - 0.3))
    if kind == "crescent moon":
        y = rng.uniform(0.12, 0.3)
        t = np.linspace(0.5 * math.pi, 1.5 * math.pi, 40)
        outer = np.stack([x + r * np.cos(t), y + r * np.sin(t)], 1)
        inner = np.stack([x + 0.5 * r * np.cos(t[::-1]), y + r * np.sin(t[::-1])], 1)
        tilt = rng.uniform(-0.6, -0.2) + (math.pi if rng.random() < 0.5 else 0)
        turn = np.array([[math.cos(tilt), -math.sin(tilt)], [math.sin(tilt), math.cos(tilt)]])
        points = np.concatenate([outer, inner]) - (x, y)
        disc(out, x, y, r * 1.5, p.body, "glow", 0.07)
        polygon(out, points @ turn.T + (x, y), p.body, "body")
        return x, y, r
    for k, alpha in ((1.7, 0.12), (1.35, 0.18)):
        disc(out, x, y, r * k, mix(p.body, p.light, 0.5), "glow", alpha)
    disc(out, x, y, r, p.body, "body")
    if kind == "full moon":
        shade = mix(p.body, p.sky[1], 0.22)
        for dx, dy, k in ((-0.35, -0.2, 0.24), (0.25, 0.3, 0.18), (0.3, -0.4, 0.13), (-0.15, 0.48, 0.12)):
            disc(out, x + dx * r, y + dy * r, k * r, shade, "body")
    return x, y, r


def clouds(out: list[Shape], rng: np.random.Generator, p: Palette, aspect: float) -> None:
    for _ in range(rng.integers(1, 4)):
        x, y, w = rng.uniform(0.05, aspect - 0.3), rng.uniform(0.06, 0.36), rng.uniform(0.16, 0.26)
        h = w * 0.17
        bar(out, x, y, w, h, p.cloud, "clouds", 0.95)
        bar(out, x + w * rng.uniform(0.1, 0.3), y - h * 0.62, w * 0.5, h, p.cloud, "clouds", 0.95)
        bar(out, x + w * rng.uniform(-0.2, 0.4), y + h * 0.6, w * 0.6, h * 0.8, p.cloud, "clouds", 0.95)


def _ridge(
    rng: np.random.Generator, aspect: float, base: float, height: float, rough: float, first: int = 5
) -> np.ndarray:
    """A jagged line over the width: midpoint displacement, (N, 2) points."""
    n = max(2, round(first * aspect))
    y = base - height * rng.uniform(0.15, 1.0, n + 1)
    step = height * rough
    for _ in range(4):
        mid = (y[1:] + y[:-1]) / 2 + rng.uniform(-1, 1, len(y) - 1) * step
        y = np.insert(y, np.arange(1, len(y)), mid)
        step *= 0.5
    return np.stack([np.linspace(-0.05, aspect + 0.05, len(y)), y], 1)


def _wave(rng: np.random.Generator, aspect: float, base: float, height: float) -> np.ndarray:
    """A soft line over the width: three sines, (N, 2) points."""
    x = np.linspace(-0.05, aspect + 0.05, 160)
    y = np.full_like(x, base)
    for k, a in ((1.1, 0.55), (2.3, 0.3), (4.1, 0.15)):
        y -= height * a * (0.5 + 0.5 * np.sin(2 * math.pi * (k * rng.uniform(0.8, 1.2) * x + rng.random())))
    return np.stack([x, y], 1)


def _fill_below(
    out: list[Shape], line: np.ndarray, colour: Colour, tag: str, bottom: float = 1.1, alpha: float = 1.0
) -> None:
    ends = np.array([[line[-1, 0], bottom], [line[0, 0], bottom]])
    polygon(out, np.concatenate([line, ends]), colour, tag, alpha)


def _mountain(
    out: list[Shape],
    rng: np.random.Generator,
    line: np.ndarray,
    colour: Colour,
    shade: Colour,
    bottom: float,
    snow: bool,
    tag: str,
) -> None:
    """A ridge with a shaded flank right of each peak, and snow on the peaks when asked."""
    _fill_below(out, line, colour, tag, bottom)
    y = line[:, 1]
    span = bottom - y.min()
    n = len(y)
    for i in range(3, n - 3):
        if y[i] != y[max(0, i - 4) : i + 5].min():
            continue
        depth = min(0.5 * span, bottom - y[i])
        end = min(n - 1, i + int(rng.integers(6, 12)))
        down = [tuple(q) for q in line[i : end + 1] if q[1] < bottom]
        back = [
            (line[i, 0] + 0.03 * k + rng.uniform(-0.012, 0.012) + 0.02 * depth, y[i] + depth * k)
            for k in (0.9, 0.7, 0.5, 0.3, 0.15)
        ]
        low = max(q[1] for q in down)
        back = [q for q in back if q[1] > y[i]]
        polygon(out, [*down, (down[-1][0], min(bottom, low + 0.1 * depth)), *back], shade, tag)
        if snow:
            cap = 0.24 * span
            left = [tuple(q) for q in line[max(0, i - 6) : i + 1] if q[1] < y[i] + cap]
            right = [tuple(q) for q in line[i : i + 7] if q[1] < y[i] + cap]
            if len(left) > 1 and len(right) > 1:
                x0, x1 = left[0][0], right[-1][0]
                zig = [
                    (x1 + (x0 - x1) * k / 6, max(left[0][1], right[-1][1]) + (0.03 if k % 2 else -0.012) * span * 1.2)
                    for k in range(7)
                ]
                polygon(out, [*left, *right[1:], *zig], mix((250, 251, 255), colour, 0.06), "snow")


def terrain(
    out: list[Shape],
    rng: np.random.Generator,
    p: Palette,
    terrain: str,
    aspect: float,
    horizon: float,
    centre: tuple[float, float, float] | None,
) -> None:
    far, near = p.land
    if terrain in ("mountains", "misty mountains", "snowy mountains", "lake"):
        bottom = horizon if terrain == "lake" else 1.1
        layers = 2 if terrain == "lake" else 3
        for i in range(layers):
            t = (i + 0.3) / layers
            tone = mix(mix(far, p.sky[2], 0.35), near, t)
            base = horizon - 0.02 + (0.0 if terrain == "lake" else 0.13 * i)
            height = rng.uniform(0.24, 0.34) * (1 - 0.28 * i)
            line = _ridge(rng, aspect, base, height, 0.22)
            snow = (terrain == "snowy mountains" and i == 0) or (terrain == "lake" and i == 0 and rng.random() < 0.3)
            if terrain == "misty mountains":
                _fill_below(out, line, tone, "land")
                for k in range(3):
                    y = base + 0.03 * k
                    rect(out, -0.1, y, aspect + 0.2, 0.6, mix(tone, p.sky[2], 0.3), "mist", 0.32)
            else:
                _mountain(out, rng, line, tone, mix(tone, near, 0.35), bottom, snow, "land")
    if terrain == "hills":
        for i in range(4):
            line = _wave(rng, aspect, horizon + 0.02 + 0.1 * i, 0.11)
            _fill_below(out, line, mix(mix(far, p.sky[2], 0.3), near, (i + 0.2) / 4), "land")
    if terrain in ("skyline", "skyline by the water"):
        _skyline(out, rng, p, aspect, horizon + 0.02)
        if terrain == "skyline":
            rect(out, -0.1, horizon + 0.019, aspect + 0.2, 0.6, mix(near, (0, 0, 0), 0.25), "land")
    if terrain in WATER:
        _water(out, rng, p, aspect, horizon + (0.02 if "skyline" in terrain else 0.0), centre)
    if terrain == "islands":
        for i in range(rng.integers(1, 4)):
            w, h = rng.uniform(0.22, 0.4), rng.uniform(0.05, 0.12)
            cx, y = rng.uniform(0.1, aspect - 0.1), horizon + 0.012 + 0.045 * i
            x = np.linspace(-1, 1, 41)
            top = (
                h * np.clip(1 - np.abs(x) ** 1.4, 0, 1) * (1 + 0.18 * np.sin(rng.uniform(5, 9) * x + rng.random() * 6))
            )
            line = np.stack([cx + x * w / 2, y - top], 1)
            polygon(out, line, mix(far, near, 0.25 + 0.3 * i), "land")
            right = line[len(x) // 2 :]
            polygon(
                out,
                [*map(tuple, right), (cx + 0.1 * w, y), (cx + 0.04 * w, y - 0.4 * h)],
                mix(far, near, 0.45 + 0.3 * i),
                "land",
            )
            bar(out, cx - w * 0.52, y - 0.004, w * 1.04, 0.008, mix(p.water[0], p.light, 0.35), "water")


def _skyline(out: list[Shape], rng: np.random.Generator, p: Palette, aspect: float, ground: float) -> None:
    for row, (tone, lo, hi) in enumerate(((0.3, 0.14, 0.34), (0.8, 0.07, 0.22))):
        colour = mix(mix(p.land[0], p.sky[2], 0.25), p.land[1], tone)
        x = -0.03
        while x < aspect + 0.03:
            w, h = rng.uniform(0.045, 0.085), rng.uniform(lo, hi)
            rect(out, x, ground - h, w, h + 0.01, colour, "skyline")
            if rng.random() < 0.25:
                rect(out, x + 0.42 * w, ground - h - 0.03, 0.1 * w, 0.03, colour, "skyline")
            elif rng.random() < 0.25:
                rect(out, x + 0.2 * w, ground - h - 0.02, 0.6 * w, 0.021, colour, "skyline")
            if row == 1:
                size, gap = 0.0105, 0.0185
                lit = p.light if p.stars or p.moon else mix(p.light, colour, 0.35)
                columns = int((w - 0.012) / gap)
                for c in range(columns):
                    for r in range(int((h - 0.015) / gap)):
                        if rng.random() < 0.55:
                            left = x + (w - columns * gap + gap - size) / 2 + c * gap
                            rect(out, left, ground - h + 0.012 + r * gap, size, size, lit, "windows")
            x += w * rng.uniform(0.85, 1.05)


def _water(
    out: list[Shape],
    rng: np.random.Generator,
    p: Palette,
    aspect: float,
    horizon: float,
    centre: tuple[float, float, float] | None,
) -> None:
    bands = 6
    for i in range(bands):
        y = horizon + (1.02 - horizon) * (i / bands) ** 1.25
        rect(out, -0.1, y, aspect + 0.2, 1.1 - y, mix(p.water[0], p.water[1], i / (bands - 1)), "water")
    for _ in range(int(34 * aspect)):
        depth = rng.random() ** 1.3
        y = horizon + 0.015 + (0.97 - horizon) * depth
        w = rng.uniform(0.02, 0.06) * (0.5 + depth)
        bar(
            out,
            rng.uniform(-0.03, aspect),
            y,
            w,
            0.0022 + 0.0035 * depth,
            mix(p.water[0], p.light, 0.45),
            "water",
            0.55,
        )
    if centre is not None:
        x, _, r = centre
        for i in range(13):
            depth = i / 13
            y = horizon + 0.012 + (0.36 + 0.04 * rng.random()) * depth
            w = r * (1.7 - 1.0 * depth) * rng.uniform(0.55, 1.1)
            bar(
                out,
                x - w / 2 + rng.uniform(-0.2, 0.2) * r,
                y,
                w,
                0.005 + 0.005 * depth,
                mix(p.body, p.light, 0.4),
                "glitter",
                0.9,
            )


def boat(out: list[Shape], rng: np.random.Generator, p: Palette, sail: Colour, aspect: float, horizon: float) -> None:
    x, y, s = rng.uniform(0.2, 0.8) * aspect, horizon + rng.uniform(0.1, 0.22), rng.uniform(0.1, 0.16)
    hull = mix(p.land[1], (20, 16, 24), 0.5)
    flip = 1 if rng.random() < 0.5 else -1

    def at(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
        return [(x + flip * s * a, y + s * b) for a, b in points]

    for i in range(4):
        w = s * (0.9 - 0.16 * i)
        bar(out, x - w / 2, y + s * (0.1 + 0.1 * i), w, 0.05 * s, mix(sail, p.water[1], 0.45), "boat", 0.7)
    polygon(out, at([(0.02, -1.05), (0.02, -0.1), (0.46, -0.1)]), sail, "boat")
    polygon(out, at([(-0.03, -0.9), (-0.03, -0.1), (-0.36, -0.1)]), mix(sail, (255, 255, 255), 0.28), "boat")
    polygon(out, at([(-0.012, -1.08), (0.012, -1.08), (0.012, 0), (-0.012, 0)]), hull, "boat")
    polygon(out, at([(-0.48, -0.07), (0.5, -0.07), (0.34, 0.1), (-0.34, 0.1)]), hull, "boat")


def pines(out: list[Shape], rng: np.random.Generator, p: Palette, aspect: float) -> None:
    colour = mix(p.land[1], (6, 12, 16), 0.3)
    line = _wave(rng, aspect, 0.97, 0.05)
    _fill_below(out, line, colour, "pines")
    for _ in range(int(rng.integers(12, 22) * aspect)):
        x = rng.uniform(0, aspect)
        y = float(np.interp(x, line[:, 0], line[:, 1])) + 0.01
        h = rng.uniform(0.09, 0.17)
        for k in range(3):
            w, top = h * (0.2 + 0.07 * k), y - h * (1 - 0.26 * k)
            polygon(out, [(x, top), (x + w, top + 0.42 * h), (x - w, top + 0.42 * h)], colour, "pines")


def cabin(out: list[Shape], rng: np.random.Generator, p: Palette, aspect: float, horizon: float, lake: bool) -> None:
    x, s = rng.uniform(0.18, 0.78) * aspect, rng.uniform(0.085, 0.12)
    y = horizon + 0.01 if lake else rng.uniform(0.8, 0.86)
    wall, roof = mix(p.land[1], (120, 66, 44), 0.6), mix(p.land[1], (24, 14, 18), 0.6)
    bar(out, x - 0.25 * s, y - 0.03 * s, 1.6 * s, 0.1 * s, mix(wall, roof, 0.8), "cabin")
    rect(out, x + 0.78 * s, y - 1.02 * s, 0.12 * s, 0.4 * s, roof, "cabin")
    rect(out, x, y - 0.55 * s, 1.1 * s, 0.56 * s, wall, "cabin")
    polygon(
        out, [(x - 0.14 * s, y - 0.52 * s), (x + 0.55 * s, y - 1.0 * s), (x + 1.24 * s, y - 0.52 * s)], roof, "cabin"
    )
    rect(out, x + 0.16 * s, y - 0.38 * s, 0.2 * s, 0.2 * s, p.light, "cabin")
    rect(out, x + 0.66 * s, y - 0.4 * s, 0.22 * s, 0.4 * s, roof, "cabin")


def balloons(out: list[Shape], rng: np.random.Generator, colour: Colour, aspect: float) -> None:
    for i in range(rng.integers(1, 3)):
        x, y = rng.uniform(0.12, 0.88) * aspect, rng.uniform(0.12, 0.34)
        r = rng.uniform(0.045, 0.065) * (1 - 0.35 * i)
        t = np.linspace(0, 2 * math.pi, 49)[:-1]
        # A disc above its middle, drawn in to the basket below it.
        drop = np.where(np.sin(t) > 0, 1.45, 1.0)
        squeeze = np.where(np.sin(t) > 0, 1 - 0.28 * np.sin(t), 1.0)
        for k, tone in ((1.0, colour), (0.68, mix(colour, (255, 244, 220), 0.8)), (0.3, colour)):
            points = np.stack([x + k * r * np.cos(t) * squeeze, y + r * np.sin(t) * drop], 1)
            polygon(out, points, tone, "balloon")
        for dx in (-0.2, 0.17):
            polygon(
                out,
                [
                    (x + dx * r, y + 1.4 * r),
                    (x + (dx + 0.04) * r, y + 1.4 * r),
                    (x + (0.8 * dx + 0.04) * r, y + 1.8 * r),
                    (x + 0.8 * dx * r, y + 1.8 * r),
                ],
                (70, 50, 46),
                "balloon",
            )
        rect(out, x - 0.2 * r, y + 1.76 * r, 0.4 * r, 0.3 * r, (92, 60, 44), "balloon")


def birds(out: list[Shape], rng: np.random.Generator, p: Palette, aspect: float) -> None:
    x, y = rng.uniform(0.2, 0.75) * aspect, rng.uniform(0.16, 0.36)
    colour = mix(p.land[1], (20, 20, 30), 0.4)
    for _ in range(rng.integers(3, 7)):
        bx, by, s = x + rng.uniform(-0.1, 0.1), y + rng.uniform(-0.05, 0.05), rng.uniform(0.012, 0.02)
        polygon(
            out,
            [(bx - s, by - 0.35 * s), (bx - 0.45 * s, by - 0.62 * s), (bx, by), (bx + 0.45 * s, by - 0.62 * s), (bx + s, by - 0.35 * s),
             (bx + 0.42 * s, by - 0.38 * s), (bx, by + 0.3 * s), (bx - 0.42 * s, by - 0.38 * s)],
            colour, "birds",
        )  # fmt: skip
