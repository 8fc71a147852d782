"""The coordinator's side of decoding: bands of a picture are given to workers that have nothing else to do, and come
back in pieces."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tiler.cluster import tasks
from tiler.cluster.greetings import Request
from tiler.cluster.members import Member, Members
from tiler.cluster.shared import Answer, BandPlace
from tiler.decoding import FACTOR
from tiler.decoding.apart import Work, sending_at_once

_LOOK = 0.1  # seconds until a signal or a free worker is noticed
# A piece is not waited for after 60 s and 3 times the worker's longest one or, before its first, 3 times the seconds of
# the whole band that the probe suggests.
_LATE, _LATE_SECONDS = 3.0, 60.0
_TOO_OFTEN = 2  # failures in a row after which a worker is left out


@dataclass(frozen=True)
class BandProbe:
    """The first requests to each worker: the job, then the held statistics and a few latents to decode."""

    job: bytes
    name: str
    work: Work

    samples = most = 1

    @property
    def requests(self) -> tuple[Request, ...]:
        size = self.work.latents.shape[2], max(band.last - band.first for band in self.work.bands)
        statistics = np.frombuffer(self.work.statistics, np.uint8)  # dask sends arrays without a copy
        return (
            Request(tasks.open_decoder, (self.job, len(self.work.statistics), size)),
            Request(tasks.hello_decoder, (self.name, statistics, self.work.small.numpy()), is_large=True),
        )


class _Asked(NamedTuple):
    """A piece that a worker has been asked for."""

    member: Member
    number: int
    since: float
    sends: bool  # the band's latents


class Bands:
    """Others who decode, as `decoding.apart` wants them; `check` is called often and may raise to stop the run."""

    def __init__(self, members: Members, job: str, work: Work, check: Callable[[], None]) -> None:
        self._members, self._job, self._work, self._check = members, job, work, check
        self._total = FACTOR * work.latents.shape[2]
        widest = max(band.last - band.first for band in work.bands)
        self._at_once = sending_at_once(4 * work.latents.shape[1] * work.latents.shape[2] * widest)
        self._rows = dict[int, int]()  # by band: the row that comes next
        self._waiting = deque[int]()
        self._asked = dict[int, _Asked]()  # by ticket
        self._arrived = deque[tuple[int, Tensor]]()

    def begin(self, number: int, row: int) -> None:
        self._rows[number] = row
        self._waiting.append(number)

    def next(self) -> tuple[int, Tensor] | None:
        while not self._arrived:
            self._check()
            for gone in self._members.look():
                self._lose(gone)
            for member in self._members.free():
                if self._waiting and self._may_send():
                    self._ask(member, self._waiting.popleft(), is_new=True)
            if not self._asked and (not self._waiting or self._members.is_deserted or self._members.are_taken):
                return None
            arrived = self._members.engine.answers(_LOOK)
            for ticket, value, error in arrived:
                if not self._members.take(ticket, value, error):
                    self._take(ticket, value, error)
            if not arrived:  # after a pause of this process, workers seem late whose answers have come
                self._leave_late()
        return self._arrived.popleft()

    def _may_send(self) -> bool:
        """Whether there is memory for another band on its way: a band has arrived when its first rows come back, or
        when a worker takes very long for them."""
        now = time.monotonic()
        return sum(a.sends and now - a.since < _LATE_SECONDS for a in self._asked.values()) < self._at_once

    def _ask(self, member: Member, number: int, *, is_new: bool) -> None:
        band, latents = self._work.bands[number], self._work.latents
        place = BandPlace(number, band.first, band.last, (band.keep.start, band.keep.stop), latents.shape[3])
        columns: np.ndarray | None = None
        if is_new:
            step = 64  # rows of latents that may lie in a file
            columns = np.empty((*latents.shape[:3], band.last - band.first), np.float32)
            for top in range(0, latents.shape[2], step):
                part = latents[:, :, top : top + step][..., band.first : band.last]
                columns[:, :, top : top + part.shape[2]] = part.numpy()
        ticket = self._members.engine.submit(
            member.address, tasks.decode, self._job, place, self._rows[number], columns
        )
        member.ticket = ticket
        self._asked[ticket] = _Asked(member, number, time.monotonic(), is_new)

    def _take(self, ticket: int, value: Any, error: BaseException | None) -> None:
        asked = self._asked.pop(ticket, None)
        if asked is None:
            return
        member, number = asked.member, asked.number
        member.ticket = None
        if error is not None or not isinstance(value, Answer) or value.predictions is None:
            self._fail(asked, value if isinstance(value, Answer) else None, error)
            return
        strip = torch.from_numpy(np.require(value.predictions, requirements="W"))
        if not bool(torch.isfinite(strip).all()):
            self._fail(asked, value._replace(error="NaN or Inf in the decoder", is_numerical=True), None)
            return
        member.note(strip.shape[1], value.seconds, value.peak_rss_bytes)
        self._rows[number] += strip.shape[1]
        self._arrived.append((number, strip))
        if self._rows[number] < self._total:
            self._ask(member, number, is_new=False)

    def _fail(self, asked: _Asked, answer: Answer | None, error: BaseException | None) -> None:
        """A piece that ended in an error: its band goes elsewhere, and a worker that fails too often is left out."""
        member = asked.member
        self._waiting.appendleft(asked.number)
        if answer is not None and answer.is_closed:
            self._members.ask_again(member)
            return
        member.failures += 1
        if member.failures >= _TOO_OFTEN or (answer is not None and answer.is_numerical):
            said = answer.error if answer is not None else f"{type(error).__name__}: {error}".partition("\n")[0]
            self._members.leave_out(member, said)

    def _lose(self, member: Member) -> None:
        for ticket in [t for t, asked in self._asked.items() if asked.member is member]:
            self._waiting.appendleft(self._asked.pop(ticket).number)
            self._members.engine.drop(ticket)

    def _seconds(self, member: Member, number: int) -> float:
        """What the probe suggests for a band."""
        band, latents, small = self._work.bands[number], self._work.latents, self._work.small
        return member.pace.seconds(1) * latents.shape[2] * (band.last - band.first) / small[0, 0].numel()

    def _leave_late(self) -> None:
        now = time.monotonic()
        for member, number, since, _ in list(self._asked.values()):
            longest = max((one.seconds for one in member.pace.passes), default=self._seconds(member, number))
            if now - since > _LATE * longest + _LATE_SECONDS:
                self._lose(member)
                self._members.leave_out(member, f"it does not answer (band {number + 1} of the picture)")
