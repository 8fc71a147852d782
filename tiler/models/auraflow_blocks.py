"""The forward pass of diffusers' AuraFlowTransformer2DModel, one sample at a time, with the functions of dit.py: joint
blocks, then single ones.

As in Flux, the text precedes the picture; here, eight learned register tokens precede the text. Unlike in Flux, the
feed-forward's result is added to the state from before attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from tiler.compute.stream import Streamer
from tiler.memory.lean_imports import lean_imports
from tiler.models.dit import (
    FeedForward,
    add_attended,
    add_feed_forward,
    added_stream,
    attention,
    modulated,
    project,
    stream_of,
)
from tiler.models.meta import on_meta, refusing
from tiler.models.patches import PATCH, pack, unpatched
from tiler.models.positions import Grid, embed, replace_table
from tiler.weights.checkpoint import Checkpoint

if TYPE_CHECKING:
    from diffusers.models.transformers.auraflow_transformer_2d import (
        AuraFlowJointTransformerBlock,
        AuraFlowSingleTransformerBlock,
        AuraFlowTransformer2DModel,
    )


def build_transformer(checkpoint: Checkpoint, config: dict[str, Any]) -> AuraFlowTransformer2DModel:
    """Build diffusers' own transformer on the meta device, without its table of positions."""
    with lean_imports():
        from diffusers.models.transformers.auraflow_transformer_2d import AuraFlowTransformer2DModel
    with on_meta(), refusing("transformer", checkpoint):
        model: Any = AuraFlowTransformer2DModel.from_config(config)
        replace_table(model.pos_embed, table_side(config), model.inner_dim)
    return model.eval().requires_grad_(False)


def table_side(config: dict[str, Any]) -> int:
    """Patches along each side of the table of positions."""
    return int(config.get("pos_embed_max_size", 1024) ** 0.5)


def modulating(model: AuraFlowTransformer2DModel) -> list[nn.Linear]:
    """The layers whose input is the timestep alone, in the order in which a pass needs their outputs."""
    blocks: list[Any] = list(model.joint_transformer_blocks)
    joint = [norm.linear for block in blocks for norm in (block.norm1, block.norm1_context)]
    singles: list[Any] = list(model.single_transformer_blocks)
    return [*joint, *(block.norm1.linear for block in singles), model.norm_out.linear]


def read_once(name: str) -> bool:
    """Whether a parameter belongs to a modulation layer or to the timestep embedding."""
    return name.startswith(("time_step_proj.", "norm_out.")) or ".norm1" in name


def quantised(name: str) -> bool:
    """Whether a weight becomes int8: those of the blocks, except their modulation layers."""
    return name.startswith(("joint_transformer_blocks.", "single_transformer_blocks.")) and not read_once(name)


def predict_sample(
    model: AuraFlowTransformer2DModel,
    streamer: Streamer,
    latents: Tensor,
    tokens: Tensor,
    modulation: Sequence[Tensor],
    side: int,
    check: Callable[[str], None] = lambda where: None,
) -> Tensor:
    """The velocity that AuraFlowTransformer2DModel predicts, (1, C, h, w), for latents of that shape and the prompt's
    tokens (1, T, W). `modulation`: the values of each of `modulating(model)`; `side`: of the table of positions."""
    height, width = (n // PATCH for n in latents.shape[2:])
    learned = model.register_tokens.shape[1]
    text = slice(0, learned + tokens.shape[1])
    image = slice(text.stop, text.stop + height * width)
    x = latents.new_empty(1, image.stop, model.inner_dim)
    check("transformer.pos_embed")
    if not x.is_meta:
        x[:, :learned] = model.register_tokens
    project(streamer, model.context_embedder, lambda chunk: tokens[:, chunk], x[:, learned : text.stop])
    grid = Grid(height, width, side // 2 - height // 2, side // 2 - width // 2, side)
    into: Any = model.pos_embed.proj
    embed(streamer, model.pos_embed, latents, x[:, image], grid, lambda strip: into(pack(strip)))
    rows = iter(modulation)
    for i, block in enumerate(model.joint_transformer_blocks):
        check(f"transformer.joint_transformer_blocks.{i}")
        joint_block(streamer, block, x, text, image, next(rows), next(rows))
    for i, block in enumerate(model.single_transformer_blocks):
        check(f"transformer.single_transformer_blocks.{i}")
        single_block(streamer, block, x, next(rows))
    check("transformer.proj_out")
    scale, shift = next(rows).chunk(2)
    made = x.new_empty(1, height * width, model.proj_out.out_features)
    project(streamer, model.proj_out, modulated(_Copy(), x[:, image], scale, shift), made)
    return unpatched(made, height, latents.shape[1])


def joint_block(
    streamer: Streamer, block: AuraFlowJointTransformerBlock, x: Tensor, text: slice, image: slice, of_image: Tensor,
    of_text: Tensor,
) -> None:  # fmt: skip
    """An AuraFlowJointTransformerBlock on the state x (1, tokens, d), in place; `of_image` and `of_text`, (6 d,), are
    what norm1 and norm1_context make of the conditioning."""
    attn: Any = block.attn
    shift, scale, gate, ff_shift, ff_scale, ff_gate = of_image.chunk(6)
    t_shift, t_scale, t_gate, t_ff_shift, t_ff_scale, t_ff_gate = of_text.chunk(6)
    streams = (
        added_stream(text, attn, modulated(block.norm1_context.norm, x, t_scale, t_shift)),
        stream_of(image, attn, modulated(block.norm1.norm, x, scale, shift)),
    )
    attended = attention(streamer, x, streams, attn.heads)
    after = x.clone()
    add_attended(streamer, attn.to_add_out, attended, after, text, t_gate)
    add_attended(streamer, attn.to_out[0], attended, after, image, gate)
    del attended
    normed = modulated(block.norm2_context, after, t_ff_scale, t_ff_shift)
    add_feed_forward(streamer, _feed_forward(block.ff_context), x, text, normed, t_ff_gate)
    normed = modulated(block.norm2, after, ff_scale, ff_shift)
    add_feed_forward(streamer, _feed_forward(block.ff), x, image, normed, ff_gate)


def single_block(streamer: Streamer, block: AuraFlowSingleTransformerBlock, x: Tensor, modulation: Tensor) -> None:
    """An AuraFlowSingleTransformerBlock on the state x (1, tokens, d), in place; modulation: (6 d,)."""
    attn: Any = block.attn
    shift, scale, gate, ff_shift, ff_scale, ff_gate = modulation.chunk(6)
    everything = slice(0, x.shape[1])
    stream = stream_of(everything, attn, modulated(block.norm1.norm, x, scale, shift))
    attended = attention(streamer, x, [stream], attn.heads)
    after = x.clone()
    add_attended(streamer, attn.to_out[0], attended, after, everything, gate)
    del attended
    normed = modulated(block.norm2, after, ff_scale, ff_shift)
    add_feed_forward(streamer, _feed_forward(block.ff), x, everything, normed, ff_gate)


class _Copy(nn.Module):
    """Modulation without a norm, as the input of the last layer needs it."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clone()


def _feed_forward(ff: Any) -> FeedForward:
    return FeedForward(ff.linear_1, nn.SiLU(), ff.out_projection, ff.linear_2)
