"""Bands of a picture at workers that fail, go or are busy: a scheduler's stand-in, and pixels that are known."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.cluster.conftest import Answering
from tiler.cluster import bands, members, tasks
from tiler.cluster.bands import BandProbe, Bands
from tiler.cluster.engine import Arrived
from tiler.cluster.members import Members
from tiler.cluster.shared import Answer, BandPlace, Greeting
from tiler.decoding import apart
from tiler.decoding.apart import Band, Work

HEIGHT, ROWS, PIECE = 10, 80, 30  # latents, pixels, and pixels in an answer
Behaviour = Callable[[int, int], Answer | None]


def pixels(number: int, first: int, last: int) -> np.ndarray:
    rows = np.arange(first, last, dtype=np.float32) + 1000 * number
    return np.broadcast_to(rows[None, :, None], (3, last - first, 4)).copy()


def good(number: int, row: int) -> Answer:
    return Answer(pixels(number, row, min(row + PIECE, ROWS)), 1.0, 10)


class Scheduler(Answering):
    """In place of an Engine: each worker answers at once as its behaviour says."""

    def __init__(self, **workers: Behaviour) -> None:
        super().__init__()
        self.workers, self.taken, self.digests = workers, set[str](), dict[str, str]()
        self.sent: list[tuple[str, int, int, bool]] = []
        self.sending = self.most_sending = 0  # bands that are on their way
        self.greeting = self.most_greeting = 0  # statistics that are on their way
        self.greeted: list[str] = []
        self.silent = set[str]()  # a long task of another render is before the greeting

    def members(self) -> dict[str, str]:
        return {name: name for name in self.workers}

    def submit(self, address: str, task: object, *arguments: Any) -> int:
        self._tickets += 1
        if task is tasks.open_decoder:
            assert not [one for one in arguments if isinstance(one, np.ndarray)], "sent to all at once"
            if address not in self.silent:
                said = Greeting(is_taken=address in self.taken)
                self.say(said.to_json())
        elif task is tasks.hello_decoder:
            self.greeting += 1
            self.most_greeting = max(self.most_greeting, self.greeting)
            said = Greeting(digest=self.digests.get(address, "same"), seconds=1.0)
            self.say(said.to_json())
        else:
            assert task is tasks.decode
            _, place, row, columns = arguments
            assert isinstance(place, BandPlace)
            self.sent.append((address, place.number, row, columns is not None))
            self.sending += columns is not None
            self.most_sending = max(self.most_sending, self.sending)
            answer = self.workers[address](place.number, row)
            if answer is not None:
                self.say(answer)
        return self._tickets

    def drop(self, ticket: int) -> None:
        pass

    def answers(self, seconds: float) -> list[Arrived]:
        self.greeting = 0
        now = [one for one in self._arrived if isinstance(one.value, str)]  # greetings
        if not now:
            now, self.sending = self._arrived, 0
        self._arrived = [one for one in self._arrived if one not in now]
        return now


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "_LOOK_EVERY", 0.0)
    monkeypatch.setattr(members, "_SETTLE", 0.0)


def gather(
    scheduler: Scheduler, notes: list[str], starts: dict[int, int], **options: Any
) -> dict[int, list[np.ndarray]]:
    """What comes of the bands, which begin at these rows."""
    cuts = [Band(n, n + 4, slice(1, 3)) for n in range(3)]
    work = Work(b"", torch.zeros(1, 4, HEIGHT, 8), cuts, torch.zeros(1, 4, 2, 2), torch.zeros(3, 16, 16))
    who = Members(scheduler, BandProbe(b"", "job", work), notes.append, 0.0, **options)
    who.digest = "same"
    found = Bands(who, "job", work, lambda: None)
    for number, row in starts.items():
        found.begin(number, row)
    rows: dict[int, list[np.ndarray]] = {}
    while (arrived := found.next()) is not None:
        rows.setdefault(arrived[0], []).append(arrived[1].numpy())
    scheduler.greeted = who.greeted()
    return rows


def is_whole(rows: dict[int, list[np.ndarray]], number: int, begin: int = 0) -> bool:
    return np.array_equal(np.concatenate(rows[number], axis=1), pixels(number, begin, ROWS))


def test_each_band_comes_in_order_and_its_latents_are_sent_once() -> None:
    scheduler = Scheduler(a=good, b=good)
    rows = gather(scheduler, [], {0: 0, 1: 25, 2: 80 - PIECE})
    assert is_whole(rows, 0) and is_whole(rows, 1, 25) and is_whole(rows, 2, 50)
    assert {address for address, *_ in scheduler.sent} == {"a", "b"}
    assert [row for _, number, row, _ in scheduler.sent if number == 0] == [0, 30, 60]
    assert [with_latents for _, number, _, with_latents in scheduler.sent if number == 0] == [True, False, False]


@pytest.mark.parametrize(("room", "most"), [(1, 1), (4 * 4 * HEIGHT * 4 * 2, 2), (10**6, 3)])
def test_few_bands_are_sent_at_a_time(room: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as the memory holds that is planned for them."""
    monkeypatch.setattr(apart, "SENDING_BYTES", room)
    scheduler = Scheduler(a=good, b=good, c=good)
    rows = gather(scheduler, [], {0: 0, 1: 0, 2: 0})
    assert all(is_whole(rows, number) for number in range(3)) and scheduler.most_sending == most


