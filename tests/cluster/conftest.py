"""Worker processes on the loopback interface, and renders that use them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tiler import Budget, RenderRequest, events, render
from tiler.cluster.engine import Arrived, Engine
from tiler.cluster.keys import make_keys
from tiler.memory.process import read_rss
from tiler.request.cluster import Cluster, Where

CEILING = 700_000_000


class Answering:
    """In place of an Engine: whatever is asked is answered at once."""

    def __init__(self) -> None:
        self._arrived: list[Arrived] = []
        self._tickets = 0

    def say(self, value: object, error: BaseException | None = None) -> None:
        """Answer what was asked last."""
        self._arrived.append(Arrived(self._tickets, value, error))

    def reach(self, address: str) -> int:
        self._tickets += 1
        self.say("")
        return self._tickets


class Fleet:
    """A scheduler in this process, and worker processes that join it."""

    def __init__(self, engine: Engine, keys: Path) -> None:
        self.engine, self.keys, self.address = engine, keys, engine.address
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, *names: str, environment: Mapping[str, str] | None = None, **options: str) -> None:
        """Start workers of these names as a user would, and wait until all have joined."""
        for name in names:
            own = () if "max_ram" in options else ("--max-ram", str(CEILING))
            self._start(("-m", "tiler", "worker"), name, {"threads": "1"} | options, environment, "--quiet", *own)
        self.wait(lambda joined: set(names) <= joined)

    def start_stubs(self, *names: str, environment: Mapping[str, str] | None = None, **options: str) -> None:
        """Start workers with made-up predictions, and wait until all have joined."""
        self.begin_stubs(*names, environment=environment, **options)
        self.wait(lambda joined: set(names) <= joined)

    def begin_stubs(self, *names: str, environment: Mapping[str, str] | None = None, **options: str) -> None:
        """Start workers with made-up predictions without waiting."""
        for name in names:
            self._start(("-m", "tests.cluster.stub"), name, options, environment)

    def _start(
        self, program: Sequence[str], name: str, options: Mapping[str, str], environment: Mapping[str, str] | None,
        *more: str,
    ) -> None:  # fmt: skip
        told = [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", value)]
        command = [sys.executable, *program, self.address, "--keys", str(self.keys), "--name", name, *told, *more]
        self.run(name, command, environment)

    def run(self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        """Any process, which ends with the fleet."""
        variables = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])} | dict(environment or {})
        self.processes[name] = subprocess.Popen(command, env=variables, stderr=subprocess.DEVNULL)

    @property
    def through(self) -> dict[str, Any]:
        """The options with which a render uses the fleet."""
        return {"cluster": self.address, "keys": self.keys}

    def end(self, name: str, number: int = signal.SIGKILL) -> None:
        process = self.processes.pop(name)
        process.send_signal(number)
        process.wait(30)

    def wait(self, until: Callable[[set[str]], bool]) -> None:
        """Wait until exactly these names have joined."""
        for _ in range(2400):
            if until(set((self.engine.members() or {}).values())):
                return
            time.sleep(0.025)
        raise AssertionError(f"only {self.engine.members()} have joined")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def wait_for_port(port: int) -> None:
    for _ in range(400):
        with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.05)
    raise AssertionError(f"nobody listens at port {port}")


@contextmanager
def open_fleet(folder: Path) -> Iterator[Fleet]:
    """A fleet without workers; all that are started end with it."""
    keys = folder / "keys"
    make_keys(keys)
    with Engine(Cluster(where=Where.LISTEN, host="127.0.0.1", port=0), keys) as engine:
        found = Fleet(engine, keys)
        try:
            yield found
        finally:
            for process in found.processes.values():
                process.kill()
            for process in found.processes.values():
                process.wait(30)


def dask_worker(fleet: Fleet, name: str, *more: str) -> list[str]:
    """The command line of a plain dask worker that joins a fleet."""
    cert, key = str(fleet.keys / "cert.pem"), str(fleet.keys / "key.pem")
    return [
        sys.executable, "-m", "distributed.cli.dask_worker", fleet.address, "--no-nanny", "--nthreads", "1",
        "--memory-limit", "0", "--no-dashboard", "--name", name, "--tls-ca-file", cert, "--tls-cert", cert,
        "--tls-key", key, "--preload", "tiler.cluster.preload", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A fleet with the workers `a`, as `tiler worker` starts it, and `b`, as a plain dask worker."""
    with open_fleet(tmp_path_factory.mktemp("cluster")) as found:
        found.run("b", dask_worker(found, "b", "--max-ram", str(CEILING), "--threads", "1"))
        found.start("a")
        found.wait(lambda joined: joined == {"a", "b"})
        yield found


class Drawn:
    """A render's latents, picture, report and notes."""

    def __init__(self, folder: Path, report: dict[str, Any], notes: list[str]) -> None:
        from safetensors.torch import load_file

        self.latents = load_file(folder / "x.safetensors")["latents"]
        self.picture, self.report, self.notes = (folder / "x.png").read_bytes(), report, notes

    @property
    def workers(self) -> dict[str, dict[str, Any]]:
        return {worker["name"]: worker for worker in self.report["workers"]}


def draw(
    model: Path, folder: Path, on_progress: Callable[[events.Progress], None] = lambda event: None, **values: Any
) -> Drawn:
    """Render a small picture of many tiles in this process."""
    folder.mkdir(exist_ok=True)
    notes: list[str] = []

    def on_event(event: events.Event) -> None:
        if isinstance(event, events.Note):
            notes.append(event.text)
        if isinstance(event, events.Progress) and event.name == "canvas":
            on_progress(event)

    asked: dict[str, Any] = {
        "prompt": "a boat", "model": str(model), "size": 160, "num_inference_steps": 3, "seed": 11, "guide": False,
        "output": folder / "x.png", "save_latents": folder / "x.safetensors", "force": True, "metadata": False,
    }  # fmt: skip
    budget = Budget(read_rss().now + 2_000_000_000)
    report = render(RenderRequest(**(asked | values)), budget, on_event).report
    return Drawn(folder, report, notes)
