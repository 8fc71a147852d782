"""The transformer of Stable Diffusion 3 and 3.5 (MMDiT: Esser et al. 2024, arXiv:2403.03206) for one sample, in little
memory.

The module is diffusers' own SD3Transformer2DModel, and the arithmetic is that of its forward(), computed with the
functions of dit.py. Every block's norms are scaled and shifted by layers that depend on timestep and pooled text alone;
these layers are read once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from tiler.compute.stream import Streamer
from tiler.memory.lean_imports import lean_imports
from tiler.models.dit import (
    add_attended,
    add_feed_forward,
    added_stream,
    attention,
    gelu_feed_forward,
    modulated,
    project,
    stream_of,
)
from tiler.models.meta import on_meta, refusing
from tiler.models.patches import PATCH, unpatched
from tiler.models.positions import Grid, embed, replace_table
from tiler.weights.checkpoint import Checkpoint

if TYPE_CHECKING:
    from diffusers.models.attention import JointTransformerBlock
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel


def build_mmdit(checkpoint: Checkpoint, config: dict[str, Any]) -> SD3Transformer2DModel:
    """Build diffusers' own transformer on the meta device. Its positions come from the file, since computing them would
    take hundreds of megabytes."""
    with lean_imports():
        from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
    with on_meta(), refusing("transformer", checkpoint):
        model: Any = SD3Transformer2DModel.from_config(config | {"pos_embed_max_size": 1})
        replace_table(model.pos_embed, table_side(config), model.inner_dim)
    return model.eval().requires_grad_(False)


def table_side(config: dict[str, Any]) -> int:
    """Patches along each side of the table of positions."""
    return int(config.get("pos_embed_max_size", 96))


def modulating(model: SD3Transformer2DModel) -> list[nn.Linear]:
    """The layers whose inputs are timestep and pooled text alone, in the order in which a pass needs their outputs."""
    blocks: list[Any] = list(model.transformer_blocks)
    norms = [norm.linear for block in blocks for norm in (block.norm1, block.norm1_context)]
    return [*norms, model.norm_out.linear]


def read_once(name: str) -> bool:
    """Whether a parameter belongs to a modulation layer or to the embeddings that feed it."""
    return name.startswith(("time_text_embed.", "norm_out.")) or ".norm1" in name


def quantised(name: str) -> bool:
    """Whether a weight becomes int8: those of the blocks, except their modulation layers."""
    return name.startswith("transformer_blocks.") and not read_once(name)


def predict_sample(
    model: SD3Transformer2DModel,
    streamer: Streamer,
    latents: Tensor,
    tokens: Tensor,
    modulation: Sequence[Tensor],
    side: int,
    check: Callable[[str], None] = lambda where: None,
) -> Tensor:
    """The velocity that SD3Transformer2DModel predicts, (1, C, h, w), for latents of that shape and the prompt's tokens
    (1, T, W). `modulation`: the values of each of `modulating(model)`; `side`: of the table of positions."""
    height, width = (n // PATCH for n in latents.shape[2:])
    image = slice(0, height * width)
    text = slice(image.stop, image.stop + tokens.shape[1])
    x = latents.new_empty(1, text.stop, model.inner_dim)
    check("transformer.pos_embed")
    grid = Grid(height, width, (side - height) // 2, (side - width) // 2, side)
    embed(streamer, model.pos_embed, latents, x[:, image], grid)
    project(streamer, model.context_embedder, lambda chunk: tokens[:, chunk], x[:, text])
    rows = iter(modulation)
    for i, block in enumerate(model.transformer_blocks):
        check(f"transformer.transformer_blocks.{i}")
        joint_block(streamer, block, x, image, text, next(rows), next(rows))
    check("transformer.proj_out")
    scale, shift = next(rows).chunk(2)
    made = x.new_empty(1, image.stop, model.proj_out.out_features)
    project(streamer, model.proj_out, modulated(model.norm_out.norm, x, scale, shift), made)
    return unpatched(made, height, latents.shape[1])


def joint_block(
    streamer: Streamer, block: JointTransformerBlock, x: Tensor, image: slice, text: slice, of_image: Tensor,
    of_text: Tensor,
) -> None:  # fmt: skip
    """A JointTransformerBlock on the state x (1, tokens, d), in place; `of_image` and `of_text`, (k·d,), are what norm1
    and norm1_context make of the conditioning. In the last block the text has keys and values, but no output."""
    attn: Any = block.attn
    shift, scale, gate, ff_shift, ff_scale, ff_gate, *second = of_image.split(x.shape[-1])
    if block.context_pre_only:
        t_scale, t_shift = of_text.chunk(2)
    else:
        t_shift, t_scale, t_gate, t_ff_shift, t_ff_scale, t_ff_gate = of_text.chunk(6)
    norm1: Any = block.norm1
    # Both attentions of a block that has two see the state before either is added.
    beside = None
    if second:
        stream = stream_of(image, block.attn2, modulated(norm1.norm, x, second[1], second[0]))
        beside = attention(streamer, x, [stream], attn.heads)
    streams = (
        stream_of(image, attn, modulated(norm1.norm, x, scale, shift)),
        added_stream(text, attn, modulated(block.norm1_context.norm, x, t_scale, t_shift)),
    )
    attended = attention(streamer, x, streams, attn.heads)
    add_attended(streamer, attn.to_out[0], attended, x, image, gate)
    if not block.context_pre_only:
        add_attended(streamer, attn.to_add_out, attended, x, text, t_gate)
    del attended
    if beside is not None:
        add_attended(streamer, block.attn2.to_out[0], beside, x, image, second[2])
        del beside
    normed = modulated(block.norm2, x, ff_scale, ff_shift)
    add_feed_forward(streamer, gelu_feed_forward(block.ff), x, image, normed, ff_gate)
    if not block.context_pre_only:
        normed = modulated(block.norm2_context, x, t_ff_scale, t_ff_shift)
        add_feed_forward(streamer, gelu_feed_forward(block.ff_context), x, text, normed, t_ff_gate)
