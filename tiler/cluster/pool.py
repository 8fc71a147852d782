"""The runner that distributes tiles over workers: it accepts predictions in any order and yields them in the order of
the tiles."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from tiler.cluster import tasks
from tiler.cluster.greetings import Probe
from tiler.cluster.members import Member, Members
from tiler.cluster.shared import Answer, digest_of, window_of
from tiler.cluster.sharing import Busy, earliest, share
from tiler.diffusion.runner import Runner, Tile, check_finite
from tiler.errors import NumericalError
from tiler.events import WorkerState
from tiler.planning.render import TILES_AHEAD

AHEAD = TILES_AHEAD  # the least window, in tiles
FARTHEST, _AHEAD_BYTES = 2000, 128_000_000  # upper limits of that window: tiles, and bytes in memory
_ROUNDS = 4  # passes per worker that may be handed out or answered early
_LOOK = 0.1  # seconds until a signal or a free worker is noticed
_LATE, _LATE_SECONDS = 1.5, 30.0  # a task of more than 1.5 times its expected time and 30 s gets a copy
# Times that limit: when all tasks take longer, this process predicts, though the workers' heartbeats go on.
_SILENT = 3.0
_SILENT_ROUNDS = 20  # looks at the answers before that
_SHOW_EVERY = 2.0  # seconds between two looks at the workers for the user
_HERE = 4  # tiles that this process predicts between two checks of the workers
_DEATHS = 2  # workers that one tile may end; after that this process predicts it
_TOO_OFTEN = 2  # failures in a row after which a worker is left out


class Group(NamedTuple):
    """The tiles in one task of one worker."""

    numbers: tuple[int, ...]
    step: int
    member: Member
    since: float
    expected: float

    def is_late(self, now: float, times: float = 1.0) -> bool:
        return now - self.since > times * (_LATE * self.expected + _LATE_SECONDS)


@dataclass
class _Step:
    """A step in progress: the tiles without an answer, of which those in `waiting` are in no task, and the answers
    whose turn has not come."""

    number: int
    tiles: dict[int, Tile] = field(default_factory=dict)
    waiting: list[int] = field(default_factory=list)
    answers: dict[int, Tensor] = field(default_factory=dict)
    deaths: dict[int, int] = field(default_factory=dict)
    not_finite: dict[int, set[str]] = field(default_factory=dict)  # by tile: the workers that reported it

    def may_have(self, member: Member, number: int) -> bool:
        """Whether a tile may go to a worker: not if it has ended two workers, nor if this worker has failed on it."""
        return self.deaths.get(number, 0) < _DEATHS and member.address not in self.not_finite.get(number, ())


class Pool:
    """A `Runner` and a context manager. `open_local` opens the runner of this process, for tiles that no worker can
    predict; `check` is called often and may raise to stop the run; samples are added to `counts`. At most `farthest`
    tiles are handed out or answered early at a time, and at most AHEAD once that runner needs the memory for more.
    `show` gets the state of the workers every two seconds."""

    def __init__(
        self, members: Members, job: str, open_local: Callable[[], AbstractContextManager[Runner]],
        check: Callable[[], None], note: Callable[[str], None], counts: dict[str, int], *, farthest: int = FARTHEST,
        show: Callable[[tuple[WorkerState, ...]], None] = lambda workers: None,
    ) -> None:  # fmt: skip
        self._show, self._shown = show, 0.0
        self._farthest = farthest
        self._members, self._job, self._open_local = members, job, open_local
        self._check, self._note, self._counts = check, note, counts
        self._groups: dict[int, Group] = {}  # by ticket
        self._stack = ExitStack()
        self._local: Runner | None = None
        self._silent_rounds = 0
        self._without_numbers = False  # whether a worker was left out for NaN or Inf

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def predict(self, step: int, tiles: Iterable[Tile]) -> Iterator[Tensor]:
        under_way, source = _Step(step), enumerate(tiles)
        pulled, turn, last = 0, 0, False
        ahead = AHEAD
        while True:
            while not last and pulled - turn < ahead:
                if (following := next(source, None)) is None:
                    last = True
                else:
                    under_way.tiles[following[0]] = following[1]
                    under_way.waiting.append(following[0])
                    pulled += 1
            while turn in under_way.answers:
                yield under_way.answers.pop(turn)
                turn += 1
            if last and turn == pulled:
                return
            if pulled - turn < ahead and not last:
                continue
            self._one_round(under_way)
            ahead = self._ahead(under_way)

    def _ahead(self, step: _Step) -> int:
        """The number of tiles that may be handed out or answered early: enough for all workers, within the memory for
        them."""
        wanted = _ROUNDS * sum(member.pace.batch for member in self._members.ready())
        tile = next(iter(step.tiles.values()), None)
        room = self._farthest if tile is None else _AHEAD_BYTES // (2 * tile.latents.nbytes)
        farthest = self._farthest if self._local is None else AHEAD
        return max(AHEAD, min(wanted, room, farthest))

    def _one_round(self, step: _Step) -> None:
        self._check()
        for gone in self._members.look():
            self._lose(gone, step)
        self._hand_out(step)
        if (now := time.monotonic()) - self._shown >= _SHOW_EVERY:
            self._shown = now
            self._show(self._members.states(self._is_late))
        nobodys = self._nobodys(step)
        arrived = self._members.engine.answers(0.0 if nobodys else _LOOK)
        for ticket, value, error in arrived:
            if not self._members.take(ticket, value, error):
                self._take(ticket, value, error, step)
        if nobodys and not arrived:  # after a pause of this process, workers seem late whose answers have come
            self._predict_here(nobodys[:_HERE], step)

    def _nobodys(self, step: _Step) -> list[int]:
        """Return the tiles that this process must predict: those that no worker may have, or all if no worker
        answers."""
        if self._members.is_deserted:
            return step.waiting
        ready = self._members.ready()
        if ready and not self._members.waits_forever and all(map(self._is_silent, ready)):
            if self._silent_rounds < _SILENT_ROUNDS:  # after a pause of this process, answers are on their way
                self._silent_rounds += 1
                return []
            # Workers that this render has started share its memory.
            return [] if self._members.end_running() else sorted(step.tiles)
        self._silent_rounds = 0
        return [n for n in step.waiting if ready and not any(step.may_have(m, n) for m in ready)]

    def _hand_out(self, step: _Step) -> None:
        time: float | None = None  # when all could be done; reset whenever a task is handed out
        for member in self._members.free():
            waiting = [n for n in step.waiting if step.may_have(member, n)]
            if not waiting:
                self._copy_late(member, step)
                continue
            if time is None:
                fleet = [Busy(m.pace, self._busy(m)) for m in self._members.ready() if not self._is_late(m)]
                time = earliest(len(waiting), fleet)
            if count := share(len(waiting), member.pace, time):
                self._submit(member, waiting[:count], step)
                time = None
            else:
                self._copy_late(member, step)

    def _group_of(self, member: Member) -> Group | None:
        """Return the current task of a worker, or None."""
        return self._groups.get(member.ticket) if member.ticket is not None else None

    def _is_late(self, member: Member) -> bool:
        """Whether a worker takes so long that its answer is no longer expected."""
        group = self._group_of(member)
        return group is not None and group.is_late(time.monotonic())

    def _is_silent(self, member: Member) -> bool:
        """Whether a worker takes so long that it may never answer."""
        group = self._group_of(member)
        return group is not None and group.is_late(time.monotonic(), _SILENT)

    def _busy(self, member: Member) -> float:
        """The expected seconds until a worker is free."""
        group = self._group_of(member)
        if group is None:
            return 0.0
        return max(0.25 * group.expected, group.since + group.expected - time.monotonic())

    def _copy_late(self, member: Member, step: _Step) -> None:
        """Give a worker a copy of the tiles of a task that takes too long elsewhere."""
        now = time.monotonic()
        tried = {
            n
            for g in self._groups.values()
            if g.step == step.number and g.since + _LATE_SECONDS > now
            for n in g.numbers
        }
        for group in list(self._groups.values()):
            numbers = [n for n in group.numbers if n in step.tiles and n not in tried]
            if group.step == step.number and group.is_late(now) and numbers and group.member is not member:
                self._submit(member, numbers[: member.pace.batch], step)
                return

    def _submit(self, member: Member, numbers: Sequence[int], step: _Step) -> None:
        tiles = [step.tiles[n] for n in numbers]
        latents = torch.cat([tile.latents for tile in tiles]).contiguous().numpy()
        windows = [window_of(tile) for tile in tiles]
        ticket = self._members.engine.submit(member.address, tasks.predict, self._job, step.number, windows, latents)
        member.ticket = ticket
        self._groups[ticket] = Group(
            tuple(numbers), step.number, member, time.monotonic(), member.pace.seconds(len(numbers)) + member.delay
        )
        step.waiting = [n for n in step.waiting if n not in set(numbers)]

    def _take(self, ticket: int, value: Any, error: BaseException | None, step: _Step) -> None:
        group = self._groups.pop(ticket, None)
        if group is None:
            return
        member = group.member
        if member.ticket == ticket:
            member.ticket = None
        if error is not None or not isinstance(value, Answer) or value.predictions is None:
            self._fail(group, value if isinstance(value, Answer) else None, error, step)
            return
        waited = time.monotonic() - group.since - value.seconds
        member.note(len(group.numbers), value.seconds, value.peak_rss_bytes, waited=waited)
        if group.step != step.number:  # a copy was faster, and the step is over
            return
        for number, prediction in zip(group.numbers, value.predictions, strict=True):
            if (tile := step.tiles.get(number)) is not None:
                found = torch.from_numpy(np.ascontiguousarray(prediction))
                check_finite(found, step.number, tile.region)
                self._counts["denoiser_samples"] += tile.region.samples
                self._answer(number, found, step)

    def _answer(self, number: int, prediction: Tensor, step: _Step) -> None:
        del step.tiles[number]
        step.answers[number] = prediction

    def _fail(self, group: Group, answer: Answer | None, error: BaseException | None, step: _Step) -> None:
        """Handle a task that ended in an error: its tiles go elsewhere, and a worker that fails too often is left
        out."""
        member = group.member
        if answer is not None and answer.is_closed:
            if group.step == step.number:
                self._return(group, step)
            self._members.ask_again(member)
            return
        said = answer.error if answer is not None else f"{type(error).__name__}: {error}".partition("\n")[0]
        member.failures += 1
        if group.step == step.number:
            if answer is not None and answer.is_numerical:
                for number in group.numbers:
                    seen = step.not_finite.setdefault(number, set())
                    seen.add(member.address)
                    if len(seen) > 1:
                        raise NumericalError(answer.error)
            self._return(group, step)
        if member.failures >= _TOO_OFTEN:
            self._members.leave_out(member, said)
            if answer is not None and answer.is_numerical:
                if self._without_numbers:  # two of them, though of different tiles
                    raise NumericalError(answer.error)
                self._without_numbers = True

    def _lose(self, member: Member, step: _Step) -> None:
        """Handle a lost worker: its tiles go elsewhere."""
        for ticket in [t for t, g in self._groups.items() if g.member is member]:
            group = self._groups.pop(ticket)
            self._members.engine.drop(ticket)
            if group.step == step.number:
                for number in group.numbers:
                    step.deaths[number] = step.deaths.get(number, 0) + 1
                self._return(group, step)

    def _return(self, group: Group, step: _Step) -> None:
        """Put the tiles that are in no other task back into the waiting list, in order."""
        elsewhere = {n for g in self._groups.values() if g.step == step.number for n in g.numbers}
        back = {n for n in group.numbers if n in step.tiles and n not in elsewhere}
        step.waiting = sorted({*step.waiting, *back})

    def _open_here(self) -> Runner:
        """Open the runner of this process, and compare its bits with those of the workers."""
        local, probe = self._stack.enter_context(self._open_local()), self._members.probe
        assert isinstance(probe, Probe)
        own = digest_of(torch.stack(list(local.predict(probe.step, [probe.tile]))).numpy())
        if self._members.digest is None:
            self._members.digest = own  # workers that join later must compute the same
        elif own != self._members.digest:
            self._note(
                "this processor computes other bits than the workers': the picture is neither quite the one that they would "
                "make nor the one of this machine alone"
            )
        return local

    def _predict_here(self, numbers: Sequence[int], step: _Step) -> None:
        """Predict tiles in this process."""
        if self._local is None:
            if self._members.is_deserted:
                self._note("no worker is left: this process predicts alone")
            elif all(map(self._is_silent, self._members.ready())):
                self._note("no worker answers: this process predicts until one does")
            self._local = self._open_here()
        tiles = [step.tiles[n] for n in numbers]
        for number, prediction in zip(numbers, self._local.predict(step.number, tiles), strict=True):
            self._answer(number, prediction, step)
        step.waiting = [n for n in step.waiting if n in step.tiles]
