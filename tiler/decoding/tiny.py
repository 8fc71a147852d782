"""diffusers' AutoencoderTiny (TAESD's layout) as a pipeline of rows: no norms and no attention, so rows are exact.

A few megabytes of weights and two per cent of an AutoencoderKL's arithmetic; the picture is an approximation that the
tiny model was trained to give.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiler.decoding import FACTOR
from tiler.decoding.rows import Check, Conv, Latents, Residual, Stage, Up, flow, latent_strips, strip_before, strip_rows

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny


PREVIEW_SIDE, PREVIEW_ROWS = 32, 1  # latents of a preview, and its rows pushed at a time: 256 pixels in a few megabytes


class Pointwise(Stage):
    """A function of single values."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function

    def push(self, x: Tensor | None, last: bool) -> Tensor | None:
        return None if x is None else self.function(x)


class Block(Stage):
    """AutoencoderTinyBlock: three convolutions with ReLU in between, and a shortcut that is delayed to match them."""

    def __init__(self, block: nn.Module) -> None:
        convs = [Conv(layer) for layer in block.conv if isinstance(layer, nn.Conv2d)]  # type: ignore[union-attr]
        relu = Pointwise(F.relu_)
        self.branch: list[Stage] = [convs[0], relu, convs[1], relu]
        self.end = convs[2]
        self.skip = Conv(block.skip) if isinstance(block.skip, nn.Conv2d) else None
        self.waiting = Residual()

    def push(self, x: Tensor | None, last: bool) -> Tensor | None:
        if x is not None:
            self.waiting.keep(x if self.skip is None else self.skip.conv(x))
        for stage in self.branch:
            x = stage.push(x, last)
        x = self.end.push(x, last, self.waiting.take)
        return None if x is None else F.relu_(x)


def decoder_stages(decoder: nn.Module) -> list[Stage]:
    """diffusers' DecoderTiny.forward: scaled latents → RGB in about [-1, 1]."""
    stages: list[Stage] = [Pointwise(lambda x: torch.tanh(x / 3).mul_(3))]
    layers = list(decoder.layers)  # type: ignore[arg-type]
    while layers:
        layer = layers.pop(0)
        if isinstance(layer, nn.Upsample):
            stages.append(Up(layers.pop(0)))
        elif isinstance(layer, nn.Conv2d):
            stages.append(Conv(layer))
        elif isinstance(layer, nn.ReLU):
            stages.append(Pointwise(F.relu_))
        else:
            stages.append(Block(layer))
    return [*stages, Pointwise(lambda x: x.mul(2).sub_(1))]


def decode(
    vae: AutoencoderTiny,
    latents: Latents,
    *,
    check: Check,
    progress: Callable[[float], None] = lambda share: None,
    begin: int = 0,
    rows: int | None = None,
) -> Generator[Tensor]:
    """latents: (1, C, h, w) fp32, divided by the tiny model's scaling_factor → strips (3, n, 8w) fp32 in about [-1, 1],
    from the row `begin` on. `rows` latent rows are pushed at a time: the fewer, the less memory."""
    stages, height, rows = decoder_stages(vae.decoder), latents.shape[2], rows or strip_rows(latents.shape[3])
    first = strip_before(begin, rows)
    row, at = first * rows, FACTOR * first * rows
    for strip in latent_strips(latents, rows, first):
        row += strip.shape[2]
        for ready in flow(stages, [strip], row == height, check=check):
            skipped, at = max(0, begin - at), at + ready.shape[2]
            if skipped < ready.shape[2]:
                yield ready[0, :, skipped:]
        progress(row / height)


def rehearse(vae: AutoencoderTiny, latents: tuple[int, int], rows: int | None = None) -> None:
    """What `decode` does for latents of (height, width), on meta tensors: for planning."""
    height = FACTOR * (rows or strip_rows(latents[1]))
    some = torch.empty(1, vae.config.latent_channels, height, latents[1], device="meta")
    for _ in decode(vae, some, check=lambda where: None, rows=rows):
        pass
