"""The coordinator's side of decoding and encoding in slabs: each of some workers has a part of the picture's rows, pass
by pass, and all of them wait for each other between two passes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tiler.cluster import tasks
from tiler.cluster.greetings import Request
from tiler.cluster.members import Member, Members
from tiler.cluster.shared import SlabAnswer
from tiler.decoding.apart import DECODERS
from tiler.decoding.directions import ENCODER
from tiler.decoding.lockstep import FEWEST, Lost, SlabWork
from tiler.decoding.messages import Begin, Fetch, Orders, Piece, Report
from tiler.request import Decode

_LOOK = 0.1  # seconds until a signal or a lost worker is noticed
# Nobody is waited for if no answer comes for 60 s and 3 times the longest task so far or the seconds of the whole
# picture that the probe suggests, whichever is more.
_LATE, _LATE_SECONDS = 3.0, 60.0
_PAUSE = 1.0  # the most seconds that pass between two looks, unless this process was stopped
_GATHERING = 60.0  # the most seconds until workers are ready
# Decoding and encoding: the work of all and their waiting for each other, over one process's; seconds until all are
# ready. Those that encode have been greeted for the canvas. Two workers encode mini's guide at 2048² in 6.0 to 6.6 s,
# one process in 7.4 s: with what they wait for, they gain nothing there, and more with larger models and pictures.
DECODING, ENCODING = (1.2, 3.0), (1.8, 1.0)
_WORTH = 1.0  # the speed of all workers together over this process's, in the probe, from which they have slabs


def slab_seconds(
    alone: float, most: int, speeds: Sequence[float], costs: tuple[float, float] = DECODING
) -> float:  # fmt: skip
    """The time of decoding or encoding, which `costs` so much, in at most `most` slabs by workers of these speeds, as
    multiples of this process's, which takes `alone` seconds and does it if they are not faster."""
    slabs = min(len(speeds), DECODERS, most)
    if slabs < FEWEST:
        return alone
    together, ready = costs
    return min(alone, ready + together * alone / sum(sorted(speeds, reverse=True)[:slabs]))


@dataclass(frozen=True)
class SlabProbe:
    """The first requests to each worker: the job, then the corner of a picture. The render's job named `canvas` may be
    open there."""

    job: bytes
    name: str
    method: Decode
    work: SlabWork
    canvas: str = ""

    samples = most = 1

    @property
    def requests(self) -> tuple[Request, ...]:
        # Nobody knows yet how small a slab will be, and each has the keys and values of the whole picture.
        return (
            Request(
                tasks.open_slabs,
                (self.job, self.work.direction.name, self.method.value, self.work.size, self.canvas),
            ),
            Request(tasks.hello_slabs, (self.name, self.work.small.numpy())),
        )


class Team:
    """Workers that may have slabs, as `decoding.lockstep` wants them. `speeds` are those of the canvas, by the names of
    workers; `check` is called often and may raise to stop the run. Once some workers are ready, others have `grace`
    seconds to get ready, and longer if they are being greeted, but all together no longer than `at_most`; nobody is
    waited for if as many are ready as had a speed."""

    def __init__(
        self, members: Members, job: str, speeds: Mapping[str, float], work: SlabWork, grace: float,
        check: Callable[[], None], note: Callable[[str], None], at_most: float | None = None,
    ) -> None:  # fmt: skip
        self._members, self._job, self._speeds, self._grace = members, job, speeds, grace
        self._here, self._probes = work.seconds, work.probes
        self._does, self._at_most = f"{work.direction.name}s", at_most
        self._encodes = work.direction is ENCODER
        self._check, self._note = check, note

    def gather(self, most: int) -> Slabs | None:
        begun = since = time.monotonic()
        count, at_most = 0, _GATHERING if self._at_most is None else self._at_most
        wanted = min(most, max(FEWEST, len(self._speeds))) if self._speeds else most
        while True:
            self._check()
            self._members.look()
            ready, now = self._members.free()[:most], time.monotonic()
            if len(ready) != count:
                since, count = now, len(ready)
            is_over = count and now - since >= self._grace and not self._members.is_greeting
            if is_over or count >= wanted or now - begun >= at_most:
                break
            if self._members.is_deserted or self._members.are_taken:
                break
            for ticket, value, error in self._members.engine.answers(_LOOK):
                self._members.take(ticket, value, error)
        if len(ready) < FEWEST:
            self._note(f"fewer than two workers are ready: this process {self._does} alone")
            return None
        if sum(self._here / member.pace.seconds(1) for member in ready) < _WORTH:
            self._note(f"the workers that are ready are together no faster than this process, which {self._does} alone")
            return None
        shares = self._shares(ready)
        whole = self._probes * max(share * each.pace.seconds(1) for share, each in zip(shares, ready, strict=True))
        return Slabs(self._members, self._job, ready, shares, whole, self._check, encodes=self._encodes)

    def _shares(self, members: Sequence[Member]) -> tuple[float, ...]:
        """In proportion to the speed in the canvas, if that of all is known; else to that of the probe."""
        speeds = [self._speeds.get(member.name, 0.0) for member in members]
        if not all(speeds):
            speeds = [1 / member.pace.seconds(1) for member in members]
        return tuple(speed / sum(speeds) for speed in speeds)

    def lose(self, why: Lost, *, again: bool) -> None:
        self._note(f"{why}; {'the other workers begin again' if again else f'this process {self._does} alone'}")


