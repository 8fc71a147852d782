"""Decode a picture whose slabs other processes have: carry what they tell each other between passes, and take their
rows in the order of the picture."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from tiler.decoding import FACTOR, exact
from tiler.decoding.apart import ANSWER_BYTES, DECODERS
from tiler.decoding.exact import Hold
from tiler.decoding.frozen import PROBE
from tiler.decoding.messages import Begin, Orders, Piece, Report
from tiler.decoding.rows import Check, Latents, Stage, decoder_stages
from tiler.decoding.scratch import Scratch
from tiler.decoding.slabs import latents_of
from tiler.decoding.statistics import Frame, Pooled
from tiler.decoding.work import of_picture

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

EDGE_BYTES = 8_000_000  # about the most that all slabs together send to others at a time
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
        """The rows of the picture, top first. Raises Lost."""
        ...


class Team(Protocol):
    """Processes that may decode slabs."""

    def gather(self, most: int) -> Slabs | None:
        """Those that are ready, at most `most`; None if there are fewer than two or they are together no faster than
        this process, which the user is told."""
        ...

    def lose(self, why: Lost, *, again: bool) -> None:
        """Tell the user that a slab is lost, and that others begin `again` or that this process decodes alone."""
        ...


class SlabWork(NamedTuple):
    """What a team must know first: the size of all latents, (height, width), and a few of them, `small`, with the
    pixels (3, h, w) that `probe` makes of them here, and its seconds. The picture is as much work as `probes` of
    them."""

    size: tuple[int, int]
    small: Tensor
    probe: Tensor
    seconds: float
    probes: float


SlabsElsewhere = Callable[[SlabWork], AbstractContextManager[Team | None]]
"""What opens the connection to others. None if there is nobody."""


def probe(vae: AutoencoderKL, latents: Tensor, scratch: Scratch, hold: Hold, check: Check) -> tuple[Tensor, float]:
    """Decode a few latents, (1, C, h, w), as a picture of their own → (3, 8h, 8w): equal on processes that compute
    equal bits. Also returns the seconds it took once everything had been used before."""
    for _ in range(2):
        start = time.perf_counter()
        pixels = torch.cat(list(exact.decode(vae, latents, scratch, hold=hold, check=check)), dim=1)
        seconds = time.perf_counter() - start
    return pixels, seconds


def held_bytes(latents_bytes: int, slabs: int) -> int:
    """What a process holds that has others decode slabs: the latents twice, as they are sent and with what slabs have
    in common, or the rows that slabs exchange, as they come and as they are sent, or two pieces of the picture."""
    return max(4 * latents_bytes, 2 * EDGE_BYTES + slabs * _REPORT_BYTES, 2 * ANSWER_BYTES)


def decode(
    vae: AutoencoderKL, latents: Latents, scratch: Scratch, elsewhere: SlabsElsewhere | None, *, hold: Hold,
    check: Check, progress: Callable[[float], None], margin: tuple[int, int], attend_to: int | None,
) -> Generator[Tensor]:  # fmt: skip
    """`exact.decode`, in slabs `elsewhere` as long as they are all there, else here. A job that remembers passes
    continues here."""
    height, done, most = latents.shape[2], 0, 0.0

    def tell(share: float) -> None:
        nonlocal most
        most = max(most, share)
        progress(most)

    options: dict[str, Any] = {"hold": hold, "check": check, "margin": margin, "attend_to": attend_to}
    is_new = scratch.spool is None or scratch.spool.is_empty
    if elsewhere is not None and is_new and slabs_in(height) >= FEWEST:
        assert scratch.folder is not None
        small = latents[:, :, :PROBE][..., :PROBE].contiguous()
        probed = probe(vae, small, Scratch(scratch.folder, scratch.dtype), hold, check)
        stages, width = decoder_stages(vae.decoder, vae.post_quant_conv), latents.shape[3]
        probes = of_picture(stages, height, width, attend_to) / of_picture(stages, *small.shape[2:])
        with elsewhere(SlabWork((height, width), small, *probed, probes)) as team:
            for strip in _elsewhere(vae, latents, team, hold, margin, attend_to, tell):
                yield strip
                done += strip.shape[1]
        if done == FACTOR * height:
            return
    row = 0
    with closing(exact.decode(vae, latents, scratch, progress=tell, **options)) as strips:
        for strip in strips:
            row += strip.shape[1]
            if row > done:
                yield strip


def _elsewhere(
    vae: AutoencoderKL, latents: Latents, team: Team | None, hold: Hold, margin: tuple[int, int], attend_to: int | None,
    tell: Callable[[float], None],
) -> Iterator[Tensor]:  # fmt: skip
    """The strips that others give before one of them is lost. As long as little is done, the rest begin again."""
    height, width = latents.shape[2:]
    stages, frame = decoder_stages(vae.decoder, vae.post_quant_conv), Frame(height, width, *margin)
    total, share, rows = of_picture(stages, height, width, attend_to), 0.0, 0

    def told(work: float) -> None:
        nonlocal share
        share = min(1.0, work / total)
        tell(share)

    while team is not None and (slabs := team.gather(min(slabs_in(height), DECODERS))) is not None:
        try:
            for strip in rows_of_slabs(slabs, stages, latents, frame, hold, attend_to, told):
                rows += strip.shape[1]
                yield strip
                tell(share + (1 - share) * rows / (FACTOR * height))
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
    slabs: Slabs, stages: list[Stage], latents: Latents, frame: Frame, hold: Hold, attend_to: int | None,
    tell: Callable[[float], None],
) -> Iterator[Tensor]:  # fmt: skip
    """The strips, (3, n, W) fp32, of a picture, as one process yields them. `tell` gets the work that is done. Raises
    Lost."""
    shares = slabs.shares
    plain = frame.height, frame.width, frame.y, frame.x  # a Frame would have a scheduler between us import torch
    begun = [
        Begin(number, shares, plain, first, part, EDGE_BYTES // len(shares), attend_to)
        for number, (first, part) in enumerate(latents_of(stages, latents, shares, hold))
    ]
    reports = slabs.begin(begun)
    del begun
    while not all(report.is_ready for report in reports):
        tell(sum(report.worked for report in reports))
        reports = slabs.go_on(orders_for(reports))
    tell(sum(report.worked for report in reports))
    for piece in slabs.pieces():
        yield from torch.from_numpy(piece.pixels).split(list(piece.heights), dim=1)


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
    return [
        Orders(mean, var, tuple(edge for edge in edges if number in edge.to), has_more)
        for number in range(len(reports))
    ]
