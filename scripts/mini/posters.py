"""Large canvases judged: do tiles show, is there one disc, does the canvas look like its guide?"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pool
from classifier import SIDE, Classifier, read
from inner import tile_borders
from pictures import rendered
from PIL import Image
from workshop import to_tensor

_LATENT = 8  # px: every eighth line is a little steeper, by the decoder


class Seams(NamedTuple):
    """How steep a picture is across the borders of tiles, over how steep it is beside them: 1 where none shows."""

    borders: float
    elsewhere: tuple[float, float]  # least and largest of the same score at lines where no tile ends


class Poster(NamedTuple):
    picture: np.ndarray  # (height, width, 3) uint8
    seams: Seams
    likeness: float  # correlation of the shrunken picture with the guide's
    discs: int


def judge_poster(model: Path, prompt: str, width: int, height: int, seed: int, classifier: Classifier) -> Poster:
    picture = rendered(model, prompt, width, height, seed)
    # The guide depends on the proportions alone. Half the size spares most of its decoding, but must have one too.
    half = 2 if max(width, height) > 2 * pool.SIDE else 1
    guide = _shrunk(rendered(model, prompt, width // half, height // half, seed, strength=0.0))
    small = _shrunk(picture)
    return Poster(
        picture=picture,
        seams=find_seams(picture, *tile_borders(str(model), width, height)),
        likeness=float(np.corrcoef(small.ravel(), guide.ravel())[0, 1]),
        discs=int(read(classifier, to_tensor(small[None]))["count"].argmax()),
    )


def _shrunk(picture: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BOX))


def find_seams(picture: np.ndarray, rows: set[int], columns: set[int]) -> Seams:
    """The same lines moved by 16 to 64 px tell how far the score strays by itself."""
    size, moved = picture.shape[:2], []
    steps = [np.abs(np.diff(picture.astype(float), axis=axis)).mean(axis=(1 - axis, 2)) for axis in (0, 1)]
    for by in (k * _LATENT for k in range(-8, 9) if abs(k) >= 2):
        lines = [{at + by for at in borders} - borders for borders in (rows, columns)]
        moved.append(
            _score(steps, [{at for at in at_all if 0 < at < side} for at_all, side in zip(lines, size, strict=True)])
        )
    return Seams(_score(steps, [rows, columns]), (min(moved), max(moved)))


def _score(steps: list[np.ndarray], lines: list[set[int]]) -> float:
    """The median over all lines: the horizon near one would outweigh the rest."""
    scores = []
    for along, borders in zip(steps, lines, strict=True):
        for at in (border - 1 for border in borders):
            beside = [along[at + k * _LATENT] for k in (-2, -1, 1, 2) if 0 <= at + k * _LATENT < len(along)]
            scores.append(along[at] / max(1e-6, float(np.mean(beside))))
    return float(np.median(scores)) if scores else 1.0
