"""Run the exact decoder or encoder on meta tensors, to find out what it needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from tiler.decoding.attention import KEYS
from tiler.decoding.directions import DECODER, ENCODER
from tiler.decoding.exact import stream
from tiler.decoding.rows import Conv, Down, Resnet, Stage, Up
from tiler.decoding.scratch import Scratch
from tiler.decoding.sources import Source
from tiler.decoding.statistics import Frame

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    from tiler.decoding.exact import Hold


class Rehearsal(NamedTuple):
    """The resources of a run. `peak_bytes`: the most on disk at once; `written_bytes`: in total; `flops` of the
    convolutions; `apart_bytes`: the most on disk at once if passes are remembered."""

    peak_bytes: int
    written_bytes: int
    flops: int
    apart_bytes: int = 0


def _flops(stages: list[Stage], pixels: int) -> int:
    """The floating-point operations of the convolutions on that many pixels or latents, two for each multiply-add, as
    if none were computed by Winograd."""
    total = 0
    for stage in stages:
        pixels = 4 * pixels if isinstance(stage, Up) else pixels // 4 if isinstance(stage, Down) else pixels
        names = ("conv1", "conv2", "shortcut") if isinstance(stage, Resnet) else ("conv",)
        convs = (getattr(stage, name, None) for name in names)
        layers = (conv.conv if isinstance(conv, Conv) else conv for conv in convs if conv is not None)
        total += 2 * pixels * sum(layer.weight.numel() for layer in layers)
    return total


def rehearse(
    vae: AutoencoderKL, latents: tuple[int, int], dtype: torch.dtype, hold: Hold, *, encoding: bool
) -> Rehearsal:
    """Run `decode` or `encode` for latents of (height, width) on meta tensors.

    A lower picture stands for one of any height: the memory does not depend on the height, and everything else is
    proportional to it.
    """
    height, width = min(latents[0], KEYS // latents[1] + 8), latents[1]
    scratch = Scratch(None, dtype)
    direction = ENCODER if encoding else DECODER
    stages, scale = direction.stages(vae), direction.reads
    x = 1, direction.channels(vae), scale * height, scale * width
    source = Source(
        lambda first, last: torch.empty(1, x[1], last - first, x[3], device="meta"), x[2], direction.step(x[3])
    )
    flops = _flops(stages, x[2] * x[3])
    for _ in stream(stages, source, Frame(x[2], x[3]), scratch, hold=hold):
        pass
    found = scratch.peak_bytes, scratch.written_bytes, flops, scratch.apart_bytes
    return Rehearsal(*(n * latents[0] // height for n in found))
