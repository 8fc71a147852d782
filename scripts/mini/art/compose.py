"""A scene from a seed: which attributes it has and where things stand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from art.palettes import PALETTES, Palette, Time
from art.scene import WET, Boat, Body, Disc, Front, Scene, Side, Style, Terrain, Tone
from art.terrain import plan_layers

T = TypeVar("T")
_TERRAIN_SHARES = (0.14, 0.12, 0.08, 0.12, 0.09, 0.08, 0.09, 0.07, 0.07, 0.08, 0.06)  # in the order of Terrain
_SUNS = (Body.SUN, Body.BIG_SUN)
# A disc may stand on the horizon of these.
_LOW = (Terrain.SEA, Terrain.ISLANDS, Terrain.DUNES, Terrain.HILLS, Terrain.MESAS, Terrain.CLOUDS)
_SNOWY = (Terrain.MOUNTAINS, Terrain.VOLCANO, Terrain.LAKE, Terrain.CLOUDS)
_BARE = (Terrain.SEA, Terrain.ISLANDS, Terrain.DUNES, Terrain.CLOUDS, Terrain.FOREST)  # nothing grows in front of them


def choose(rng: np.random.Generator, options: Sequence[T], shares: Sequence[float] | None = None) -> T:
    return options[int(rng.choice(len(options), p=shares))]


def compose(seed: int, aspect: float = 1.0) -> Scene:
    """The same seed and aspect give the same scene."""
    rng = np.random.default_rng([seed, round(aspect * 1000), 77])
    name = choose(rng, tuple(PALETTES))
    palette = PALETTES[name]
    terrain = choose(rng, tuple(Terrain), _TERRAIN_SHARES)
    style = Style.INK if name == "ink" else choose(rng, tuple(Style), (0.36, 0.08, 0.28, 0.28))
    body = _choose_body(rng, name, palette)
    side = choose(rng, tuple(Side))
    stars = palette.stars > 0 and rng.random() < palette.stars
    aurora = palette.time is Time.NIGHT and rng.random() < 0.35
    clouds = not aurora and rng.random() < 0.45
    snow = terrain in _SNOWY and (name == "winter" or rng.random() < 0.5)
    front = Front.NONE
    if terrain not in _BARE:
        front = choose(rng, tuple(Front), (0.8, 0.2, 0.0) if terrain is Terrain.MESAS else (0.45, 0.3, 0.25))
    sails = terrain in WET and rng.random() < 0.4
    horizon = _horizon(rng, terrain)
    disc = _place_disc(rng, body, side, terrain, horizon, aspect)
    tone = _tone(rng, lit=-1.0 if disc.x > 0.5 * aspect else 1.0)
    boat = Boat(x=rng.uniform(0.2, 0.8) * aspect, size=rng.uniform(0.11, 0.19), sail=rng.random())
    layers = plan_layers(rng, terrain, horizon, aspect, front, snow)
    return Scene(
        seed=seed,
        aspect=aspect,
        palette_name=name,
        terrain=terrain,
        style=style,
        body=body,
        side=side,
        front=front,
        clouds=clouds,
        stars=stars,
        aurora=aurora,
        snow=any(layer.snow for layer in layers),
        horizon=horizon,
        discs=() if body is Body.NONE else (disc,),
        boat=boat if sails else None,
        layers=layers,
        tone=tone,
    )


def _choose_body(rng: np.random.Generator, name: str, palette: Palette) -> Body:
    if palette.time is Time.NIGHT:
        return choose(rng, (Body.NONE, Body.FULL_MOON, Body.CRESCENT), (0.2, 0.5, 0.3))
    if name in ("winter", "dusk"):
        return choose(rng, (Body.NONE, *_SUNS, Body.FULL_MOON), (0.3, 0.3, 0.2, 0.2))
    return choose(rng, (Body.NONE, *_SUNS), (0.25, 0.4, 0.35))


def _horizon(rng: np.random.Generator, terrain: Terrain) -> float:
    low, high = {Terrain.SEA: (0.5, 0.68), Terrain.ISLANDS: (0.55, 0.68), Terrain.LAKE: (0.58, 0.68)}.get(
        terrain, (0.55, 0.7)
    )
    return rng.uniform(low, high)


def _place_disc(
    rng: np.random.Generator, body: Body, side: Side, terrain: Terrain, horizon: float, aspect: float
) -> Disc:
    """Where a disc stands, or would: its side decides where the light comes from."""
    low, high = {Body.BIG_SUN: (0.11, 0.16), Body.FULL_MOON: (0.06, 0.11)}.get(body, (0.055, 0.08))
    radius = rng.uniform(low, high)
    low, high = {Side.LEFT: (0.2, 0.3), Side.CENTRE: (0.45, 0.55), Side.RIGHT: (0.7, 0.8)}[side]
    x = float(np.clip(rng.uniform(low, high) * aspect, 1.15 * radius, aspect - 1.15 * radius))
    sets = terrain in _LOW and rng.random() < 0.45 and body in _SUNS
    y = horizon - radius * rng.uniform(0.1, 0.9) if sets else rng.uniform(0.16, 0.3)
    return Disc(x=x, y=y, radius=radius)


def _tone(rng: np.random.Generator, lit: float) -> Tone:
    lightness, *hue = rng.normal(0, 1, 3) * (0.012, 0.008, 0.008)
    return Tone(
        shift=(lightness, hue[0], hue[1]),
        middle=rng.uniform(0.42, 0.6),
        bokashi=rng.random() < 0.5,
        mist=rng.uniform(0.35, 0.8),
        cover=rng.uniform(-0.15, 0.2),
        cloud=int(rng.integers(3)),
        relief=rng.uniform(0.7, 1.1),
        ridges=rng.uniform(0.5, 1.0),
        lit=lit,
    )
