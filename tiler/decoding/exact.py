"""The whole-image decode (or encode) of an AutoencoderKL, out of core: the result of diffusers at any size.

Works layer by layer over strips of rows, with the activations in scratch files. GroupNorm's statistics are collected
while the previous layer is written, from every element once; the mid-block attention sees every token, or as many
evenly spaced ones as requested, with keys and values in chunks and a running softmax (Milakov & Gimelshein 2018,
arXiv:1805.02867).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tiler.decoding.attention import QUERIES, Attend, keys_and_values_of, spacing
from tiler.decoding.directions import DECODER, ENCODER, Direction
from tiler.decoding.messages import Orders, Report
from tiler.decoding.rows import Conv, Down, Latents, MidAttention, Norm, Pixels, Resnet, Stage, Up
from tiler.decoding.scratch import STRIP_BYTES, Rows, Scratch
from tiler.decoding.sources import Source
from tiler.decoding.statistics import Frame, Pooled
from tiler.decoding.work import of_attention, of_conv, of_picture, of_stage, of_weights, telling, through

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    from tiler.decoding.rows import Check
    from tiler.decoding.spool import Line

Hold = Callable[[nn.Module], AbstractContextManager[None]]

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


def work_of(stage: Stage) -> float:
    """The work for each pixel that comes out of a pass's stage."""
    if isinstance(stage, SecondHalf):
        shortcut = stage.block.shortcut
        return of_conv(stage.block.conv2.conv) + (0.0 if shortcut is None else of_conv(shortcut.conv))
    if isinstance(stage, Attend):
        a, tokens = stage.stage.attention, stage.memory.count * stage.memory.width
        return of_conv(a.to_q) + of_conv(a.to_out[0]) + of_attention(a.to_q.in_features, tokens)
    return of_stage(stage, 0)


class Passes:
    """The numbered passes over one picture. Passes that a spool remembers are not run again.

    `hold(module)` is entered around the layers of a pass, so that one read of the weights serves the whole picture.
    """

    def __init__(self, frame: Frame, scratch: Scratch, hold: Hold, check: Check) -> None:
        self.frame, self.scratch, self.hold, self.check = frame, scratch, hold, check
        self._count = 0

    def begin(self, chain: list[Stage], source: Source) -> Generator[Report, Orders]:
        """What comes before each pass: whoever has only a slab of the picture reports to others and waits for them."""
        yield from ()

    def rows(
        self, chain: list[Stage], source: Source, begin: int = 0, part: Callable[[], None] = lambda: None
    ) -> Iterator[Tensor]:
        """What a pass yields, from its input's row `begin` on. `part` as for `Source.through`."""
        return source.through(chain, self.check, source.cuts(begin), part)

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
        each, layers = through(chain, work_of), layers_of(chain)
        self.scratch.worked += of_weights(layers) + (0 if out is None else out.count * out.width * each)
        if known is not None and pooled is not None and known.statistics is not None:
            pooled.recall(known.statistics)
        if known is None or not known.whole:
            attends = bool(chain) and isinstance(chain[0], Attend)

            def part() -> None:
                """Record a finished strip of attention: its rows have no neighbours, so later rows do not need it."""
                if attends and out is not None:
                    self._note(out, pooled, whole=False)

            end = chain[-1] if chain else None
            # It is read row by row just before it is overwritten; but a pass that is resumed needs its complete input.
            old = end.stored if isinstance(end, SecondHalf) and self.scratch.spool is None else None
            with self.hold(layers):
                for x in self.rows(chain, source, 0 if out is None else out.count, part):
                    largest = None if pooled is None else self.pool(pooled, x, 0 if out is None else out.count)
                    if out is None:
                        channels, width = x.shape[1], x.shape[3]
                        fits = old is not None and channels <= old.channels and width == old.width
                        out = Rows(self.scratch, channels, width, over=old if fits else None, number=number)
                    out.append(x, largest)
                    self.scratch.worked += x.shape[2] * x.shape[3] * each
                    del x  # freed before the next rows
            assert out is not None
            self._note(out, pooled, closes=source.numbers(keep))
        assert out is not None
        if norm is not None and pooled is not None:
            norm.hold(pooled.mean, pooled.var)
        source.close(keep=out.over if out.over is not None else keep)
        if out.over is not None:
            out.over.give_back()
        return out

    def pool(self, pooled: Pooled, x: Tensor, row: int) -> float | None:
        """Add the rows x, of which the first is `row`, without the frame's margin; their largest magnitude, if all of x
        was seen. Apart from `store`, so that no view of x outlives it."""
        inner = self.frame.inner(x, row)
        largest = pooled.add(inner)
        return largest if inner.shape == x.shape else None

    def keys_and_values(self, stage: MidAttention, stored: Rows, most: int | None = None) -> Rows:
        """Store the key and the value of every token, or of at most `most` evenly spaced ones, with twice the
        channels."""
        number, known = self._next()
        a, frame, row = stage.attention, self.frame, 0
        layers = nn.ModuleList([a.to_k, a.to_v])
        each = sum(map(of_conv, layers))
        self.scratch.worked += of_weights(layers)
        if known is not None:
            memory = self._recalled(known)
            self.scratch.worked += memory.count * memory.width * each
            return memory
        height, width = (
            n * stored.width // frame.width for n in (frame.height - 2 * frame.y, frame.width - 2 * frame.x)
        )
        step = spacing(height, width, most)
        made: Rows | None = None
        with self.hold(layers):
            for strip in self.rows([], Source.of(stored)):
                self.check("decode.keys")
                if (both := keys_and_values_of(stage, strip, frame, row, step)) is not None:
                    made = made or Rows(stored.scratch, 2 * stored.channels, both.shape[3], number=number)
                    made.append(both)
                    self.scratch.worked += both.shape[2] * both.shape[3] * each
                row += strip.shape[2]
        assert made is not None
        self._note(made, None)
        return made


