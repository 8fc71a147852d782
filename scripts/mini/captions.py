"""What a scene, or a crop of it, is called: a grammar over attributes, several captions for each scene.

Knows nothing of drawing beyond bounding boxes: a crop is captioned by what its rectangle shows.
"""

from __future__ import annotations

import numpy as np
from scenes import Scene
from shapes import View, bounds

PALETTE_WORDS = {
    "dusk": ("at dusk", "at twilight", "in the evening", "in purple dusk light"),
    "dawn": ("at dawn", "at daybreak", "in the early morning", "in soft pink morning light"),
    "night": ("at night", "by night", "under a dark night sky", "in the night"),
    "noon": ("at noon", "in bright daylight", "on a clear day", "under a blue sky"),
    "autumn": ("in autumn", "in fall colours", "in autumn colors", "in golden autumn light"),
    "mint": ("in mint green", "in mint tones", "in pale green light", "in mint colours"),
    "sunset": ("at sunset", "in red sunset light", "under a red sky", "at sundown"),
    "winter": ("in winter", "in cold winter light", "on a winter day", "in pale blue winter tones"),
}
TERRAIN_WORDS = {
    "mountains": ("mountains", "a mountain range", "rugged mountains", "mountain peaks"),
    "misty mountains": ("misty mountains", "foggy mountains", "mountains in the mist"),
    "snowy mountains": ("snow-capped mountains", "snowy mountains", "mountains with snow"),
    "hills": ("rolling hills", "hills", "soft hills", "gentle hills"),
    "sea": ("the sea", "the ocean", "open sea", "a calm ocean"),
    "lake": ("a mountain lake", "a lake below mountains", "a lake", "mountains by a lake"),
    "islands": ("islands in the sea", "an island in the ocean", "islands", "the sea with islands"),
    "skyline": ("a city skyline", "a city", "skyscrapers", "a town skyline"),
    "skyline by the water": (
        "a city skyline by the water",
        "a harbour city",
        "a city by the river",
        "a skyline at the waterfront",
    ),
}
BODY_WORDS = {
    "sun": ("a sun", "the sun", "a small sun"),
    "big sun": ("a big sun", "a huge sun", "a large sun"),
    "full moon": ("a full moon", "the full moon", "a round moon"),
    "crescent moon": ("a crescent moon", "a thin moon", "a sickle moon"),
}
SIDE_WORDS = {
    "left": ("on the left", "at the left"),
    "centre": ("in the centre", "in the middle", "in the center"),
    "right": ("on the right", "at the right"),
}
OBJECT_WORDS = {
    "stars": ("stars", "a starry sky", "many stars"),
    "clouds": ("clouds", "white clouds", "some clouds"),
    "birds": ("birds", "a flock of birds", "flying birds"),
    "pines": ("pine trees", "a pine forest", "fir trees"),
    "cabin": ("a cabin", "a small house", "a hut"),
}
PREFIX = (
    "",
    "",
    "",
    "poster of ",
    "a travel poster of ",
    "minimalist poster, ",
    "a flat illustration of ",
    "landscape, ",
)


def caption(scene: Scene, rng: np.random.Generator, view: View | None = None, keep: float = 0.8) -> str:
    """One caption; each attribute is mentioned with probability `keep` (1: everything, also that there is no
    sun or moon). With `view`, only what the crop shows."""

    def pick(words: tuple[str, ...]) -> str:
        return str(words[rng.integers(len(words))])

    def mention(tag: str) -> bool:
        return visible(scene, tag, view) and rng.random() < keep

    things = []
    if scene.body != "none" and mention("body"):
        side = _side(scene, view)
        things.append(
            pick(BODY_WORDS[scene.body])
            + (f" {pick(SIDE_WORDS[side])}" if side and rng.random() < max(0.8, keep) else "")
        )
    elif scene.body == "none" and view is None and rng.random() < (1.0 if keep == 1 else 0.25):
        things.append("no sun" if rng.random() < 0.6 else "no moon")
    things += [pick(words) for tag, words in OBJECT_WORDS.items() if getattr(scene, tag) and mention(tag)]
    if scene.boat and mention("boat"):
        article = "an" if scene.boat == "orange" else "a"
        things.append(
            f"a {pick(('sailing boat', 'sailboat', 'boat'))} with {pick((f'{article} {scene.boat} sail', f'{scene.boat} sails'))}"
        )
    if scene.balloon and mention("balloon"):
        things.append(
            pick(
                (
                    f"a {scene.balloon} hot-air balloon",
                    f"{scene.balloon} hot air balloons",
                    f"a {scene.balloon} balloon",
                )
            )
        )
    rng.shuffle(things)
    terrain = _terrain(scene, view)
    parts = [pick(TERRAIN_WORDS[terrain])] if terrain and (rng.random() < max(0.95, keep) or not things) else []
    if not parts and not things:
        parts = ["the sky"]
    light = pick(PALETTE_WORDS[scene.palette]) if rng.random() < max(keep, 0.85) else ""
    if parts and things and rng.random() < 0.5:
        text = f"{parts[0]} {light} with {_list(things)}" if light else f"{parts[0]} with {_list(things)}"
    else:
        text = ", ".join([*parts, *([light] if light else []), *things])
    if view is not None and rng.random() < 0.7:
        return f"{pick(('detail of ', 'close-up, ', 'a part of '))}{text}"
    return pick(PREFIX) + text


def visible(scene: Scene, tag: str, view: View | None) -> bool:
    """Whether the view shows at least a third of one shape of this tag (or is filled by it)."""
    if view is None:
        return any(shape.tag == tag for shape in scene.shapes)
    area = (view.x1 - view.x0) * (view.y1 - view.y0)
    for shape in scene.shapes:
        if shape.tag != tag:
            continue
        b = bounds(shape)
        w, h = min(b.x1, view.x1) - max(b.x0, view.x0), min(b.y1, view.y1) - max(b.y0, view.y0)
        if w > 0 and h > 0 and (w * h > 0.33 * (b.x1 - b.x0) * (b.y1 - b.y0) or w * h > 0.3 * area):
            return True
    return False


def _terrain(scene: Scene, view: View | None) -> str:
    if view is None:
        return scene.terrain
    dry = visible(scene, "land", view) or visible(scene, "skyline", view)
    wet = visible(scene, "water", view)
    match scene.terrain:
        case "skyline by the water":
            return (
                scene.terrain if dry and wet else "sea" if wet else "skyline" if visible(scene, "skyline", view) else ""
            )
        case "lake":
            return scene.terrain if dry and wet else "sea" if wet else "mountains" if dry else ""
        case "islands":
            return scene.terrain if dry and wet else "sea" if wet else ""
        case "sea":
            return scene.terrain if wet else ""
        case _:
            return scene.terrain if dry else ""


def _side(scene: Scene, view: View | None) -> str:
    body = next(bounds(s) for s in scene.shapes if s.tag == "body")
    x0, x1 = (0.0, scene.aspect) if view is None else (view.x0, view.x1)
    at = ((body.x0 + body.x1) / 2 - x0) / (x1 - x0)
    return "left" if at < 0.38 else "right" if at > 0.62 else "centre"


def _list(things: list[str]) -> str:
    return things[0] if len(things) == 1 else ", ".join(things[:-1]) + " and " + things[-1]
