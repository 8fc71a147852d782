"""How tiles are distributed if workers are slow, fail or leave, with a stand-in for the scheduler and known
predictions."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tiler.cluster import greetings, members, pool, tasks
from tiler.cluster.early import Early
from tiler.cluster.engine import Arrived
from tiler.cluster.greetings import Probe
from tiler.cluster.members import Members
from tiler.cluster.pool import Pool
from tiler.cluster.shared import Answer, Greeting, digest_of
from tiler.diffusion.runner import Tile
from tiler.diffusion.tiles import Text2ImageRegion
from tiler.errors import NumericalError

TILES = 40
Behaviour = Callable[[np.ndarray], Answer | None]


def tile(number: int) -> Tile:
    region = Text2ImageRegion(
        top=0, left=number, height=2, width=2, condition=0, guidance_scale=7.5, weights=torch.ones(2, 2), canvas=(8, 64)
    )
    return Tile(torch.full((1, 4, 2, 2), float(number)), region)


PROBE = 99  # a tile of no canvas
SAME = digest_of(2 * tile(PROBE).latents.numpy())  # of what all predict for it


def good(latents: np.ndarray) -> Answer:
    return Answer(2 * latents, 1.0, 10)


def silent(latents: np.ndarray) -> None:
    """A worker that is stopped, or on a machine whose lid is closed."""
    return


class Scheduler:
    """Replaces an Engine: each worker answers at once according to its behaviour; the last task is served first."""

    def __init__(self, **workers: Behaviour) -> None:
        self.workers, self.digests = workers, dict.fromkeys(workers, SAME)
        self.refusals: dict[str, str] = {}
        self.taken = 0  # greetings that find another render
        self.closed: set[str] = set()  # behind a firewall
        self.seconds = dict.fromkeys(workers, 1.0)  # of a probe
        self.done: dict[str, list[int]] = {name: [] for name in workers}
        self._arrived: list[Arrived] = []
        self._tickets = 0
        self.asked: list[tuple[str, object]] = []  # the first requests
        self.deaf = set[str]()  # those that never answer the large one
        self.sending, self.most_sending = set[int](), 0  # requests whose encoded prompts are on their way
        self.on_held: Callable[[int], None] = lambda ticket: None
        self.held: dict[int, str] = {}  # tickets of those that do not answer

    def members(self) -> dict[str, str]:
        return {name: name for name in self.workers}

    def submit(self, address: str, task: object, *arguments: Any) -> int:
        self._tickets += 1
        if task is not tasks.predict:
            self.asked.append((address, task))
        if task is tasks.open_ahead:
            self._arrived.append(Arrived(self._tickets, Greeting().to_json(), None))
        elif task is tasks.open_job:
            self.sending.add(self._tickets)
            self.most_sending = max(self.most_sending, len(self.sending))
            if address not in self.deaf:
                self._arrived.append(Arrived(self._tickets, Greeting().to_json(), None))
        elif task is tasks.hello:
            self.taken -= 1
            said = Greeting(
                refusal=self.refusals.get(address, ""), is_taken=self.taken >= 0, digest=self.digests[address],
                seconds=self.seconds.get(address, 1.0), batch=8,
            )  # fmt: skip
            self._arrived.append(Arrived(self._tickets, said.to_json(), None))
        else:
            latents = arguments[-1]
            answer = self.workers[address](latents)
            if answer is None:
                self.on_held(self._tickets)
                self.held[self._tickets] = address
            else:
                self.done[address] += [int(one[0, 0, 0]) for one in latents]
                self._arrived.append(Arrived(self._tickets, answer, None))
        return self._tickets

    def tell(self, address: str, task: object, *arguments: Any) -> None:
        pass

    def reach(self, address: str) -> int:
        self._tickets += 1
        error = ConnectionError() if address in self.closed else None
        self._arrived.append(Arrived(self._tickets, None, error))
        return self._tickets

    def drop(self, ticket: int) -> None:
        self.held.pop(ticket, None)
        self.sending.discard(ticket)

    def answers(self, seconds: float) -> list[Arrived]:
        found, self._arrived = self._arrived[::-1], []
        self.sending -= {arrived.ticket for arrived in found}
        return found


class Local:
    """The runner of this process."""

    def __init__(self) -> None:
        self.numbers: list[int] = []

    def predict(self, step: int, tiles: Iterable[Tile]) -> Iterator[Tensor]:
        for one in tiles:
            if one.region.left != PROBE:
                self.numbers.append(one.region.left)
            yield 2 * one.latents[0]


class Outcome:
    def __init__(self) -> None:
        self.local, self.notes = Local(), list[str]()


def run(
    scheduler: Scheduler,
    on_prediction: Callable[[int], None] = lambda number: None,
    patience: float = 0.0,
    **options: Any,
) -> Outcome:
    """Predict all tiles, and check each prediction and their order."""
    found = Outcome()
    probe = Probe("job", b"", b"", 0, tile(PROBE))

    @contextmanager
    def open_local() -> Iterator[Local]:
        yield found.local

    who = Members(scheduler, probe, found.notes.append, patience, **options)  # type: ignore[arg-type]
    with Pool(who, "job", open_local, lambda: None, found.notes.append, {"denoiser_samples": 0}) as runner:
        for number, prediction in enumerate(runner.predict(0, (tile(n) for n in range(TILES)))):
            assert torch.equal(prediction, torch.full((4, 2, 2), 2.0 * number))
            on_prediction(number)
        assert number == TILES - 1
    return found


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip all waiting; jobs are large."""
    monkeypatch.setattr(greetings, "_LARGE", -1)
    monkeypatch.setattr(members, "_LOOK_EVERY", 0.0)
    monkeypatch.setattr(members, "_SETTLE", 0.0)
    monkeypatch.setattr(pool, "_LATE", 0.0)
    monkeypatch.setattr(pool, "_LATE_SECONDS", 0.0)