def stream(
    stages: list[Stage],
    source: Source,
    frame: Frame,
    scratch: Scratch,
    *,
    hold: Hold = lambda module: nullcontext(),
    check: Check = lambda where: None,
    attend_to: int | None = None,
    hold_tokens: int = 0,
) -> Iterator[Tensor]:
    """Push the rows of `source`, (1, C, n, W) fp32 that make up `frame`, through `stages` → (C', n', W') top first.

    Attention sees at most `attend_to` evenly spaced tokens, None for all. The stages keep their statistics, and the
    keys and values of up to `hold_tokens` evenly spaced tokens of the attention.
    """
    passes = Passes(frame, scratch, hold, check)
    for rows in in_passes(stages, source, passes, attend_to, hold_tokens):
        assert isinstance(rows, Tensor)
        yield rows


def in_passes(
    stages: list[Stage], source: Source, passes: Passes, attend_to: int | None = None, hold_tokens: int = 0
) -> Generator[Tensor | Report, Orders]:
    """Run the stages in `passes` over `source`: yield what the passes report between each other, and then the rows,
    (C', n', W'), of the last one."""
    chain, scratch = list[Stage](), passes.scratch
    for stage in stages:
        norm = first_norm(stage)
        if norm is None:
            if isinstance(stage, (Up, Down)) and layers_of([stage])[0].weight.numel() > ALONE:  # type: ignore[operator]
                yield from passes.begin(chain, source)
                stored = passes.store(chain, source, None)
                source, chain = Source.of(stored, strip_bytes=int(STRIP_BYTES / stage.growth)), []
            chain.append(stage)
            continue
        yield from passes.begin(chain, source)
        stored = passes.store(chain, source, norm)
        source, chain = Source.of(stored), [stage]
        if isinstance(stage, Resnet):
            yield from passes.begin([stage.conv1], source)
            inner = passes.store([stage.conv1], source, stage.conv2.norm, keep=stored)
            source, chain = Source.of(inner, stored), [SecondHalf(stage, stored)]
        elif isinstance(stage, MidAttention):
            yield from passes.begin([], source)
            memory = passes.keys_and_values(stage, stored, attend_to)
            if hold_tokens:
                step = spacing(memory.count, memory.width, hold_tokens)
                some = (memory.read(row, row + 1)[..., ::step] for row in range(0, memory.count, step))
                stage.hold(torch.cat(list(some), dim=2))
            source = Source.of(stored, memory, strip_bytes=QUERIES * 4 * stored.channels)
            chain = [Attend(stage, memory)]
    yield from passes.begin(chain, source)
    each, layers = through(chain, work_of), layers_of(chain)
    scratch.worked += of_weights(layers)
    with passes.hold(layers):
        for rows in passes.rows(chain, source):
            yield rows[0]
            scratch.worked += rows.shape[2] * rows.shape[3] * each
    if scratch.spool is None:  # the results for these rows may still be incomplete
        source.close()


def first_norm(stage: Stage) -> Norm | None:
    if isinstance(stage, Resnet):
        return stage.conv1.norm
    return stage.norm if isinstance(stage, (Conv, MidAttention)) else None


def layers_of(chain: list[Stage]) -> nn.ModuleList:
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


def run(
    direction: Direction,
    vae: AutoencoderKL,
    picture: Latents | Pixels,
    scratch: Scratch,
    *,
    hold: Hold,
    check: Check,
    progress: Callable[[float], None] = lambda share: None,
    margin: tuple[int, int] = (0, 0),
    attend_to: int | None = None,
) -> Generator[Tensor]:
    """Decode latents, (1, C, h, w) fp32 divided by scaling_factor, into strips (3, n, 8w) fp32 in about [-1, 1]; or
    encode pixels, (H, W, 3) uint8 with sides that are multiples of FACTOR, into strips (C, n, w) fp32 of the
    posterior's mean, unscaled. Top first.

    `margin` is the number of latents above and below, and left and right, that repeat the opposite side. Attention sees
    at most `attend_to` evenly spaced tokens. Raises StorageError, and NumericalError for NaN and Inf.
    """
    stages, frame = direction.stages(vae), direction.frame(picture, margin)
    check = telling(check, scratch, of_picture(stages, frame.height, frame.width, attend_to), progress)
    with scratch:
        strips = stream(
            stages, direction.source(picture), frame, scratch, hold=hold, check=check, attend_to=attend_to
        )  # fmt: skip
        yield from map(direction.result, strips)


def decode(vae: AutoencoderKL, latents: Latents, scratch: Scratch, **options: Any) -> Generator[Tensor]:
    """`run` as a decoder."""
    return run(DECODER, vae, latents, scratch, **options)


def encode(vae: AutoencoderKL, pixels: Pixels, scratch: Scratch, **options: Any) -> Tensor:
    """`run` as an encoder: the mean in one piece, (1, C, h, w)."""
    return torch.cat(list(run(ENCODER, vae, pixels, scratch, **options)), dim=1)[None]
