"""The whole-image decode (or encode) of an AutoencoderKL, out of core: the result of diffusers at any size.

Works layer by layer over strips of rows, with the activations in scratch files. GroupNorm's statistics are collected
while the previous layer is written, from every element once; the mid-block attention sees every token, or as many
evenly spaced ones as requested, with keys and values in chunks and a running softmax (Milakov & Gimelshein 2018,
arXiv:1805.02867).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from tiler.compute.layers import attend_in_parts
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
    latent_strips,
    means,
    strip_rows,
    to_tensor,
)
from tiler.decoding.scratch import STRIP_BYTES, Rows, Scratch
from tiler.decoding.sources import Source
from tiler.decoding.statistics import Frame, Pooled

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    from tiler.decoding.rows import Check
    from tiler.decoding.spool import Line

Hold = Callable[[nn.Module], AbstractContextManager[None]]

KEYS = 4096  # tokens of keys and values in memory at a time
QUERIES = 1024
ALONE = 2**20  # weight elements of an Up or Down that gets its own pass, to be held alone


class SecondHalf(Stage):
    """A resnet from its second convolution on. It adds the block's input rows, which it reads again from the
    scratch."""

    def __init__(self, block: Resnet, stored: Rows) -> None:
        self.block, self.stored, self.row = block, stored, 0

    def push(self, x: Tensor | None, last: bool) -> Tensor | None:
        h = self.block.conv2.push(x, last, self._skipped)
        return h if h is None or self.block.scale == 1 else h.div_(self.block.scale)

    def _skipped(self, count: int) -> Tensor:
        skip = self.stored.read(self.row, self.row + count)
        self.row += count
        return skip if self.block.shortcut is None else self.block.shortcut.conv(skip)


class Attend(Stage):
    """The mid-block attention of some rows to all tokens of the picture, stored as `memory` (keys above values)."""

    growth = 4.0  # the scores exist beside the queries

    def __init__(self, stage: MidAttention, memory: Rows) -> None:
        self.stage, self.memory = stage, memory

    def push(self, x: Tensor | None, last: bool) -> Tensor | None:
        if x is None:
            return None
        self.memory.scratch.attended += 1
        a = self.stage.attention
        tokens = self.stage.norm.apply(x).flatten(2).transpose(1, 2)
        queries = a.to_q(tokens).unflatten(-1, (a.heads, -1)).transpose(1, 2)  # (1, heads, rows·W, d)
        del tokens
        mixed = torch.cat(
            [attend_in_parts(part, self._parts(), a.to_q) for part in queries.split(QUERIES, dim=2)], dim=2
        )
        out = a.to_out[0](mixed.transpose(1, 2).flatten(2)).transpose(1, 2).reshape(x.shape)
        return (out + x).div_(a.rescale_output_factor)

    def _parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the keys and values of some tokens at a time, (1, heads, n, d) each."""
        heads, memory = self.stage.attention.heads, self.memory
        for strip in memory.strips(KEYS * 4 * memory.channels):
            keys, values = (
                strip.flatten(2).transpose(1, 2).unflatten(-1, (2 * heads, -1)).transpose(1, 2).chunk(2, dim=1)
            )
            yield keys, values
            if strip.is_meta:  # planning: one chunk of the memory suffices
                return
            del strip, keys, values  # freed before the next ones


def spacing(height: int, width: int, most: int | None) -> int:
    """The distance along rows and columns between the tokens that attention sees, such that about `most` remain; 1 if
    `most` is None."""
    return 1 if most is None else math.ceil(math.sqrt(height * width / most))


