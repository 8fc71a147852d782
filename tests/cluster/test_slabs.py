"""Slabs of a picture at workers that fail, go, or are busy: a scheduler's stand-in, and pixels that are known."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.cluster.conftest import Answering
from tiler.cluster import members, run, slabs, tasks
from tiler.cluster.decoder import SlabCoder
from tiler.cluster.engine import Arrived
from tiler.cluster.members import Members
from tiler.cluster.shared import Greeting, SlabAnswer
from tiler.cluster.slabs import SlabProbe, Team, slab_seconds
from tiler.decoding.directions import DECODER, ENCODER
from tiler.decoding.lockstep import Lost, SlabWork, orders_for
from tiler.decoding.messages import Begin, Edge, Fetch, Orders, Packed, Piece, Report
from tiler.decoding.statistics import Pooled
from tiler.request import Decode

PASSES, ROWS, PIECE = 3, 10, 4  # reports, rows of a slab, rows in an answer
Asked = Begin | Orders | Fetch
Behaviour = Callable[[int, Asked], SlabAnswer | BaseException | None]


class Good:
    """A worker that answers, unless `instead` does: it gets the number of the task, from 0."""

    def __init__(self, instead: Behaviour = lambda number, asked: None) -> None:
        self.instead, self.asked, self.slab, self.row = instead, list[Asked](), 0, 0
        self.passes = 0

    def __call__(self, asked: Asked) -> SlabAnswer | BaseException | None:
        self.asked.append(asked)
        if (said := self.instead(len(self.asked) - 1, asked)) is not None:
            return said
        if isinstance(asked, Begin):
            self.slab, self.row, self.passes = asked.number, 0, 0
        told: Report | Piece = Report(is_ready=True)
        if isinstance(asked, Fetch) and not asked.ahead:
            rows = np.arange(self.row, min(self.row + PIECE, ROWS), dtype=np.float32) + ROWS * self.slab
            self.row += len(rows)
            told = Piece((len(rows),), np.broadcast_to(rows[None, :, None], (3, len(rows), 2)), self.row == ROWS)
        elif not isinstance(asked, Fetch):
            self.passes += 1
            told = Report(is_ready=self.passes == PASSES)
        return SlabAnswer(told, 1.0, 10)


class Gone(Exception):
    """No answer, ever."""


class Scheduler(Answering):
    """In place of an Engine: each worker answers at once."""

    def __init__(self, **workers: Good) -> None:
        super().__init__()
        self.workers, self.taken, self.digests = workers, set[str](), dict[str, str]()
        self.numbers = dict[str, list[int]]()  # of the messages to each worker
        self.seconds = dict[str, float]()  # of the probe, if not 1

    def members(self) -> dict[str, str]:
        return {name: name for name in self.workers}

    def submit(self, address: str, task: object, *arguments: Any) -> int:
        self._tickets += 1
        if task is tasks.open_slabs:
            said = Greeting(is_taken=address in self.taken, refusal="no room" if address == "small" else "")
            self.say(said.to_json())
        elif task is tasks.hello_slabs:
            said = Greeting(digest=self.digests.get(address, "same"), seconds=self.seconds.get(address, 1.0))
            self.say(said.to_json())
        else:
            assert task is tasks.run_slab
            self.numbers.setdefault(address, []).append(arguments[1])
            answer = self.workers[address](arguments[2])
            if not isinstance(answer, Gone):
                error = answer if isinstance(answer, BaseException) else None
                self.say(None if error else answer, error)
        return self._tickets

    def drop(self, ticket: int) -> None:
        self._arrived = [one for one in self._arrived if one.ticket != ticket]

    def answers(self, seconds: float) -> list[Arrived]:
        now, self._arrived = self._arrived, []
        return now


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "_LOOK_EVERY", 0.0)


def team_of(
    scheduler: Scheduler, notes: list[str], speeds: dict[str, float] | None = None, seconds: float = 1.0
) -> Team:
    """A team for a process that takes so many `seconds` for what its workers do in one."""
    work = SlabWork(DECODER, (100, 8), torch.zeros(1, 4, 2, 2), torch.zeros(3, 16, 16), seconds, 20.0)
    who = Members(scheduler, SlabProbe(b"", "job", Decode.EXACT, work), notes.append, 0.0)
    who.digest = "same"
    return Team(who, "job", speeds or {}, work, 0.0, lambda: None, notes.append)


def rows_from(team: Team) -> list[float]:
    """The value of each row of the picture. Raises Lost."""
    found = team.gather(8)
    assert found is not None
    reports = found.begin([Begin(n, found.shares, (1, 1, 0, 0), 1, None) for n in range(len(found.shares))])
    while not all(report.is_ready for report in reports):
        reports = found.go_on([Orders()] * len(reports))
    return [float(row) for piece in found.pieces() for row in piece.rows[0, :, 0]]


def test_rows_come_in_order_while_others_compute_ahead() -> None:
    scheduler, notes = Scheduler(a=Good(), b=Good(), c=Good()), list[str]()
    team = team_of(scheduler, notes, {"a": 1.0, "b": 2.0, "c": 1.0})
    assert rows_from(team) == list(range(3 * ROWS))
    asked = {
        name: [each for each in worker.asked if isinstance(each, Fetch)] for name, worker in scheduler.workers.items()
    }
    assert all(numbers == list(range(len(numbers))) for numbers in scheduler.numbers.values())
    first = next(name for name, worker in scheduler.workers.items() if worker.slab == 0)
    assert all(fetched[0].ahead == (name != first) for name, fetched in asked.items())
    shares = {name: worker.asked[0].shares for name, worker in scheduler.workers.items()}  # type: ignore[union-attr]
    assert all(share[scheduler.workers["b"].slab] == 0.5 for share in shares.values())
    assert {use.name: use.tiles for use in team._members.uses()} == dict.fromkeys("abc", ROWS)


def test_shares_are_those_of_the_probe_if_a_worker_had_no_part_in_the_canvas() -> None:
    scheduler = Scheduler(a=Good(), b=Good())
    scheduler.seconds["b"] = 3.0
    team = team_of(scheduler, [], {"a": 1.0}, seconds=2.0)
    found = team.gather(8)
    assert found is not None and sorted(found.shares) == pytest.approx([0.25, 0.75])


BROKEN = Piece((4,), np.full((3, 4, 2), np.nan, np.float32), False)


@pytest.mark.parametrize(
    ("at", "answer", "note"),
    [
        (0, SlabAnswer(None, 1.0, 0, "No space left"), "worker bad is left out: No space left"),
        (2, SlabAnswer(None, 1.0, 0, "it is busy", is_closed=True), ""),
        (2, ValueError("connection lost"), "worker bad is left out: ValueError: connection lost"),
        (3, SlabAnswer(BROKEN, 1.0, 0), "worker bad is left out: NaN or Inf in the autoencoder"),
    ],
)
def test_what_happens_to_one_ends_all(at: int, answer: SlabAnswer | BaseException, note: str) -> None:
    bad = Good(lambda number, asked: answer if number == at else None)
    scheduler, notes = Scheduler(bad=bad, good=Good()), list[str]()
    team = team_of(scheduler, notes)
    with pytest.raises(Lost, match="worker bad"):
        rows_from(team)
    assert not note or note in notes
    if not note:
        return
    assert team.gather(8) is None and "fewer than two workers" in notes[-1]


def test_the_rest_begin_again_without_a_lost_worker() -> None:
    scheduler, notes = Scheduler(a=Good(), b=Good()), list[str]()

    def dying(number: int, asked: Asked) -> BaseException | None:
        if number != 1:
            return None
        del scheduler.workers["dying"]
        return Gone()

    scheduler.workers["dying"] = Good(dying)
    team = team_of(scheduler, notes)
    with pytest.raises(Lost, match="worker dying had a part of the picture"):
        rows_from(team)
    assert "worker dying is gone" in notes
    assert rows_from(team) == list(range(2 * ROWS))


def test_a_worker_that_joins_late_gets_a_slab_if_it_is_ready_in_time() -> None:
    """While others wait for more to come; who comes after they have begun gets none."""
    scheduler = Scheduler(a=Good(), b=Good())
    team = team_of(scheduler, [])
    team._grace = 1e9
    looks = 0

    def come() -> None:
        nonlocal looks
        looks += 1
        if looks == 10:
            scheduler.workers["late"] = Good()
            team._grace = 0.0

    team._check = come
    scheduler.workers["a"].instead = lambda number, asked: scheduler.workers.setdefault("later", Good()) and None
    assert rows_from(team) == list(range(3 * ROWS))
    assert scheduler.workers["late"].asked and not scheduler.workers["later"].asked


def test_a_worker_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "_LATE", 0.0)
    monkeypatch.setattr(slabs, "_LATE_SECONDS", 0.0)
    scheduler, notes = (
        Scheduler(a=Good(), late=Good(lambda number, asked: Gone() if number == 1 else None)),
        list[str](),
    )
    with pytest.raises(Lost, match="worker late"):
        rows_from(team_of(scheduler, notes))
    assert any(note.startswith("worker late is left out: it does not answer") for note in notes)


@pytest.mark.parametrize("hanging", [0, 2])  # at which of their tasks
def test_workers_that_all_hang_are_not_waited_for(hanging: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though their heartbeats go on; and not for much longer than the picture should take."""
    now = 0.0

    def look(arrived: list[Arrived]) -> list[Arrived]:
        nonlocal now
        now += 0.5
        assert now < 1000, "it waits for ever"
        return arrived

    def hang(number: int, asked: Asked) -> BaseException | None:
        return Gone() if number == hanging else None

    scheduler, notes = Scheduler(a=Good(hang), b=Good(hang)), list[str]()
    answers = scheduler.answers
    team = team_of(scheduler, notes)
    monkeypatch.setattr(scheduler, "answers", lambda seconds: look(answers(seconds)))
    monkeypatch.setattr(slabs, "time", SimpleNamespace(monotonic=lambda: now))
    with pytest.raises(Lost, match="workers a, b had a part of the picture"):
        rows_from(team)
    # Each has half of 20 probes of a second.
    assert slabs._LATE * 10 + slabs._LATE_SECONDS <= now < slabs._LATE * 10 + slabs._LATE_SECONDS + 10
    assert team.gather(8) is None, "they are not asked again"