def test_the_statistics_are_sent_to_one_worker_at_a_time() -> None:
    """They take up to 17 MB, and the plan counts them once."""
    scheduler = Scheduler(**{f"w{n}": good for n in range(5)})
    rows = gather(scheduler, [], {0: 0, 1: 0, 2: 0})
    assert all(is_whole(rows, number) for number in range(3))
    assert len({address for address, *_ in scheduler.sent}) > 1 and scheduler.most_greeting == 1


def test_what_a_lost_worker_has_not_sent_goes_elsewhere_with_its_latents() -> None:
    scheduler = Scheduler(a=good)

    def dying(number: int, row: int) -> Answer | None:
        if row < PIECE:
            return good(number, row)
        del scheduler.workers["b"]
        return None

    scheduler.workers["b"] = dying
    notes: list[str] = []
    rows = gather(scheduler, notes, {0: 0, 1: 0})
    assert is_whole(rows, 0) and is_whole(rows, 1) and "worker b is gone" in notes
    (lost,) = {number for address, number, _, _ in scheduler.sent if address == "b"}
    assert ("a", lost, PIECE, True) in scheduler.sent


def test_a_worker_that_fails_or_says_nan_is_left_out() -> None:
    broken = pixels(0, 0, PIECE)
    broken[0, 0, 0] = np.nan
    scheduler = Scheduler(
        a=good, full=lambda number, row: Answer(None, 1.0, 0, "the ceiling of 700 MB was reached"),
        nan=lambda number, row: Answer(broken, 1.0, 0),
    )  # fmt: skip
    notes: list[str] = []
    rows = gather(scheduler, notes, {0: 0, 1: 0, 2: 0})
    assert all(is_whole(rows, number) for number in range(3))
    assert "worker full is left out: the ceiling of 700 MB was reached" in notes
    assert "worker nan is left out: NaN or Inf in the decoder" in notes


def test_nobody_is_waited_for_who_is_busy_or_computes_other_bits() -> None:
    scheduler = Scheduler(busy=good, other=good)
    scheduler.taken.add("busy")
    scheduler.digests["other"] = "another"
    notes: list[str] = []
    assert gather(scheduler, notes, {0: 0}) == {} and not scheduler.sent
    assert any(note.startswith("worker other is left out: its processor computes other bits") for note in notes)
    assert set(scheduler.greeted) == {"busy", "other"}, "who is left out is told to close too"


def test_an_idle_worker_is_asked_though_the_first_are_busy() -> None:
    scheduler = Scheduler(busy=good, engaged=good, idle=good, spare=good)
    scheduler.taken |= {"busy", "engaged"}
    assert is_whole(gather(scheduler, [], {0: 0}, most=1), 0)
    assert {address for address, *_ in scheduler.sent} == {"idle"} and "spare" not in scheduler.greeted


def test_a_long_task_before_the_greeting_is_not_waited_for() -> None:
    scheduler = Scheduler(busy=good)
    scheduler.silent.add("busy")
    assert gather(scheduler, [], {0: 0}, at_most=0.0) == {} and scheduler.greeted == ["busy"]


def test_a_worker_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bands, "_LATE", 0.0)
    monkeypatch.setattr(bands, "_LATE_SECONDS", 0.0)
    scheduler = Scheduler(a=lambda number, row: good(number, row) if row < PIECE else None)
    notes: list[str] = []
    rows = gather(scheduler, notes, {0: 0})
    assert len(rows[0]) == 1 and any("does not answer (band 1 of the picture)" in note for note in notes)


def test_a_worker_whose_first_answer_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for much longer than the band should take by the probe: 10 times its 4 latents, of a second."""
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 1.0
        assert now < 1000, "it waits for ever"
        return now

    monkeypatch.setattr(bands, "time", SimpleNamespace(monotonic=clock))
    notes: list[str] = []
    assert gather(Scheduler(a=lambda number, row: None), notes, {0: 0}) == {}
    assert now > bands._LATE * 10 + bands._LATE_SECONDS
    assert any("does not answer (band 1 of the picture)" in note for note in notes)
