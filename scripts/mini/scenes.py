"""Minimalist travel posters, drawn from a seed: the art that `mini` learns.

A scene is a list of flat shapes in world units: y runs from 0 (top) to 1 (bottom), x from 0 to `aspect`. Nothing
depends on pixels, so any view can be drawn at any size. Knows nothing of models or training.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pieces
import skia
from pieces import Palette
from shapes import Colour, Shape, View


def _hex(text: str) -> Colour:
    return int(text[0:2], 16), int(text[2:4], 16), int(text[4:6], 16)


def _palette(sky: str, land: str, water: str, body: str, cloud: str, light: str, **flags: bool) -> Palette:
    s, n, w = sky.split(), land.split(), water.split()
    return Palette(
        sky=(_hex(s[0]), _hex(s[1]), _hex(s[2])),
        land=(_hex(n[0]), _hex(n[1])),
        water=(_hex(w[0]), _hex(w[1])),
        body=_hex(body),
        cloud=_hex(cloud),
        light=_hex(light),
        **flags,
    )


PALETTES: dict[str, Palette] = {
    "dusk": _palette(
        "33285f 8c4a7d e98a6b", "5d3b70 1d1531", "a2607c 2c1f4b", "f7b267", "b56a86", "ffd58a", stars=True
    ),
    "dawn": _palette("9fb3d9 e6c3d5 fbdcc4", "a58bb0 5f5580", "c9b0ca 7f84ad", "fff3d6", "fdeae6", "fff6df"),
    "night": _palette(
        "0a0d3a 17205c 2c3a7e", "273468 080b22", "24316b 0c1238", "f4ecc8", "39468a", "ffe08a", moon=True, stars=True
    ),
    "noon": _palette("3f9be8 8cc8ef d8f0f7", "74b06c 1f5a3f", "4fb0dd 1f6ea6", "fff8dc", "ffffff", "fffbe6"),
    "autumn": _palette("e3b062 f1c97a fbe6a6", "b0703c 5a2418", "d59a5c 8e5230", "e2542c", "fdf0cf", "ffe9b0"),
    "mint": _palette("86dcc8 aeead5 e2f8e4", "5da892 1f5a52", "7fd0bb 3f9c8c", "fdfbdc", "f3fff4", "f6ffe8"),
    "sunset": _palette("7d1d3a d8462e f9a14a", "8e2a35 2c0a1e", "d2553a 6d1a37", "ffe29a", "f07c3e", "ffd27a"),
    "winter": _palette(
        "8fa9d0 b9cbe4 e6edf5", "8397b4 3a4a66", "a9bdd8 6f87ab", "ffffff", "f8fbff", "fdfdff", moon=True
    ),
}
TERRAINS = (
    "mountains",
    "misty mountains",
    "snowy mountains",
    "hills",
    "sea",
    "lake",
    "islands",
    "skyline",
    "skyline by the water",
)
BODIES = ("none", "sun", "big sun", "full moon", "crescent moon")
SIDES = ("left", "centre", "right")
SAILS = {"red": (206, 52, 56), "orange": (240, 130, 44), "white": (248, 246, 238)}
BALLOONS = {"red": (208, 56, 48), "yellow": (244, 186, 66), "teal": (32, 120, 122)}


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Attributes (what captions and the classifier speak of) and the shapes, back to front."""

    seed: int
    aspect: float
    palette: str
    terrain: str
    body: str
    side: str
    stars: bool
    clouds: bool
    birds: bool
    pines: bool
    cabin: bool
    boat: str  # sail colour, or ""
    balloon: str  # colour, or ""
    horizon: float
    shapes: list[Shape] = field(repr=False)


