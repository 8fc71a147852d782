"""Faults of workers, scheduler and network, on loopback with real processes: the picture always has the bytes that one
process makes. Predictions are made up; those of a model are tested in tests/cluster/test_cluster.py."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.cluster import stub
from tests.cluster.conftest import Drawn, Fleet, draw, free_port, open_fleet
from tiler import events, phases
from tiler.cluster import engine, members, pool, run
from tiler.cluster.keys import make_keys
from tiler.decoding import lockstep
from tiler.errors import NumericalError

ROOT = str(Path(__file__).parents[2])


@pytest.fixture(autouse=True)
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the workers' made-up predictions in this process too, and wait no longer than necessary."""
    monkeypatch.setattr(run, "open_denoiser", stub.open_local)
    monkeypatch.setattr(members, "_LOOK_EVERY", 0.1)
    monkeypatch.setattr(members, "_SETTLE", 1.0)
    monkeypatch.setattr(run, "_PATIENCE", 1.0)


@pytest.fixture(scope="module")
def alone(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "open_denoiser", stub.open_local)
        return draw(tiny, tmp_path_factory.mktemp("alone"))


@pytest.fixture
def stubs(tmp_path: Path) -> Iterator[Fleet]:
    with open_fleet(tmp_path) as found:
        yield found


def at_a_third(do: Callable[[], None]) -> Callable[[events.Progress], None]:
    """Call a function once, when a third of the canvas is done."""
    done: list[int] = []

    def on_progress(event: events.Progress) -> None:
        if event.done > event.total // 3 and not done:
            done.append(event.done)
            do()

    return on_progress


def same(drawn: Drawn, alone: Drawn) -> bool:
    return bool((drawn.latents == alone.latents).all()) and drawn.picture == alone.picture


def test_a_worker_that_is_stopped_loses_its_tiles_and_works_again_when_it_goes_on(
    stubs: Fleet, tiny: Path, tmp_path: Path, alone: Drawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "_LATE_SECONDS", 0.3)
    stubs.start_stubs("a", "b", seconds="0.1")
    b = stubs.processes["b"]
    drawn = draw(tiny, tmp_path / "1", at_a_third(lambda: b.send_signal(signal.SIGSTOP)), **stubs.through)
    assert same(drawn, alone)
    b.send_signal(signal.SIGCONT)
    again = draw(tiny, tmp_path / "2", **stubs.through)
    assert same(again, alone) and set(again.workers) == {"a", "b"}


