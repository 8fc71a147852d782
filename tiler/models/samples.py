"""What a denoiser is asked: one sample is a crop of the canvas under one prompt. Data only."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Prompt(NamedTuple):
    """A prompt's embeddings, fp32: `tokens` (1, L, W), one row a token; `pooled` (1, P), one vector for all of it, where the
    family has one."""

    tokens: Tensor
    pooled: Tensor | None = None


class Place(NamedTuple):
    """Where a tile lies, in canvas pixels: its top-left corner, taken modulo the canvas, its size, and the canvas's
    (height, width)."""

    top: int
    left: int
    height: int
    width: int
    canvas: tuple[int, int]


class Sample(NamedTuple):
    """One input of the denoiser: `latents` (1, C, h, w) fp32 as the schedule scales them; `guidance` is the guidance scale, for
    families that take it as an input."""

    latents: Tensor
    prompt: Prompt
    place: Place
    guidance: float
