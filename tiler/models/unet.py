"""One pass of a UNet2DConditionModel over many samples with one read of its weights.

Walks the blocks of diffusers' own module in the order of its forward() and keeps, between two units, only each
sample's hidden state and the skips still to be used. Skips are concatenated when a sample needs them, not before.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from tiler.memory.meter import MetaMeter
from tiler.weights.layers import SMALL, stream_layers
from tiler.weights.stream import Streamer

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

# Of a feed-forward's projection at a time: 6.3 MB, which the allocator need not map anew each time; but no fewer tokens than
# keep the product efficient. Where the weights do not fit the arena, and every further chunk would read them again, just
# enough to leave SD 1.5's second level (1024 × 5120) whole.
FEED_FORWARD_ELEMENTS, FEED_FORWARD_TOKENS = 3 * 2**19, 256
FEED_FORWARD_ELEMENTS_READ = 5 * 2**20


class Windows(NamedTuple):
    """Self-attention of the highest resolution that has any looks only inside windows of size × size latents (HyperTile).
    `top` and `left`, below `size`, are where the second row and column of them begin, unless they are 0."""

    size: int
    top: int = 0
    left: int = 0

    @classmethod
    def drawn(cls, size: int, seed: int, timestep: Tensor) -> Windows:
        """Windows of a step, elsewhere than at the step before."""
        rng = random.Random(f"{seed} {float(timestep)}")
        return cls(size, rng.randrange(size), rng.randrange(size))


# Weights that stay as they are where others become int8: their names hold one of these. They are small, and first or last;
# scripts/sensitivity.py tells what each kind of the others loses.
FP32_NAMES = ("time_emb", "conv_in.", "conv_out.")


def int8_weights(unet: UNet2DConditionModel) -> frozenset[str]:
    """The parameters that are quantised where int8 is asked for."""
    layers = ((n, m) for n, m in unet.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d))
    names = (f"{name}.weight" for name, layer in layers if layer.weight.numel() > SMALL)
    return frozenset(name for name in names if not any(part in name for part in FP32_NAMES))


def order_of_use(unet: UNet2DConditionModel) -> list[str]:
    """All parameters of a meta-device UNet: what is loaded at once, then what a pass streams, as it comes."""
    streamer, meta = Streamer(None), torch.device("meta")
    everything = [name for name, _ in unet.named_parameters()]
    stream_layers(unet, streamer)
    side, config = 2**unet.num_upsamplers, unet.config
    with MetaMeter(), torch.no_grad():
        latents = torch.empty(1, config.in_channels, side, side, device=meta)
        text = torch.empty(1, 77, config.cross_attention_dim, device=meta)
        predict_noise(unet, streamer, [latents], torch.empty((), device=meta), [text])
    return [name for name in everything if name not in streamer.used] + list(streamer.used)


def _ignore(where: str) -> None:
    pass


def predict_noise(
    unet: UNet2DConditionModel,
    streamer: Streamer,
    latents: Sequence[Tensor],
    timestep: Tensor,
    prompt_embeds: Sequence[Tensor],
    check: Callable[[str], None] = _ignore,
    windows: Windows | None = None,
) -> Tensor:
    """The model's prediction (epsilon or v, whichever it was trained for).

    latents: one (1, channels, h, w) fp32 for each sample, scaled by the scheduler; timestep: scalar, the same for all;
    prompt_embeds: one (1, tokens, width) fp32 for each → (batch, channels, h, w) fp32. Neighbours that are the same
    tensor, the two halves of a guidance, share their work and memory up to the first layer that sees the prompt.
    `check` is called at every unit.
    """
    levels = [i for i, block in enumerate(unet.down_blocks) if hasattr(block, "attentions")]
    windowed = (
        {f"unet.down_blocks.{levels[0]}", f"unet.up_blocks.{len(unet.up_blocks) - 1 - levels[0]}"} if levels else set()
    )
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
            most = FEED_FORWARD_ELEMENTS if streamer.fits(block.ff) else FEED_FORWARD_ELEMENTS_READ
            block.set_chunk_feed_forward(_feed_forward_chunk(tokens, max(most // width, FEED_FORWARD_TOKENS)), 1)
            if where.rpartition(".attentions")[0] in windowed:
                _look_through(block.attn1, windows, inputs[0].shape[2:], 2 ** levels[0])
        calls: list[tuple[Tensor, ...]] = list(zip(inputs, texts, strict=True))
        inputs.clear()
        return streamer.run(_WithText(module), calls)

    if streamer.can_prepack:  # in channels-last oneDNN reorders nothing but weights
        ordered = {id(x): x if x.is_meta else x.contiguous(memory_format=torch.channels_last) for x in latents}
        latents = [ordered[id(x)] for x in latents]
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


def _feed_forward_chunk(tokens: int, most: int) -> int | None:
    """Tokens that go through a feed-forward at a time (diffusers wants a divisor). For the 4096 tokens of SD 1.5's first
    level its projection would be 42 MB, the largest transient of the whole pass."""
    parts = next(n for n in range(1, tokens + 1) if tokens % n == 0 and tokens // n <= most)
    return None if parts == 1 else tokens // parts


def _look_through(attention: Any, windows: Windows | None, shape: Sequence[int], scale: int) -> None:
    """Give a self-attention over `shape` (height, width) its windows, or all there is; `scale` latents make one token."""
    inner = getattr(attention.processor, "inner", attention.processor)
    if windows is None:
        attention.processor = inner
        return
    spans = (
        _spans(length, max(1, windows.size // scale), first // scale)
        for length, first in zip(shape, windows[1:], strict=True)
    )
    attention.processor = _Windowed(inner, tuple(shape), *spans)


def _spans(length: int, size: int, first: int) -> list[slice]:
    """`length` in pieces of `size`, of which the first may be cut to `first`; in one when it is no longer than that."""
    if size >= length:
        return [slice(0, length)]
    starts = [0, *range(first or size, length, size)]
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], length], strict=True)]


class _Windowed:
    """diffusers' attention processor `inner`, called for each window of tokens by itself."""

    def __init__(self, inner: Any, shape: tuple[int, ...], rows: list[slice], cols: list[slice]) -> None:
        self.inner, self.shape, self.rows, self.cols = inner, shape, rows, cols

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """hidden_states: (1, height × width, C) → the same."""
        plane = hidden_states.unflatten(1, self.shape)
        out = torch.empty_like(plane)
        for rows in self.rows:
            for cols in self.cols:
                window = plane[:, rows, cols]
                seen = self.inner(attn, window.flatten(1, 2), *args, **kwargs)
                out[:, rows, cols] = seen.unflatten(1, window.shape[1:3])
        return out.flatten(1, 2)


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
    """A Transformer2DModel under its prompt's embeddings: what diffusers' own forward does, which would leave channels-last
    for a copy before its last projection."""

    def __init__(self, attention: torch.nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, hidden: Tensor, text: Tensor) -> Tensor:
        model: Any = self.attention
        of_pixels = not model.use_linear_projection
        x = model.norm(hidden)
        x = model.proj_in(x) if of_pixels else x
        sides, tokens = x.shape[2:], x.permute(0, 2, 3, 1).flatten(1, 2)
        del x
        tokens = tokens if of_pixels else model.proj_in(tokens)
        for block in model.transformer_blocks:
            tokens = block(tokens, encoder_hidden_states=text)
        tokens = tokens if of_pixels else model.proj_out(tokens)
        planes = tokens.unflatten(1, sides).permute(0, 3, 1, 2)
        result: Tensor = (model.proj_out(planes) if of_pixels else planes) + hidden
        return result
