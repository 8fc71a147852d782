"""The whole-image decode (or encode) of an AutoencoderKL, out of core: what diffusers computes, at any size.

Layer by layer over row strips, with the activations in scratch files. GroupNorm's statistics are gathered while the
layer before it is written, every element once; the mid-block attention sees every token, or as many evenly spaced ones as
asked, keys and values in chunks with a running softmax (Milakov & Gimelshein 2018, arXiv:1805.02867). Nothing is computed twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from fractions import Fraction
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from tiler.decoding import FACTOR
from tiler.decoding.rows import (
    Conv,
    Down,
    Latents,
    MidAttention,
    Norm,
    Pixels,
    Resnet,
    Stage,
    Up,
    decoder_stages,
    encoder_stages,
    flow,
    latent_strips,
    means,
    strip_rows,
    to_tensor,
)
from tiler.decoding.scratch import STRIP_BYTES, Rows, Scratch

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    from tiler.decoding.rows import Check

Hold = Callable[[nn.Module], AbstractContextManager[None]]

KEYS = 4096  # tokens of keys and values in memory at a time
QUERIES = 1024
ALONE = 2**20  # elements of the weight of an Up or Down that gets a pass of its own: it is not held beside another one


class Pooled:
    """Mean and variance of each group over a picture seen strip by strip, pooled in fp64 (Chan, Golub & LeVeque 1979)."""

    def __init__(self, groups: int) -> None:
        self.groups, self.count = groups, 0
        self.mean = torch.zeros(groups, dtype=torch.float64)
        self.m2 = torch.zeros(groups, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """x: (1, C, n, W) fp32."""
        if not x.shape[2]:
            return
        if x.is_meta:
            x.new_empty(x.shape)  # planning: what is squared
            return
        # Two sums down the columns of (pixels, C): an eighth of torch.var_mean's time.
        values = x[0].permute(1, 2, 0).flatten(0, 1)
        mean = values.mean(0).view(self.groups, -1).mean(1)
        each = mean.repeat_interleave(x.shape[1] // self.groups)
        var = (values - each).square_().mean(0).view(self.groups, -1).mean(1)
        n = x.numel() // self.groups
        delta, total = mean.double() - self.mean, self.count + n
        self.m2 += var.double() * n + delta.square() * (self.count * n / total)
        self.mean += delta * (n / total)
        self.count = total

    @property
    def var(self) -> Tensor:
        return self.m2 / max(1, self.count)


class Frame(NamedTuple):
    """The input's size, and how much of it on each side (above and below, left and right) repeats the other side. What
    repeats is for convolutions only: statistics and attention see every pixel once."""

    height: int
    width: int
    y: int = 0
    x: int = 0

    def inner(self, part: Tensor, row: int) -> Tensor:
        """The pixels of `part`, (1, C, n, W), whole rows from `row` on at any scale of the input, that repeat no other side."""
        scale = Fraction(part.shape[3], self.width)
        y, x, bottom = int(self.y * scale), int(self.x * scale), int((self.height - self.y) * scale)
        return part[:, :, max(0, y - row) : max(0, bottom - row), x : part.shape[3] - x]


class Add(Stage):
    """The residual branch's end: adds the rows that the block began with, read again from the scratch."""

    def __init__(self, block: Resnet, stored: Rows) -> None:
        self.block, self.stored, self.row = block, stored, 0

    def push(self, x: Tensor | None, last: bool) -> Tensor | None:
        if x is None:
            return None
        skip = self.stored.read(self.row, self.row + x.shape[2])
        self.row += x.shape[2]
        if self.block.shortcut is not None:
            skip = self.block.shortcut.conv(skip)
        x += skip
        return x if self.block.scale == 1 else x.div_(self.block.scale)


