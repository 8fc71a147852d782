"""What a scene, or a view of it, is called: a grammar over its attributes, with many words for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum

import numpy as np
from art import WET, Body, Front, Scene, Side, Style, Terrain, Thing

PALETTE_WORDS = {
    "dawn": ("at dawn", "at daybreak", "in the early morning", "in soft morning light", "at sunrise"),
    "noon": ("at noon", "in bright daylight", "on a clear day", "under a blue sky", "in summer"),
    "sunset": ("at sunset", "at sundown", "under a red sky", "in red evening light"),
    "dusk": ("at dusk", "at twilight", "in the evening", "in purple evening light", "after sunset"),
    "night": ("at night", "by night", "under a dark blue night sky", "in the night"),
    "autumn": ("in autumn", "in fall colours", "in autumn colors", "in rust and ochre"),
    "winter": ("in winter", "in cold winter light", "on a winter day", "in pale winter tones"),
    "ink": ("in black ink", "in black and white", "in grey ink", "in monochrome"),
    "jade": ("in jade green", "in green tones", "in mint green", "in pale green light"),
    "spring": ("in spring", "in pink and lilac", "in cherry blossom time", "in pink light"),
    "storm": ("on a stormy day", "before the storm", "on a grey rainy day", "in gloomy light"),
    "desert": ("in the heat", "in terracotta and turquoise", "in warm desert light", "in the afternoon"),
    "moonlight": ("in moonlight", "on a moonlit night", "in teal moonlight", "in dark teal"),
    "indigo": ("in indigo blue", "in prussian blue", "in blue and cream", "in blue tones"),
    "gold": ("in golden light", "at golden hour", "in gold and brown", "in sepia"),
    "coral": ("in coral light", "in coral and blue", "in the glow of the evening", "in peach light"),
}
TERRAIN_WORDS = {
    Terrain.MOUNTAINS: ("mountains", "a mountain range", "rugged mountains", "mountain peaks"),
    Terrain.MISTY: ("misty mountains", "foggy mountains", "mountains in the mist", "mountain ridges in fog"),
    Terrain.VOLCANO: ("a volcano", "Mount Fuji", "a lone volcano", "a great mountain"),
    Terrain.LAKE: ("a mountain lake", "a lake below mountains", "a lake", "mountains reflected in a lake"),
    Terrain.SEA: ("the sea", "the ocean", "open sea", "a calm ocean"),
    Terrain.ISLANDS: ("islands in the sea", "sea cliffs", "rocks in the sea", "a rocky coast"),
    Terrain.HILLS: ("rolling hills", "hills", "soft hills", "gentle hills"),
    Terrain.DUNES: ("sand dunes", "dunes", "a desert of dunes", "desert sands"),
    Terrain.MESAS: ("mesas", "a canyon", "desert mesas", "table mountains"),
    Terrain.FOREST: ("a pine forest", "a misty forest", "forest", "pine woods on slopes"),
    Terrain.CLOUDS: ("a sea of clouds", "peaks above the clouds", "mountains above a sea of clouds"),
}
BODY_WORDS = {
    Body.SUN: ("a sun", "the sun", "a small sun"),
    Body.BIG_SUN: ("a big sun", "a huge sun", "a large sun"),
    Body.FULL_MOON: ("a full moon", "the moon", "a round moon", "the full moon"),
    Body.CRESCENT: ("a crescent moon", "a thin moon", "a sickle moon"),
}
NO_BODY_WORDS = ("no sun", "no moon")
SIDE_WORDS = {
    Side.LEFT: ("on the left", "at the left"),
    Side.CENTRE: ("in the centre", "in the middle", "in the center"),
    Side.RIGHT: ("on the right", "at the right"),
}
STYLE_WORDS = {
    Style.WOODBLOCK: ("woodblock print", "Japanese woodblock print", "ukiyo-e"),
    Style.INK: ("ink wash", "ink wash painting", "sumi-e"),
    Style.WATERCOLOUR: ("watercolour", "watercolor", "watercolour painting"),
    Style.SCREEN: ("screen print", "flat poster", "travel poster", "national park poster"),
}


class Object(StrEnum):
    """What a scene may have beside its land and its disc."""

    STARS = "stars"
    CLOUDS = "clouds"
    AURORA = "aurora"
    SNOW = "snow"
    BOAT = "boat"
    PINES = "pines"
    WOODS = "woods"


OBJECT_WORDS = {
    Object.STARS: ("stars", "a starry sky", "many stars"),
    Object.CLOUDS: ("clouds", "a cloudy sky", "some clouds"),
    Object.AURORA: ("northern lights", "aurora", "an aurora"),
    Object.SNOW: ("snow", "snowy peaks", "snow-capped peaks"),
    Object.BOAT: ("a sailing boat", "a sailboat", "a boat"),
    Object.PINES: ("pine trees", "pines in front", "fir trees"),
    Object.WOODS: ("woods", "trees", "bushes in front"),
}
_SEEN_AS = {
    Object.CLOUDS: Thing.CLOUDS,
    Object.SNOW: Thing.SNOW,
    Object.BOAT: Thing.BOAT,
    Object.PINES: Thing.PINES,
    Object.WOODS: Thing.WOODS,
}  # the others need sky to be seen
_CLOSE = ("detail of ", "close-up, ", "a part of ")


def has(scene: Scene, thing: Object) -> bool:
    return {
        Object.STARS: scene.stars,
        Object.CLOUDS: scene.clouds,
        Object.AURORA: scene.aurora,
        Object.SNOW: scene.snow,
        Object.BOAT: scene.boat is not None,
        Object.PINES: scene.front is Front.PINES or scene.terrain is Terrain.FOREST,
        Object.WOODS: scene.front is Front.WOODS,
    }[thing]


def as_seen(scene: Scene, shares: np.ndarray) -> Scene:
    """The scene without what the drawing of the whole, which shows `shares` of THINGS, hides behind something else."""

    def hidden(thing: Thing, least: float = 0.001) -> bool:
        return _share(shares, thing) < least

    if hidden(Thing.BODY, 0.0015):
        scene = replace(scene, body=Body.NONE, discs=())
    if hidden(Thing.PINES if scene.front is Front.PINES else Thing.WOODS):
        scene = replace(scene, front=Front.NONE)
    return replace(
        scene,
        clouds=scene.clouds and not hidden(Thing.CLOUDS),
        snow=scene.snow and not hidden(Thing.SNOW),
        boat=None if hidden(Thing.BOAT) else scene.boat,
    )


def caption(scene: Scene, rng: np.random.Generator, keep: float = 0.8, shares: np.ndarray | None = None) -> str:
    """Mentions each attribute with probability `keep`. With `shares`, the part of a view that shows each of THINGS,
    only what the view shows is mentioned, and no side."""
    things = [*_body(scene, rng, keep, shares), *_objects(scene, rng, keep, shares)]
    rng.shuffle(things)
    land = scene.terrain if shares is None else _visible_terrain(scene.terrain, shares)
    main = pick(rng, TERRAIN_WORDS[land]) if land and (rng.random() < max(0.95, keep) or not things) else ""
    if not main and not things:
        main = "the sky"
    light = pick(rng, PALETTE_WORDS[scene.palette_name]) if rng.random() < max(keep, 0.8) else ""
    style = pick(rng, STYLE_WORDS[scene.style]) if rng.random() < max(0.5, keep - 0.15) else ""
    text = _sentence(main, light, things, rng)
    if shares is not None and rng.random() < 0.6:
        text = pick(rng, _CLOSE) + text
    return _with_style(text, style, rng)


def pick(rng: np.random.Generator, words: Sequence[str]) -> str:
    return words[int(rng.integers(len(words)))]


def _share(shares: np.ndarray, *things: Thing) -> float:
    return float(sum(shares[thing.number] for thing in things))


def _body(scene: Scene, rng: np.random.Generator, keep: float, shares: np.ndarray | None) -> list[str]:
    if shares is not None:
        seen = scene.body is not Body.NONE and _share(shares, Thing.BODY) > 0.02
        return [pick(rng, BODY_WORDS[scene.body])] if seen and rng.random() < keep else []
    if scene.body is Body.NONE:
        return [pick(rng, NO_BODY_WORDS)] if rng.random() < (1 if keep == 1 else 0.2) else []
    if rng.random() >= keep:
        return []
    side = f" {pick(rng, SIDE_WORDS[scene.side])}" if rng.random() < max(0.75, keep) else ""
    return [pick(rng, BODY_WORDS[scene.body]) + side]


def _objects(scene: Scene, rng: np.random.Generator, keep: float, shares: np.ndarray | None) -> list[str]:
    said = []
    for thing in Object:
        if not has(scene, thing) or (shares is None and thing is Object.PINES and scene.terrain is Terrain.FOREST):
            continue
        if shares is None:
            seen = True
        elif thing in _SEEN_AS:
            seen = _share(shares, _SEEN_AS[thing]) > 0.02
        else:
            seen = _share(shares, Thing.SKY) > 0.3
        if seen and rng.random() < keep:
            said.append(pick(rng, OBJECT_WORDS[thing]))
    return said


def _visible_terrain(terrain: Terrain, shares: np.ndarray) -> Terrain | None:
    """What a view that shows these shares would be called."""
    land, water = _share(shares, Thing.LAND, Thing.SNOW) > 0.05, _share(shares, Thing.WATER) > 0.05
    if terrain in WET:
        if land and water:
            return terrain
        return Terrain.SEA if water else Terrain.MOUNTAINS if land else None
    if terrain is Terrain.FOREST:
        land = land or _share(shares, Thing.PINES) > 0.05
    return terrain if land else None


def _sentence(main: str, light: str, things: list[str], rng: np.random.Generator) -> str:
    if main and things and rng.random() < 0.5:
        listed = things[0] if len(things) == 1 else ", ".join(things[:-1]) + " and " + things[-1]
        return " ".join(part for part in (main, light, "with", listed) if part)
    parts = [part for part in (main, light, *things) if part]
    if rng.random() < 0.2:
        rng.shuffle(parts)
    return ", ".join(parts)


def _with_style(text: str, style: str, rng: np.random.Generator) -> str:
    if not style:
        return text
    form = rng.random()
    if form < 0.6:
        return f"{text}, {style}"
    article = "an" if style.startswith("ink") else "a"
    return f"{article} {style} of {text}" if form < 0.85 else f"{style}, {text}"
