"""Measure what a cluster brings, and what it costs its coordinator.

python scripts/bench_cluster.py speedup --model FOLDER --size 2048 [--steps 4] [--precision int8] [--brief] [OPTION …]
    seconds of the canvas and of the whole render: one process with one thread; two workers with one thread each; then
    `tiler batch` with two pictures at once on these workers against one process after the other; the bytes of all are
    compared. Wants a quiet machine with two free cores. With --canvas each render ends when its canvas is done, and
    latents are compared. With --part only the first or the second of these is measured. Other options are those of
    `tiler render`.
python scripts/bench_cluster.py scale [--workers 100] [--tasks 10000] [--side 100000]
    CPU time of a queue's scheduler and of the coordinator for each task, less what both take while nothing happens,
    and their memory, in windows of a tenth of the tasks: growth would be seen. So many workers are in another process,
    and their predictions are made up. --plain measures a `dask scheduler` instead.
python scripts/bench_cluster.py idle --model mini --size 512 --steps 1 [--decode exact]
    RSS of two workers, as they read it themselves: before their first job, and after a render; its peak meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from safetensors.torch import load_file

from tiler.memory.budget import parse_bytes

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
BATCH = 5  # tiles a task, as workers with SD 1.5 under 700 MB take


def tiler(*words: object) -> list[str]:
    return [sys.executable, "-m", "tiler", *map(str, words)]


PROMPT = "a lighthouse on a cliff"


def common(told: argparse.Namespace) -> list[object]:
    """Options of all renders."""
    return [
        "--model", told.model, "--size", told.size, "--steps", told.steps, "--seed", 7, "--precision", told.precision,
        "--guide-upscale", "pixel", "--no-metadata", *["--quiet"] * (not told.canvas), *told.more,
    ]  # fmt: skip


class Timed:
    """A render that has been told to go: its seconds, and the bytes of its picture."""

    def __init__(self, told: argparse.Namespace, folder: Path, name: str, *more: object) -> None:
        self.picture, self._report = folder / f"{name}.png", folder / f"{name}.json"
        own = ["--max-ram", told.max_ram, "--report", self._report, "-o", self.picture, *more]
        words = ["render", PROMPT, *common(told), *own]
        self._start, self._ends_early = time.monotonic(), told.canvas
        if told.canvas:
            self.picture = folder / f"{name}.safetensors"
            words += ["--save-latents", self.picture, "--log-json"]
        error = subprocess.PIPE if told.canvas else None
        self._process = subprocess.Popen(tiler(*words), env=ENVIRONMENT, stderr=error, text=True)

    def wait(self) -> dict[str, float]:
        """Seconds of the canvas and of all; seconds that workers spent in tasks."""
        if self._ends_early:
            return self._wait_for_canvas()
        if self._process.wait():
            raise SystemExit("a render failed")
        whole, report = time.monotonic() - self._start, json.loads(self._report.read_text())
        phases = {phase["name"]: phase["seconds"] for phase in report["phases"]}
        busy = sum(worker["seconds"] for worker in report["workers"])
        return {"canvas": phases["canvas"], "whole": whole, "busy": busy}

    def _wait_for_canvas(self) -> dict[str, float]:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            event: dict[str, Any] = json.loads(line) if line.startswith("{") else {"event": ""}
            if event["event"] == "phase_done" and event["name"] == "canvas":
                whole = time.monotonic() - self._start
                while not self.picture.exists():
                    time.sleep(0.05)
                self._process.kill()
                self._process.wait()
                return {"canvas": event["seconds"], "whole": whole, "busy": 0.0}
        raise SystemExit("a render failed")

    def digest(self) -> str:
        if self._ends_early:  # latents; the file's header also says how they were made
            latents = load_file(self.picture)
            return hashlib.sha256(b"".join(latents[name].numpy().tobytes() for name in sorted(latents))).hexdigest()[
                :16
            ]
        return hashlib.sha256(self.picture.read_bytes()).hexdigest()[:16]


def scheduler_command(keys: Path, file: Path) -> list[str]:
    """Of a `dask scheduler` that writes its address into `file`."""
    pair = [f"--tls-{what}={keys / name}.pem" for what, name in (("ca-file", "cert"), ("cert", "cert"), ("key", "key"))]
    return [
        sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "tls://127.0.0.1", "--port", "0",
        "--no-dashboard", "--dashboard-address", "127.0.0.1:0", "--scheduler-file", str(file), *pair,
    ]  # fmt: skip


@contextmanager
def fleet(told: argparse.Namespace, folder: Path) -> Iterator[tuple[object, ...]]:
    """A scheduler and two workers of one thread each, and how a render names them."""
    keys, file = folder / "keys", folder / "scheduler.json"
    subprocess.run(tiler("cluster", "keys", keys), env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL)
    started = [subprocess.Popen(scheduler_command(keys, file), stderr=subprocess.DEVNULL)]
    try:
        while not file.exists():
            time.sleep(0.1)
        for name in ("a", "b"):
            own = ["--name", name, "--threads", 1, "--max-ram", told.worker_ram, "--quiet"]
            started.append(subprocess.Popen(tiler("worker", f"file:{file}", "--keys", keys, *own), env=ENVIRONMENT))
        yield "--cluster", f"file:{file}", "--keys", keys, "--cluster-only"
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait()


def tell_workers(two: dict[str, float]) -> None:
    print(f"two workers × 1 thread: canvas {two['canvas']:.1f} s, whole {two['whole']:.1f} s")
    if two["busy"]:
        print(f"each worker was in a task for {two['busy'] / 2:.1f} s of its canvas")


def tell(one: dict[str, float], two: dict[str, float], digests: set[str]) -> None:
    print(f"speed-up: canvas {one['canvas'] / two['canvas']:.2f}×, whole {one['whole'] / two['whole']:.2f}×")
    print(f"bytes: {'equal' if len(digests) == 1 else f'DIFFERENT {digests}'}", flush=True)


def speedup(told: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        small = ("--size", 256, "--steps", 1)
        warms_up = not told.brief and not told.cold
        if warms_up:
            Timed(told, folder, "warm-up", *small).wait()  # packs int8 weights
        if told.part != "workers":
            alone = Timed(told, folder, "alone")
            one = alone.wait()
            seconds = f"canvas {one['canvas']:.1f} s, whole {one['whole']:.1f} s"
            print(f"one process × 1 thread: {seconds}, bytes {alone.digest()}", flush=True)
            if told.part == "alone":
                return
        with fleet(told, folder) as through:
            if warms_up:
                Timed(told, folder, "warm-up-2", *small, *through).wait()
            both = Timed(told, folder, "both", *through)
            two = both.wait()
            tell_workers(two)
            if told.part == "workers":
                print(f"bytes {both.digest()}")
                return
            tell(one, two, {alone.digest(), both.digest()})
            if told.brief or told.canvas:
                return
            queue = folder / "q.toml"
            queue.write_text("".join(f'[[image]]\nprompt = "{PROMPT}"\noutput = "pair-{n}.png"\n' for n in (1, 2)))
            ceiling = f"{2 * parse_bytes(told.max_ram) + 20_000_000}"
            start = time.monotonic()
            words = ["batch", queue, *common(told), "--nice", 0, "--max-ram", ceiling, *through]
            subprocess.run(tiler(*words), env=ENVIRONMENT, check=True)
            together = time.monotonic() - start
        pair = {hashlib.sha256((folder / f"pair-{n}.png").read_bytes()).hexdigest()[:16] for n in (1, 2)}
        digests = {alone.digest(), both.digest(), *pair}
    print(
        f"two pictures of a queue at once: {together:.1f} s, {2 * one['whole'] / together:.2f}× of two alone, one after the other"
    )
    print(f"bytes: {'equal' if len(digests) == 1 else f'DIFFERENT {digests}'}")


def idle(told: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as place, fleet(told, Path(place)) as through:
        _, address, *keys, _ = through

        def ask(until: Callable[[dict[str, Any]], bool]) -> None:
            command = tiler("cluster", "status", address, *keys, "--json")
            while True:
                ran = subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True, text=True)
                found = json.loads(ran.stdout)["workers"]
                if len(found) == 2 and all(map(until, found)):
                    break
                time.sleep(0.5)
            for worker in found:
                sizes = f"RSS {worker['rss_bytes'] / 1e6:.0f} MB, peak {worker['peak_rss_bytes'] / 1e6:.0f} MB"
                print(f"{worker['name']}: {sizes}", flush=True)

        ask(lambda worker: True)
        Timed(told, Path(place), "picture", *through).wait()
        ask(lambda worker: not worker["job"])


def host(keys: Path, folder: Path) -> subprocess.Popen[bytes]:
    """The process with the scheduler of a queue, which prints its address."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    asked = {
        "cluster": f"listen:127.0.0.1:{port}", "keys": str(keys), "insecure": False, "folder": str(folder),
        "worker_bytes": 0, "threads": 1,
    }  # fmt: skip
    command = [sys.executable, "-m", "tiler.cli.host"]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(json.dumps(asked).encode() + b"\n")
    process.stdin.flush()
    return process


