"""Decode or encode a picture whose slabs other processes have: carry what they tell each other between passes, and take
their rows in the order of the picture."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from tiler.decoding import exact
from tiler.decoding.apart import ANSWER_BYTES, DECODERS
from tiler.decoding.directions import Direction
from tiler.decoding.exact import Hold
from tiler.decoding.frozen import PROBE
from tiler.decoding.messages import Begin, Edge, Orders, Packed, Piece, Report
from tiler.decoding.rows import Check, Latents, Pixels
from tiler.decoding.scratch import Scratch
from tiler.decoding.slabs import in_parts
from tiler.decoding.statistics import Frame, Pooled
from tiler.decoding.work import of_picture

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

EDGE_BYTES = 8_000_000  # about the most that all slabs together are sent, or send to others, at a time
LEAST_ROWS = 32  # of latents in a slab
FEWEST = 2  # slabs: one alone would only move the work
_LITTLE = 0.3  # of the picture: what is done when the rest begin again
_REPORT_BYTES = 500_000  # of the moments in one report


class Lost(Exception):
    """A process with a slab is gone or failed; the message says which and why, for the user."""


class Slabs(Protocol):
    """Other processes, one for each slab."""

    @property
    def shares(self) -> tuple[float, ...]:
        """The part of the picture that each has, top first; they add up to 1."""
        ...

    def begin(self, begun: Sequence[Begin]) -> list[Report]:
        """Have all slabs begin; their first reports. Raises Lost."""
        ...

    def go_on(self, orders: Sequence[Orders]) -> list[Report]:
        """Have all slabs follow their orders; their next reports. Raises Lost."""
        ...

    def pieces(self) -> Iterator[Piece]:
        """The rows of the result, top first. Raises Lost."""
        ...


class Team(Protocol):
    """Processes that may have slabs."""

    def gather(self, most: int) -> Slabs | None:
        """Those that are ready, at most `most`; None if there are fewer than two or they are together no faster than
        this process, which the user is told."""
        ...

    def lose(self, why: Lost, *, again: bool) -> None:
        """Tell the user that a slab is lost, and that others begin `again` or that this process continues alone."""
        ...


class SlabWork(NamedTuple):
    """What a team must know first: the size of all latents, (height, width), and a corner of what is read, `small`,
    with the result (C, h, w) that `probe` makes of it here, and its seconds. The picture is as much work as `probes` of
    them."""

    direction: Direction
    size: tuple[int, int]
    small: Tensor
    probe: Tensor
    seconds: float
    probes: float


SlabsElsewhere = Callable[[SlabWork], AbstractContextManager[Team | None]]
"""What opens the connection to others. None if there is nobody."""


def probe(
    direction: Direction, vae: AutoencoderKL, small: Tensor, scratch: Scratch, hold: Hold, check: Check
) -> tuple[Tensor, float]:
    """Decode or encode the corner of a picture as a picture of its own → (C, h, w): equal on processes that compute
    equal bits. Also returns the seconds it takes once everything has been used before: the lesser of two, since slabs
    are cut by them and anything may disturb one."""
    seconds = list[float]()
    for _ in range(3):
        start = time.perf_counter()
        result = torch.cat(list(exact.run(direction, vae, small, scratch, hold=hold, check=check)), dim=1)
        seconds.append(time.perf_counter() - start)
    return result, min(seconds[1:])


def held_bytes(slabs: int) -> int:
    """What a process holds whose picture others have in slabs: the rows that slabs get and exchange, as they come and
    as they are sent, or two pieces of the result."""
    return max(2 * EDGE_BYTES + slabs * _REPORT_BYTES, 2 * ANSWER_BYTES)


def run(
    direction: Direction, vae: AutoencoderKL, picture: Latents | Pixels, scratch: Scratch,
    elsewhere: SlabsElsewhere | None, *, hold: Hold, check: Check, progress: Callable[[float], None],
    margin: tuple[int, int], attend_to: int | None,
) -> Generator[Tensor]:  # fmt: skip
    """`exact.run`, in slabs `elsewhere` as long as they are all there, else here. A job that remembers passes
    continues here."""
    frame, done, most = direction.frame(picture, margin), 0, 0.0
    size = frame.height // direction.reads, frame.width // direction.reads

    def tell(share: float) -> None:
        nonlocal most
        most = max(most, share)
        progress(most)

    options: dict[str, Any] = {"hold": hold, "check": check, "margin": margin, "attend_to": attend_to}
    is_new = scratch.spool is None or scratch.spool.is_empty
    if elsewhere is not None and is_new and slabs_in(size[0]) >= FEWEST:
        assert scratch.folder is not None
        small, stages = direction.corner(picture, direction.reads * PROBE), direction.stages(vae)
        probed = probe(direction, vae, small, Scratch(scratch.folder, scratch.dtype), hold, check)
        total = of_picture(stages, frame.height, frame.width, attend_to)
        probes = total / of_picture(stages, *direction.size(small))
        with elsewhere(SlabWork(direction, size, small, *probed, probes)) as team:
            for strip in _elsewhere(direction, picture, team, frame, attend_to, total, tell):
                yield strip
                done += strip.shape[1]
        if done == direction.gives * size[0]:
            return
    row = 0
    with closing(exact.run(direction, vae, picture, scratch, progress=tell, **options)) as strips:
        for strip in strips:
            row += strip.shape[1]
            if row > done:
                yield strip


def _elsewhere(
    direction: Direction, picture: Latents | Pixels, team: Team | None, frame: Frame, attend_to: int | None,
    total: float, tell: Callable[[float], None],
) -> Iterator[Tensor]:  # fmt: skip
    """The strips that others give before one of them is lost. As long as little of the `total` work is done, the rest
    begin again."""
    share, rows, height = 0.0, 0, frame.height // direction.reads

    def told(work: float) -> None:
        nonlocal share
        share = min(1.0, work / total)
        tell(share)

    while team is not None and (slabs := team.gather(min(slabs_in(height), DECODERS))) is not None:
        try:
            for strip in rows_of_slabs(slabs, direction, picture, frame, attend_to, told):
                rows += strip.shape[1]
                yield strip
                tell(share + (1 - share) * rows / (direction.gives * height))
            return
        except Lost as lost:
            again = not rows and share < _LITTLE
            team.lose(lost, again=again)
            if not again:
                return


def slabs_in(height: int) -> int:
    """How many slabs a picture of so many rows of latents may have."""
    return height // LEAST_ROWS


def rows_of_slabs(
    slabs: Slabs, direction: Direction, picture: Latents | Pixels, frame: Frame, attend_to: int | None,
    tell: Callable[[float], None],
) -> Iterator[Tensor]:  # fmt: skip
    """The strips, (C, n, W) fp32, of the result, as one process yields them. `tell` gets the work that is done. Raises
    Lost."""
    shares = slabs.shares
    plain = frame.height, frame.width, frame.y, frame.x  # a Frame would have a scheduler between us import torch
    reports = slabs.begin(
        [Begin(number, shares, plain, EDGE_BYTES // len(shares), attend_to) for number in range(len(shares))]
    )
    # Two parts are here at a time.
    for edges, has_more in _with_more(in_parts(_given(direction, picture, reports), EDGE_BYTES // 2)):
        reports = slabs.go_on(_orders(edges, len(shares), has_more=has_more))
    while not all(report.is_ready for report in reports):
        tell(sum(report.worked for report in reports))
        reports = slabs.go_on(orders_for(reports))
    tell(sum(report.worked for report in reports))
    for piece in slabs.pieces():
        yield from torch.from_numpy(piece.rows).split(list(piece.heights), dim=1)


def _given(direction: Direction, picture: Latents | Pixels, reports: Sequence[Report]) -> Iterator[Edge]:
    """The rows of the picture that each slab reads, in the strips in which one process reads them: where they are
    computed when they are read, their bits may depend on that."""
    for first, last in pairwise(direction.source(picture).cuts()):
        to = tuple(n for n, report in enumerate(reports) if report.reads[0] < last and first < report.reads[1])
        if to:
            rows = direction.raw(picture, first, last).view(np.uint8)
            yield Edge(0, to, Packed(first, (1.0,) * len(rows), rows))


def _with_more(parts: Iterator[tuple[Edge, ...]]) -> Iterator[tuple[tuple[Edge, ...], bool]]:
    """Each part, and whether another follows."""
    part = next(parts)
    for following in parts:
        yield part, True
        part = following
    yield part, False


def orders_for(reports: Sequence[Report]) -> list[Orders]:
    """What the slabs that report so are to do next: the moments of all strips, pooled in the order of the picture, and
    the rows that each needs."""
    pooled, measured = None, [report.moments for report in reports if report.moments is not None]
    if measured:
        pooled = Pooled(measured[0].shape[2])
        for report in reports:
            assert report.moments is not None
            for count, (mean, squares) in zip(report.counts, torch.from_numpy(report.moments.copy()), strict=True):
                pooled.fold(count, mean, squares)
    mean, var = (None, None) if pooled is None else (pooled.mean.numpy(), pooled.var.numpy())
    has_more = any(report.has_more for report in reports)
    edges = [edge for report in reports for edge in report.edges]
    return _orders(edges, len(reports), mean, var, has_more=has_more)


def _orders(
    edges: Sequence[Edge], slabs: int, mean: np.ndarray | None = None, var: np.ndarray | None = None, *, has_more: bool
) -> list[Orders]:
    return [Orders(mean, var, tuple(edge for edge in edges if n in edge.to), has_more) for n in range(slabs)]
