"""An autoencoder as a pipeline of rows: each layer takes some rows of its input and gives the rows it can.

A 3×3 convolution keeps the last two rows it saw, so nothing is computed twice and no tile needs a halo: work factor
1.00, memory proportional to the width alone. Two things in the network look at the whole picture; both are measured
elsewhere (`exact.stream` gathers them), and held for all rows:

- GroupNorm's mean and variance, after which a norm is a fixed scale and shift per channel;
- the keys and values of the mid-block attention, so that every row attends to the same global view.

So all strips see the same network and no strip can differ in tone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiler.compute.kernels import HeldNorm
from tiler.compute.layers import attend, enlarging
from tiler.compute.steps import activated
from tiler.compute.windows import Window
from tiler.decoding import FACTOR

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention
    from diffusers.models.autoencoders.vae import Decoder, Encoder
    from diffusers.models.resnet import ResnetBlock2D

Check = Callable[[str], None]

REACH = 18  # latents: the decoder's convolutions reach 17.25 latents, the encoder's less
_SILU = nn.SiLU()
_STRIP_BYTES = 5 * 2**19  # elements in the input of one convolution call; bounds its scratch


class Pixels(Protocol):
    """A picture of `shape` (H, W, 3); a slice of its rows is uint8. An array, or an object that computes rows on
    demand."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: slice, /) -> np.ndarray: ...