def test_predictions_come_in_the_order_of_the_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "AHEAD", 12)
    monkeypatch.setattr(pool, "_ROUNDS", 0)
    monkeypatch.setattr(pool, "_LATE_SECONDS", 1e9)
    scheduler = Scheduler(a=good, b=good)
    assert not run(scheduler).local.numbers
    assert sorted(scheduler.done["a"] + scheduler.done["b"]) == list(range(TILES))
    assert scheduler.done["a"] and scheduler.done["b"]


def test_many_workers_have_more_tiles_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "AHEAD", 2)
    out = 0

    def counted(latents: np.ndarray) -> Answer:
        nonlocal out
        out = max(out, len(latents))
        return good(latents)

    run(Scheduler(**{f"w{n}": counted for n in range(5)}))
    assert out > 2


def test_the_prompts_are_sent_to_one_worker_at_a_time() -> None:
    """They take up to 17 MB; the model is opened before, and a probe predicted after."""
    scheduler = Scheduler(**{f"w{n}": good for n in range(5)})
    assert not run(scheduler).local.numbers and scheduler.most_sending == 1
    for name in scheduler.workers:
        asked = [task for address, task in scheduler.asked if address == name]
        assert asked == [tasks.open_ahead, tasks.open_job, tasks.hello][: len(asked)]


def test_a_worker_that_does_not_take_the_prompts_keeps_none_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "_LONG", 0.05)
    scheduler = Scheduler(a=good, b=good, deaf=good)
    scheduler.deaf.add("deaf")
    assert not run(scheduler, patience=1e9).local.numbers
    assert set(scheduler.done["a"] + scheduler.done["b"]) == set(range(TILES)) and not scheduler.done["deaf"]


def test_at_most_two_copies_of_the_prompts_are_on_their_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan counts no more, however many workers do not take them."""
    monkeypatch.setattr(members, "_LONG", 0.0)
    scheduler = Scheduler(a=good, b=good, c=good, d=good)
    scheduler.deaf |= {"b", "c", "d"}
    assert not run(scheduler, patience=1e9).local.numbers
    assert scheduler.most_sending == 2


def test_workers_that_never_answer_keep_none_from_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are: the oldest request is withdrawn."""
    monkeypatch.setattr(members, "_LONG", 0.0)
    scheduler = Scheduler(a=good, b=good, c=good, d=good)
    scheduler.deaf |= {"a", "b", "c"}  # all of whom are asked before the last
    assert not run(scheduler, patience=1e9).local.numbers
    assert scheduler.most_sending == 2


