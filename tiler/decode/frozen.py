"""The autoencoder with held statistics: pictures of any height at constant memory, in both directions.

Statistics come from the picture itself, shrunk to about 32×32 latents; a picture that small is decoded exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tiler.decode.rows import Check, Measured, Stage, decoder_stages, encoder_stages, flow, strip_rows, to_tensor

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

STATS_SIDE = 32  # latents; 256 px: the measuring pass is then under 250 MB for SD's decoder


def shrunken_size(height: int, width: int, side: int = STATS_SIDE) -> tuple[int, int]:
    """(h, w) of at most about side² pixels with the same aspect; the picture's own size when it is that small."""
    if height * width <= side * side:
        return height, width
    factor = side / math.sqrt(height * width)
    return max(1, min(height, round(height * factor))), max(1, min(width, round(width * factor)))


def shrink(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Area-average to `size`, then give each channel back its mean and deviation: (1, C, h, w)."""
    if size == tuple(x.shape[2:]):
        return x
    small = F.interpolate(x, size=size, mode="area")
    std, mean = torch.std_mean(x, dim=(2, 3), keepdim=True)
    std_small, mean_small = torch.std_mean(small, dim=(2, 3), keepdim=True)
    return (small - mean_small) * (std / std_small.clamp_min(1e-6)) + mean


def _ignore(where: str) -> None:
    pass


def _measure(stages: list[Stage], measured: Measured, small: Tensor, check: Check) -> None:
    measured.measuring = True
    for _ in flow(stages, [small], True, split=False, check=check):
        pass
    measured.measuring = False


def decode(vae: AutoencoderKL, latents: Tensor, *, rows: int | None = None, check: Check = _ignore) -> Iterator[Tensor]:
    """latents: (1, C, h, w) fp32, already divided by scaling_factor → strips (3, n, 8w) fp32 in about [-1, 1], top first.

    `rows` latent rows are pushed at a time (default `strip_rows`): memory grows with it, the result does not depend on
    it beyond the last bits of fp32.
    """
    rows = strip_rows(latents.shape[3]) if rows is None else rows
    measured = Measured()
    stages = decoder_stages(vae.decoder, vae.post_quant_conv, measured)
    _measure(stages, measured, shrink(latents, shrunken_size(*latents.shape[2:])), check)
    yield from _stream(
        stages,
        (latents[:, :, top : top + rows] for top in range(0, latents.shape[2], rows)),
        latents.shape[2],
        rows,
        check,
    )


def encode(vae: AutoencoderKL, pixels: np.ndarray, small: np.ndarray, *, check: Check = _ignore) -> Tensor:
    """pixels: (H, W, 3) uint8, sides multiples of 8 → the posterior's mean (1, C, H/8, W/8) fp32, unscaled.

    `small` is the same picture shrunk to `shrunken_size` × 8, for the statistics.
    """
    measured, rows = Measured(), strip_rows(pixels.shape[1] // 8)
    stages = encoder_stages(vae.encoder, vae.quant_conv, measured)
    _measure(stages, measured, to_tensor(small), check)
    strips = (to_tensor(pixels[top : top + 8 * rows]) for top in range(0, len(pixels), 8 * rows))
    moments = torch.cat([s[None] for s in _stream(stages, strips, len(pixels), 8 * rows, check)], dim=2)
    return moments[:, : moments.shape[1] // 2]


def rehearse(vae: AutoencoderKL, latents: tuple[int, int], *, encoding: bool) -> None:
    """What `decode` or `encode` does for latents of (height, width), on meta tensors: for planning."""
    measured, (height, width), rows = Measured(), latents, strip_rows(latents[1])
    small = shrunken_size(height, width)
    if encoding:
        stages, channels, scale = encoder_stages(vae.encoder, vae.quant_conv, measured), 3, 8
    else:
        stages, channels, scale = (
            decoder_stages(vae.decoder, vae.post_quant_conv, measured),
            vae.config.latent_channels,
            1,
        )
    _measure(stages, measured, torch.empty(1, channels, scale * small[0], scale * small[1], device="meta"), _ignore)
    strips = (torch.empty(1, channels, scale * rows, scale * width, device="meta") for _ in range(8))
    for _ in _stream(stages, strips, 8 * scale * rows, scale * rows, _ignore):
        pass


def _stream(stages: list[Stage], strips: Iterator[Tensor], height: int, step: int, check: Check) -> Iterator[Tensor]:
    top = 0
    for strip in strips:
        top += step
        for ready in flow(stages, [strip], top >= height, split=True, check=check):
            yield ready[0]
