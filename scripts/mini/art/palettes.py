"""Sixteen palettes: fifteen colours each, the time of day, and how likely stars are."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from art.colour import parse_hex


class Time(StrEnum):
    MORNING = "morning"
    DAY = "day"
    EVENING = "evening"
    NIGHT = "night"


@dataclass(frozen=True, kw_only=True)
class Palette:
    """sRGB colours (3,) in [0, 1]."""

    sky: tuple[np.ndarray, np.ndarray, np.ndarray]  # top, middle, low
    land: tuple[np.ndarray, np.ndarray]  # far, near
    mist: np.ndarray
    light: np.ndarray  # lit flanks
    sun: np.ndarray  # or moon
    glow: np.ndarray  # around it
    cloud: np.ndarray
    water: np.ndarray  # where it is deep
    snow: np.ndarray
    leaves: tuple[np.ndarray, np.ndarray, np.ndarray]
    time: Time
    stars: float  # how likely
    glowing: float  # how strong the glow is, 0 to 1


# sky: top, middle, low | land: far, near | mist | light | sun | glow | cloud | water | snow | leaves
_TABLE = """
dawn      7d9cc4 e3c3cb fbe2c2 b4adca 37456a f3dccc f2c6b0 f0694c ffd9b0 fbeadf 5d7799 fbeeea 7d6a8e c98a94 56648a
noon      2a78b4 86c1dd e4f0e2 8db4c6 1d4c4a dcebe8 cfe0b8 fff3cf ffffff ffffff 175f86 ffffff 4f8a4e 86ae52 2b6a52
sunset    3d1d4e c43a3b f9ab50 b2504f 26102f ea8f5a ffc07a ffe6a6 ffc46a f58a54 5a1d3c f9c7a0 8e2b34 c4552f 4a1a3a
dusk      28285a 7c5a94 efae9f 8c77a8 1b193b cda0b4 eab9a6 ffdcae ffc9a0 c58aa4 373463 e6cfd6 533a6a 8a5578 2c2850
night     050c25 11265a 375a8d 3a5584 050a1b 40639a 86a2c8 f7f0d2 a9c1e0 3a5488 0a1738 b9cbe4 14284c 24406a 0b1834
autumn    d8a452 efcf8c f9ebc8 c79a64 54230f f3dfb4 f0c070 d83f26 fbe3a8 fbf0d6 8c5a38 fbf2e0 c2361d e3892b 8e2318
winter    889fbf c2d2e1 f0f4f5 a7bbce 2a3a55 e8eef3 ffffff f4efe2 ffffff fafcfd 6f8fb0 ffffff 51657f 8fa4b8 2f435e
ink       cfc8b6 e6e1d2 f2eee2 b0ada4 1b1c1f ece8db d6d2c6 c22f25 f4ecd8 f3efe4 8c8a84 f4f1e8 3a3a3a 77746c 1e1e20
jade      63b0a2 b6dbc2 eff5dc 88bfac 0b4541 deefdc d3e8a8 fcf7dc fbfde6 f6fbea 2a7f78 f5fbf0 2c7a5a 74ae62 12544c
spring    9fbfe2 f2d0dc fdeee6 c6b4d4 544676 f9e4e6 fbd8d4 ee6f86 ffe6e0 fff4f2 8d9cc8 fff4f4 e98aa6 f7bccb b8658e
storm     343f49 717f86 cbd1c7 87959a 182629 b3bdba c3cbbd f2ecd4 e9ead8 9aa6a8 2f4148 dfe5e2 34483f 5f7362 1d2c2c
desert    3b8d9f b6d1c1 f8e0b0 d8976d 762a1c f4d2a0 f7bd80 fdeec8 fff0c8 fbf0dc 2d7f8a fbeede b5562b d98a45 7c2f1f
moonlight 04202b 0e4855 539490 33727a 03141b 5f9f98 9ed0bc f5f2d4 b9e0cc 3d7f82 07303a bfe0d8 0f4a4c 1f6a62 082a32
indigo    193b78 a4b6c4 f1e8d2 6a8db0 0f2852 ebe3cf dcd8c2 d8452d f8e6c6 f5efdf 24508c f6f1e4 27487c 5f83a6 12284e
gold      b98a3e e8c274 fdf0c4 b9935c 33230f f6e0a8 ffe49a fffbe2 fff0b0 fff1c8 7a5a2a fff6dc 8a6a1e d0a238 4e3a12
coral     3f6d9c e8927f fcd9a8 c77e7e 3a1f3c f6bb9c ffc9a0 fff0c4 ffd6a0 fbc0a4 3d5a86 fce6d8 a8434e e0785a 5c2c4c
"""
_TIMES = {
    Time.MORNING: ("dawn",),
    Time.EVENING: ("sunset", "dusk", "gold", "coral"),
    Time.NIGHT: ("night", "moonlight"),
}
_STARS = {"dusk": 0.3, "night": 0.85, "moonlight": 0.5}
_GLOWING = {"ink": 0.1, "storm": 0.3, "indigo": 0.25}


def _palette(name: str, *colours: str) -> Palette:
    c = [parse_hex(text) for text in colours]
    return Palette(
        sky=(c[0], c[1], c[2]),
        land=(c[3], c[4]),
        mist=c[5],
        light=c[6],
        sun=c[7],
        glow=c[8],
        cloud=c[9],
        water=c[10],
        snow=c[11],
        leaves=(c[12], c[13], c[14]),
        time=next((time for time, names in _TIMES.items() if name in names), Time.DAY),
        stars=_STARS.get(name, 0.0),
        glowing=_GLOWING.get(name, 0.5),
    )


PALETTES: dict[str, Palette] = {
    line.split()[0]: _palette(*line.split()) for line in _TABLE.splitlines() if line.strip()
}