class Latents(Protocol):
    """Latents of `shape` (1, C, h, w); `[:, :, first:last]` returns rows, fp32. A tensor, or a file that is read on
    demand."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, rows: tuple[slice, slice, slice], /) -> Tensor: ...


class Stage(Protocol):
    """One layer. `push` takes (1, C, rows, W) fp32, from top to bottom; `last` marks the end of the picture. Returns
    the rows that are ready, or None if there are none yet. `growth` is output size over input size in bytes."""

    growth: float = 1.0

    def push(self, x: Tensor | None, last: bool) -> Tensor | None: ...


class Norm:
    """GroupNorm with fixed statistics, then SiLU: y = silu(x·scale + shift), per channel."""

    def __init__(self, norm: nn.Module, *, silu: bool = True) -> None:
        assert isinstance(norm, nn.GroupNorm)
        self.norm, self.silu = norm, silu
        self.held: tuple[Tensor, Tensor] | None = None  # mean and variance
        self.affine: HeldNorm | None = None  # the scale and shift that they give

    def hold(self, mean: Tensor, var: Tensor) -> None:
        """Set the statistics of each group, (groups,) fp64."""
        self.held = mean, var
        norm, per = self.norm, self.norm.num_channels // self.norm.num_groups
        if norm.weight.is_meta:
            self.affine = HeldNorm(norm.weight.new_empty(2, norm.num_channels))
            return
        scale = norm.weight * torch.rsqrt(var + norm.eps).repeat_interleave(per)
        self.affine = HeldNorm(torch.stack([scale, norm.bias - mean.repeat_interleave(per) * scale]).float())

    def apply(self, x: Tensor) -> Tensor:
        assert self.affine is not None
        y: Tensor = self.affine(x)
        return activated(_SILU, y) if self.silu else y


def _without_row_padding(conv: nn.Conv2d) -> nn.Conv2d:
    """A copy of the layer with the same parameters that pads columns only, because rows are padded here. The layer
    itself is not changed; it belongs to someone else."""
    padded = copy.copy(conv)
    padded.padding = (0, conv.padding[1])  # type: ignore[assignment]
    return padded


class Conv(Stage):
    """A 3×3 convolution of stride 1, or a 1×1, row by row, after an optional norm, with zero rows above and below.

    Works in strips of a few rows, so that temporary memory and the normalised copy stay small compared to input and
    output. With `enlarged`, its input is an image with both sides doubled; if it `takes_small`, it takes the rows of
    the small one.
    """

    def __init__(self, conv: nn.Module, norm: Norm | None = None, *, enlarged: bool = False) -> None:
        assert isinstance(conv, nn.Conv2d)
        self.conv, self.norm = _without_row_padding(enlarging(conv) if enlarged else conv), norm
        self.halo = conv.kernel_size[0] // 2
        self.tail: Tensor | None = None  # lines still needed, as the convolution reads them
        self.width = 0  # of the rows

    @property
    def together(self) -> int:
        """The number of rows that the layer computes at once: rows come in multiples of it, except at the end of the
        picture."""
        return getattr(self.conv, "rows_together", 1)

    @property
    def takes_small(self) -> bool:
        """Whether its kernel enlarges the rows; the answer must not change while it holds rows back."""
        return getattr(self.conv, "takes_small", False)

    def push(self, x: Tensor | None, last: bool, residual: Callable[[int], Tensor] | None = None) -> Tensor | None:
        """Push rows; `residual(n)` returns the next n rows to add to the result."""
        if x is None and not (last and self.halo):
            return None
        if not self.halo and self.norm is None:
            assert x is not None and residual is None
            done: Tensor = self.conv(x)
            return done
        like = x if x is not None else self.tail
        assert like is not None
        if x is not None:
            self.width = x.shape[3]
        window = Window(self.conv, None if self.norm is None else self.norm.affine, silu=self.norm is not None)
        rows, scale = 0 if x is None else x.shape[2], window.scale
        count, beyond = self.ready(rows, last) // scale, 2 * self.halo
        tail = window.lines(like, self.halo, self.width).zero_() if self.tail is None else self.tail
        self.tail = None
        together = self.together // scale
        step = max(1, _STRIP_BYTES // (scale**2 * self.conv.in_channels * self.width * 4) // together) * together
        lines = window.lines(like, min(step, count) + beyond, self.width)
        out = _empty(like, self.conv.out_channels, scale * count, scale * self.width)
        taken = 0
        for top in range(0, count, step):
            bottom = min(top + step, count)
            seen = lines[: bottom - top + beyond]
            held = len(tail)
            seen[:held] = tail
            del tail  # it may have as many lines as are computed at once
            fresh = min(len(seen) - held, rows - taken)
            if x is not None:
                window.write(x[:, :, taken : taken + fresh], seen[held : held + fresh])
            seen[held + fresh :].zero_()
            taken += fresh
            part = out[:, :, scale * top : scale * bottom]
            window.compute(seen, part, None if residual is None else residual(bottom - top))
            tail = seen[len(seen) - beyond :]
            if bottom == count or step < beyond:  # otherwise a view will do: the next strip copies it elsewhere
                tail = tail.clone()
        self.tail = None if last or not self.halo else self._with(window, tail, x, taken)
        return out if count else None

    def ready(self, rows: int, last: bool) -> int:
        """The number of output rows that a push of `rows` rows returns."""
        held, scale = self.halo if self.tail is None else len(self.tail), 2 if self.takes_small else 1
        count = scale * max(0, held + rows + (self.halo if last else 0) - 2 * self.halo)
        return count if last else count // self.together * self.together

    @staticmethod
    def _with(window: Window, tail: Tensor, x: Tensor | None, taken: int) -> Tensor:
        """The rows of `tail`, followed by those of x from row `taken` on."""
        if x is None or taken == x.shape[2]:
            return tail
        lines = window.lines(x, len(tail) + x.shape[2] - taken, x.shape[3])
        lines[: len(tail)] = tail
        window.write(x[:, :, taken:], lines[len(tail) :])
        return lines


class Down(Stage):
    """diffusers' Downsample2D of an encoder: a zero row below and a zero column to the right, then a 3×3 convolution of
    stride 2."""

    def __init__(self, sampler: nn.Module) -> None:
        self.conv = sampler.conv
        assert isinstance(self.conv, nn.Conv2d) and self.conv.stride == (2, 2) and self.conv.padding == (0, 0)
        self.tail: Tensor | None = None

    def push(self, x: Tensor | None, last: bool) -> Tensor | None:
        if x is None and not last:
            return None
        parts = [p for p in (self.tail, x) if p is not None]
        joined = F.pad(torch.cat(parts, dim=2), (0, 1, 0, 1 if last else 0))
        count = (joined.shape[2] - 3) // 2 + 1 if joined.shape[2] >= 3 else 0
        self.tail = None if last else joined[:, :, 2 * count :, :-1].clone()
        result: Tensor | None = self.conv(joined[:, :, : 2 * count + 1]) if count else None  # type: ignore[operator]
        return result


class Up(Stage):
    """diffusers' Upsample2D: nearest neighbour ×2, then a 3×3 convolution."""

    growth = 4.0

    def __init__(self, conv: nn.Module) -> None:
        self.conv = Conv(conv, enlarged=True)

    def push(self, x: Tensor | None, last: bool) -> Tensor | None:
        if x is None or self.conv.takes_small:
            return self.conv.push(x, last)
        # A few rows at a time: four copies of the whole input need not exist beside the output.
        step = max(1, _STRIP_BYTES // (4 * x.shape[1] * x.shape[3] * 4))
        out: Tensor | None = None
        filled, count = 0, self.conv.ready(2 * x.shape[2], last)
        for top in range(0, x.shape[2], step):
            large = F.interpolate(x[:, :, top : top + step], scale_factor=2.0, mode="nearest")
            part = self.conv.push(large, last and top + step >= x.shape[2])
            if part is None:
                continue
            if out is None:
                out = part if part.shape[2] == count else _empty(part, part.shape[1], count, part.shape[3])
            if out is not part:
                out[:, :, filled : filled + part.shape[2]] = part
            filled += part.shape[2]
            del part, large
        assert filled == count
        return out


class Residual:
    """Rows of a shortcut, kept until the convolutions beside it have produced theirs."""

    def __init__(self) -> None:
        self.rows: Tensor | None = None

    def keep(self, x: Tensor) -> None:
        self.rows = x if self.rows is None else torch.cat([self.rows, x], dim=2)

    def take(self, count: int) -> Tensor:
        """Remove and return the first stored rows."""
        assert self.rows is not None
        taken, rest = self.rows[:, :, :count], self.rows[:, :, count:]
        self.rows = rest.clone() if rest.shape[2] else None
        return taken


class Resnet(Stage):
    """diffusers' ResnetBlock2D without time embedding. The shortcut is delayed by the number of rows that the
    convolutions hold back."""

    def __init__(self, block: ResnetBlock2D) -> None:
        self.conv1 = Conv(block.conv1, Norm(block.norm1))
        self.conv2 = Conv(block.conv2, Norm(block.norm2))
        self.shortcut = Conv(block.conv_shortcut) if block.conv_shortcut is not None else None
        self.scale = float(block.output_scale_factor)
        self.waiting = Residual()

    def push(self, x: Tensor | None, last: bool) -> Tensor | None:
        h = self.conv1.push(x, last)
        if x is not None:
            self.waiting.keep(x if self.shortcut is None else self.shortcut.conv(x))
            del x
        h = self.conv2.push(h, last, self.waiting.take)
        return h if h is None or self.scale == 1 else h.div_(self.scale)


class MidAttention(Stage):
    """diffusers' Attention of an autoencoder's mid block, with fixed keys and values."""

    def __init__(self, attention: Attention) -> None:
        assert attention.group_norm is not None and attention.residual_connection
        self.attention = attention
        self.norm = Norm(attention.group_norm, silu=False)
        self.memory: Tensor | None = None
        self.keys: Tensor | None = None  # both are views of the memory
        self.values: Tensor | None = None

    def hold(self, memory: Tensor) -> None:
        """Set every token's key and value, (1, 2C, h, w), keys above values, for all following rows."""
        self.memory = memory
        keys, values = memory.flatten(2).transpose(1, 2).chunk(2, dim=2)
        self.keys, self.values = self._heads(keys), self._heads(values)

    def _heads(self, tokens: Tensor) -> Tensor:
        """Split x into heads: (1, n, C) → (1, heads, n, C / heads)."""
        return tokens.unflatten(-1, (self.attention.heads, -1)).transpose(1, 2)

    def push(self, x: Tensor | None, last: bool) -> Tensor | None:
        if x is None:
            return None
        a = self.attention
        tokens = self.norm.apply(x).flatten(2).transpose(1, 2)  # (1, rows·W, C)

        assert self.keys is not None and self.values is not None
        mixed = attend(self._heads(a.to_q(tokens)), self.keys, self.values, a.to_q)
        out = a.to_out[0](mixed.transpose(1, 2).flatten(2)).transpose(1, 2).reshape(x.shape)
        return (out + x).div_(a.rescale_output_factor)


def _empty(like: Tensor, channels: int, rows: int, width: int) -> Tensor:
    """An uninitialised (1, C, rows, W) fp32 on the device of `like`, channels-last like all rows of an autoencoder, so
    that oneDNN reorders none of them."""
    return like.new_empty(1, rows, width, channels, dtype=torch.float32).permute(0, 3, 1, 2)


def flow(stages: list[Stage], box: list[Tensor], last: bool, *, check: Check) -> Iterator[Tensor]:
    """Push the rows in `box` (one tensor or none; it is emptied) through every stage, and yield the results of the last
    one.

    Rows are passed on a few at a time, so that neither the wide stages nor the end of the picture, where every stage
    releases the rows that it held back, needs more memory than a strip.
    """
    for at, stage in enumerate(stages):
        if box or last:
            result = stage.push(box.pop() if box else None, last)
            if result is not None:
                box.append(result)
            del result
        check(f"decode.{type(stage).__name__}")
        if not box:
            continue
        shape = box[0].shape
        growth = stages[at + 1].growth if at + 1 < len(stages) else 1.0
        step = max(1, int(2 * _STRIP_BYTES / growth) // (shape[1] * shape[3] * 4))
        if shape[2] > step:
            x = box.pop()
            for top in range(0, shape[2], step):
                yield from flow(
                    stages[at + 1 :],
                    [x[:, :, top : top + step]],
                    last and top + step >= shape[2],
                    check=check,
                )
            return
    yield from box


def _mid(block: nn.Module) -> list[Stage]:
    stages: list[Stage] = [Resnet(block.resnets[0])]  # type: ignore[index]
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):  # type: ignore[arg-type, index]
        if attention is not None:
            stages.append(MidAttention(attention))
        stages.append(Resnet(resnet))
    return stages


def decoder_stages(decoder: Decoder, post_quant_conv: nn.Module | None) -> list[Stage]:
    """diffusers' Decoder.forward as stages: latents (divided by scaling_factor) → RGB in about [-1, 1]."""
    stages: list[Stage] = [] if post_quant_conv is None else [Conv(post_quant_conv)]
    stages += [Conv(decoder.conv_in), *_mid(decoder.mid_block)]
    for block in decoder.up_blocks:
        stages += [Resnet(resnet) for resnet in block.resnets]
        stages += [Up(sampler.conv) for sampler in block.upsamplers or []]
    return [*stages, Conv(decoder.conv_out, Norm(decoder.conv_norm_out))]


def encoder_stages(encoder: Encoder, quant_conv: nn.Module | None) -> list[Stage]:
    """diffusers' Encoder.forward as stages: RGB in [-1, 1] → the posterior's moments (mean, then log-variance)."""
    stages: list[Stage] = [Conv(encoder.conv_in)]
    for block in encoder.down_blocks:
        stages += [Resnet(resnet) for resnet in block.resnets]
        stages += [Down(sampler) for sampler in block.downsamplers or []]
    stages += [*_mid(encoder.mid_block), Conv(encoder.conv_out, Norm(encoder.conv_norm_out))]
    return stages if quant_conv is None else [*stages, Conv(quant_conv)]


def latent_strips(latents: Latents, rows: int, first: int = 0) -> Iterator[Tensor]:
    """Cut the latents into strips (1, C, n, w) of at most `rows` rows each, from the strip `first` on,
    channels-last."""
    strips = (latents[:, :, top : top + rows] for top in range(first * rows, latents.shape[2], rows))
    return (strip.contiguous(memory_format=torch.channels_last) for strip in strips)


def strip_rows(width: int) -> int:
    """The number of latent rows that are pushed at a time for `width` latent columns: enough to justify a read of the
    weights. Depends only on the width, so the bytes of the picture depend on nothing else either."""
    return max(1, min(32, 512 // width))


def strip_before(begin: int, rows: int) -> int:
    """The number of the strip, of `rows` latent rows each, at which a decoder must start so that its pixels from the
    row `begin` on are right to the last bit: by then the effects of an artificial top and of strips cut differently
    have passed."""
    return max(0, (begin // FACTOR - 2 * REACH) // rows - 1)
