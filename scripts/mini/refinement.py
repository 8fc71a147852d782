"""Does refining add detail like that of a finer drawing? Power spectra of a scene, drawn and refined."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import NamedTuple

import art
import numpy as np
from captions import caption
from inner import tile_borders
from pictures import rendered
from PIL import Image
from pool import HELD_OUT, SIDE
from posters import Seams, find_seams

_SEEDS = HELD_OUT + 7_000


class Refined(NamedTuple):
    prompt: str
    octaves: dict[float, tuple[float, float]]  # by wavelength in px, halved at each step: dB, refined and Lanczos
    seams: Seams
    picture: np.ndarray  # (size, size, 3) uint8
    drawn: np.ndarray  # the same scene, drawn as large


def compare_refined(model: Path, k: int, size: int, strength: float) -> Refined:
    """How much more power than a drawing of `size` there is in its 256-px view refined at `strength`, and in the same
    view enlarged by Lanczos. It is refined as `render` does it: again at each doubling of its side."""
    scene = art.compose(_SEEDS + k)
    prompt = caption(scene, np.random.default_rng(k), keep=1.0)
    small = Image.fromarray(art.draw(scene, None, SIDE, SIDE).pixels)
    with tempfile.TemporaryDirectory() as folder:
        guide = Path(folder) / "guide.png"
        small.save(guide)
        for side in (size >> n for n in reversed(range(int(np.log2(size / SIDE))))):
            refined = rendered(model, prompt, side, side, k, guide_image=guide, strength=strength)
            Image.fromarray(refined).save(guide)
    drawn = art.draw(scene, None, size, size).pixels
    lanczos = np.asarray(small.resize((size, size), Image.Resampling.LANCZOS))
    want, *found = (power(picture) for picture in (drawn, refined, lanczos))
    octaves = {w: tuple(10 * np.log10(max(1e-12, p[w]) / max(1e-12, want[w])) for p in found) for w in want}
    return Refined(prompt, octaves, find_seams(refined, *tile_borders(str(model), size, size)), refined, drawn)


def power(picture: np.ndarray) -> dict[float, float]:
    """Mean power of a square picture's brightness by octave: shortest wavelength of the octave in px → power. The edges
    are faded, or the jump from the right edge to the left would be in every octave."""
    side = len(picture)
    window = np.hanning(side)
    grey = picture.astype(float).mean(axis=2)
    spectrum = np.abs(np.fft.rfft2((grey - grey.mean()) * window[:, None] * window)) ** 2
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side))  # waves a px
    octaves = [2.0**k for k in range(1, int(np.log2(side)) - 1)]
    return {w: float(spectrum[(frequency <= 1 / w) & (frequency > 0.5 / w)].mean()) for w in octaves}
