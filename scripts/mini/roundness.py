"""How round are discs? The fault that a poster shows first, and that no classifier of words sees."""

from __future__ import annotations

import art
import numpy as np
from art import Body, Scene, Thing
from PIL import Image, ImageDraw, ImageFilter
from pool import HELD_OUT

_SEEDS = HELD_OUT + 60_000
_FOUND = 0.97  # as round as a drawn disc must seem: where colours of the sky are near the disc's, nothing is measured


def scenes_of_big_suns(count: int) -> list[Scene]:
    """Held-out scenes, each with a big sun clear of the horizon whose outline stands out in the drawing."""
    found: list[Scene] = []
    seed = _SEEDS
    while len(found) < count:
        scene = art.compose(seed)
        seed += 1
        if scene.body is Body.BIG_SUN and scene.horizon > scene.discs[0].y + 1.3 * scene.discs[0].radius:
            drawing = art.draw(scene)
            shows = (drawing.things == Thing.BODY.number).any()
            if shows and roundness(drawing.pixels, disc_colour(scene), scene.horizon) > _FOUND:
                found.append(scene)
    return found


def disc_colour(scene: Scene) -> np.ndarray:
    """(3,) the mean over the drawn disc."""
    drawing = art.draw(scene)
    return drawing.pixels[drawing.things == Thing.BODY.number].mean(axis=0)


def roundness(picture: np.ndarray, colour: np.ndarray, horizon: float) -> float:
    """Intersection over union of the disc of a (H, W, 3) picture and a circle of the same area around its middle: 1 for
    a circle. The disc is what joins the place above the horizon that is most like `colour`, and is like it."""
    sky = picture[: int(horizon * len(picture))].astype(float)
    far = np.linalg.norm(sky - colour, axis=2)
    blurred = Image.fromarray(np.minimum(far, 255).astype(np.uint8)).filter(ImageFilter.BoxBlur(4))
    row, column = np.unravel_index(np.asarray(blurred).argmin(), far.shape)
    like = far < np.median(far) / 2
    like[row, column] = True
    mask = Image.fromarray(like.astype(np.uint8)).copy()  # an image that shares its memory is not filled
    ImageDraw.floodfill(mask, (int(column), int(row)), 2)
    places = np.argwhere(np.asarray(mask) == 2)
    inside = ((places - places.mean(axis=0)) ** 2).sum(axis=1) <= len(places) / np.pi
    return float(inside.sum() / (2 * len(places) - inside.sum()))