def make(seed: int, aspect: float = 1.0) -> Scene:
    """The scene of `seed`; the same seed and aspect always give the same scene."""
    rng = np.random.default_rng([seed, round(aspect * 1000)])
    name = str(rng.choice(list(PALETTES)))
    palette = PALETTES[name]
    terrain = str(rng.choice(TERRAINS))
    body = _choose_body(rng, name)
    side = str(rng.choice(SIDES))
    horizon = float(rng.uniform(0.54, 0.66))
    stars = palette.stars and rng.random() < (0.8 if name == "night" else 0.5)
    clouds = rng.random() < 0.4
    birds = rng.random() < 0.25
    wet = terrain in pieces.WATER
    boat = str(rng.choice(list(SAILS))) if wet and rng.random() < 0.45 else ""
    pines = not wet and terrain != "skyline" and rng.random() < 0.4
    cabin = terrain in ("hills", "mountains", "snowy mountains", "lake") and rng.random() < 0.3
    balloon = str(rng.choice(list(BALLOONS))) if rng.random() < 0.3 else ""
    shapes: list[Shape] = []
    pieces.sky(shapes, palette, aspect)
    if stars:
        pieces.stars(shapes, rng, palette, aspect, horizon)
    centre = pieces.body(shapes, rng, palette, body, side, aspect, horizon, low=wet or terrain == "hills")
    if clouds:
        pieces.clouds(shapes, rng, palette, aspect)
    pieces.terrain(shapes, rng, palette, terrain, aspect, horizon, centre)
    if boat:
        pieces.boat(shapes, rng, palette, SAILS[boat], aspect, horizon)
    if pines:
        pieces.pines(shapes, rng, palette, aspect)
    if cabin:
        pieces.cabin(shapes, rng, palette, aspect, horizon, lake=terrain == "lake")
    if balloon:
        pieces.balloons(shapes, rng, BALLOONS[balloon], aspect)
    if birds:
        pieces.birds(shapes, rng, palette, aspect)
    return Scene(
        seed=seed, aspect=aspect, palette=name, terrain=terrain, body=body, side=side, stars=bool(stars),
        clouds=bool(clouds), birds=bool(birds), pines=bool(pines), cabin=bool(cabin), boat=boat, balloon=balloon,
        horizon=horizon, shapes=shapes,
    )  # fmt: skip


def _choose_body(rng: np.random.Generator, palette: str) -> str:
    if palette == "night":
        return str(rng.choice(["none", "full moon", "crescent moon"], p=[0.15, 0.45, 0.4]))
    if palette == "winter":
        return str(rng.choice(["none", "sun", "big sun", "full moon"], p=[0.15, 0.35, 0.25, 0.25]))
    return str(rng.choice(["none", "sun", "big sun"], p=[0.15, 0.5, 0.35]))


def render(scene: Scene, view: View | None, width: int, height: int, *, smooth: bool = True) -> np.ndarray:
    """Draw `view` (the whole scene when None), `smooth` means antialiased: (height, width, 3) uint8 RGB."""
    view = view or View(0.0, 0.0, scene.aspect, 1.0)
    surface = skia.Surface(width, height)
    canvas = surface.getCanvas()
    canvas.clear(skia.ColorWHITE)
    canvas.scale(width / (view.x1 - view.x0), height / (view.y1 - view.y0))
    canvas.translate(-view.x0, -view.y0)
    paint = skia.Paint(AntiAlias=smooth)
    for shape in scene.shapes:
        paint.setARGB(round(255 * shape.alpha), *shape.colour)
        d = shape.data
        if shape.kind == "polygon":
            path = skia.Path.Polygon([skia.Point(float(x), float(y)) for x, y in d], True)
            canvas.drawPath(path, paint)
        elif shape.kind == "disc":
            canvas.drawCircle(float(d[0]), float(d[1]), float(d[2]), paint)
        else:
            x, y, w, h = (float(v) for v in d)
            canvas.drawRoundRect(skia.Rect.MakeXYWH(x, y, w, h), h / 2, h / 2, paint)
    # N32 is BGRA in memory; ask for RGBA and drop alpha.
    pixels = surface.toarray(colorType=skia.kRGBA_8888_ColorType)
    return np.ascontiguousarray(pixels[..., :3])