class Attend(Stage):
    """The mid-block attention of some rows to all tokens of the picture, kept as `memory` (keys above values)."""

    growth = 4.0  # scores beside queries

    def __init__(self, stage: MidAttention, memory: Rows) -> None:
        self.stage, self.memory = stage, memory

    def push(self, x: Tensor | None, last: bool) -> Tensor | None:
        if x is None:
            return None
        a = self.stage.attention
        tokens = self.stage.norm.apply(x).flatten(2).transpose(1, 2)
        queries = a.to_q(tokens).unflatten(-1, (a.heads, -1)).transpose(1, 2)[0]  # (heads, rows·W, d)
        del tokens
        mixed = torch.cat([self._mix(part) for part in queries.split(QUERIES, dim=1)], dim=1)
        out = a.to_out[0](mixed.transpose(0, 1).flatten(1)[None]).transpose(1, 2).reshape(x.shape)
        return (out + x).div_(a.rescale_output_factor)

    def _mix(self, queries: Tensor) -> Tensor:
        """softmax(q kᵀ / √d) v for (heads, n, d) queries over all keys."""
        heads, n, d = queries.shape
        if queries.is_meta:  # planning: scores and their exponentials' input, beside one chunk of the memory
            next(self.memory.strips(KEYS * 4 * self.memory.channels))
            scores = queries.new_empty(2, heads, n, KEYS)
            return scores.new_empty(queries.shape)
        queries = queries * (1 / math.sqrt(d))
        top = queries.new_full((heads, n, 1), -math.inf)
        below, mixed = queries.new_zeros(heads, n, 1), queries.new_zeros(heads, n, d)
        for strip in self.memory.strips(KEYS * 4 * self.memory.channels):
            # each (heads, d, tokens)
            keys, values = (half.unflatten(0, (heads, -1)) for half in strip[0].flatten(1).chunk(2))
            scores = queries @ keys
            higher = torch.maximum(top, scores.amax(-1, keepdim=True))
            weights, fade = scores.sub_(higher).exp_(), (top - higher).exp_()
            below = below * fade + weights.sum(-1, keepdim=True)
            mixed = mixed * fade + weights @ values.transpose(1, 2)
            top = higher
            del strip, keys, values, scores, weights  # not beside the next ones
        return mixed / below


def spacing(height: int, width: int, most: int | None) -> int:
    """The distance between tokens along rows and columns at which about `most` of them remain; 1 where `most` is None: all."""
    return 1 if most is None else math.ceil(math.sqrt(height * width / most))


