"""The forward pass of diffusers' FluxTransformer2DModel, one sample at a time, with the functions of dit.py: joint
blocks, then single ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tiler.compute.stream import Streamer
from tiler.models.dit import (
    FeedForward,
    add_attended,
    add_feed_forward,
    added_stream,
    attention,
    gelu_feed_forward,
    modulated,
    project,
    stream_of,
)
from tiler.models.patches import PATCH, pack, unpack

if TYPE_CHECKING:
    from diffusers.models.transformers.transformer_flux import (
        FluxSingleTransformerBlock,
        FluxTransformer2DModel,
        FluxTransformerBlock,
    )


def predict_sample(
    model: FluxTransformer2DModel,
    streamer: Streamer,
    latents: Tensor,
    tokens: Tensor,
    modulation: Sequence[Tensor],
    check: Callable[[str], None] = lambda where: None,
) -> Tensor:
    """The velocity that FluxTransformer2DModel predicts, (1, C, h, w), for latents of that shape and the prompt's
    tokens (1, T, W). `modulation`: the values of each of the model's modulation layers, in its order."""
    height, width = (side // PATCH for side in latents.shape[2:])
    text, image = slice(0, tokens.shape[1]), slice(tokens.shape[1], tokens.shape[1] + height * width)
    x = latents.new_empty(1, image.stop, model.inner_dim)
    for part, layer, given in ((text, model.context_embedder, tokens), (image, model.x_embedder, pack(latents))):
        project(streamer, layer, lambda some, given=given: given[:, some], x[:, part])  # type: ignore[misc]
    rotation = None if x.is_meta else rotations(model, text.stop, height, width)
    rows = iter(modulation)
    for i, block in enumerate(model.transformer_blocks):
        check(f"transformer.transformer_blocks.{i}")
        joint_block(streamer, block, x, text, image, next(rows), next(rows), rotation)
    for i, block in enumerate(model.single_transformer_blocks):
        check(f"transformer.single_transformer_blocks.{i}")
        single_block(streamer, block, x, next(rows), rotation)
    check("transformer.proj_out")
    scale, shift = next(rows).chunk(2)
    out = x.new_empty(1, height * width, model.proj_out.out_features)
    project(streamer, model.proj_out, modulated(model.norm_out.norm, x[:, image], scale, shift), out)
    return unpack(out, height)


def joint_block(
    streamer: Streamer, block: FluxTransformerBlock, x: Tensor, text: slice, image: slice, of_image: Tensor,
    of_text: Tensor, rotation: Tensor | None,
) -> None:  # fmt: skip
    """A FluxTransformerBlock on the state x (1, tokens, d), in place; `of_image` and `of_text`, (6 d,), are what norm1
    and norm1_context make of the conditioning."""
    attn = block.attn
    shift, scale, gate, ff_shift, ff_scale, ff_gate = of_image.chunk(6)
    t_shift, t_scale, t_gate, t_ff_shift, t_ff_scale, t_ff_gate = of_text.chunk(6)
    streams = (
        added_stream(text, attn, modulated(block.norm1_context.norm, x, t_scale, t_shift)),
        stream_of(image, attn, modulated(block.norm1.norm, x, scale, shift)),
    )
    attended = attention(streamer, x, streams, attn.heads, rotation)
    add_attended(streamer, attn.to_add_out, attended, x, text, t_gate)
    add_attended(streamer, attn.to_out[0], attended, x, image, gate)
    del attended
    normed = modulated(block.norm2_context, x, t_ff_scale, t_ff_shift)
    add_feed_forward(streamer, gelu_feed_forward(block.ff_context), x, text, normed, t_ff_gate)
    normed = modulated(block.norm2, x, ff_scale, ff_shift)
    add_feed_forward(streamer, gelu_feed_forward(block.ff), x, image, normed, ff_gate)


def single_block(
    streamer: Streamer, block: FluxSingleTransformerBlock, x: Tensor, modulation: Tensor, rotation: Tensor | None
) -> None:
    """A FluxSingleTransformerBlock on the state x (1, tokens, d), in place; modulation: (3 d,). Attention and
    feed-forward see the same input, and share their last layer."""
    shift, scale, gate = modulation.chunk(3)
    normed, everything = modulated(block.norm.norm, x, scale, shift), slice(0, x.shape[1])
    attended = attention(streamer, x, [stream_of(everything, block.attn, normed)], block.attn.heads, rotation)
    layers = FeedForward(block.proj_mlp, nn.GELU(approximate="tanh"), block.proj_out)
    add_feed_forward(streamer, layers, x, everything, normed, gate, beside=attended)


def modulating(model: FluxTransformer2DModel) -> list[nn.Linear]:
    """The layers whose inputs are timestep, guidance and pooled text alone, in the order in which a pass needs their
    outputs."""
    joint = [norm.linear for block in model.transformer_blocks for norm in (block.norm1, block.norm1_context)]
    return [*joint, *(block.norm.linear for block in model.single_transformer_blocks), model.norm_out.linear]


def rotations(model: FluxTransformer2DModel, text: int, height: int, width: int) -> Tensor:
    """(tokens, 1, head / 2) complex: cosine and sine of each pair's angle. The text's ids are 0, the picture's (0, y,
    x)."""
    ids = torch.zeros(text + height * width, 3)
    grid = ids[text:].view(height, width, 3)
    grid[..., 1], grid[..., 2] = torch.arange(height)[:, None], torch.arange(width)
    cos, sin = model.pos_embed(ids)  # each value twice, for both halves of its pair
    return torch.complex(cos[:, ::2].contiguous(), sin[:, ::2].contiguous())[:, None]
