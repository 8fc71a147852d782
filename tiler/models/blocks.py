"""What the blocks of a UNet2DConditionModel compute, over diffusers' own modules: one sample, or several of one size.

The same as their forward() does, with fewer copies: nothing leaves channels-last, sums and activations are made in place
where the tensor is theirs, and a feed-forward sees a few tokens at a time.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tiler.compute.kernels import activated, joined, normed
from tiler.compute.layers import StreamedLayer, attend, convolve, linear_layers
from tiler.models import strips

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


class ResnetFirstHalf(nn.Module):
    """A ResnetBlock2D up to its first convolution. On the up path its input is the hidden state and one skip, joined along
    channels."""

    def __init__(self, resnet: Any, whole_elements: int | None = None) -> None:
        """Inputs that have more than `whole_elements` when they are joined go by strips."""
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
        if isinstance(self.time, StreamedLayer):
            projected: Tensor = self.time(temb)
            return projected
        return torch.cat([self.time(one) for one in temb.split(1)])  # the bits of a product depend on their number


class ResnetSecondHalf(nn.Module):
    """The rest of a ResnetBlock2D, of what `ResnetFirstHalf` made of `parts`."""

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
        if residual is None:
            x = joined(parts)
            h += x if self.shortcut is None else self.shortcut(x)
        return h if self.scale == 1 else h.div_(self.scale)


class Resnet(nn.Module):
    """Both halves, where the weights of both can be held at once."""

    def __init__(self, resnet: Any, whole_elements: int | None = None) -> None:
        super().__init__()
        self.halves = nn.ModuleList([half(resnet, whole_elements) for half in (ResnetFirstHalf, ResnetSecondHalf)])
        self.whole_elements = whole_elements

    def forward(self, hidden: Tensor, temb: Tensor, *skip: Tensor) -> Tensor:
        """hidden, skip: (n, C, h, w) each; temb: (n, width) → (n, C', h, w)."""
        parts = (hidden, *skip)
        parts = parts if strips.are_large(parts, self.whole_elements) else (joined(parts),)
        h = self.halves[0](parts[0], temb, *parts[1:])
        out: Tensor = self.halves[1](h, *parts)
        return out


class PrePrompt(nn.Module):
    """A Transformer2DModel as far as it does not see the prompt: its norm, and the self-attention of its first block."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: (n, C, h, w) → tokens (n, h·w, width)."""
        model: Any = self.model
        x = normed(model.norm, hidden)
        x = x if model.use_linear_projection else model.proj_in(x)
        x = x.permute(0, 2, 3, 1).flatten(1, 2)
        x = model.proj_in(x) if model.use_linear_projection else x
        return _self_attention(model.transformer_blocks[0], x)


class Transformer(nn.Module):
    """A Transformer2DModel under its prompt's embeddings."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.up_to_text = model, PrePrompt(model)

    def forward(self, hidden: Tensor, text: Tensor, tokens: Tensor | None = None) -> Tensor:
        """hidden: (n, C, h, w); text: (n, 77, width); `tokens`: what `PrePrompt` made of `hidden`, if that was done →
        (n, C, h, w)."""
        model: Any = self.model
        tokens = self.up_to_text(hidden) if tokens is None else tokens
        for i, block in enumerate(model.transformer_blocks):
            tokens = _self_attention(block, tokens) if i else tokens
            tokens = block.attn2(block.norm2(tokens), encoder_hidden_states=text).add_(tokens)
            for some in tokens.split(block.feed_forward_tokens, dim=1):
                some += block.ff(block.norm3(some))
        tokens = model.proj_out(tokens) if model.use_linear_projection else tokens
        planes = tokens.unflatten(1, hidden.shape[2:]).permute(0, 3, 1, 2)
        out: Tensor = planes if model.use_linear_projection else model.proj_out(planes)
        return out + hidden


def _self_attention(block: Any, tokens: Tensor) -> Tensor:
    out: Tensor = block.attn1(block.norm1(tokens)).add_(tokens)
    return out


class Attend:
    """diffusers' attention processor of a layer without norms of its own: for all tokens together, or for each window of
    (height, width) tokens, a span of rows by one of columns, by itself."""

    def __init__(
        self, shape: tuple[int, int] | None = None, rows: Sequence[slice] = (), cols: Sequence[slice] = ()
    ) -> None:
        self.shape, self.rows, self.cols = shape, rows, cols

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None,
    ) -> Tensor:
        """hidden_states: (n, tokens, C) look at themselves, or at encoder_hidden_states → the same shape."""
        if self.shape is None:
            return _attend(
                attn, hidden_states, hidden_states if encoder_hidden_states is None else encoder_hidden_states
            )
        plane = hidden_states.unflatten(1, self.shape)
        out = torch.empty_like(plane)
        for rows in self.rows:
            for cols in self.cols:
                window = plane[:, rows, cols]
                tokens = window.flatten(1, 2)
                out[:, rows, cols] = _attend(attn, tokens, tokens).unflatten(1, window.shape[1:3])
        return out.flatten(1, 2)


def _attend(attn: Any, tokens: Tensor, seen: Tensor) -> Tensor:
    inputs = [attn.to_q, attn.to_k, attn.to_v]
    made = linear_layers(inputs, tokens) if seen is tokens else [attn.to_q(tokens), *linear_layers(inputs[1:], seen)]
    q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in made)
    del made
    mixed = attend(q, k, v).transpose(1, 2).flatten(2)
    out: Tensor = attn.to_out[0](mixed)
    return out


def prepare(
    model: Any, shape: Sequence[int], would_fit: Callable[[nn.Module], bool], windows: Windows | None, scale: int
) -> None:
    """Say how the blocks of a Transformer2DModel work on (C, height, width): how many tokens a feed-forward takes at a time,
    and the windows of self-attention; `scale` latents make one token."""
    channels, height, width = shape
    for block in model.transformer_blocks:
        most = FEED_FORWARD_ELEMENTS if would_fit(block.ff) else FEED_FORWARD_ELEMENTS_READ
        block.feed_forward_tokens = _feed_forward_chunk(
            height * width, max(most // (8 * channels), FEED_FORWARD_TOKENS)
        )
        block.attn1.processor = block.attn2.processor = Attend()
        if windows is not None:
            rows = _spans(height, max(1, windows.size // scale), windows.top // scale)
            cols = _spans(width, max(1, windows.size // scale), windows.left // scale)
            block.attn1.processor = Attend((height, width), rows, cols)


def _feed_forward_chunk(tokens: int, most: int) -> int:
    """Tokens that go through a feed-forward at a time, a divisor of all, so that every product has one size. For the 4096
    tokens of SD 1.5's first level its projection would be 42 MB, the largest transient of the whole pass."""
    return next(tokens // n for n in range(1, tokens + 1) if tokens % n == 0 and tokens // n <= most)


def _spans(length: int, size: int, first: int) -> list[slice]:
    """`length` in pieces of `size`, of which the first may be cut to `first`; in one when it is no longer than that."""
    if size >= length:
        return [slice(0, length)]
    starts = [0, *range(first or size, length, size)]
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], length], strict=True)]