def attend_strips(height: int, width: int) -> int:
    """The number of strips into which attention cuts latents of (height, width)."""
    return math.ceil(height / max(1, QUERIES // width))


class Passes:
    """The numbered passes over one picture. Passes that a spool remembers are not run again.

    `hold(module)` is entered around the layers of a pass, so that one read of the weights serves the whole picture.
    """

    def __init__(self, frame: Frame, scratch: Scratch, hold: Hold, check: Check) -> None:
        self.frame, self.scratch, self.hold, self.check = frame, scratch, hold, check
        self._count = 0

    def _next(self) -> tuple[int, Line | None]:
        number, self._count = self._count, self._count + 1
        return number, None if self.scratch.spool is None else self.scratch.spool.of(number)

    def _recalled(self, line: Line) -> Rows:
        return Rows(self.scratch, line.channels, line.width, number=line.number, known=line)

    def _note(self, out: Rows, pooled: Pooled | None, *, whole: bool = True, **facts: Any) -> None:
        if self.scratch.spool is not None:
            statistics = None if pooled is None else pooled.told()
            self.scratch.spool.note(out.line(whole=whole, statistics=statistics, **facts), out.fd)

    def store(self, chain: list[Stage], source: Source, norm: Norm | None, keep: Rows | None = None) -> Rows:
        """Run one pass into a new file. If `norm`, the next norm, is given, set its statistics from the values
        written."""
        pooled = None if norm is None else Pooled(norm.norm.num_groups)
        number, known = self._next()
        out = None if known is None else self._recalled(known)
        if known is not None and pooled is not None and known.statistics is not None:
            pooled.recall(known.statistics)
        if known is None or not known.whole:
            attends, before = bool(chain) and isinstance(chain[0], Attend), self.scratch.attended

            def part() -> None:
                """Record a finished strip of attention: its rows have no neighbours, so later rows do not need it."""
                if attends and out is not None:
                    self._note(out, pooled, whole=False, attended=attended())

            def attended() -> int:
                return self.scratch.attended - before + (0 if known is None else known.attended)

            end = chain[-1] if chain else None
            # It is read row by row just before it is overwritten; but a pass that is resumed needs its complete input.
            old = end.stored if isinstance(end, SecondHalf) and self.scratch.spool is None else None
            with self.hold(_layers(chain)):
                for x in source.through(chain, self.check, 0 if out is None else out.count, part):
                    largest = None if pooled is None else self._pool(pooled, x, 0 if out is None else out.count)
                    if out is None:
                        channels, width = x.shape[1], x.shape[3]
                        fits = old is not None and channels <= old.channels and width == old.width
                        out = Rows(self.scratch, channels, width, over=old if fits else None, number=number)
                    out.append(x, largest)
                    del x  # freed before the next rows
            assert out is not None
            self._note(out, pooled, closes=source.numbers(keep), attended=attended())
        assert out is not None
        if norm is not None and pooled is not None:
            norm.hold(pooled.mean, pooled.var)
        source.close(keep=out.over if out.over is not None else keep)
        if out.over is not None:
            out.over.give_back()
        return out

    def _pool(self, pooled: Pooled, x: Tensor, row: int) -> float | None:
        """Add the rows x, of which the first is `row`, without the frame's margin; their largest magnitude, if all of x
        was seen. Apart from `store`, so that no view of x outlives it."""
        inner = self.frame.inner(x, row)
        largest = pooled.add(inner)
        return largest if inner.shape == x.shape else None

    def keys_and_values(self, stage: MidAttention, stored: Rows, most: int | None = None) -> Rows:
        """Store the key and the value of every token, or of at most `most` evenly spaced ones, with twice the
        channels."""
        number, known = self._next()
        if known is not None:
            return self._recalled(known)
        a, frame, row, seen = stage.attention, self.frame, 0, 0
        height, width = (
            n * stored.width // frame.width for n in (frame.height - 2 * frame.y, frame.width - 2 * frame.x)
        )
        step = spacing(height, width, most)
        memory: Rows | None = None
        with self.hold(nn.ModuleList([a.to_k, a.to_v])):
            for strip in stored.strips():
                self.check("decode.keys")
                x = frame.inner(strip, row)
                row += strip.shape[2]
                first, seen = (step // 2 - seen) % step, seen + x.shape[2]
                x = x[:, :, first::step, step // 2 :: step]
                tokens = stage.norm.apply(x).flatten(2).transpose(1, 2)
                both = torch.cat([a.to_k(tokens), a.to_v(tokens)], dim=2)
                memory = memory or Rows(stored.scratch, 2 * stored.channels, x.shape[3], number=number)
                if x.shape[2]:
                    memory.append(both.transpose(1, 2).unflatten(2, tuple(x.shape[2:])))
        assert memory is not None
        self._note(memory, None)
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

    Attention sees at most `attend_to` evenly spaced tokens, None for all. The stages keep their statistics, and the
    keys and values of up to `hold_tokens` evenly spaced tokens of the attention.
    """
    passes = Passes(frame, scratch, hold, check)
    source, chain = Source(lambda begin: strips, frame.height), list[Stage]()
    for stage in stages:
        norm = _first_norm(stage)
        if norm is None:
            if isinstance(stage, (Up, Down)) and _layers([stage])[0].weight.numel() > ALONE:  # type: ignore[operator]
                stored = passes.store(chain, source, None)
                source, chain = Source.of(stored, strip_bytes=int(STRIP_BYTES / stage.growth)), []
            chain.append(stage)
            continue
        stored = passes.store(chain, source, norm)
        if isinstance(stage, Resnet):
            inner = passes.store([stage.conv1], Source.of(stored), stage.conv2.norm, keep=stored)
            source, chain = Source.of(inner, stored), [SecondHalf(stage, stored)]
        elif isinstance(stage, MidAttention):
            memory = passes.keys_and_values(stage, stored, attend_to)
            if hold_tokens:
                step = spacing(memory.count, memory.width, hold_tokens)
                some = (memory.read(row, row + 1)[..., ::step] for row in range(0, memory.count, step))
                stage.hold(torch.cat(list(some), dim=2))
            source = Source.of(stored, memory, strip_bytes=QUERIES * 4 * stored.channels)
            chain = [Attend(stage, memory)]
        else:
            source, chain = Source.of(stored), [stage]
    with hold(_layers(chain)):
        for rows in source.through(chain, check):
            yield rows[0]
    if scratch.spool is None:  # the results for these rows may still be incomplete
        source.close()


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
        elif isinstance(stage, SecondHalf):
            shortcut = stage.block.shortcut
            found += [stage.block.conv2.conv, *([] if shortcut is None else [shortcut.conv])]
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
    """latents: (1, C, h, w) fp32, divided by scaling_factor → strips (3, n, 8w) fp32 in about [-1, 1], top first.

    `margin` is the number of latents above and below, and left and right, that repeat the opposite side. Attention sees
    at most `attend_to` evenly spaced tokens. Raises StorageError, and NumericalError for NaN and Inf.
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

    FACTOR × `margin` pixels above and below, and left and right, repeat the opposite side. `attend_to` as for `decode`.
    """
    stages = encoder_stages(vae.encoder, vae.quant_conv)
    rows = FACTOR * strip_rows(pixels.shape[1] // FACTOR)
    height, width = pixels.shape[:2]
    strips = (to_tensor(pixels[top : top + rows]) for top in range(0, height, rows))
    frame = Frame(height, width, *(FACTOR * n for n in margin))
    with scratch:
        return means(stream(stages, strips, frame, scratch, hold=hold, check=check, attend_to=attend_to))


class Rehearsal(NamedTuple):
    """The resources of a run. `peak_bytes`: the most on disk at once; `written_bytes`: in total; `flops` of the
    convolutions; `apart_bytes`: the most on disk at once if passes are remembered."""

    peak_bytes: int
    written_bytes: int
    flops: int
    apart_bytes: int = 0


def _flops(stages: list[Stage], pixels: int) -> int:
    """The floating-point operations of the convolutions on that many pixels or latents, two for each multiply-add, as
    if none were computed by Winograd."""
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
    """Run `decode` or `encode` for latents of (height, width) on meta tensors.

    A lower picture stands for one of any height: the memory does not depend on the height, and everything else is
    proportional to it.
    """
    height, width = min(latents[0], KEYS // latents[1] + 8), latents[1]
    scratch = Scratch(None, dtype)
    if encoding:
        stages, x = encoder_stages(vae.encoder, vae.quant_conv), (1, 3, FACTOR * height, FACTOR * width)
    else:
        stages = decoder_stages(vae.decoder, vae.post_quant_conv)
        x = 1, vae.config.latent_channels, height, width
    rows = strip_rows(width) * (FACTOR if encoding else 1)
    strips = (torch.empty(1, x[1], min(rows, x[2] - top), x[3], device="meta") for top in range(0, x[2], rows))
    flops = _flops(stages, x[2] * x[3])
    for _ in stream(stages, strips, Frame(x[2], x[3]), scratch, hold=hold):
        pass
    found = scratch.peak_bytes, scratch.written_bytes, flops, scratch.apart_bytes
    return Rehearsal(*(n * latents[0] // height for n in found))
