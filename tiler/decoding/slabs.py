"""A slab of a picture: the rows that one process decodes, or encodes, while others have the rest, in the same passes.

Each pass cuts the picture into the strips of one process; a slab is a run of them, and the rows that they give. A slab
starts some rows earlier, where all layers hold back as many rows as they do in one process, and drops what comes before
its own rows: so its strips, their moments and its result have the bits of one process. Between two passes processes
exchange moments and the rows that others need, which `lockstep` carries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tiler.decoding.attention import Attend, keys_and_values_of, spacing, tokens_above
from tiler.decoding.directions import Direction
from tiler.decoding.exact import Hold, Passes, SecondHalf, in_passes, layers_of, work_of
from tiler.decoding.messages import Begin, Edge, Orders, Piece, Report
from tiler.decoding.rows import Conv, Down, MidAttention, Norm, Stage, Up
from tiler.decoding.scratch import Rows, Scratch
from tiler.decoding.sources import Source
from tiler.decoding.statistics import Frame, Noted
from tiler.decoding.work import of_conv, of_weights, through

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    from tiler.decoding.rows import Check


def cuts_of(count: int, shares: Sequence[float], lead: int = 0) -> list[int]:
    """Cut `count` strips in proportion to `shares`: the first strip of each slab, and `count`. Each slab but the first
    also computes `lead` strips above its own. Slabs may be empty."""
    total = count + lead * (len(shares) - 1)
    cuts = [0]
    for number, done in enumerate(accumulate(shares[:-1])):
        cuts.append(min(count, max(cuts[-1], math.floor(total * done - lead * number + 0.5))))
    return [*cuts, count]


def _conv(stage: Stage) -> Conv | None:
    """The convolution that makes a stage hold rows back; None if it holds none back."""
    conv = stage.block.conv2 if isinstance(stage, SecondHalf) else stage.conv if isinstance(stage, Up) else stage
    return conv if isinstance(conv, Conv) and (conv.halo or conv.norm is not None) else None


def _together(stage: Stage) -> int:
    """How many of its input's rows a stage computes at once; 0 if it holds none back."""
    conv = _conv(stage)
    return 2 if isinstance(stage, Down) else 0 if conv is None else conv.together


def _scale(stage: Stage) -> Fraction:
    """The rows that a stage gives for each that it takes."""
    return Fraction(2) if isinstance(stage, Up) else Fraction(1, 2) if isinstance(stage, Down) else Fraction(1)


def _given(stage: Stage, rows: int, *, last: bool) -> int:
    """How many rows a stage has given after `rows` rows from the top."""
    if isinstance(stage, Down):  # each of its own takes three, the last one a row of zeros
        return (rows if last else max(0, rows - 1)) // 2
    conv, rows = _conv(stage), int(rows * _scale(stage))
    return rows if conv is None or last else max(0, rows - conv.halo) // conv.together * conv.together


class Stretch(NamedTuple):
    """A slab's rows in one pass: it reads the strips between `cuts`, none if it has no strip; `beside` are the rows
    that a resnet adds, and `out` those of the result, each (first, last). What it gives before those is dropped."""

    cuts: tuple[int, ...]
    beside: tuple[int, int]
    out: tuple[int, int]

    @property
    def read(self) -> tuple[int, int]:
        return (self.cuts[0], self.cuts[-1]) if self.cuts else (0, 0)


