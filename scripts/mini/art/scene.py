"""What a scene is: its attributes, where things stand, and the layers of land from far to near. Pure data.

World units: y runs from 0 (top) to 1 (bottom), x from 0 to `aspect`. Nothing is in pixels, so any view can be drawn at
any size.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from art.palettes import PALETTES, Palette


class Terrain(StrEnum):
    MOUNTAINS = "mountains"
    MISTY = "misty mountains"
    VOLCANO = "volcano"
    LAKE = "lake"
    SEA = "sea"
    ISLANDS = "islands"
    HILLS = "hills"
    DUNES = "dunes"
    MESAS = "mesas"
    FOREST = "forest"
    CLOUDS = "sea of clouds"


WET = (Terrain.LAKE, Terrain.SEA, Terrain.ISLANDS)


class Body(StrEnum):
    """What stands in the sky."""

    NONE = "none"
    SUN = "sun"
    BIG_SUN = "big sun"
    FULL_MOON = "full moon"
    CRESCENT = "crescent moon"


class Side(StrEnum):
    LEFT = "left"
    CENTRE = "centre"
    RIGHT = "right"


class Style(StrEnum):
    WOODBLOCK = "woodblock print"
    INK = "ink wash"
    WATERCOLOUR = "watercolour"
    SCREEN = "screen print"


class Front(StrEnum):
    """What grows in front of everything else."""

    NONE = "none"
    PINES = "pines"
    WOODS = "woods"


class Thing(StrEnum):
    """What a pixel can show."""

    SKY = "sky"
    CLOUDS = "clouds"
    BODY = "body"
    LAND = "land"
    SNOW = "snow"
    WATER = "water"
    PINES = "pines"
    WOODS = "woods"
    BOAT = "boat"

    @property
    def number(self) -> int:
        return THINGS.index(self)


THINGS = tuple(Thing)


class Ridge(StrEnum):
    """The outline of a layer of land."""

    PEAKS = "peaks"
    CONE = "cone"
    HILLS = "hills"
    DUNES = "dunes"
    STACKS = "stacks"  # rocks in the sea
    MESAS = "mesas"
    PINES = "pines"
    WOODS = "woods"


@dataclass(frozen=True, kw_only=True)
class View:
    """The part of a scene that is drawn."""

    x0: float
    y0: float
    x1: float
    y1: float


@dataclass(frozen=True, kw_only=True)
class Disc:
    """A sun or a moon."""

    x: float
    y: float
    radius: float


@dataclass(frozen=True, kw_only=True)
class Boat:
    x: float
    size: float
    sail: float  # 0 to 1: from 0.6 on in the palette's sun colour, else white


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A strip of land. Each has noise of its own."""

    ridge: Ridge
    depth: float  # 0 far, 1 near
    base: float  # y of its foot
    height: float
    frequency: float  # peaks a unit
    seed: int
    snow: bool = False
    fringe: float = 0.0  # height of the trees along a bare ridge
    trees: float = 0.0  # height of the trees of a wood
    misty: bool = False
    bank: bool = False  # its foot lies in a sea of clouds
    front: bool = False
    centre: float = 0.0  # of a cone, as is
    width: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Tone:
    """How one scene differs from another of the same attributes."""

    shift: tuple[float, float, float]  # of all colours in OKLab
    middle: float  # where the sky's middle colour lies: 0 top, 1 horizon
    bokashi: bool  # a woodblock's dark band along the top
    mist: float
    cover: float  # how much of the sky is clouded
    cloud: int  # kind of clouds, 0 to 2
    relief: float
    ridges: float
    lit: float  # 1: light falls from the left, −1: from the right


@dataclass(frozen=True, kw_only=True)
class Scene:
    seed: int
    aspect: float  # width over height
    palette_name: str
    terrain: Terrain
    style: Style
    body: Body
    side: Side
    front: Front
    clouds: bool
    stars: bool
    aurora: bool
    snow: bool
    horizon: float  # y
    discs: tuple[Disc, ...]  # one of `body`, or none
    boat: Boat | None
    layers: tuple[Layer, ...]  # far to near
    tone: Tone

    @property
    def palette(self) -> Palette:
        return PALETTES[self.palette_name]
