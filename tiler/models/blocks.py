"""The blocks of a UNet2DConditionModel, computed with diffusers' own modules for one sample, or several of one size.

The results equal those of their forward(), with fewer copies: everything stays channels-last, sums and activations are
in place if the tensor is not shared, and a feed-forward processes a few tokens at a time.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tiler.compute.layers import (
    StreamedLayer,
    as_unit,
    attend,
    convolve,
    each_sample,
    enlarging,
    linear,
    linear_layers,
)
from tiler.compute.steps import activated, joined, normed
from tiler.compute.tuning import FEED_FORWARD_ELEMENTS, FEED_FORWARD_ELEMENTS_READ, FEED_FORWARD_TOKENS
from tiler.models import strips

_GELU = {approximate: nn.GELU(approximate) for approximate in ("none", "tanh")}


class Windows(NamedTuple):
    """Restrict self-attention at the highest resolution to windows of size × size latents (HyperTile). `top` and
    `left`, below `size`, are the starts of the second row and column of windows, unless they are 0."""

    size: int
    top: int = 0
    left: int = 0

    @classmethod
    def drawn(cls, size: int, seed: int, timestep: Tensor) -> Windows:
        """The windows of a step, at other positions than in the step before."""
        rng = random.Random(f"{seed} {float(timestep)}")
        return cls(size, rng.randrange(size), rng.randrange(size))


class ResnetFirstHalf(nn.Module):
    """A ResnetBlock2D up to its first convolution. On the up path its input is the hidden state and one skip, joined
    along channels."""

    def __init__(self, resnet: Any, whole_elements: int | None = None) -> None:
        """Inputs with more than `whole_elements` elements after joining are processed in strips."""
        super().__init__()
        self.norm, self.act, self.conv = resnet.norm1, resnet.nonlinearity, resnet.conv1
        self.time, self.whole_elements = resnet.time_emb_proj, whole_elements

    def forward(self, hidden: Tensor, temb: Tensor, *skip: Tensor) -> Tensor:
        """hidden, skip: (n, C, h, w) each; temb: (n, width) → (n, C', h, w)."""
        parts = (hidden, *skip)
        by = strips.convolve if strips.are_large(parts, self.whole_elements) else convolve
        h = by(self.conv, *parts, norm=self.norm, activation=self.act)
        return h.add_(self._projected(activated(self.act, temb.clone()))[:, :, None, None])

    def _projected(self, temb: Tensor) -> Tensor:
        projected: Tensor = self.time(temb) if isinstance(self.time, StreamedLayer) else each_sample(self.time, temb)
        return projected


class ResnetSecondHalf(nn.Module):
    """The rest of a ResnetBlock2D, applied to the output of `ResnetFirstHalf` for `parts`."""

    def __init__(self, resnet: Any, whole_elements: int | None = None) -> None:
        super().__init__()
        self.norm, self.act, self.conv = resnet.norm2, resnet.nonlinearity, resnet.conv2
        self.shortcut, self.scale = resnet.conv_shortcut, resnet.output_scale_factor
        self.whole_elements = whole_elements

    def forward(self, h: Tensor, *parts: Tensor) -> Tensor:
        """h: (n, C', h, w); parts: (n, C, h, w) each → (n, C', h, w)."""
        residual = parts[0] if self.shortcut is None and len(parts) == 1 else None
        if self.shortcut is not None and strips.are_large(parts, self.whole_elements):
            h = strips.convolve(self.conv, h, norm=self.norm, activation=self.act)
            h = strips.add_pointwise(self.shortcut, parts, h)
            return h if self.scale == 1 else h.div_(self.scale)
        h = convolve(self.conv, h, norm=self.norm, activation=self.act, residual=residual)
        if self.shortcut is not None:
            h = convolve(self.shortcut, *parts, residual=h)
        elif residual is None:
            h += joined(parts)
        return h if self.scale == 1 else h.div_(self.scale)


class Resnet(nn.Module):
    """Both halves of a ResnetBlock2D, if the weights of both can be held at once."""

    def __init__(self, resnet: Any, whole_elements: int | None = None) -> None:
        super().__init__()
        self.halves = nn.ModuleList([half(resnet, whole_elements) for half in (ResnetFirstHalf, ResnetSecondHalf)])

    def forward(self, hidden: Tensor, temb: Tensor, *skip: Tensor) -> Tensor:
        """hidden, skip: (n, C, h, w) each; temb: (n, width) → (n, C', h, w)."""
        h = self.halves[0](hidden, temb, *skip)
        out: Tensor = self.halves[1](h, hidden, *skip)
        return out


class Upsampler(nn.Module):
    """An Upsample2D with a convolution."""

    def __init__(self, upsampler: Any) -> None:
        super().__init__()
        self.conv = enlarging(upsampler.conv)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: (n, C, h, w) → (n, C', 2h, 2w)."""
        return convolve(self.conv, hidden, enlarged=True)


class Head(nn.Module):
    """The last layers of a UNet2DConditionModel: a norm, an activation and a convolution."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.norm, self.act, self.conv = unet.conv_norm_out, unet.conv_act, unet.conv_out

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: (n, C, h, w) → (n, C', h, w)."""
        return convolve(self.conv, hidden, norm=self.norm, activation=self.act)


class PrePrompt(nn.Module):
    """The part of a Transformer2DModel that does not depend on the prompt: its norm, and the self-attention of its
    first block."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: (n, C, h, w) → tokens (n, h·w, width)."""
        model: Any = self.model
        if model.use_linear_projection:
            tokens = linear(model.proj_in, _tokens(normed(model.norm, hidden)))
        else:
            tokens = _tokens(convolve(model.proj_in, hidden, norm=model.norm))
        return _self_attention(model.transformer_blocks[0], tokens)


class Transformer(nn.Module):
    """A Transformer2DModel with a prompt's embeddings."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.up_to_text = model, PrePrompt(model)

    def forward(self, hidden: Tensor, text: Tensor, tokens: Tensor | None = None) -> Tensor:
        """hidden: (n, C, h, w); text: (n, 77, width); `tokens`: the output of `PrePrompt` for `hidden`, if it was
        computed → (n, C, h, w)."""
        model: Any = self.model
        tokens = self.up_to_text(hidden) if tokens is None else tokens
        for i, block in enumerate(model.transformer_blocks):
            tokens = _self_attention(block, tokens) if i else tokens
            tokens = as_unit(block.attn2, partial(attention, block.attn2, block.norm2), tokens, text)
            as_unit(block.ff, partial(feed_forward, block.ff, block.norm3, block.feed_forward_tokens), tokens)
        if model.use_linear_projection:
            return _planes(linear(model.proj_out, tokens, residual=_tokens(hidden)), hidden.shape[2:])
        return convolve(model.proj_out, _planes(tokens, hidden.shape[2:]), residual=hidden)


def _tokens(planes: Tensor) -> Tensor:
    """(n, C, h, w) → (n, h·w, C)."""
    return planes.permute(0, 2, 3, 1).flatten(1, 2)


def _planes(tokens: Tensor, sides: Sequence[int]) -> Tensor:
    """(n, h·w, C) → (n, C, h, w)."""
    return tokens.unflatten(1, sides).permute(0, 3, 1, 2)


class Spans(NamedTuple):
    """The windows of self-attention over (height, width) tokens: every combination of a span of rows and a span of
    columns."""

    shape: tuple[int, int]
    rows: list[slice]
    cols: list[slice]


def _self_attention(block: Any, tokens: Tensor) -> Tensor:
    return as_unit(block.attn1, partial(_in_windows, block.attn1, block.norm1, block.windows), tokens)


def _in_windows(attn: Any, norm: nn.Module, windows: Spans | None, tokens: Tensor) -> Tensor:
    """Apply `attention` to all tokens together, or to each window separately."""
    if windows is None:
        return attention(attn, norm, tokens)
    plane = tokens.unflatten(1, windows.shape)
    out = torch.empty_like(plane)
    for rows in windows.rows:
        for cols in windows.cols:
            window = plane[:, rows, cols]
            out[:, rows, cols] = attention(attn, norm, window.flatten(1, 2)).unflatten(1, window.shape[1:3])
    return out.flatten(1, 2)


def attention(attn: Any, norm: nn.Module, tokens: Tensor, text: Tensor | None = None) -> Tensor:
    """A diffusers Attention without norms of its own: tokens (n, tokens, C), normalised, attend to themselves or to
    `text` (n, 77, width) → the tokens plus the result."""
    if text is None:
        made = linear_layers([attn.to_q, attn.to_k, attn.to_v], tokens, norm=norm)
    else:
        made = linear(attn.to_q, tokens, norm=norm), *linear_layers([attn.to_k, attn.to_v], text)
    q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in made)
    del made
    seen = attend(q, k, v, attn.to_q).transpose(1, 2).flatten(2)
    del q, k, v
    return linear(attn.to_out[0], seen, residual=tokens)


def feed_forward(module: Any, norm: nn.Module, step: int, tokens: Tensor) -> None:
    """Add the output of a diffusers FeedForward for the tokens (n, tokens, C), normalised, to them in place, `step`
    tokens at a time."""
    from diffusers.models.activations import GEGLU, GELU

    first, last = module.net[0], module.net[2]
    assert isinstance(first, GEGLU | GELU), type(first)
    activation = _GELU[first.approximate if isinstance(first, GELU) else "none"]
    for some in tokens.split(step, dim=1):
        hidden = linear(first.proj, some, norm=norm, activation=activation, glu=isinstance(first, GEGLU))
        some.copy_(linear(last, hidden, residual=some))
        del hidden


def prepare(
    model: Any, shape: Sequence[int], would_fit: Callable[[nn.Module], bool], windows: Windows | None, scale: int
) -> None:
    """Set how the blocks of a Transformer2DModel process (C, height, width): the number of tokens per step of a
    feed-forward, and the windows of self-attention; one token covers `scale` latents."""
    channels, height, width = shape
    for block in model.transformer_blocks:
        most = FEED_FORWARD_ELEMENTS if would_fit(block.ff) else FEED_FORWARD_ELEMENTS_READ
        block.feed_forward_tokens = _feed_forward_chunk(
            height * width, max(most // (8 * channels), FEED_FORWARD_TOKENS)
        )
        block.windows = None
        if windows is not None:
            rows = _spans(height, max(1, windows.size // scale), windows.top // scale)
            cols = _spans(width, max(1, windows.size // scale), windows.left // scale)
            block.windows = Spans((height, width), rows, cols)


def _feed_forward_chunk(tokens: int, most: int) -> int:
    """The number of tokens per step of a feed-forward, a divisor of their total, so that all products have one size.
    For the 4096 tokens of SD 1.5's first level, the projection of all tokens would take 42 MB, the largest temporary of
    a pass."""
    return next(tokens // n for n in range(1, tokens + 1) if tokens % n == 0 and tokens // n <= most)


def _spans(length: int, size: int, first: int) -> list[slice]:
    """Cut `length` into pieces of `size`; the first may be shortened to `first`. A shorter length is one piece."""
    if size >= length:
        return [slice(0, length)]
    starts = [0, *range(first or size, length, size)]
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], length], strict=True)]
