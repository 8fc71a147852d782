"""Large canvases judged: do tiles show, is there one disc, does the canvas look like its guide?"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from classifier import SIDE, Classifier, read
from inner import tile_borders
from pictures import rendered
from PIL import Image
from workshop import to_tensor

_LATENT = 8  # px: every eighth line is a little steeper, by the decoder


class Poster(NamedTuple):
    picture: np.ndarray  # (height, width, 3) uint8
    seams: float  # gradient across the borders of tiles over that beside them: 1 where none shows
    likeness: float  # correlation of the shrunken picture with the guide's
    discs: int


def judge_poster(model: Path, prompt: str, width: int, height: int, seed: int, classifier: Classifier) -> Poster:
    picture = rendered(model, prompt, width, height, seed)
    guide = _shrunk(rendered(model, prompt, width, height, seed, strength=0.0))
    small = _shrunk(picture)
    return Poster(
        picture=picture,
        seams=seam_score(picture, *tile_borders(str(model), width, height)),
        likeness=float(np.corrcoef(small.ravel(), guide.ravel())[0, 1]),
        discs=int(read(classifier, to_tensor(small[None]))["count"].argmax()),
    )


def _shrunk(picture: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BOX))


def seam_score(picture: np.ndarray, rows: set[int], columns: set[int]) -> float:
    """The median over all borders: the horizon near one would outweigh the rest."""
    scores = []
    for axis, borders in enumerate((rows, columns)):
        steps = np.abs(np.diff(picture.astype(float), axis=axis)).mean(axis=(1 - axis, 2))
        for at in (border - 1 for border in borders):
            beside = [steps[at + k * _LATENT] for k in (-2, -1, 1, 2) if 0 <= at + k * _LATENT < len(steps)]
            scores.append(steps[at] / max(1e-6, float(np.mean(beside))))
    return float(np.median(scores)) if scores else 1.0
