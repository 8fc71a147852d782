"""How round are discs? The fault that a poster shows first, and that no classifier of words sees."""

from __future__ import annotations

import art
import numpy as np
from art import Body, Drawing, Scene, Thing
from PIL import Image, ImageDraw, ImageFilter
from pool import HELD_OUT

_SEEDS = HELD_OUT + 60_000
_DRAWN = 0.97  # the least for a drawn disc, or colours near its own have misled the search
_SIZES = (0.6, 1.6)  # of a drawn disc's area: less is a sun that sets, more is one with cloud or snow


def scenes_of_big_suns(count: int) -> list[tuple[Scene, Drawing]]:
    """Held-out scenes, each with a big sun clear of the horizon whose outline stands out in the drawing."""
    found: list[tuple[Scene, Drawing]] = []
    seed = _SEEDS
    while len(found) < count:
        scene = art.compose(seed)
        seed += 1
        if scene.body is Body.BIG_SUN and scene.horizon > scene.discs[0].y + 1.3 * scene.discs[0].radius:
            drawing = art.draw(scene)
            shape = disc_roundness(drawing.pixels, scene, drawing)
            if shape is not None and shape > _DRAWN:
                found.append((scene, drawing))
    return found


def disc_roundness(picture: np.ndarray, scene: Scene, drawing: Drawing) -> float | None:
    """`roundness` of the disc in a picture of the scene, as large as its drawing, which tells the disc's colour. None
    if the drawing shows no disc, or what is found is much smaller or larger than it. Only what is above the drawing's
    horizon counts: below it are reflections."""
    shown = drawing.things == Thing.BODY.number
    if not shown.any():
        return None
    sky = picture[: int(scene.horizon * len(picture))]
    disc = find_disc(sky, drawing.pixels[shown].mean(axis=0))
    low, high = _SIZES
    return roundness(disc) if low <= disc.sum() / shown.sum() <= high else None


def find_disc(picture: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """(H, W) bool: what joins the place of a (H, W, 3) picture that is most like `colour`, and is like it."""
    far = np.linalg.norm(picture.astype(float) - colour, axis=2)
    blurred = Image.fromarray(np.minimum(far, 255).astype(np.uint8)).filter(ImageFilter.BoxBlur(4))
    row, column = np.unravel_index(np.asarray(blurred).argmin(), far.shape)
    like = far < np.median(far) / 2
    like[row, column] = True
    mask = Image.fromarray(like.astype(np.uint8)).copy()  # an image that shares its memory is not filled
    ImageDraw.floodfill(mask, (int(column), int(row)), 2)
    return np.asarray(mask) == 2


def roundness(shape: np.ndarray) -> float:
    """Intersection over union of a (H, W) bool and the circle of the same area around its middle: 1 for a circle."""
    places = np.argwhere(shape)
    inside = ((places - places.mean(axis=0)) ** 2).sum(axis=1) <= len(places) / np.pi
    return float(inside.sum() / (2 * len(places) - inside.sum()))