class Slabs:
    """Workers that each have a slab of the picture, top first, and all of it in about `whole` seconds. Whatever happens
    to one of them raises Lost."""

    def __init__(
        self, members: Members, job: str, team: Sequence[Member], shares: tuple[float, ...], whole: float,
        check: Callable[[], None], *, encodes: bool,
    ) -> None:  # fmt: skip
        self.shares = shares
        self._encodes = encodes
        self._members, self._job, self._team, self._check = members, job, team, check
        self._asked = dict[int, Member]()  # by ticket
        self._told = dict[int, Report | Piece]()  # the answers by ticket
        self._sent = dict.fromkeys((member.address for member in team), 0)  # messages
        self._seconds = dict.fromkeys(self._sent, 0.0)
        self._rows = dict.fromkeys(self._sent, 0)  # of pixels, that it reads or gives
        self._whole, self._longest = whole, 0.0  # seconds, the latter of a task
        self._expected, self._waited = 0.0, 0.0  # seconds since the last answer or message to all

    def begin(self, begun: Sequence[Begin]) -> list[Report]:
        reports = self._all(begun)
        if self._encodes:
            for member, report in zip(self._team, reports, strict=True):
                self._rows[member.address] = report.reads[1] - report.reads[0]
        return reports

    def go_on(self, orders: Sequence[Orders]) -> list[Report]:
        return self._all(orders)

    def pieces(self) -> Iterator[Piece]:
        first, *others = self._team
        following = self._ask(first, Fetch())
        ahead = {member.address: self._ask(member, Fetch(ahead=True)) for member in others}
        for number, member in enumerate(self._team):
            is_last = False
            while not is_last:
                piece = self._wait(following)
                assert isinstance(piece, Piece)
                is_last = piece.is_last
                if not is_last:  # the next one is made while this one is written
                    following = self._ask(member, Fetch())
                elif number + 1 < len(self._team):
                    self._wait(ahead[self._team[number + 1].address])
                    following = self._ask(self._team[number + 1], Fetch())
                if not self._encodes:
                    self._rows[member.address] += piece.rows.shape[1]
                if not np.isfinite(piece.rows).all():
                    self._leave(member, "NaN or Inf in the autoencoder")
                yield piece
            if rows := self._rows[member.address]:
                member.note(rows, self._seconds[member.address], member.peak_rss_bytes)

    def _all(self, said: Sequence[Begin | Orders]) -> list[Report]:
        """Send each worker its message, and wait for all answers."""
        self._expected, self._waited = self._whole, 0.0
        tickets = [self._ask(member, each) for member, each in zip(self._team, said, strict=True)]
        found = [self._wait(ticket) for ticket in tickets]
        assert all(isinstance(report, Report) for report in found)
        return [report for report in found if isinstance(report, Report)]

    def _ask(self, member: Member, said: Begin | Orders | Fetch) -> int:
        number = self._sent[member.address]
        self._sent[member.address] += 1
        ticket = self._members.engine.submit(member.address, tasks.run_slab, self._job, number, said)
        self._asked[ticket] = member
        return ticket

    def _wait(self, ticket: int) -> Report | Piece:
        since = time.monotonic()
        while ticket not in self._told:
            self._check()
            for gone in self._members.look():
                if any(gone is member for member in self._team):
                    self._lose(f"worker {gone.name} had a part of the picture")
            arrived = self._members.engine.answers(_LOOK)
            # Greetings first: what belongs to a slab may raise.
            for answer in [answer for answer in arrived if not self._members.take(*answer)]:
                self._take(*answer)
            now = time.monotonic()
            self._waited, since = self._waited + min(now - since, _PAUSE), now
            if not arrived and self._waited > _LATE * self._expected + _LATE_SECONDS:
                silent = {member.address: member for member in self._asked.values()}.values()
                for member in silent:
                    self._members.leave_out(member, "it does not answer (a part of the picture)")
                names = ", ".join(member.name for member in silent)
                self._lose(f"{'workers' if len(silent) > 1 else 'worker'} {names} had a part of the picture")
        return self._told.pop(ticket)

    def _take(self, ticket: int, value: Any, error: BaseException | None) -> None:
        member = self._asked.pop(ticket, None)
        if member is None:
            return
        if error is not None or not isinstance(value, SlabAnswer):
            self._leave(member, f"{type(error).__name__}: {error}".partition("\n")[0])
        elif value.is_closed:
            self._members.ask_again(member)
            self._lose(f"worker {member.name} {value.error}")
        elif value.told is None:
            self._leave(member, value.error)
        else:
            self._seconds[member.address] += value.seconds
            self._longest = max(self._longest, value.seconds)
            self._expected, self._waited = max(self._expected, self._longest), 0.0
            member.peak_rss_bytes = max(member.peak_rss_bytes, value.peak_rss_bytes)
            self._told[ticket] = value.told

    def _leave(self, member: Member, why: str) -> None:
        self._members.leave_out(member, why)
        self._lose(f"worker {member.name} had a part of the picture")

    def _lose(self, why: str) -> None:
        """Give up all slabs. Raises Lost."""
        for ticket in self._asked:
            self._members.engine.drop(ticket)
        self._asked.clear()
        raise Lost(why)