def stretches(chain: list[Stage], source: Source, shares: Sequence[float]) -> list[Stretch]:
    """What each slab does in a pass."""
    height, step, align, back = source.height, source.step, 1, 0
    scale = Fraction(1)
    # Before its own first strip, a layer must have seen the rows that it holds back then; and what a layer gives to the
    # next one must have been cut as in one process.
    for stage in chain:
        if rows := _together(stage):
            each = math.ceil(1 / scale)  # rows of the input for one of the layer's
            align, back = math.lcm(align, each * rows), back + each * (rows + 2)
        scale *= _scale(stage)
    lead = (len(chain) - 1) * math.ceil(back / step) if chain else 0
    cuts = cuts_of(math.ceil(height / step), shares, lead)

    def given(row: int, stages: list[Stage]) -> int:
        """How many rows some stages have given after the input's rows above `row`."""
        last = row == height
        for stage in stages:
            row = _given(stage, row, last=last)
        return row

    found = []
    for first, last in pairwise(cuts):
        own, end = min(first * step, height), min(last * step, height)
        out = given(own, chain), given(end, chain)
        if first == last:
            found.append(Stretch((), (0, 0), (out[0], out[0])))
            continue
        begin = max(0, (own - lead * step - back) // align * align) if own and back else own
        between = [begin, *range((begin // step + 1) * step, end, step), end]
        found.append(Stretch(tuple(between), (begin, given(end, chain[:1])), out))
    return found


class _SlabRows(Rows):
    """Rows of which each slab made those between two of `owners`, and this process the slab `number`. `known` are the
    rows that each slab has by now, (first, last)."""

    def __init__(
        self, scratch: Scratch, channels: int, width: int, owners: Sequence[int], number: int,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(scratch, channels, width, begin=owners[number], dtype=dtype)
        self.owners = owners
        self.known = list(pairwise(owners))


class SlabPasses(Passes):
    """The passes over one slab. Nothing is remembered in a spool."""

    def __init__(self, frame: Frame, scratch: Scratch, hold: Hold, check: Check, begun: Begin) -> None:
        super().__init__(frame, scratch, hold, check)
        self._number, self._shares, self._edge_bytes = begun.number, begun.shares, begun.edge_bytes
        self._unknown: tuple[Norm, Noted] | None = None  # the norm whose statistics are still to come
        self._stretches: list[Stretch] = []  # of the pass that comes

    def given(self, direction: Direction, channels: int) -> Rows:
        """Where the picture that is to be coded lies, raw: rows that others have."""
        owners = [0] * (len(self._shares) + 1)
        rows = _SlabRows(self.scratch, channels, self.frame.width, owners, self._number, direction.dtype)
        rows.settle(self.frame.height)
        return rows

    @property
    def _own(self) -> Stretch:
        return self._stretches[self._number]

    def begin(self, chain: list[Stage], source: Source) -> Generator[Report, Orders]:
        with self.hold(layers_of(chain)):  # which kernels compute the layers
            self._stretches = stretches(chain, source, self._shares)
        parts = in_parts(self._edges(chain, source), self._edge_bytes)
        counts, moments = self._measured()
        following, goes_on = next(parts, None), True
        while goes_on:
            edges, following = following or (), next(parts, None)
            has_more = following is not None
            reads = self._own.read
            orders = yield Report(counts, moments, edges, has_more, worked=self.scratch.worked, reads=reads)
            counts, moments = (), None
            if orders.mean is not None and orders.var is not None:
                assert self._unknown is not None
                self._unknown[0].hold(torch.from_numpy(orders.mean.copy()), torch.from_numpy(orders.var.copy()))
            for edge in orders.edges:
                source.stored[edge.picture].fill(edge.rows)
            goes_on = orders.has_more
        self._unknown = None

    def _measured(self) -> tuple[tuple[int, ...], np.ndarray | None]:
        """The moments of the pass that ended."""
        if self._unknown is None:
            return (), None
        noted = self._unknown[1]
        moments = torch.stack(noted.moments) if noted.moments else torch.empty(0, 2, noted.groups, dtype=torch.float64)
        return tuple(noted.counts), moments.numpy()

    def _edges(self, chain: list[Stage], source: Source) -> Iterator[Edge]:
        """The rows of this slab that others need for the pass that comes, not yet read: without their bytes."""
        for picture, stored in enumerate(source.stored):
            assert isinstance(stored, _SlabRows)
            first, last = stored.owners[self._number : self._number + 2]
            needs = [self._needed(chain, stored, picture, stretch) for stretch in self._stretches]
            had, stored.known = stored.known, [_joined(*both) for both in zip(stored.known, needs, strict=True)]
            ends = sorted({row for some in (*had, *needs) for row in some if first < row < last} | {first, last})
            for top, bottom in pairwise(ends):
                to = tuple(
                    n for n, need in enumerate(needs) if _within(top, bottom, need) and not _within(top, bottom, had[n])
                )
                rows = max(1, self._edge_bytes // (stored.row_bytes * max(1, len(to))))
                for row in range(top, bottom, rows) if to else ():
                    yield Edge(picture, to, stored.packed(row, min(row + rows, bottom)))

    @staticmethod
    def _needed(chain: list[Stage], stored: Rows, picture: int, stretch: Stretch) -> tuple[int, int]:
        """The rows of a stored picture that a pass reads for one slab."""
        if not picture or not stretch.cuts:
            return stretch.read
        return (0, stored.count) if isinstance(chain[0], Attend) else stretch.beside

    def rows(
        self, chain: list[Stage], source: Source, begin: int = 0, part: Callable[[], None] = lambda: None
    ) -> Iterator[Tensor]:
        own = self._own
        if not own.cuts:
            return
        if chain and isinstance(chain[0], SecondHalf):
            chain[0].row = own.cuts[0]
        row = int(own.cuts[0] * math.prod(map(_scale, chain)))
        for x in source.through(chain, self.check, own.cuts, part):
            row += x.shape[2]
            if row > own.out[0]:
                assert row - x.shape[2] >= own.out[0]
                yield x
            del x  # freed before the next rows
        assert row == own.out[1]

    def store(self, chain: list[Stage], source: Source, norm: Norm | None, keep: Rows | None = None) -> Rows:
        noted = None if norm is None else Noted(norm.norm.num_groups)
        channels, width, height = self._shape(chain, source)
        owners = [*(stretch.out[0] for stretch in self._stretches), height]
        out = _SlabRows(self.scratch, channels, width, owners, self._number)
        each, layers = through(chain, work_of), layers_of(chain)
        with self.hold(layers):
            self.scratch.worked += self._weights(layers)
            for x in self.rows(chain, source):
                out.append(x, None if noted is None else self.pool(noted, x, out.count))
                self.scratch.worked += x.shape[2] * x.shape[3] * each
                del x  # freed before the next rows
        out.settle(height)
        self._unknown = None if norm is None or noted is None else (norm, noted)
        source.close(keep=keep)
        return out

    def _weights(self, layers: nn.ModuleList) -> float:
        """The work that a pass over weights is, once for all slabs."""
        return of_weights(layers) * self._shares[self._number]

    def _shape(self, chain: list[Stage], source: Source) -> tuple[int, int, int]:
        """The channels, width and height of a pass's result."""
        channels, width, height = source.stored[0].channels, source.stored[0].width, source.height
        for stage in chain:
            width, height = (int(side * _scale(stage)) for side in (width, height))
            if not isinstance(stage, Attend):
                conv = layers_of([stage])[0]
                assert isinstance(conv, nn.Conv2d)
                channels = conv.out_channels
        return channels, width, height

    def keys_and_values(self, stage: MidAttention, stored: Rows, most: int | None = None) -> Rows:
        a, frame, row = stage.attention, self.frame, self._own.read[0]
        layers = nn.ModuleList([a.to_k, a.to_v])
        each = sum(map(of_conv, layers))
        top, left, bottom = frame.bounds(stored.width)
        step = spacing(bottom - top, stored.width - 2 * left, most)
        owners = [tokens_above(s.out[0], frame, stored.width, step) for s in self._stretches]
        height = tokens_above(stored.count, frame, stored.width, step)
        width = len(range(step // 2, stored.width - 2 * left, step))
        made = _SlabRows(self.scratch, 2 * stored.channels, width, [*owners, height], self._number)
        with self.hold(layers):
            self.scratch.worked += self._weights(layers)
            for strip in self.rows([], Source.of(stored)):
                self.check("decode.keys")
                if (both := keys_and_values_of(stage, strip, frame, row, step)) is not None:
                    made.append(both)
                    self.scratch.worked += both.shape[2] * both.shape[3] * each
                row += strip.shape[2]
        made.settle(height)
        return made


def _within(first: int, last: int, rows: tuple[int, int]) -> bool:
    return rows[0] <= first and last <= rows[1]


def _joined(some: tuple[int, int], more: tuple[int, int]) -> tuple[int, int]:
    """Both together if they have no gap between them, else the second, if it has rows."""
    if more[0] >= more[1]:
        return some
    if some[0] >= some[1] or more[0] > some[1] or some[0] > more[1]:
        return more
    return min(some[0], more[0]), max(some[1], more[1])


def in_parts(edges: Iterator[Edge], most: int) -> Iterator[tuple[Edge, ...]]:
    """Join edges to parts of about `most` bytes, counted for each slab that gets them."""
    part, size = list[Edge](), 0
    for edge in edges:
        nbytes = edge.rows.data.nbytes * len(edge.to)
        if part and size + nbytes > most:
            yield tuple(part)
            part, size = [], 0
        part.append(edge)
        size += nbytes
    if part:
        yield tuple(part)


class SlabRun:
    """A slab under way, in the process that decodes or encodes it. `close` removes its scratch files."""

    def __init__(
        self, direction: Direction, vae: AutoencoderKL, scratch: Scratch, begun: Begin, *, hold: Hold, check: Check
    ) -> None:
        passes = SlabPasses(Frame(*begun.frame), scratch, hold, check, begun)
        source = direction.source_of(passes.given(direction, direction.channels(vae)))
        self._scratch, self._result = scratch, direction.result
        self._steps: Generator[Any, Any] = in_passes(direction.stages(vae), source, passes, begun.attend_to)
        self._strip: Tensor | None = None  # the one that comes next
        self._ahead: Rows | None = None  # strips computed ahead, in full
        self._heights: list[int] = []
        self._taken = 0  # rows of them

    def close(self) -> None:
        self._steps.close()
        self._scratch.__exit__()

    def go_on(self, orders: Orders | None = None) -> Report:
        """Follow the orders (None begins) up to the next report. Raises NumericalError, StorageError."""
        try:
            found: Report | Tensor = self._steps.send(orders)
        except StopIteration:  # it has no strip of the last pass
            return Report(is_ready=True, worked=self._scratch.worked)
        if isinstance(found, Tensor):
            self._strip = self._result(found)
            return Report(is_ready=True, worked=self._scratch.worked)
        return found

    def _next(self) -> Tensor | None:
        """The next strip, (C, n, W)."""
        strip, self._strip = self._strip, None
        if strip is not None and (following := next(self._steps, None)) is not None:
            self._strip = self._result(following)
        return strip

    def compute_ahead(self) -> None:
        """Compute all rows of the result that are left, into a file."""
        while (strip := self._next()) is not None:
            if self._ahead is None:
                self._ahead = Rows(self._scratch, strip.shape[0], strip.shape[2], dtype=torch.float32)
            self._ahead.append(strip[None])
            self._heights.append(strip.shape[1])

    def piece(self, nbytes: int) -> Piece:
        """The next rows of the result, of about `nbytes`."""
        strips, size = list[Tensor](), 0
        while size < nbytes and (strip := self._stored() if self._ahead is not None else self._next()) is not None:
            strips.append(strip)
            size += strip.nbytes
        joined = torch.cat(strips, dim=1) if strips else torch.empty(0, 0, 0)
        is_last = self._strip is None and not self._heights
        return Piece(tuple(strip.shape[1] for strip in strips), joined.contiguous().numpy(), is_last)

    def _stored(self) -> Tensor | None:
        """The next strip that was computed ahead."""
        if not self._heights:
            return None
        assert self._ahead is not None
        height = self._heights.pop(0)
        strip = self._ahead.read(self._taken, self._taken + height)[0]
        self._taken += height
        return strip