def members(address: str, keys: str, count: str) -> None:
    """Workers in this process, whose predictions are their latents."""
    import numpy as np
    from distributed import Worker

    from tiler.cluster import tasks
    from tiler.cluster.engine import security_of
    from tiler.cluster.shared import Answer, Greeting

    def opened(job: object) -> str:
        return Greeting().to_json()

    def hello(job: str, step: int, window: Sequence[Any], latents: np.ndarray) -> str:
        return Greeting(digest="same", seconds=1.0, batch=2 * BATCH, max_ram_bytes=10**9).to_json()

    def predict(job: str, step: int, windows: Sequence[Any], latents: np.ndarray) -> Answer:
        return Answer(latents, 1.0 * len(windows), 0)

    tasks.open_ahead = tasks.open_job = opened
    tasks.hello, tasks.predict = hello, predict
    tasks.begin(lambda: None, 10**9)  # type: ignore[arg-type, return-value]

    async def stay() -> None:
        security = security_of(Path(keys))
        workers = [
            Worker(
                address, nthreads=1, name=f"w{n}", memory_limit=0, security=security, dashboard=False, host="127.0.0.1",
                dashboard_address="127.0.0.1:0",
            )
            for n in range(int(count))
        ]  # fmt: skip
        await asyncio.gather(*(worker.start() for worker in workers))
        await asyncio.gather(*(worker.finished() for worker in workers))

    asyncio.run(stay())


