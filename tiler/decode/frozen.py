"""The autoencoder with held statistics: pictures of any height at constant memory, in both directions.

Statistics come from a sample of the picture itself: small blocks at full resolution from all over it, laid side by side
and worked on as one picture of at most 64×64 latents by `exact`. A picture that small is decoded exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tiler.decode import exact
from tiler.decode.rows import Check, Stage, decoder_stages, encoder_stages, flow, strip_rows, to_tensor

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    from tiler.decode.exact import Hold
    from tiler.decode.scratch import Scratch

SAMPLE_SIDE = 64  # latents; scripts/bench_decode.py: 5 dB better than 32
BLOCK = 4  # latents; of 2, 4, 8 and 16 the best: many small blocks see more of the picture, smaller ones mostly borders


def sample(height: int, width: int) -> tuple[Tensor, Tensor]:
    """The rows and the columns of latents that are measured: all of a picture of at most SAMPLE_SIDE², else evenly spaced
    blocks of BLOCK of them, of the picture's aspect."""
    if height * width <= SAMPLE_SIDE**2:
        return torch.arange(height), torch.arange(width)
    short, long = sorted((height, width))
    few = min(short, max(1, round(SAMPLE_SIDE * math.sqrt(short / long) / BLOCK)) * BLOCK)
    taken = few, min(long, SAMPLE_SIDE**2 // few // BLOCK * BLOCK)
    return _blocks(height, taken[height > width]), _blocks(width, taken[height <= width])


def _blocks(length: int, taken: int) -> Tensor:
    if taken == length:
        return torch.arange(length)
    count = taken // BLOCK
    starts = torch.linspace(0, length - BLOCK, count) if count > 1 else torch.tensor([(length - BLOCK) / 2])
    return starts.round().long()[:, None].add(torch.arange(BLOCK)).flatten()


def _ignore(where: str) -> None:
    pass


def _measure(stages: list[Stage], part: Tensor, scratch: Scratch, hold: Hold, check: Check) -> None:
    """Give the stages the statistics of `part`, (1, C, h, w)."""
    height, width = part.shape[2:]
    frame = exact.Frame(height, width)
    strips = part.split(max(1, height * strip_rows(64) // 64), dim=2)
    for _ in exact.stream(stages, strips, frame, scratch, hold=hold, check=check, hold_memory=True):
        pass


def decode(
    vae: AutoencoderKL,
    latents: Tensor,
    scratch: Scratch,
    *,
    hold: Hold,
    rows: int | None = None,
    check: Check = _ignore,
    margin: tuple[int, int] = (0, 0),
) -> Iterator[Tensor]:
    """latents: (1, C, h, w) fp32, already divided by scaling_factor → strips (3, n, 8w) fp32 in about [-1, 1], top first.

    `rows` latent rows are pushed at a time (default `strip_rows`): memory grows with it, the result does not depend on
    it beyond the last bits of fp32. `margin` latents above and below, left and right, repeat the other side's and are
    not measured.
    """
    (y, x), (height, width) = margin, latents.shape[2:]
    rows = strip_rows(width) if rows is None else rows
    stages = decoder_stages(vae.decoder, vae.post_quant_conv)
    down, across = sample(height - 2 * y, width - 2 * x)
    _measure(stages, latents[:, :, (down + y)[:, None], across + x], scratch, hold, check)
    yield from _stream(stages, iter(latents.split(rows, dim=2)), height, check)


def encode(
    vae: AutoencoderKL,
    pixels: np.ndarray,
    scratch: Scratch,
    *,
    hold: Hold,
    check: Check = _ignore,
    margin: tuple[int, int] = (0, 0),
) -> Tensor:
    """pixels: (H, W, 3) uint8, sides multiples of 8 → the posterior's mean (1, C, H/8, W/8) fp32, unscaled. `margin` as for
    `decode`, in latents."""
    (y, x), height, width = margin, len(pixels) // 8, pixels.shape[1] // 8
    stages = encoder_stages(vae.encoder, vae.quant_conv)
    down, across = (
        (8 * (taken + first)[:, None] + torch.arange(8)).flatten().numpy()
        for taken, first in zip(sample(height - 2 * y, width - 2 * x), margin, strict=True)
    )
    _measure(stages, to_tensor(pixels[down[:, None], across]), scratch, hold, check)
    rows = 8 * strip_rows(width)
    strips = (to_tensor(pixels[top : top + rows]) for top in range(0, len(pixels), rows))
    moments = torch.cat([s[None] for s in _stream(stages, strips, len(pixels), check)], dim=2)
    return moments[:, : moments.shape[1] // 2]


def rehearse(vae: AutoencoderKL, latents: tuple[int, int], scratch: Scratch, hold: Hold, *, encoding: bool) -> None:
    """What `decode` or `encode` does for latents of (height, width), on meta tensors: for planning."""
    (height, width), rows = latents, strip_rows(latents[1])
    if encoding:
        stages, channels, scale = encoder_stages(vae.encoder, vae.quant_conv), 3, 8
    else:
        stages, channels, scale = decoder_stages(vae.decoder, vae.post_quant_conv), vae.config.latent_channels, 1
    down, across = sample(height, width)
    part = torch.empty(1, channels, scale * len(down), scale * len(across), device="meta")
    _measure(stages, part, scratch, hold, _ignore)
    strips = (torch.empty(1, channels, scale * rows, scale * width, device="meta") for _ in range(8))
    for _ in _stream(stages, strips, 8 * scale * rows, _ignore):
        pass


def _stream(stages: list[Stage], strips: Iterator[Tensor], height: int, check: Check) -> Iterator[Tensor]:
    row = 0
    for strip in strips:
        row += strip.shape[2]
        for ready in flow(stages, [strip], row >= height, check=check):
            yield ready[0]
