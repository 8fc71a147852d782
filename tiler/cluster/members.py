"""The workers of a render: who has come, who is ready, who was left out and why, and which of them compute equal
bits."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tiler.cluster import tasks
from tiler.cluster.shared import Greeting, window_of
from tiler.cluster.sharing import Pace
from tiler.diffusion.runner import Tile
from tiler.memory.budget import format_mb
from tiler.run import WorkerUse

if TYPE_CHECKING:
    from tiler.cluster.engine import Engine

_LOOK_EVERY = 1.0  # seconds between two questions to the scheduler
_AGAIN = 10.0  # seconds until a worker that is taken is asked again
_LOST = 600.0  # seconds for which a scheduler that does not answer is waited for
_SETTLE = 10.0  # seconds for more workers to answer before it is decided whose bits count


@dataclass
class Member:
    """A worker. `ticket` is of the task that it has."""

    address: str
    name: str
    greeting: Greeting | None = None
    pace: Pace = field(default_factory=lambda: Pace(1, 0.0, 1.0))
    ticket: int | None = None
    delay: float = 0.0  # seconds that its tasks wait for those of other renders
    failures: int = 0
    is_out: bool = False
    tiles: int = 0
    seconds: float = 0.0
    peak_rss_bytes: int = 0

    def note(self, tiles: int, seconds: float, peak_rss_bytes: int, *, waited: float = 0.0) -> None:
        """A task is done, `waited` seconds later than it took."""
        self.delay += (max(0.0, waited) - self.delay) / 3
        self.pace.note(tiles, seconds)
        self.tiles, self.seconds = self.tiles + tiles, self.seconds + seconds
        self.peak_rss_bytes = max(self.peak_rss_bytes, peak_rss_bytes)
        self.failures = 0


@dataclass(frozen=True)
class Probe:
    """What each worker is asked first: the job, and a tile of noise in the place of one of its first step."""

    job: bytes
    step: int
    tile: Tile


class Members:
    """`patience` is for how long a render waits for a first or another worker, in seconds; None: for ever. A scheduler
    that does not answer is waited for longer. `running` counts the worker processes that are there, where no others can
    come."""

    def __init__(
        self, engine: Engine, probe: Probe, note: Callable[[str], None], patience: float | None,
        running: Callable[[], int] | None = None,
    ) -> None:  # fmt: skip
        self.engine = engine
        self.probe, self._note, self._patience, self._running = probe, note, patience, running
        self._members: dict[str, Member] = {}
        self._gone: list[Member] = []
        self._greetings: dict[int, Member] = {}  # by ticket: those that are asked
        self._reaching: dict[int, Member] = {}  # by ticket: those to which the scheduler connects
        self._taken: set[str] = set()  # addresses of those of which that has been told
        self._again: dict[str, float] = {}  # by address: when one that works for another render is asked again
        self.digest: str | None = None  # of the bits that count
        self._is_lost = False  # the scheduler does not answer
        self._looked = self._first_greeting = 0.0
        self._deserted_since = time.monotonic()

    def uses(self) -> list[WorkerUse]:
        """What each that predicted something did, those that have gone included."""
        return [
            WorkerUse(m.name, m.tiles, m.seconds, m.peak_rss_bytes, m.greeting.max_ram_bytes)
            for m in (*self._gone, *self._members.values())
            if m.tiles and m.greeting is not None
        ]

    def ready(self) -> list[Member]:
        """Those that may have tasks."""
        if self.digest is None:
            return []
        return [m for m in self._members.values() if m.greeting is not None and not m.is_out]

    def free(self) -> list[Member]:
        """Those that are ready and have none, the fastest first."""
        return sorted((m for m in self.ready() if m.ticket is None), key=lambda m: m.pace.seconds(1))

    @property
    def is_deserted(self) -> bool:
        """Whether there has been no worker for so long that nobody waits for one."""
        if self.ready():
            self._deserted_since = time.monotonic()
            return False
        if self._running is not None and self._running() <= sum(m.is_out for m in self._members.values()):
            return True
        if self._patience is None or self._greetings or self._reaching:
            return False
        patience = max(_LOST, self._patience) if self._is_lost else self._patience
        return time.monotonic() - self._deserted_since >= patience

    def look(self) -> list[Member]:
        """Greet who has come, → who has gone. Asks the scheduler once a second."""
        now = time.monotonic()
        self._decide(now)
        if now - self._looked < _LOOK_EVERY:
            return []
        self._looked = now
        present = self.engine.members()
        if present is None and not self._is_lost:
            self._note("the scheduler does not answer: waiting for it")
        if self._is_lost and present is not None:  # workers come back after it
            self._deserted_since = now
        self._is_lost, present = present is None, present or {}
        gone = [m for address, m in self._members.items() if address not in present]
        for member in gone:
            del self._members[member.address]
            self._gone.append(member)
            self._again.pop(member.address, None)
            for asked in (self._greetings, self._reaching):
                for ticket in [t for t, m in asked.items() if m is member]:
                    del asked[ticket]
                    self.engine.drop(ticket)
            if not member.is_out:
                self._note(f"worker {member.name} is gone")
        for address, name in present.items():
            if address not in self._members:
                member = self._members[address] = Member(address, name)
                self._reaching[self.engine.reach(address)] = member
        for address in [address for address, when in self._again.items() if when <= now]:
            del self._again[address]
            self._greet(self._members[address])
        return gone

    def _greet(self, member: Member) -> None:
        probe, tile = self.probe, self.probe.tile
        ticket = self.engine.submit(
            member.address, tasks.hello, probe.job, probe.step, window_of(tile), tile.latents.numpy()
        )
        self._greetings[ticket] = member

    def ask_again(self, member: Member) -> None:
        """Of a worker that has closed the job: another render has taken it."""
        member.greeting = None
        self._again[member.address] = time.monotonic() + _AGAIN

    def take(self, ticket: int, value: Any, error: BaseException | None) -> bool:
        """Whether an answer was a greeting."""
        if (member := self._reaching.pop(ticket, None)) is not None:
            if error is None:
                self._greet(member)
            else:
                port = member.address.rpartition(":")[2]
                self.leave_out(
                    member,
                    f"the scheduler cannot connect to {member.address}; open port {port} in the worker's firewall, or start "
                    "it with --port and --contact-address",
                )
            return True
        member = self._greetings.pop(ticket, None)
        if member is None:
            return False
        if error is not None:
            greeting = Greeting(refusal=f"{type(error).__name__}: {error}".partition("\n")[0])
        else:
            greeting = Greeting.from_json(value)
        if greeting.is_taken:
            if member.address not in self._taken:
                self._taken.add(member.address)
                self._note(f"worker {member.name} works for another render: it is asked again")
            self._again[member.address] = time.monotonic() + _AGAIN
            return True
        if greeting.refusal:
            self.leave_out(member, greeting.refusal)
            return True
        member.greeting, member.peak_rss_bytes = greeting, greeting.peak_rss_bytes
        member.pace = Pace.from_probe(greeting.seconds, max(1, greeting.batch // self.probe.tile.region.samples))
        self._first_greeting = self._first_greeting or time.monotonic()
        if self.digest is not None:
            self._admit(member)
        return True

    def leave_out(self, member: Member, why: str) -> None:
        """Give a worker nothing to do from now on, and say why."""
        member.is_out = True
        self._note(f"worker {member.name} is left out: {why}")

    def _decide(self, now: float) -> None:
        """Whose bits count: those of the workers that are fastest together, once all have answered or enough time has
        gone by."""
        answered = [m for m in self._members.values() if m.greeting is not None and not m.is_out]
        if self.digest is not None or not answered or (self._greetings and now - self._first_greeting < _SETTLE):
            return
        speeds: dict[str, float] = {}
        for member in answered:
            assert member.greeting is not None
            speeds[member.greeting.digest] = speeds.get(member.greeting.digest, 0.0) + 1 / member.pace.seconds(1)
        self.digest = max(speeds, key=lambda digest: speeds[digest])
        for member in answered:
            self._admit(member)

    def _admit(self, member: Member) -> None:
        assert member.greeting is not None
        if member.greeting.digest != self.digest:
            self.leave_out(
                member, "its processor computes other bits than the others', and the picture would not be the same"
            )
            return
        if member.tiles:  # it was away for another render
            return
        ceiling = format_mb(member.greeting.max_ram_bytes)
        self._note(f"worker {member.name} has joined: {member.pace.seconds(1):.1f} s a tile, ceiling {ceiling}")
