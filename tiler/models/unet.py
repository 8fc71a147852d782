"""One pass of a UNet2DConditionModel over many samples with one read of its weights.

Walks the blocks of diffusers' own module in the order of its forward() and keeps, between two units, only each
sample's hidden state and the skips still to be used. Skips are concatenated when a sample needs them, not before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tiler.weights.stream import Streamer

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

# Of a feed-forward's inner activation at a time: 10.5 MB. Just large enough to leave SD 1.5's second level (1024 × 2560)
# whole: its weights do not fit the arena, and every further chunk would read them again.
FEED_FORWARD_ELEMENTS = 5 * 2**19


def _ignore(where: str) -> None:
    pass


def predict_noise(
    unet: UNet2DConditionModel,
    streamer: Streamer,
    latents: Sequence[Tensor],
    timestep: Tensor,
    prompt_embeds: Sequence[Tensor],
    check: Callable[[str], None] = _ignore,
) -> Tensor:
    """The model's prediction (epsilon or v, whichever it was trained for).

    latents: one (1, channels, h, w) fp32 for each sample, scaled by the scheduler; timestep: scalar, the same for all;
    prompt_embeds: one (1, tokens, width) fp32 for each → (batch, channels, h, w) fp32. Neighbours that are the same
    tensor, the two halves of a guidance, share their work and memory up to the first layer that sees the prompt.
    `check` is called at every unit.
    """
    batch, up = len(latents), 2**unet.num_upsamplers
    assert all(x.shape[2] % up == 0 and x.shape[3] % up == 0 for x in latents), latents[0].shape
    temb = unet.time_embedding(unet.get_time_embed(sample=latents[0], timestep=timestep))
    texts = list(prompt_embeds)

    def each(
        where: str, module: torch.nn.Module, inputs: list[Tensor], *more: list[Tensor], **shared: object
    ) -> list[Tensor]:
        check(where)
        calls: list[tuple[Tensor, ...]] = list(zip(inputs, *more, strict=True))
        inputs.clear()
        return streamer.run(module, calls, **shared)

    def transform(where: str, module: torch.nn.Module, inputs: list[Tensor]) -> list[Tensor]:
        check(where)
        tokens, width = inputs[0].shape[2] * inputs[0].shape[3], 8 * inputs[0].shape[1]
        for block in module.transformer_blocks:  # type: ignore[union-attr]
            block.set_chunk_feed_forward(_feed_forward_chunk(tokens, width), 1)
        calls: list[tuple[Tensor, ...]] = list(zip(inputs, texts, strict=True))
        inputs.clear()
        return streamer.run(_WithText(module), calls)

    hidden = each("unet.conv_in", unet.conv_in, list(latents))
    skips = [list(hidden)]
    for i, block in enumerate(unet.down_blocks):
        attentions = getattr(block, "attentions", [None] * len(block.resnets))
        for j, (resnet, attention) in enumerate(zip(block.resnets, attentions, strict=True)):
            hidden = each(f"unet.down_blocks.{i}.resnets.{j}", resnet, hidden, temb=temb)
            if attention is not None:
                hidden = transform(f"unet.down_blocks.{i}.attentions.{j}", attention, hidden)
            skips.append(list(hidden))
        for sampler in block.downsamplers or []:
            hidden = each(f"unet.down_blocks.{i}.downsamplers", sampler, hidden)
            skips.append(list(hidden))
    if (mid := unet.mid_block) is not None:
        hidden = each("unet.mid_block.resnets.0", mid.resnets[0], hidden, temb=temb)
        for j, (attention, resnet) in enumerate(zip(mid.attentions, mid.resnets[1:], strict=True)):
            if attention is not None:
                hidden = transform(f"unet.mid_block.attentions.{j}", attention, hidden)
            hidden = each(f"unet.mid_block.resnets.{j + 1}", resnet, hidden, temb=temb)
    for i, block in enumerate(unet.up_blocks):
        attentions = getattr(block, "attentions", [None] * len(block.resnets))
        for j, (resnet, attention) in enumerate(zip(block.resnets, attentions, strict=True)):
            hidden = each(f"unet.up_blocks.{i}.resnets.{j}", _WithSkip(resnet), hidden, skips.pop(), temb=temb)
            if attention is not None:
                hidden = transform(f"unet.up_blocks.{i}.attentions.{j}", attention, hidden)
        for sampler in block.upsamplers or []:
            hidden = each(f"unet.up_blocks.{i}.upsamplers", sampler, hidden)
    hidden = each("unet.conv_out", torch.nn.Sequential(unet.conv_norm_out, unet.conv_act, unet.conv_out), hidden)
    assert len(hidden) == batch and not skips
    return torch.cat(hidden)


def _feed_forward_chunk(tokens: int, width: int) -> int | None:
    """Tokens that go through a feed-forward of inner `width` at a time (diffusers wants a divisor). For the 4096 tokens of
    SD 1.5's first level that activation would be 42 MB, the largest transient of the whole pass."""
    parts = next(
        (n for n in range(1, tokens + 1) if tokens % n == 0 and tokens // n * width <= FEED_FORWARD_ELEMENTS), 1
    )
    return None if parts == 1 else tokens // parts


class _WithSkip(torch.nn.Module):
    """A resnet of the up path: its input is the hidden state and one skip, joined along channels."""

    def __init__(self, resnet: torch.nn.Module) -> None:
        super().__init__()
        self.resnet = resnet

    def forward(self, hidden: Tensor, skip: Tensor, temb: Tensor) -> Tensor:
        joined = torch.cat([hidden, skip], dim=1)
        del hidden, skip
        result: Tensor = self.resnet(joined, temb)
        return result


class _WithText(torch.nn.Module):
    """A Transformer2DModel under its prompt's embeddings."""

    def __init__(self, attention: torch.nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, hidden: Tensor, text: Tensor) -> Tensor:
        result: Tensor = self.attention(hidden, encoder_hidden_states=text, return_dict=False)[0]
        return result
