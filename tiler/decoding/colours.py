"""Rough likenesses of latents: an affine function of a latent's channels for each pixel, or of its neighbourhood's
mean.

The function is fitted to an autoencoder by least squares: the means of 8×8 pixels of a decoded picture on its latents.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from tiler.decoding import FACTOR

LONGEST = 512  # pixels of a likeness's side, at least about half of them


def fit_colours(latents: Tensor, pixels: np.ndarray) -> Tensor:
    """latents (1, C, h, w), their picture (8h, 8w, 3) uint8 → (C + 1, 3) fp32, by the normal equations in fp64."""
    _, channels, height, width = latents.shape
    blocks = pixels[: FACTOR * height, : FACTOR * width].reshape(height, FACTOR, width, FACTOR, 3)
    means = blocks.mean(axis=(1, 3), dtype=np.float32).reshape(-1, 3)
    known = torch.cat([latents[0].reshape(channels, -1), torch.ones(1, height * width)]).numpy().astype(np.float64)
    # Without BLAS and LAPACK, whose code and buffers would take 20 MB.
    gram, right = np.einsum("in,jn->ij", known, known), np.einsum("in,nk->ik", known, means)
    gram += np.eye(channels + 1) * gram.diagonal().mean() * 1e-6  # a picture of one colour tells little
    for row in range(channels + 1):  # Gauss and Jordan; the matrix is positive definite
        right[row] /= gram[row, row]
        gram[row] /= gram[row, row]
        for other in range(channels + 1):
            if other != row:
                factor = gram[other, row]
                gram[other] -= factor * gram[row]
                right[other] -= factor * right[row]
    return torch.from_numpy(right).float()


def paint(latents: Tensor, colours: Tensor) -> np.ndarray:
    """latents (1, C, h, w) → (H, W, 3) uint8, about LONGEST pixels on the longer side; a few rows are in memory at a
    time."""
    times = max(1, LONGEST // max(latents.shape[2:]))  # pixels for a latent
    rows = []
    for row in _means(latents, LONGEST):
        colour = row.T @ colours[:-1] + colours[-1]
        rows.append(colour.nan_to_num().clamp(0, 255).round().to(torch.uint8).numpy())
    return np.stack(rows).repeat(times, 0).repeat(times, 1)


def reduced(latents: Tensor, longest: int) -> Tensor:
    """latents (1, C, h, w) → the means of blocks of equal size, so that no side is longer than `longest`. What does not
    fill a block at the right and at the bottom is left out."""
    return torch.stack(list(_means(latents, longest)), dim=1)[None]


def _means(latents: Tensor, longest: int) -> Iterator[Tensor]:
    """The rows of `reduced`, (C, columns)."""
    _, channels, height, width = latents.shape
    many = -(-max(height, width) // longest)  # latents of a block's side
    columns = max(1, width // many)
    for row in range(max(1, height // many)):
        band = latents[0, :, row * many : (row + 1) * many, : columns * many]
        yield band.reshape(channels, -1, columns, band.shape[2] // columns).mean(dim=(1, 3))