def attend_strips(height: int, width: int) -> int:
    """How many strips of rows the latents (height, width) are cut into for attention."""
    return math.ceil(height / max(1, QUERIES // width))


def keys_and_values(
    stage: MidAttention, stored: Rows, frame: Frame, hold: Hold, check: Check, most: int | None = None
) -> Rows:
    """Key above value of every token, or of about `most` evenly spaced ones: rows of twice the channels. Raises StorageError,
    NumericalError."""
    a, row, seen = stage.attention, 0, 0
    height, width = (n * stored.width // frame.width for n in (frame.height - 2 * frame.y, frame.width - 2 * frame.x))
    step = spacing(height, width, most)
    memory: Rows | None = None
    with hold(nn.ModuleList([a.to_k, a.to_v])):
        for strip in stored.strips():
            check("decode.keys")
            x = frame.inner(strip, row)
            row += strip.shape[2]
            first, seen = (step // 2 - seen) % step, seen + x.shape[2]
            x = x[:, :, first::step, step // 2 :: step]
            tokens = stage.norm.apply(x).flatten(2).transpose(1, 2)
            both = torch.cat([a.to_k(tokens), a.to_v(tokens)], dim=2)
            memory = memory or Rows(stored.scratch, 2 * stored.channels, x.shape[3])
            if x.shape[2]:
                memory.append(both.transpose(1, 2).unflatten(2, tuple(x.shape[2:])))
    assert memory is not None
    return memory


def stream(
    stages: list[Stage],
    strips: Iterable[Tensor],
    frame: Frame,
    scratch: Scratch,
    *,
    hold: Hold = lambda module: nullcontext(),
    check: Check = lambda where: None,
    attend_to: int | None = None,
    hold_tokens: int = 0,
) -> Iterator[Tensor]:
    """Push `strips`, (1, C, n, W) fp32 that make up `frame`, through `stages` → (C', n', W') top first.

    `hold(module)` is entered around the layers of one pass: one read of the weights serves the whole picture. Attention sees
    at most `attend_to` evenly spaced tokens, None for all. Statistics stay with the stages; so do, of the attention's keys and
    values, up to `hold_tokens` evenly spaced ones.
    """
    source, chain = _Source(strips, frame.height), list[Stage]()
    for stage in stages:
        norm = _first_norm(stage)
        if norm is None:
            if isinstance(stage, (Up, Down)) and _layers([stage])[0].weight.numel() > ALONE:  # type: ignore[operator]
                stored = _store(chain, source, None, frame, scratch, hold, check)
                source, chain = _Source.of(stored, strip_bytes=int(STRIP_BYTES / stage.growth)), []
            chain.append(stage)
            continue
        stored = _store(chain, source, norm, frame, scratch, hold, check)
        if isinstance(stage, Resnet):
            inner = _store(
                [stage.conv1], _Source.of(stored), stage.conv2.norm, frame, scratch, hold, check, keep=stored
            )
            source, chain = _Source.of(inner, stored), [stage.conv2, Add(stage, stored)]
        elif isinstance(stage, MidAttention):
            memory = keys_and_values(stage, stored, frame, hold, check, attend_to)
            if hold_tokens:
                step = spacing(memory.count, memory.width, hold_tokens)
                some = (memory.read(row, row + 1)[..., ::step] for row in range(0, memory.count, step))
                stage.hold(torch.cat(list(some), dim=2))
            source = _Source.of(stored, memory, strip_bytes=QUERIES * 4 * stored.channels)
            chain = [Attend(stage, memory)]
        else:
            source, chain = _Source.of(stored), [stage]
    with hold(_layers(chain)):
        for rows in source.through(chain, check):
            yield rows[0]
    source.close()


class _Source:
    """Where a pass gets its rows, and the stored pictures that nobody needs once it is over."""

    def __init__(self, strips: Iterable[Tensor], height: int, *stored: Rows) -> None:
        self.strips, self.height, self.stored = strips, height, stored

    @classmethod
    def of(cls, first: Rows, *more: Rows, strip_bytes: int = STRIP_BYTES) -> _Source:
        return cls(first.strips(strip_bytes), first.count, first, *more)

    def through(self, chain: list[Stage], check: Check) -> Iterator[Tensor]:
        row = 0
        for strip in self.strips:
            row += strip.shape[2]
            box = [strip]
            del strip
            yield from flow(chain, box, row >= self.height, check=check)

    def close(self, keep: Rows | None = None) -> None:
        for rows in self.stored:
            if rows is not keep:
                rows.close()


def _store(
    chain: list[Stage],
    source: _Source,
    norm: Norm | None,
    frame: Frame,
    scratch: Scratch,
    hold: Hold,
    check: Check,
    keep: Rows | None = None,
) -> Rows:
    """Run one pass into a new file, and give `norm`, if that comes next, the statistics of what was written."""
    pooled = None if norm is None else Pooled(norm.norm.num_groups)
    out: Rows | None = None
    end = chain[-1] if chain else None
    old = end.stored if isinstance(end, Add) else None  # read row by row, just before it is written
    with hold(_layers(chain)):
        for x in source.through(chain, check):
            if pooled is not None:
                pooled.add(frame.inner(x, 0 if out is None else out.count))
            if out is None:
                channels, width = x.shape[1], x.shape[3]
                fits = old is not None and channels <= old.channels and width == old.width
                out = Rows(scratch, channels, width, over=old if fits else None)
            out.append(x)
            del x  # not beside the next rows
    assert out is not None
    if norm is not None and pooled is not None:
        norm.hold(pooled.mean, pooled.var)
    source.close(keep=out.over if out.over is not None else keep)
    return out


def _first_norm(stage: Stage) -> Norm | None:
    if isinstance(stage, Resnet):
        return stage.conv1.norm
    return stage.norm if isinstance(stage, (Conv, MidAttention)) else None


def _layers(chain: list[Stage]) -> nn.ModuleList:
    """The layers whose weights a pass needs."""
    found: list[nn.Module] = []
    for stage in chain:
        if isinstance(stage, Attend):
            found += [stage.stage.attention.to_q, stage.stage.attention.to_out[0]]
        elif isinstance(stage, Add):
            found += [] if stage.block.shortcut is None else [stage.block.shortcut.conv]
        else:
            conv = stage.conv  # type: ignore[attr-defined]
            found.append(conv if isinstance(conv, nn.Module) else conv.conv)
    return nn.ModuleList(found)


def decode(
    vae: AutoencoderKL,
    latents: Latents,
    scratch: Scratch,
    *,
    hold: Hold,
    check: Check,
    margin: tuple[int, int] = (0, 0),
    attend_to: int | None = None,
) -> Generator[Tensor]:
    """latents: (1, C, h, w) fp32, already divided by scaling_factor → strips (3, n, 8w) fp32 in about [-1, 1], top first.

    `margin` latents above and below, left and right, repeat the other side's. Attention sees at most `attend_to` evenly spaced
    tokens, None for all. Raises StorageError, and NumericalError for NaN and Inf.
    """
    stages = decoder_stages(vae.decoder, vae.post_quant_conv)
    frame = Frame(latents.shape[2], latents.shape[3], *margin)
    strips = latent_strips(latents, strip_rows(frame.width))
    with scratch:
        yield from stream(stages, strips, frame, scratch, hold=hold, check=check, attend_to=attend_to)


def encode(
    vae: AutoencoderKL,
    pixels: Pixels,
    scratch: Scratch,
    *,
    hold: Hold,
    check: Check,
    margin: tuple[int, int] = (0, 0),
    attend_to: int | None = None,
) -> Tensor:
    """pixels: (H, W, 3) uint8, sides multiples of FACTOR → the posterior's mean (1, C, h, w) fp32, unscaled.

    FACTOR × `margin` pixels above and below, left and right, repeat the other side's. `attend_to` as for `decode`.
    """
    stages = encoder_stages(vae.encoder, vae.quant_conv)
    rows = FACTOR * strip_rows(pixels.shape[1] // FACTOR)
    height, width = pixels.shape[:2]
    strips = (to_tensor(pixels[top : top + rows]) for top in range(0, height, rows))
    frame = Frame(height, width, *(FACTOR * n for n in margin))
    with scratch:
        return means(stream(stages, strips, frame, scratch, hold=hold, check=check, attend_to=attend_to))


class Rehearsal(NamedTuple):
    """`peak_bytes` on disk at once, `written_bytes` in all, `flops` of the convolutions."""

    peak_bytes: int
    written_bytes: int
    flops: int


def _flops(stages: list[Stage], pixels: int) -> int:
    """Of the convolutions on so many pixels or latents, two for each multiply-add; as if none were transformed."""
    total = 0
    for stage in stages:
        pixels = 4 * pixels if isinstance(stage, Up) else pixels // 4 if isinstance(stage, Down) else pixels
        names = ("conv1", "conv2", "shortcut") if isinstance(stage, Resnet) else ("conv",)
        convs = (getattr(stage, name, None) for name in names)
        layers = (conv.conv if isinstance(conv, Conv) else conv for conv in convs if conv is not None)
        total += 2 * pixels * sum(layer.weight.numel() for layer in layers)
    return total


def rehearse(
    vae: AutoencoderKL, latents: tuple[int, int], dtype: torch.dtype, hold: Hold, *, encoding: bool
) -> Rehearsal:
    """What `decode` or `encode` does for latents of (height, width), on meta tensors.

    A low picture stands for one of any height: what is in memory does not depend on it, the rest is proportional to it.
    """
    height, width = min(latents[0], KEYS // latents[1] + 8), latents[1]
    scratch = Scratch(None, dtype)
    if encoding:
        stages, x = encoder_stages(vae.encoder, vae.quant_conv), (1, 3, FACTOR * height, FACTOR * width)
    else:
        stages = decoder_stages(vae.decoder, vae.post_quant_conv)
        x = 1, vae.config.latent_channels, height, width
    picture = torch.empty(x, device="meta")
    rows = strip_rows(width) * (FACTOR if encoding else 1)
    flops = _flops(stages, x[2] * x[3])
    for _ in stream(stages, picture.split(rows, dim=2), Frame(x[2], x[3]), scratch, hold=hold):
        pass
    return Rehearsal(*(n * latents[0] // height for n in (scratch.peak_bytes, scratch.written_bytes, flops)))
