"""The denoiser's inputs: one sample is a crop of the canvas under one prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tiler.decoding import FACTOR


class Prompt(NamedTuple):
    """A prompt's embeddings, fp32: `tokens` (1, L, W), one row per token; `pooled` (1, P), one vector for the whole
    prompt, if the family has one."""

    tokens: Tensor
    pooled: Tensor | None = None


class Place(NamedTuple):
    """The position of a tile in canvas pixels: its top-left corner, modulo the canvas, its size, and the canvas's
    (height, width)."""

    top: int
    left: int
    height: int
    width: int
    canvas: tuple[int, int]


class Sample(NamedTuple):
    """One input of the denoiser: `latents` (1, C, h, w) fp32 as scaled by the schedule; `guidance` is the guidance
    scale for families that have it as an input."""

    latents: Tensor
    prompt: Prompt
    place: Place
    guidance: float


def empty(*shape: int) -> Tensor:
    """An fp32 tensor on the meta device."""
    return torch.empty(shape, device="meta")


def examples(tiles: Sequence[int], channels: int, sides: tuple[int, int], prompt: Callable[[], Prompt]) -> list[Sample]:
    """Samples for `Family.example`: latents of (channels, *sides) for each number in `tiles`, one tensor for equal
    numbers, each with the result of `prompt`, placed as whole pictures."""
    latents = {tile: empty(1, channels, *sides) for tile in tiles}
    height, width = (FACTOR * side for side in sides)
    place = Place(0, 0, height, width, (height, width))
    return [Sample(latents[tile], prompt(), place, 1.0) for tile in tiles]