def test_a_pause_of_this_process_is_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers on the same laptop have slept as well."""
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 3600
        return now

    scheduler, late = Scheduler(a=Good(), b=Good()), list[list[Arrived]]()
    answers = scheduler.answers
    team = team_of(scheduler, [])
    monkeypatch.setattr(slabs, "_GATHERING", 1e9)
    monkeypatch.setattr(slabs, "time", SimpleNamespace(monotonic=clock))

    def answering(seconds: float) -> list[Arrived]:  # a few looks later
        late.append(answers(seconds))
        return late.pop(0) if len(late) > 3 else []

    monkeypatch.setattr(scheduler, "answers", answering)
    assert rows_from(team) == list(range(2 * ROWS))


def test_a_process_that_was_stopped_takes_the_answers_that_have_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "_LATE_SECONDS", -1e9)  # late by any clock
    assert rows_from(team_of(Scheduler(a=Good(), b=Good()), [])) == list(range(2 * ROWS))


def test_a_message_that_comes_twice_ends_the_slab() -> None:
    """Rows would be missing, or a norm would get the statistics of another one."""

    class Run:
        closed = False

        def piece(self, nbytes: int) -> Piece:
            return BROKEN

        def close(self) -> None:
            Run.closed = True

    coder = SlabCoder.__new__(SlabCoder)
    coder._run, coder._next = Run(), 4  # type: ignore[assignment]
    assert coder.run(4, Fetch()) is BROKEN and coder.run(5, Fetch()) is BROKEN
    assert coder.run(5, Fetch()) is None and coder.run(6, Fetch()) is None and Run.closed


def test_one_worker_is_too_few() -> None:
    scheduler, notes = Scheduler(a=Good(), small=Good(), other=Good(), busy=Good()), list[str]()
    scheduler.taken.add("busy")
    scheduler.digests["other"] = "another"
    assert team_of(scheduler, notes).gather(8) is None and not scheduler.workers["a"].asked
    assert "worker small is left out: no room" in notes and "fewer than two workers" in notes[-1]
    assert any(note.startswith("worker other is left out: its processor computes other bits") for note in notes)


def test_slow_workers_do_not_decode() -> None:
    scheduler, notes = Scheduler(a=Good(), b=Good()), list[str]()
    assert team_of(scheduler, notes, seconds=0.4).gather(8) is None
    assert "together no faster than this process" in notes[-1]
    assert team_of(scheduler, notes, seconds=0.6).gather(8) is not None


@pytest.mark.parametrize(
    ("seconds", "workers", "waited"), [(1.0, 2, 9.0), (1.0, 4, 54.0), (0.02, 2, 0.0), (1.0, 1, 0.0)]
)
def test_nobody_waits_for_encoders_longer_than_they_would_save(
    monkeypatch: pytest.MonkeyPatch, seconds: float, workers: int, waited: float
) -> None:
    """They are still being greeted for the canvas."""
    clock, notes = [0.0], list[str]()

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=sleep))
    canvas: Any = SimpleNamespace(
        has_looked=True, count=workers, answered=lambda: {"a"}, awaited=lambda: {"b"} if workers > 1 else set()
    )
    render: Any = SimpleNamespace(budget=SimpleNamespace(check=lambda phase: None), note=notes.append)
    work = SlabWork(ENCODER, (256, 256), torch.zeros(1), torch.zeros(1), seconds, 100.0)
    with run._open_encoders(render, "", canvas, "job", work) as team:
        assert team is None and clock[0] == pytest.approx(waited, abs=0.2)
    assert notes == ["fewer than two workers are ready soon: this process encodes alone"]


def test_a_plan_has_slabs_only_where_they_are_faster() -> None:
    assert slab_seconds(20.0, 8, [1.0, 0.5, 0.5]) == pytest.approx(3 + 0.6 * 20)
    assert slab_seconds(20.0, 2, [1.0, 2.0, 0.5]) == pytest.approx(3 + 0.4 * 20)
    assert slab_seconds(20.0, 8, [9.0]) == slab_seconds(20.0, 1, [9.0, 9.0]) == slab_seconds(20.0, 8, [0.2, 0.2]) == 20


def test_orders_pool_the_strips_in_their_order_and_send_rows_where_they_are_needed() -> None:
    moments = torch.rand(3, 2, 4, dtype=torch.float64)
    edges = [
        Edge(0, (1,), Packed(5, (1.0,), np.zeros((1, 3), np.uint8))),
        Edge(1, (0, 2), Packed(7, (1.0,), np.ones((1, 3), np.uint8))),
    ]
    reports = [
        Report((10, 30), moments[:2].numpy(), (edges[0],)), Report((), np.empty((0, 2, 4))),
        Report((5,), moments[2:].numpy(), (edges[1],), has_more=True),
    ]  # fmt: skip
    orders, pooled = orders_for(reports), Pooled(4)
    for count, (mean, squares) in zip((10, 30, 5), moments, strict=True):
        pooled.fold(count, mean, squares)
    assert all(np.array_equal(order.mean, pooled.mean) and np.array_equal(order.var, pooled.var) for order in orders)
    assert [order.edges for order in orders] == [(edges[1],), (edges[0],), (edges[1],)]
    assert all(order.has_more for order in orders)
