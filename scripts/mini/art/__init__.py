"""Landscape prints drawn from a seed: woodblocks, ink washes, watercolours and screen prints of fractal noise.

`compose` makes a scene of a seed, `draw` makes a picture of any view of it.
"""

from art.compose import compose
from art.draw import Drawing, draw
from art.palettes import PALETTES, Time
from art.scene import THINGS, WET, Body, Disc, Front, Scene, Side, Style, Terrain, Thing, View

__all__ = [
    "PALETTES",
    "THINGS",
    "WET",
    "Body",
    "Disc",
    "Drawing",
    "Front",
    "Scene",
    "Side",
    "Style",
    "Terrain",
    "Thing",
    "Time",
    "View",
    "compose",
    "draw",
]
