"""The two directions of an autoencoder: what it reads, the layers on the way, and what it gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tiler.decoding import FACTOR
from tiler.decoding.pictures import from_pixels_, to_tensor
from tiler.decoding.rows import Latents, Pixels, Stage, decoder_stages, encoder_stages, strip_rows
from tiler.decoding.sources import Source
from tiler.decoding.statistics import Frame

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    from tiler.decoding.scratch import Rows


@dataclass(frozen=True, kw_only=True)
class Direction:
    """One direction. It reads a picture, Latents or Pixels, with `reads` rows and columns for each of the latents, in
    `dtype`, and gives `gives` of them.

    `size` is a picture's (height, width); `read` its rows as the `stages` take them, (1, C, n, W) fp32; `raw` the same
    as Rows store them, (n, W·C) of `dtype`; `from_raw` makes (1, C, n, W) fp32 of these; `corner` is its top left part,
    so many rows and columns, as a tensor. `result` takes what is wanted of the stages' strips, (C', n, W'). `channels`
    are those that an autoencoder reads.
    """

    name: str  # "decode", as in "decodes" and "decoder"
    reads: int
    gives: int
    dtype: torch.dtype
    stages: Callable[[AutoencoderKL], list[Stage]]
    channels: Callable[[AutoencoderKL], int]
    size: Callable[[Any], tuple[int, int]]
    read: Callable[[Any, int, int], Tensor]
    raw: Callable[[Any, int, int], np.ndarray]
    from_raw: Callable[[Tensor], Tensor]
    corner: Callable[[Any, int], Tensor]
    result: Callable[[Tensor], Tensor]

    def source(self, picture: Latents | Pixels) -> Source:
        """The picture as the input of the stages."""
        height, width = self.size(picture)
        return Source(lambda first, last: self.read(picture, first, last), height, self.step(width))

    def source_of(self, stored: Rows) -> Source:
        """The same picture, whose rows are `stored` raw."""
        return Source(
            lambda first, last: self.from_raw(stored.read(first, last)), stored.count, self.step(stored.width), stored
        )

    def step(self, width: int) -> int:
        """How many rows of a picture of `width` go through the stages at a time."""
        return self.reads * strip_rows(width // self.reads)

    def frame(self, picture: Latents | Pixels, margin: tuple[int, int]) -> Frame:
        """Its frame, with a margin in latents above and below, and left and right."""
        return Frame(*self.size(picture), *(self.reads * side for side in margin))


def _raw_latents(latents: Latents, first: int, last: int) -> np.ndarray:
    rows: np.ndarray = latents[:, :, first:last][0].permute(1, 2, 0).flatten(1).contiguous().numpy()
    return rows


def mean_of(moments: Tensor) -> Tensor:
    """A strip of a posterior's moments, (2C, n, w) → its mean, (C, n, w)."""
    return moments[: len(moments) // 2].clone()


DECODER = Direction(
    name="decode",
    reads=1,
    gives=FACTOR,
    dtype=torch.float32,
    stages=lambda vae: decoder_stages(vae.decoder, vae.post_quant_conv),
    channels=lambda vae: int(vae.config.latent_channels),
    size=lambda latents: (latents.shape[2], latents.shape[3]),
    read=lambda latents, first, last: latents[:, :, first:last].contiguous(memory_format=torch.channels_last),
    raw=_raw_latents,
    from_raw=lambda rows: rows,
    corner=lambda latents, side: latents[:, :, :side][..., :side].contiguous(),
    result=lambda strip: strip,
)
ENCODER = Direction(
    name="encode",
    reads=FACTOR,
    gives=1,
    dtype=torch.uint8,
    stages=lambda vae: encoder_stages(vae.encoder, vae.quant_conv),
    channels=lambda vae: 3,
    size=lambda pixels: (pixels.shape[0], pixels.shape[1]),
    read=lambda pixels, first, last: to_tensor(pixels[first:last]),
    raw=lambda pixels, first, last: np.ascontiguousarray(pixels[first:last]).reshape(last - first, -1),
    from_raw=from_pixels_,
    corner=lambda pixels, side: torch.from_numpy(np.array(pixels[:side][:, :side])),
    result=mean_of,
)
DIRECTIONS = {direction.name: direction for direction in (DECODER, ENCODER)}