def test_when_all_workers_are_gone_this_process_goes_on_and_takes_who_comes(
    stubs: Fleet, tiny: Path, tmp_path: Path, alone: Drawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    stubs.start_stubs("a", seconds="0.05")
    local = stub.Local.predict

    def come(self: stub.Local, *tiles: object) -> object:
        if "c" not in stubs.processes:
            stubs.start_stubs("c")
        return local(self, *tiles)  # type: ignore[arg-type]

    monkeypatch.setattr(stub.Local, "predict", come)
    drawn = draw(tiny, tmp_path, at_a_third(lambda: stubs.end("a")), **stubs.through)
    assert same(drawn, alone)
    assert "no worker is left: this process predicts alone" in drawn.notes and set(drawn.workers) == {"a", "c"}


def test_workers_are_greeted_again_if_that_fails_while_the_guide_is_made(
    stubs: Fleet, tiny: Path, tmp_path: Path, alone: Drawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    take, failed = members.Members.take, threading.Event()

    def fail(self: members.Members, *answer: object) -> bool:
        if threading.current_thread() is threading.main_thread():
            return take(self, *answer)  # type: ignore[arg-type]
        failed.set()
        raise RuntimeError("out of order")

    monkeypatch.setattr(members.Members, "take", fail)
    monkeypatch.setattr(phases, "make_guide", lambda *run: None if failed.wait(30) else pytest.fail("nobody came"))
    stubs.start_stubs("a")
    drawn = draw(tiny, tmp_path, **stubs.through)
    assert same(drawn, alone) and set(drawn.workers) == {"a"}
    assert "greeting workers ahead failed (out of order): they are greeted again" in drawn.notes


def test_if_no_worker_comes_nobody_waits_for_them_again_to_decode(
    stubs: Fleet, tiny: Path, tmp_path: Path, alone: Drawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lockstep, "LEAST_ROWS", 8)  # of latents: a small picture has slabs too
    monkeypatch.setattr(run, "_PATIENCE", 0.0)
    drawn = draw(tiny, tmp_path, cluster=f"listen:127.0.0.1:{free_port()}", keys=stubs.keys)
    assert same(drawn, alone) and "no worker is left: this process predicts alone" in drawn.notes
    assert not [note for note in drawn.notes if "to decode" in note or "alone decodes" in note]


def test_workers_that_hang_while_their_heartbeats_go_on_are_not_waited_for(
    stubs: Fleet, tiny: Path, tmp_path: Path, alone: Drawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "_LATE_SECONDS", 0.1)
    stubs.begin_stubs("a", hangs_at="0,6", seconds="0.05")
    stubs.start_stubs("b", hangs_at="0,6", seconds="0.05")
    stubs.wait(lambda joined: joined == {"a", "b"})
    drawn = draw(tiny, tmp_path, **stubs.through)
    assert same(drawn, alone) and "no worker answers: this process predicts until one does" in drawn.notes


def test_workers_that_refuse_or_have_another_key_are_left_out_and_this_process_goes_on(
    stubs: Fleet, tiny: Path, tmp_path: Path, alone: Drawn
) -> None:
    ours, others = stubs.keys, tmp_path / "others"
    make_keys(others)
    stubs.keys = others
    stubs.begin_stubs("stranger")
    stubs.keys = ours
    reasons = {"model": "x is another model here", "small": "its ceiling of 100 MB is too low"}
    for name, why in reasons.items():
        stubs.begin_stubs(name, refuses=why)
    stubs.wait(lambda joined: joined == set(reasons))
    drawn = draw(tiny, tmp_path, **stubs.through)
    assert same(drawn, alone) and not drawn.workers
    assert {f"worker {name} is left out: {why}" for name, why in reasons.items()} <= set(drawn.notes)
    assert "no worker is left: this process predicts alone" in drawn.notes
    assert stubs.processes["stranger"].poll() is None and set((stubs.engine.members() or {}).values()) == set(reasons)


def test_with_cluster_only_it_waits_for_workers(
    stubs: Fleet, tiny: Path, tmp_path: Path, alone: Drawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_PATIENCE", 0.0)
    look = members.Members.look

    def come(self: members.Members) -> list[members.Member]:
        if "late" not in stubs.processes:
            stubs.begin_stubs("late")
        return look(self)

    monkeypatch.setattr(members.Members, "look", come)
    drawn = draw(tiny, tmp_path, cluster_only=True, **stubs.through)
    assert same(drawn, alone) and set(drawn.workers) == {"late"}
    scheduler = stubs.engine._scheduler
    assert not scheduler.tasks and not scheduler.task_groups, "it keeps nothing of what is done"
    assert all(isinstance(extension, engine._Nothing) for extension in scheduler.extensions.values())
    assert not [note for note in drawn.notes if "predicts alone" in note]


def dask_scheduler(keys: Path, port: int) -> subprocess.Popen[bytes]:
    """A scheduler, started as a user would."""
    pair = [f"--tls-{what}={keys / name}.pem" for what, name in (("ca-file", "cert"), ("cert", "cert"), ("key", "key"))]
    command = [
        sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "tls://127.0.0.1", "--port", str(port),
        "--no-dashboard", "--dashboard-address", "127.0.0.1:0", *pair,
    ]  # fmt: skip
    return subprocess.Popen(command, stderr=subprocess.DEVNULL)


def test_a_scheduler_that_is_killed_is_waited_for(
    stubs: Fleet, tiny: Path, tmp_path: Path, alone: Drawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_PATIENCE", 60.0)
    port = free_port()
    stubs.address = f"tls://127.0.0.1:{port}"
    schedulers = [dask_scheduler(stubs.keys, port)]

    def replace() -> None:
        schedulers[0].kill()
        schedulers[0].wait()
        schedulers.append(dask_scheduler(stubs.keys, port))

    try:
        stubs._start(("-m", "tests.cluster.stub"), "a", {"seconds": "0.05"}, None)
        drawn = draw(tiny, tmp_path, at_a_third(replace), **stubs.through)
    finally:
        for process in schedulers:
            process.kill()
            process.wait()
    assert same(drawn, alone)
    assert "the scheduler does not answer: waiting for it" in drawn.notes
    assert sum(use["tiles"] for use in drawn.report["workers"]) >= 27 and not [n for n in drawn.notes if "alone" in n]


def test_a_coordinator_that_is_killed_finds_its_workers_again_and_they_are_small_between(
    stubs: Fleet, tiny: Path, tmp_path: Path, alone: Drawn
) -> None:
    port = free_port()
    stubs.address = f"tls://127.0.0.1:{port}"
    words = [
        "render", "a boat", "--model", tiny, "--size", 160, "--steps", 3, "--seed", 11, "--no-guide", "-f", "-o",
        tmp_path / "x.png", "--save-latents", tmp_path / "x.safetensors", "--no-metadata", "--cluster",
        f"listen:127.0.0.1:{port}", "--keys", stubs.keys, "--log-json", "--max-ram", "2GB",
    ]  # fmt: skip
    stubs._start(("-m", "tests.cluster.stub"), "a", {"seconds": "0.3"}, None)
    command = [sys.executable, "-m", "tiler", *map(str, words)]
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": ROOT}, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while '"progress"' not in (line := process.stderr.readline()):
            assert line, "the render has ended"
        worker = psutil.Process(stubs.processes["a"].pid)
        assert worker.memory_info().rss > stub.BALLAST
        process.kill()
    with socket.create_server(("127.0.0.1", port)) as nobody:
        nobody.settimeout(60)
        nobody.accept()[0].close()  # it has begun anew
        assert worker.memory_info().rss < 70_000_000
    drawn = draw(tiny, tmp_path, cluster=f"listen:127.0.0.1:{port}", keys=stubs.keys, cluster_only=True)
    assert same(drawn, alone) and set(drawn.workers) == {"a"}


def test_a_tile_that_ends_every_worker_is_predicted_here(
    stubs: Fleet, tiny: Path, tmp_path: Path, alone: Drawn
) -> None:
    stubs.start_stubs("a", "b", "c", dies_at="0,6", seconds="0.05")
    drawn = draw(tiny, tmp_path, **stubs.through)
    assert same(drawn, alone)
    ended = [name for name, process in stubs.processes.items() if process.poll() is not None]
    assert len(ended) >= 2 and sum("is gone" in note for note in drawn.notes) >= 2


def test_nan_on_one_worker_and_on_two_and_a_ceiling(stubs: Fleet, tiny: Path, tmp_path: Path, alone: Drawn) -> None:
    here = {"TMPDIR": str(tmp_path)}
    stubs.begin_stubs("a", seconds="0.05", environment=here)
    stubs.begin_stubs("full", says="the ceiling of 700 MB was reached at cluster", seconds="0.05", environment=here)
    stubs.start_stubs("broken", says="NaN or Inf in the noise prediction", seconds="0.05", environment=here)
    stubs.wait(lambda joined: joined == {"a", "full", "broken"})
    drawn = draw(tiny, tmp_path / "1", **stubs.through)
    assert same(drawn, alone) and set(drawn.workers) == {"a"}
    assert "worker full is left out: the ceiling of 700 MB was reached at cluster" in drawn.notes
    stubs.end("a")
    stubs.start_stubs("too", says="NaN or Inf in the noise prediction", seconds="0.05", environment=here)
    assert len(list(tmp_path.glob("tiler-worker-*"))) == 3, "of a worker that was killed, the next removes the folder"
    with pytest.raises(NumericalError, match="NaN or Inf") as stopped:
        draw(tiny, tmp_path / "2", **stubs.through)
    assert stopped.value.exit_code == 7


class SlowWire:
    """A proxy between workers and scheduler: everything arrives 50 ms later, and one piece in fifty is lost first and
    arrives after a quarter of a second."""

    def __init__(self, port: int) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port, self._to, self.pieces = int(self._server.getsockname()[1]), port, 0
        self._random = random.Random(0)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                here, _ = self._server.accept()
            except OSError:
                return
            there = socket.create_connection(("127.0.0.1", self._to))
            for one, other in ((here, there), (there, here)):
                threading.Thread(target=self._carry, args=(one, other), daemon=True).start()

    def _carry(self, one: socket.socket, other: socket.socket) -> None:
        try:
            while data := one.recv(65536):
                self.pieces += 1
                time.sleep(0.25 if self._random.random() < 0.02 else 0.05)
                other.sendall(data)
        except OSError:
            pass
        one.close()
        other.close()

    def close(self) -> None:
        self._server.close()


def test_a_slow_and_lossy_network_changes_no_byte(stubs: Fleet, tiny: Path, tmp_path: Path, alone: Drawn) -> None:
    wire = SlowWire(int(stubs.address.rpartition(":")[2]))
    direct, stubs.address = stubs.address, f"tls://127.0.0.1:{wire.port}"
    stubs.start_stubs("a", "b")
    stubs.address = direct
    drawn = draw(tiny, tmp_path, **stubs.through)
    wire.close()
    assert same(drawn, alone) and set(drawn.workers) == {"a", "b"} and wire.pieces > 50


CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>
#define YEAR 31536000
time_t time(time_t *out) {
    struct timespec now;
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    real(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec - YEAR;
    return now.tv_sec - YEAR;
}
int clock_gettime(clockid_t clock, struct timespec *out) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int code = real(clock, out);
    if (clock == CLOCK_REALTIME) out->tv_sec -= YEAR;
    return code;
}
"""


def test_a_clock_that_is_a_year_behind_changes_no_byte(stubs: Fleet, tiny: Path, tmp_path: Path, alone: Drawn) -> None:
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        pytest.skip("no C compiler to make another clock with")
    (tmp_path / "clock.c").write_text(CLOCK)
    library = tmp_path / "clock.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-o", library, tmp_path / "clock.c", "-ldl"], check=True, capture_output=True
    )
    behind = {"LD_PRELOAD": str(library)}
    told = subprocess.run(
        [sys.executable, "-c", "import time; print(time.time())"], env=os.environ | behind, capture_output=True,
        check=True,
    )  # fmt: skip
    assert time.time() - float(told.stdout) > 3e7
    stubs.start_stubs("past", environment=behind)
    drawn = draw(tiny, tmp_path, **stubs.through)
    assert same(drawn, alone) and set(drawn.workers) == {"past"}


def test_a_worker_that_the_scheduler_cannot_reach_is_left_out_with_its_port(
    stubs: Fleet, tiny: Path, tmp_path: Path, alone: Drawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_REACHED_SECONDS", 1.0)
    port = free_port()
    stubs.begin_stubs("a", seconds="0.1")  # slower than the other is found out
    stubs.start_stubs("walled", contact_address=f"tls://127.0.0.1:{port}")
    stubs.wait(lambda joined: joined == {"a", "walled"})
    drawn = draw(tiny, tmp_path, **stubs.through)
    assert same(drawn, alone) and set(drawn.workers) == {"a"}
    assert any("worker walled is left out" in note and f"open port {port}" in note for note in drawn.notes)
