"""The workers of a render: which have come, which are ready, which were left out and why, and which compute equal
bits."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tiler.cluster.greetings import Asked
from tiler.cluster.shared import Greeting
from tiler.cluster.sharing import Pace
from tiler.events import WorkerState
from tiler.memory.budget import format_mb
from tiler.run import WorkerUse

if TYPE_CHECKING:
    from subprocess import Popen

    from tiler.cluster.engine import Engine

_LOOK_EVERY = 1.0  # seconds between two requests to the scheduler
_AGAIN = 10.0  # seconds until a worker that another render has is asked again
_LOST = 600.0  # seconds to wait for a scheduler that does not answer
_LONG = 60.0  # seconds after which a large request without an answer no longer keeps others from their turn
_SENDING = 2  # large requests at a time at most, of which only the newest may be younger: the plan counts so many
_SETTLE = 10.0  # seconds that other workers have to answer before the choice of bits
_SILENT = 600.0  # seconds in which no worker comes or answers, after which greetings are not waited for


@dataclass
class Member:
    """A worker. `ticket` is that of its current task."""

    address: str
    name: str
    request: int = 0  # the last of the first requests that it was sent, or that it waits for
    greeting: Greeting | None = None
    pace: Pace = field(default_factory=lambda: Pace(1, 0.0, 1.0))
    ticket: int | None = None
    asked: float = 0.0  # when that request was sent
    delay: float = 0.0  # seconds that its tasks wait for tasks of other renders
    failures: int = 0
    is_out: bool = False
    tiles: int = 0
    seconds: float = 0.0
    peak_rss_bytes: int = 0

    def note(self, tiles: int, seconds: float, peak_rss_bytes: int, *, waited: float = 0.0) -> None:
        """Record a finished task, which waited `waited` seconds in addition to the `seconds` that it took."""
        self.delay += (max(0.0, waited) - self.delay) / 3
        self.pace.note(tiles, seconds)
        self.tiles, self.seconds = self.tiles + tiles, self.seconds + seconds
        self.peak_rss_bytes = max(self.peak_rss_bytes, peak_rss_bytes)
        self.failures = 0


class Members:
    """The workers known to a render. `patience` is the time in seconds to wait for a first or another worker; None
    waits forever. If the scheduler does not answer, the wait is longer. `running` returns the worker processes that are
    alive, if no others can join. At most `most` of those that are neither left out nor taken are greeted; a worker that
    does not answer within `at_most` seconds counts as taken. `among` are the addresses of those that may be greeted,
    which the user has been told of; None for all."""

    def __init__(
        self, engine: Engine, probe: Asked, note: Callable[[str], None], patience: float | None,
        running: Callable[[], list[Popen[bytes]]] | None = None, most: int | None = None, at_most: float | None = None,
        among: Container[str] | None = None,
    ) -> None:  # fmt: skip
        self.engine, self._most, self._at_most, self._among = engine, most, at_most, among
        self.probe, self._note, self._patience, self._running = probe, note, patience, running
        self._requests = probe.requests
        self._members: dict[str, Member] = {}
        self._gone: list[Member] = []
        self._greetings: dict[int, Member] = {}  # by ticket: workers that were sent a greeting
        self._turns: deque[Member] = deque()  # workers whose turn for a large request has not come
        self._reaching: dict[int, Member] = {}  # by ticket: workers that the scheduler is connecting to
        self._taken: set[str] = set()  # addresses of taken workers that were already reported
        self._again: dict[str, float] = {}  # by address: the time at which a taken worker is asked again
        self.digest: str | None = None  # of the bits that count
        self._greeted: set[str] = set()  # addresses of workers that may have the job open
        self._has_unasked = False  # whether workers have come that were not needed
        self._is_lost = False  # the scheduler does not answer
        self._looked = self._first_greeting = 0.0
        self._deserted_since = self._news = time.monotonic()

    def begin(self) -> None:
        """From now on there is work for them, and patience is measured."""
        self._deserted_since = self._news = time.monotonic()

    def uses(self) -> list[WorkerUse]:
        """Return the work of each worker that predicted something, including workers that have gone."""
        return [
            WorkerUse(m.name, m.tiles, m.seconds, m.peak_rss_bytes, m.greeting.max_ram_bytes)
            for m in (*self._gone, *self._members.values())
            if m.tiles and m.greeting is not None
        ]

    @property
    def are_present(self) -> bool:
        """Whether any worker was at the scheduler at the last look, also one that is being greeted or was left out."""
        return bool(self._members)

    def states(self, is_late: Callable[[Member], bool]) -> tuple[WorkerState, ...]:
        """Return what there is to show of the ready workers."""
        return tuple(
            WorkerState(
                name=m.name, tiles=m.tiles, seconds_per_tile=m.seconds / m.tiles if m.tiles else m.pace.seconds(1),
                peak_rss_bytes=m.peak_rss_bytes, max_ram_bytes=m.greeting.max_ram_bytes, is_late=is_late(m),
            )
            for m in self.ready()
            if m.greeting is not None
        )  # fmt: skip

    @property
    def has_looked(self) -> bool:
        """Whether it is known who is there. Other threads may ask for it."""
        return self._looked > 0

    @property
    def count(self) -> int:
        """The number of workers that have come and were not left out. Other threads may ask for it."""
        return sum(not m.is_out for m in list(self._members.values()))

    def answered(self) -> set[str]:
        """Return the addresses of the workers that have answered all first requests. Other threads may call this."""
        return {m.address for m in list(self._members.values()) if m.greeting is not None and not m.is_out}

    def awaited(self) -> set[str]:
        """Return the addresses of the workers that have not answered all first requests yet, unless other renders have
        them. Other threads may call this."""
        found = [m for m in list(self._members.values()) if m.greeting is None and not m.is_out]
        return {m.address for m in found if m.address not in self._again}

    def ready(self) -> list[Member]:
        """Return the workers that may receive tasks."""
        if self.digest is None:
            return []
        return [m for m in self._members.values() if m.greeting is not None and not m.is_out]

    def free(self) -> list[Member]:
        """Return the ready workers that have no task, fastest first."""
        return sorted((m for m in self.ready() if m.ticket is None), key=lambda m: m.pace.seconds(1))

    def greeted(self) -> list[str]:
        """Return the addresses of the present workers that may have the job open, or may open it yet."""
        return [address for address in self._members if address in self._greeted]

    @property
    def is_deserted(self) -> bool:
        """Whether there has been no ready worker for so long that the render stops waiting for one."""
        if self.ready():
            self._deserted_since = time.monotonic()
            return False
        if self._running is not None and len(self._running()) <= sum(m.is_out for m in self._members.values()):
            return True
        now = time.monotonic()
        if self._patience is None or (self.is_greeting and now - self._news < _SILENT):
            return False
        patience = max(_LOST, self._patience) if self._is_lost else self._patience
        return now - self._deserted_since >= patience

    def end_running(self) -> bool:
        """End the worker processes that this render has started, and return whether it has."""
        for process in self._running() if self._running is not None else ():
            process.kill()
        return self._running is not None

    @property
    def waits_forever(self) -> bool:
        """Whether the render waits for workers however long they take, since others may come."""
        return self._patience is None and self._running is None

    @property
    def are_taken(self) -> bool:
        """Whether every worker that has come works for another render, or was left out."""
        return bool(self._members) and not (
            self.is_greeting or self.ready() or (self._has_unasked and not self._are_enough)
        )

    @property
    def is_greeting(self) -> bool:
        """Whether some workers have not answered yet."""
        return bool(self._greetings or self._reaching or self._turns)

    def look(self) -> list[Member]:
        """Greet new workers, and return those that have gone. Asks the scheduler once a second."""
        now = time.monotonic()
        self._decide(now)
        self._next_turn()
        if now - self._looked < _LOOK_EVERY:
            return []
        present = self.engine.members()
        if present is None and not self._is_lost:
            self._note("the scheduler does not answer: waiting for it")
        if self._is_lost and present is not None:  # workers reconnect after the scheduler does
            self._deserted_since = now
        self._is_lost, present = present is None, present or {}
        if self._among is not None:
            present = {address: name for address, name in present.items() if address in self._among}
        gone = [m for address, m in self._members.items() if address not in present]
        for member in gone:
            del self._members[member.address]
            self._gone.append(member)
            self._again.pop(member.address, None)
            for asked in (self._greetings, self._reaching):
                for ticket in [t for t, m in asked.items() if m is member]:
                    del asked[ticket]
                    self.engine.drop(ticket)
            if member in self._turns:
                self._turns.remove(member)
            if not member.is_out:
                self._note(f"worker {member.name} is gone")
        for address, name in present.items():
            if address not in self._members and not self._are_enough:
                member = self._members[address] = Member(address, name)
                self._reaching[self.engine.reach(address)] = member
                self._news = now
        self._looked = now
        self._has_unasked = any(address not in self._members for address in present)
        for address in [address for address, when in self._again.items() if when <= now]:
            if not self._are_enough:
                del self._again[address]
                self._greet(self._members[address])
        self._put_off(now)
        return gone

    def _put_off(self, now: float) -> None:
        """Take the workers whose answers are overdue for taken: a long task of another render comes first there."""
        if self._at_most is not None:
            for ticket, member in list(self._greetings.items()):
                if now - member.asked > self._at_most:
                    self._withdraw(ticket)

    def end(self) -> None:
        """Give up what has not been answered, for others that take the place of this value."""
        for ticket in (*self._greetings, *self._reaching):
            self.engine.drop(ticket)

    def _withdraw(self, ticket: int) -> None:
        """Give up a greeting; its worker is asked again."""
        member = self._greetings.pop(ticket)
        self.engine.drop(ticket)
        self._again[member.address] = time.monotonic() + _AGAIN

    @property
    def _are_enough(self) -> bool:
        asked = sum(not m.is_out and address not in self._again for address, m in self._members.items())
        return self._most is not None and asked >= self._most

    def _greet(self, member: Member, request: int = 0) -> None:
        """Send a worker one of the first requests, when its turn comes."""
        member.request = request
        if self._requests[request].is_large:
            self._turns.append(member)
        else:
            self._send(member)

    def _next_turn(self) -> None:
        """Send a large request if no other is under way, or only one that takes very long. If several do, the oldest is
        withdrawn, so that workers that never answer keep none from its turn."""
        since = time.monotonic() - _LONG
        sending = {t: m.asked for t, m in self._greetings.items() if self._requests[m.request].is_large}
        if not self._turns or any(asked > since for asked in sending.values()):
            return
        if len(sending) == _SENDING:
            self._withdraw(min(sending, key=lambda ticket: sending[ticket]))
        self._send(self._turns.popleft())

    def _send(self, member: Member) -> None:
        request = self._requests[member.request]
        self._greetings[self.engine.submit(member.address, request.task, *request.arguments)] = member
        self._greeted.add(member.address)
        member.asked = time.monotonic()

    def ask_again(self, member: Member) -> None:
        """Schedule another greeting for a worker that has closed the job because another render has taken it."""
        member.greeting = None
        self._again[member.address] = time.monotonic() + _AGAIN

    def take(self, ticket: int, value: Any, error: BaseException | None) -> bool:
        """Process an answer if it belongs to a greeting or a connection check, and return whether it does."""
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
        self._news = time.monotonic()
        if error is not None:
            greeting = Greeting(refusal=f"{type(error).__name__}: {error}".partition("\n")[0])
        else:
            greeting = Greeting.from_json(value)
        if greeting.is_taken:
            if member.address not in self._taken:
                self._taken.add(member.address)
                if self._among is None:
                    self._note(f"worker {member.name} works for another render: it is asked again")
            self._again[member.address] = time.monotonic() + _AGAIN
            return True
        if greeting.refusal:
            self.leave_out(member, greeting.refusal)
            return True
        if (following := member.request + 1) < len(self._requests):
            self._greet(member, following)
            return True
        member.greeting, member.peak_rss_bytes = greeting, greeting.peak_rss_bytes
        batch = max(1, greeting.batch // self.probe.samples)
        member.pace = Pace.from_probe(greeting.seconds, batch, most=self.probe.most)
        self._first_greeting = self._first_greeting or time.monotonic()
        if self.digest is not None:
            self._admit(member)
        return True

    def leave_out(self, member: Member, why: str) -> None:
        """Give a worker no more tasks, and say why."""
        member.is_out = True
        self._note(f"worker {member.name} is left out: {why}")

    def _decide(self, now: float) -> None:
        """Decide whose bits count: those of the workers that are fastest together, once all have answered or enough
        time has passed."""
        answered = [m for m in self._members.values() if m.greeting is not None and not m.is_out]
        if (
            self.digest is not None
            or not answered
            or ((self._greetings or self._turns) and now - self._first_greeting < _SETTLE)
        ):
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
        if member.tiles or self._among is not None:  # it comes back from another render, or is known
            return
        ceiling = format_mb(member.greeting.max_ram_bytes)
        self._note(f"worker {member.name} has joined: {member.pace.seconds(1):.1f} s a tile, ceiling {ceiling}")
