"""The forward of diffusers' PixArtTransformer2DModel, one sample at a time, by the walk of dit.py.

Chen et al. 2023, arXiv:2310.00426. All blocks share one modulation, of the timestep and, for PixArt-α, of the picture's
size; each adds a table of its own. The prompt enters through cross attention; padding, whose weight there is
exp(−10,000) = 0, is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tiler.compute.layers import attend
from tiler.compute.stream import Streamer
from tiler.models.dit import (
    CHUNK,
    Stream,
    add_attended,
    add_feed_forward,
    attention,
    cut,
    each,
    gelu_feed_forward,
    modulated,
    project,
)
from tiler.models.patches import PATCH, patches, unpatched

if TYPE_CHECKING:
    from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel


class Grid(NamedTuple):
    """How positions are counted: a grid of any size is stretched over `base` / `scale` steps."""

    base: int
    scale: float


class Modulation(NamedTuple):
    """The modulation of one step: the values that all blocks share, (6, d), and the output layer's, (d,)."""

    blocks: Tensor
    out: Tensor


def modulations(model: PixArtTransformer2DModel, timesteps: Tensor, sides: tuple[int, int]) -> list[Modulation]:
    """One Modulation for each of `timesteps` (n,). `sides`: the sample's height and width in pixels, an input of
    PixArt-α."""
    layer = model.adaln_single
    emb = layer.emb
    seen = emb.timestep_embedder(emb.time_proj(timesteps))
    if emb.use_additional_conditions:
        # As in the pipeline: each number is embedded, and the three thirds are put side by side.
        told = [torch.tensor([float(v) for v in values]) for values in (sides, (sides[0] / sides[1],))]
        resolution, ratio = (emb.additional_condition_proj(values.to(seen.device)) for values in told)
        sizes = emb.resolution_embedder(resolution).flatten(), emb.aspect_ratio_embedder(ratio).flatten()
        seen = seen + torch.cat(sizes)
    blocks = layer.linear(F.silu(seen)).unflatten(-1, (6, -1))
    return [Modulation(a, b) for a, b in zip(blocks, seen, strict=True)]


def predict_sample(
    model: PixArtTransformer2DModel,
    streamer: Streamer,
    latents: Tensor,
    text: Tensor,
    modulation: Modulation,
    grid: Grid,
    check: Callable[[str], None] = lambda where: None,
) -> Tensor:
    """The noise that PixArtTransformer2DModel predicts, (1, C, h, w), for latents of that shape and the projected
    tokens of a prompt (1, T, d); the variances beside it are not computed to the end."""
    channels, rows = latents.shape[1], latents.shape[2] // PATCH
    embedder = model.pos_embed.proj
    x = F.linear(patches(latents), embedder.weight.flatten(1), embedder.bias)
    add_positions(x, rows, grid)
    everything = slice(0, x.shape[1])
    for i, block in enumerate(model.transformer_blocks):
        check(f"transformer.transformer_blocks.{i}")
        shift, scale, gate, ff_shift, ff_scale, ff_gate = block.scale_shift_table + modulation.blocks
        attn = block.attn1
        streams = [Stream(everything, modulated(block.norm1, x, scale, shift), (attn.to_q, attn.to_k, attn.to_v))]
        attended = attention(streamer, x, streams, attn.heads)
        add_attended(streamer, attn.to_out[0], attended, x, everything, gate)
        del attended
        add_text(streamer, block.attn2, x, text)
        layers = gelu_feed_forward(block.ff)
        add_feed_forward(streamer, layers, x, everything, modulated(block.norm2, x, ff_scale, ff_shift), ff_gate)
    check("transformer.proj_out")
    shift, scale = model.scale_shift_table + modulation.out
    out = x.new_empty(1, x.shape[1], model.proj_out.out_features)
    project(streamer, model.proj_out, modulated(model.norm_out, x, scale, shift), out)
    return unpatched(out, rows, channels)


def add_text(streamer: Streamer, attn: Any, x: Tensor, text: Tensor) -> None:
    """x += cross attention of x (1, n, d) to text (1, T, d), in place."""
    with streamer.hold(attn.to_q, attn.to_k, attn.to_v, attn.to_out[0]):
        keys, values = (layer(text).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for layer in (attn.to_k, attn.to_v))
        for tokens in each(cut(slice(0, x.shape[1]), CHUNK), x.is_meta):
            queries = attn.to_q(x[:, tokens]).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            made = attn.to_out[0](attend(queries, keys, values, attn.to_q).transpose(1, 2).flatten(2))
            if not made.is_meta:
                x[:, tokens] += made


def add_positions(x: Tensor, rows: int, grid: Grid) -> None:
    """x += the embedding of each token's position, in place; x: (1, rows · columns, d). Half of the values describe its
    column, half its row; positions count from 0 in every grid, whichever part of a canvas it is."""
    if x.is_meta:
        return
    places = x.view(rows, -1, x.shape[2])
    half = x.shape[2] // 2
    places[..., :half] += waves(places.shape[1], half, grid)
    places[..., half:] += waves(rows, half, grid)[:, None]


def waves(count: int, width: int, grid: Grid) -> Tensor:
    """(count, width) fp32: sines, then cosines, of the positions along one side with falling frequencies. Vaswani et
    al. 2017, arXiv:1706.03762, section 3.5; positions in fp32 and angles in fp64, as in diffusers."""
    positions = torch.arange(count, dtype=torch.float32) / (count / grid.base) / grid.scale
    frequencies = 1.0 / 10_000 ** (torch.arange(width // 2, dtype=torch.float64) / (width / 2))
    angles = torch.outer(positions.double(), frequencies)
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()