def test_an_error_while_workers_open_the_model_ahead_keeps_none_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is tried again at the next look."""
    scheduler, told = Scheduler(a=good), threading.Event()
    present = scheduler.members
    errors = [RuntimeError("no answer")]

    def find() -> dict[str, str]:
        if errors:
            raise errors.pop()
        return present()

    monkeypatch.setattr(scheduler, "members", find)
    monkeypatch.setattr(scheduler, "tell", lambda *said: told.set())
    monkeypatch.setattr("tiler.cluster.early._LOOK_EVERY", 0.01)
    early = Early(scheduler, b"")  # type: ignore[arg-type]
    assert told.wait(30)
    early.end()
    assert early.told == {"a"} and early.error is None and str(early.failure) == "no answer"


@pytest.mark.parametrize(("shape", "most"), [((4, 64, 64), 32), ((16, 64, 64), 8), ((16, 256, 256), 1)])
def test_a_task_holds_two_megabytes_of_tiles(shape: tuple[int, ...], most: int) -> None:
    """For a worker that is very fast; a single tile may be larger."""
    one = Probe("job", b"", b"", 0, tile(PROBE)._replace(latents=torch.empty(1, *shape)))
    assert one.most == most
    scheduler = Scheduler(a=good)
    who = Members(scheduler, one, lambda text: None, 0.0)  # type: ignore[arg-type]
    while not who.ready():
        who.look()
        for arrived in scheduler.answers(0.0):
            who.take(*arrived)
    (member,) = who.ready()
    for _ in range(9):
        member.note(member.pace.batch, 0.1, 0)
    assert member.pace.batch == max(4, most), "4 fill one of its passes"


def test_what_a_stopped_worker_has_is_copied() -> None:
    scheduler = Scheduler(a=good, b=silent)
    assert not run(scheduler).local.numbers
    assert set(scheduler.done["a"]) == set(range(TILES)) and scheduler.held


@pytest.mark.parametrize("others", [{}, {"quick": good}])
def test_nobody_waits_for_a_stopped_worker_because_it_was_fast(
    others: dict[str, Behaviour], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    def look(tickets: list[Arrived]) -> list[Arrived]:
        nonlocal now
        now += 5.0
        assert now < 10_000, "it waits for ever"
        return tickets

    scheduler = Scheduler(fast=silent, slow=lambda latents: Answer(2 * latents, 100.0 * len(latents), 10), **others)
    scheduler.seconds["slow"] = 100.0
    answers = scheduler.answers
    monkeypatch.setattr(scheduler, "answers", lambda seconds: look(answers(seconds)))
    monkeypatch.setattr(pool, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(pool, "_LATE", 1.5)
    monkeypatch.setattr(pool, "_LATE_SECONDS", 30.0)
    assert not run(scheduler).local.numbers
    assert not scheduler.done["fast"] and scheduler.held
    assert {n for done in scheduler.done.values() for n in done} == set(range(TILES))


@pytest.mark.parametrize("local", [False, True])
def test_if_all_workers_hang_this_process_predicts(local: bool) -> None:
    """Though their heartbeats go on; those that this render has started are ended, since they have its memory."""
    scheduler, ended = Scheduler(a=silent, b=silent), list[str]()

    class Process:
        def kill(self) -> None:
            ended.extend(scheduler.workers)
            scheduler.workers.clear()

    processes = [Process()]
    found = run(scheduler, running=lambda: processes if scheduler.workers else []) if local else run(scheduler)
    assert found.local.numbers == list(range(TILES)) and len(ended) == 2 * local
    said = "no worker is left: this process predicts alone" if local else "no worker answers: this process predicts"
    assert any(note.startswith(said) for note in found.notes)


def test_a_hanging_worker_may_come_back() -> None:
    scheduler = Scheduler(a=silent)

    def recover(number: int) -> None:
        if number == 10:
            (ticket, name) = scheduler.held.popitem()
            scheduler.workers[name] = good
            scheduler._arrived.append(Arrived(ticket, Answer(None, 1.0, 10, "it hung"), None))

    found = run(scheduler, recover)
    assert found.local.numbers[:10] == list(range(10)) and scheduler.done["a"]


def test_greetings_that_are_never_answered_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "_LONG", 0.0)
    monkeypatch.setattr(members, "_SILENT", 0.1)
    scheduler = Scheduler(a=good, b=good, c=good)
    scheduler.deaf |= {"a", "b", "c"}
    found = run(scheduler)
    assert found.local.numbers == list(range(TILES))
    assert "no worker is left: this process predicts alone" in found.notes


def test_what_a_dead_worker_had_goes_elsewhere() -> None:
    scheduler = Scheduler(a=good, b=silent)

    def kill(number: int) -> None:
        scheduler.workers.pop("b", None)

    found = run(scheduler, kill)
    assert "worker b is gone" in found.notes and not found.local.numbers


def test_without_workers_this_process_predicts_until_one_comes() -> None:
    scheduler = Scheduler()
    scheduler.digests["a"], scheduler.done["a"] = SAME, []

    def come(number: int) -> None:
        if number == 10:
            scheduler.workers["a"] = good

    found = run(scheduler, come)
    assert found.local.numbers[:10] == list(range(10)) and scheduler.done["a"]
    assert "no worker is left: this process predicts alone" in found.notes


def test_a_scheduler_that_stays_away_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "_LOST", 0.0)
    scheduler = Scheduler(a=good)
    monkeypatch.setattr(scheduler, "members", lambda: None)
    found = run(scheduler)
    assert found.local.numbers == list(range(TILES))
    assert found.notes[0] == "the scheduler does not answer: waiting for it"


def test_other_bits_and_refusals_are_left_out_with_a_reason() -> None:
    scheduler = Scheduler(a=good, b=good, c=good, d=good)
    scheduler.digests["c"], scheduler.refusals["d"] = "other", "its ceiling of 100 MB is too low"
    found = run(scheduler)
    assert not scheduler.done["c"] and not scheduler.done["d"]
    assert "worker d is left out: its ceiling of 100 MB is too low" in found.notes
    assert any(note.startswith("worker c is left out: its processor computes other bits") for note in found.notes)


def test_if_all_are_left_out_this_process_predicts() -> None:
    scheduler = Scheduler(a=good, b=good)
    scheduler.refusals |= {"a": "x is another model here", "b": "other versions"}
    found = run(scheduler)
    assert found.local.numbers == list(range(TILES)) and not scheduler.done["a"] and not scheduler.done["b"]
    assert "no worker is left: this process predicts alone" in found.notes


def test_a_worker_behind_a_firewall_is_told_its_port() -> None:
    scheduler = Scheduler(**{"tls://10.0.0.1:44": good, "b": good})
    scheduler.closed.add("tls://10.0.0.1:44")
    found = run(scheduler)
    assert not scheduler.done["tls://10.0.0.1:44"] and not found.local.numbers
    assert any("left out: the scheduler cannot connect" in note and "open port 44" in note for note in found.notes)


def test_a_worker_that_another_render_took_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "_AGAIN", 0.0)
    closed = [Answer(None, 0.0, 0, "works for another render now", is_closed=True)] * 3
    scheduler = Scheduler(a=lambda latents: closed.pop() if closed else good(latents))
    scheduler.taken = 2
    found = run(scheduler)
    assert not found.local.numbers and set(scheduler.done["a"]) == set(range(TILES))
    assert found.notes.count("worker a works for another render: it is asked again") == 1
    assert not [note for note in found.notes if "left out" in note]


def test_bits_of_this_process_are_compared_with_the_workers() -> None:
    scheduler = Scheduler(a=silent)
    scheduler.digests["a"] = "other"

    def die(number: int) -> None:
        scheduler.workers.pop("a", None)

    scheduler.on_held = die
    assert any(note.startswith("this processor computes other bits") for note in run(scheduler).notes)


def test_who_comes_after_this_process_has_begun_must_compute_its_bits() -> None:
    scheduler = Scheduler()
    scheduler.digests["a"], scheduler.done["a"] = "other", []

    def come(number: int) -> None:
        scheduler.workers["a"] = good

    found = run(scheduler, come)
    assert found.local.numbers == list(range(TILES)) and not scheduler.done["a"]
    assert any(note.startswith("worker a is left out: its processor computes other bits") for note in found.notes)


def test_a_worker_that_fails_twice_is_left_out() -> None:
    failing = Answer(None, 1.0, 10, "the ceiling of 100 MB was reached")
    scheduler = Scheduler(a=good, b=lambda latents: failing)
    found = run(scheduler)
    assert "worker b is left out: the ceiling of 100 MB was reached" in found.notes and not found.local.numbers


def test_nan_on_one_worker_is_its_own_fault_and_on_two_the_models() -> None:
    broken = Answer(None, 1.0, 10, "NaN or Inf in the noise prediction at step 1", is_numerical=True)
    assert not run(Scheduler(a=good, b=lambda latents: broken)).local.numbers
    with pytest.raises(NumericalError, match="step 1"):
        run(Scheduler(a=lambda latents: broken, b=lambda latents: broken))


def test_a_single_worker_that_says_nan_is_not_asked_again() -> None:
    broken = Answer(None, 1.0, 10, "NaN or Inf in the noise prediction at step 1", is_numerical=True)
    assert run(Scheduler(a=lambda latents: broken)).local.numbers == list(range(TILES))


def test_what_kills_workers_is_predicted_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_DEATHS", 1)
    monkeypatch.setattr(pool, "_LATE_SECONDS", 1e9)
    scheduler = Scheduler(a=good, b=silent)

    def die(number: int) -> None:
        if scheduler.held:
            scheduler.workers.pop("b", None)

    found = run(scheduler, die)
    assert found.local.numbers and set(found.local.numbers) | set(scheduler.done["a"]) == set(range(TILES))