def spent_by(processes: Sequence[psutil.Process]) -> list[float]:
    """CPU seconds of each so far."""
    return [sum(process.cpu_times()[:2]) for process in processes]


def scale(told: argparse.Namespace) -> None:
    from contextlib import nullcontext

    import torch

    from tiler.cluster.engine import Engine
    from tiler.cluster.greetings import Probe
    from tiler.cluster.keys import make_keys
    from tiler.cluster.members import Members
    from tiler.cluster.pool import Pool
    from tiler.diffusion.layouts import plan_tiles
    from tiler.diffusion.runner import Tile
    from tiler.memory.process import frugal_allocator, read_rss
    from tiler.planning.resolve import fill
    from tiler.request import RenderRequest
    from tiler.request.cluster import Cluster, Where

    frugal_allocator()
    asked = fill(RenderRequest(prompt="x", size=told.side))
    tiles = plan_tiles(asked, canvas=(told.side // 8,) * 2, tile=(64, 64), overlap=16)
    latents = torch.randn(1, 4, 64, 64)
    print(f"{told.side:,} px: {len(tiles):,} tiles a step, {told.workers} workers, {BATCH} tiles a task")
    with tempfile.TemporaryDirectory() as place:
        keys = Path(place) / "keys"
        make_keys(keys)
        file = Path(place) / "scheduler.json"
        if told.plain:
            started = [subprocess.Popen(scheduler_command(keys, file), env=ENVIRONMENT, stderr=subprocess.DEVNULL)]
            while not file.exists():
                time.sleep(0.1)
            cluster = Cluster(where=Where.FILE, address=str(file))
        else:
            started = [host(keys, Path(place))]
            assert started[0].stdout is not None
            cluster = Cluster(where=Where.CONNECT, address=json.loads(started[0].stdout.readline())["address"])
        with Engine(cluster, keys) as engine:
            command = [sys.executable, __file__, "members", engine.address, str(keys), str(told.workers)]
            started.append(subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL))
            both = psutil.Process(started[0].pid), psutil.Process()
            try:
                while len(engine.members() or {}) < told.workers:
                    time.sleep(1)
                before = spent_by(both)
                time.sleep(told.idle)
                idle = [(now - then) / told.idle for now, then in zip(spent_by(both), before, strict=True)]
                print(f"while nothing happens: {idle[0]:.3f} and {idle[1]:.3f} s CPU a second")
                probe = Probe("job", b"", b"", 0, Tile(latents, tiles[0]))
                who = Members(engine, probe, lambda text: None, None)
                counts = {"denoiser_samples": 0}
                done, window = 0, told.tasks * BATCH // 10
                with Pool(who, "job", nullcontext, lambda: None, lambda text: None, counts) as pool:  # type: ignore[arg-type]
                    mark, since, step = spent_by(both), time.monotonic(), 0
                    while done < told.tasks * BATCH:
                        for _ in pool.predict(step, (Tile(latents, tiles[n]) for n in range(len(tiles)))):
                            done += 1
                            if done % window == 0:
                                now, lasted = spent_by(both), time.monotonic() - since
                                words = []
                                for n, name in enumerate(("scheduler", "coordinator")):
                                    spent = 1000 * (now[n] - mark[n] - lasted * idle[n]) / (window / BATCH)
                                    rss = read_rss(Path(f"/proc/{both[n].pid}"))
                                    words.append(
                                        f"{name} {spent:.2f} ms, {rss.now / 1e6:.0f} MB (peak {rss.peak / 1e6:.0f})"
                                    )
                                print(f"{done // BATCH:7,} tasks: {'; '.join(words)}", flush=True)
                                mark, since = spent_by(both), time.monotonic()
                            if done >= told.tasks * BATCH:
                                break
                        step += 1
            finally:
                for process in started:
                    process.kill()
                    process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("speedup")
    one.add_argument("--model", default="mini")
    one.add_argument("--size", type=int, default=2048)
    one.add_argument("--steps", type=int, default=4)
    one.add_argument("--precision", default="fp32")
    one.add_argument("--max-ram", default="800MB")
    one.add_argument("--worker-ram", default="800MB")
    one.add_argument("--canvas", action="store_true", help="end each render when its canvas is done")
    one.add_argument("--cold", action="store_true", help="no runs to warm up")
    one.add_argument("--part", choices=("alone", "workers"), help="measure nothing else")
    one.add_argument("--brief", action="store_true", help="neither runs to warm up nor a queue")
    one.set_defaults(run=speedup)
    three = commands.add_parser("idle")
    three.add_argument("--model", default="mini")
    three.add_argument("--size", type=int, default=512)
    three.add_argument("--steps", type=int, default=1)
    three.add_argument("--precision", default="fp32")
    three.add_argument("--max-ram", default="800MB")
    three.add_argument("--worker-ram", default="800MB")
    three.set_defaults(run=idle, canvas=False)
    two = commands.add_parser("scale")
    two.add_argument("--workers", type=int, default=100)
    two.add_argument("--tasks", type=int, default=10_000)
    two.add_argument("--side", type=int, default=100_000)
    two.add_argument("--idle", type=float, default=20.0, metavar="SECONDS", help="for which nothing happens")
    two.add_argument("--plain", action="store_true", help="a `dask scheduler`")
    two.set_defaults(run=scale)
    told, more = parser.parse_known_args()
    told.more = more  # options of `tiler render`
    told.run(told)


if __name__ == "__main__":
    if sys.argv[1:2] == ["members"]:  # the other process of `scale`
        members(*sys.argv[2:])
    else:
        main()
