"""What the tests share: small checkpoints made once per session, and fixtures that run the program."""

from __future__ import annotations

import gc
import json
import logging
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
sys.path.insert(0, str(Path(__file__).parents[1]))  # for what tests share: tests.models.rendering

from tiler.memory.process import frugal_allocator

frugal_allocator()
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns where it is imported, and diffusers imports it
os.environ["TILER_CONFIG"] = os.devnull  # the habits of whoever runs the tests are not the tests'


@pytest.fixture(scope="session", autouse=True)
def one_measurement() -> Iterator[None]:
    """Every plan tells of this machine's speed: it is measured once a session, and not for each of a hundred plans."""
    from tiler.planning import time

    with pytest.MonkeyPatch.context() as patch:
        for measure in (time.chosen_speed, time.attention_speed, time.call_seconds):
            patch.setattr(time, measure.__name__, cache(measure))
        yield


@pytest.fixture(scope="session", autouse=True)
def one_rehearsal() -> Iterator[None]:
    """Plans of equal models share the measurements of memory and the count of work."""
    from tests.rehearsals import Remembered
    from tiler.planning.peaks import DenoiserPeaks, VaePeaks
    from tiler.planning.time import Counter

    remembered = Remembered(DenoiserPeaks.activations)

    def vae_peaks(peaks: VaePeaks, *args: Any) -> None:
        prepare(peaks, *args)
        peaks._rehearsed = remembered.of_autoencoder(peaks)

    def counter(made: Counter, *args: Any) -> None:
        begin(made, *args)
        made.known = remembered.of_counter(made)

    prepare, begin = VaePeaks.__init__, Counter.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DenoiserPeaks, "activations", lambda *asked: remembered.activations(*asked))
        patch.setattr(VaePeaks, "__init__", vae_peaks)
        patch.setattr(Counter, "__init__", counter)
        yield


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests use no prompts encoded by another version of the code. They share int8 weights, which record their
    version."""
    from tiler.weights.packed import default_cache

    packed, home = default_cache(), tmp_path_factory.mktemp("cache")
    packed.mkdir(parents=True, exist_ok=True)
    (home / "tiler").mkdir()
    (home / "tiler/packed").symlink_to(packed)
    os.environ["XDG_CACHE_HOME"] = str(home)


def pytest_configure(config: pytest.Config) -> None:
    """Record for scripts/test which rows of the fault table were run. Programs started here take signals also where the
    session ignores them, as a shell's background jobs do."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if (told := os.environ.get("TILER_ROWS")) and not hasattr(config, "workerinput"):
        from tests import faults

        config.pluginmanager.register(faults.Rows(Path(told), faults.read_rows(faults.README.read_text())))


LONG = ("full", "cluster", "e2e", "jobs", "models", "cli")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the folders with slow files first: workers take a file at a time, and one that started such a file last
    would run on alone."""
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.parent, len(LONG)))


@pytest.fixture(scope="module", autouse=True)
def trimmed() -> None:
    """What the tests of other files left is returned, or ceilings in this process would be reached by it."""
    from tiler.memory import process

    process.trim()


@pytest.fixture(autouse=True)
def short_pauses(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A render releases memory at each phase, which takes two thirds of a tiny render's time. Here it does not. In the
    tests of memory it does, but code stays mapped, and garbage collection skips what earlier tests left (a tiler
    process freezes its imports in the same way)."""
    gc.collect()
    gc.freeze()
    monkeypatch.setattr("tiler.memory.process.release_code", lambda: None)
    if request.path.parent.name != "memory":
        monkeypatch.setattr("tiler.memory.process.trim", lambda: None)
        monkeypatch.setattr("tiler.memory.process.free_heap", lambda: 0)  # slow in a heap that has grown


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny checkpoints `tiny` (epsilon) and `tiny-sd2` (v-prediction, linear projections)."""
    import make_checkpoint

    cache = tmp_path_factory.mktemp("checkpoints")
    for kind in ("tiny", "tiny-sd2"):
        make_checkpoint.make(kind, cache)
    return cache


@pytest.fixture(scope="session")
def tiny(checkpoints: Path) -> Path:
    return checkpoints / "tiny"


@pytest.fixture(scope="session")
def reference(tiny: Path) -> AutoencoderKL:
    """diffusers' own autoencoder of `tiny`, resident, fp32."""
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(tiny / "vae", variant="fp16", torch_dtype=torch.float32).eval()


@pytest.fixture
def quanto(monkeypatch: pytest.MonkeyPatch) -> Any:
    """optimum-quanto, with its unpacking in Python instead of an extension that takes half a minute to compile in a new
    environment."""
    found = pytest.importorskip("optimum.quanto")
    from optimum.quanto.library.extensions.extension import get_extension

    with monkeypatch.context() as patch:
        patch.setattr("torch.library.define", lambda *args: None)
        patch.setattr("torch.library.impl", lambda *args: lambda function: function)
        own = runpy.run_path(str(Path(found.__file__).with_name("library") / "unpack.py"))
    monkeypatch.setattr(get_extension("quanto_cpp"), "_lib", SimpleNamespace(unpack=own["unpack"]))
    return found


class Ran(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out)


@pytest.fixture
def tiler(tmp_path: Path):
    """Run the `tiler` program in a fresh process, in an empty folder: tiler("render", "a boat", "--size", 128)."""

    def run(*args: object, env: dict[str, str] | None = None, timeout: float = 600) -> Ran:
        command = [sys.executable, "-c", "from tiler.cli.main import main; main()", *map(str, args)]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, "COLUMNS": "200", **(env or {})},
            check=False,
        )
        return Ran(done.returncode, done.stdout, done.stderr)

    return run


_NICE = os.nice


@pytest.fixture
def in_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """Run `tiler` in the test's own process, in an empty folder, which takes a quarter of the time. Not for tests of
    processes, memory and signals."""
    from tiler.cli import supervise
    from tiler.cli.main import main

    def run(*args: object, env: dict[str, str] | None = None) -> Ran:
        capfd.readouterr()
        with monkeypatch.context() as patch:
            patch.chdir(tmp_path)
            patch.setenv("COLUMNS", "200")
            if os.nice is _NICE:  # a batch would slow down all later tests of this process
                patch.setattr(os, "nice", lambda by: 0)
            if args[:1] != ("config",):  # which shows the environment
                patch.setenv("TILER_MAX_RAM", "8GB")  # what earlier tests have left in this process counts as well
            for name, value in (env or {}).items():
                patch.setenv(name, value)
            patch.setattr(sys, "argv", ["tiler", *map(str, args)])
            # These change the whole process for a run that ends with it; the tests go on.
            patch.setattr("tiler.memory.lean_imports.start_program", lambda: None)
            patch.setattr("tiler.cli.queues.hand_over", lambda spec: sys.exit(supervise.run(spec)))
            ours = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
            before, threads = [signal.getsignal(number) for number in ours], torch.get_num_threads()
            try:
                main()
                code = 0
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            finally:
                for number, handler in zip(ours, before, strict=True):
                    signal.signal(number, handler)
                torch.set_num_threads(threads)
                torch.set_grad_enabled(True)
        out, err = capfd.readouterr()
        return Ran(code, out, err)

    return run
