"""Latents as the tokens of a diffusion transformer, each a patch of 2 × 2 latents, and back."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

PATCH = 2  # latents along a token's side


def patches(latents: Tensor) -> Tensor:
    """(1, C, h, w) → (1, h/2 · w/2, 4 C): the values of each patch, channel by channel; a view through other
    strides."""
    _, channels, height, width = latents.shape
    if latents.is_meta:
        return latents.new_empty(1, height * width // PATCH**2, channels * PATCH**2)
    return F.pixel_unshuffle(latents, PATCH).flatten(2).transpose(1, 2)


def pack(latents: Tensor) -> Tensor:
    """`patches`, token after token in memory."""
    return patches(latents).contiguous()


def unpack(tokens: Tensor, height: int) -> Tensor:
    """The inverse of `pack`, for `height` rows of tokens."""
    if tokens.is_meta:
        return tokens.new_empty(1, tokens.shape[2] // PATCH**2, height * PATCH, tokens.shape[1] // height * PATCH)
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height, -1)), PATCH)


def unpatched(tokens: Tensor, rows: int, channels: int) -> Tensor:
    """(1, n, 4 · outputs), in a patch pixel by pixel, `rows` rows of tokens → the first `channels` of the outputs,
    (1, channels, h, w)."""
    columns = tokens.shape[1] // rows
    if tokens.is_meta:
        return tokens.new_empty(1, channels, PATCH * rows, PATCH * columns)
    planes = tokens.view(rows, columns, PATCH, PATCH, -1)[..., :channels]
    return planes.permute(4, 0, 2, 1, 3).reshape(1, channels, PATCH * rows, PATCH * columns)
