"""The tasks of a worker. They are sent by reference: these functions run in the worker's process, one at a time."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from tiler.cluster.shared import FORGOTTEN, Answer, BandPlace, Estimate, Greeting, SharedJob, SlabAnswer, Taken, Window
from tiler.errors import NumericalError, TilerError
from tiler.memory.limits import is_out_of_memory
from tiler.memory.process import read_rss

if TYPE_CHECKING:
    import numpy as np

    from tiler.cluster.bench import Bench
    from tiler.decoding.messages import Begin, Fetch, Orders


_NO_WORKER = "is no `tiler worker`"


class _Desk:
    """The state of this process, once it has started as a worker. The first job opens `bench`."""

    opener: Callable[[], Bench] | None = None
    bench: Bench | None = None
    facts: Mapping[str, object] = MappingProxyType({})
    lock = threading.Lock()  # a worker that has joined again may still run an earlier pass
    timer: threading.Timer | None = None  # closes a slab that is abandoned


def begin(opener: Callable[[], Bench], max_ram_bytes: int) -> None:
    """Make this process a worker."""
    _Desk.opener, _Desk.bench = opener, None
    _Desk.facts = {
        "job": "", "digest": "", "tiles": 0, "seconds_per_tile": 0.0, "max_ram_bytes": max_ram_bytes,
        "peak_rss_bytes": read_rss().now,
    }  # fmt: skip


def has_worked() -> bool:
    """Whether this process has opened a job, or tried to, since it started as a worker."""
    return _Desk.bench is not None


def wake() -> None:
    """Import what jobs need, which takes seconds."""
    with _Desk.lock:
        if _Desk.opener is not None:
            _Desk.bench = _Desk.bench or _Desk.opener()


def open_ahead(job: bytes) -> str:
    """Open the denoiser of a job without its prompts, if this worker has nothing else to do. Returns a Greeting without
    a digest, as JSON."""
    return _opened(job, lambda bench, shared: bench.open_ahead(shared))


def open_job(job: np.ndarray) -> str:
    """Open a job, bytes in an array, with its denoiser if `open_ahead` has not. Returns a Greeting without a digest, as
    JSON."""
    return _opened(job.data, lambda bench, shared: bench.open(shared))


def hello(job: str, step: int, window: Window, latents: np.ndarray) -> str:
    """Predict a probe tile of the open job named `job`. Returns a Greeting as JSON."""
    return _said(job, lambda bench: bench.greet(job, step, window, latents))


def open_decoder(job: bytes, statistics_bytes: int, size: tuple[int, int]) -> str:
    """Open the job's decoder for bands of at most `size` latents, if this machine has nothing else to do. Returns a
    Greeting without a digest, as JSON."""
    return _opened(job, lambda bench, shared: bench.open_decoder(shared, statistics_bytes, size))


def hello_decoder(job: str, statistics: np.ndarray, latents: np.ndarray) -> str:
    """Give the open decoder of the job named `job` its `statistics`, bytes in an array, and decode a few latents.
    Returns a Greeting as JSON."""
    return _said(job, lambda bench: bench.greet_decoder(job, statistics.tobytes(), latents))


def open_slabs(job: bytes, direction: str, method: str, size: tuple[int, int], canvas: str = "") -> str:
    """Open the job's autoencoder for slabs of at most `size` latents, coded in a `direction` by `method`, if this
    machine has nothing else to do but the same render's job named `canvas`. Returns a Greeting without a digest, as
    JSON."""
    return _opened(job, lambda bench, shared: bench.open_slabs(shared, direction, method, size, canvas))


def hello_slabs(job: str, small: np.ndarray) -> str:
    """Decode or encode the corner of a picture with the open autoencoder of the job named `job`. Returns a Greeting as
    JSON."""
    return _said(job, lambda bench: bench.greet_slabs(job, small))


def _opened(job: bytes | memoryview, open_it: Callable[[Bench, SharedJob], None]) -> str:
    """Open a job, or a part of it, on the bench. Returns a Greeting without a digest, as JSON."""
    if _Desk.opener is None:
        return Greeting(refusal=_NO_WORKER).to_json()
    try:
        with _Desk.lock:  # before the job, which would import all of torch
            _Desk.bench = _Desk.bench or _Desk.opener()
        shared = SharedJob.from_bytes(job)
    except Exception as error:
        return Greeting(refusal=_explained(error)).to_json()

    def greet(bench: Bench) -> Greeting:
        open_it(bench, shared)
        return Greeting()

    return _said(shared.name, greet)


def _said(job: str, greet: Callable[[Bench], Greeting]) -> str:
    """The bench's greeting, as JSON; if it fails, what the bench opened for the job is closed."""
    if _Desk.opener is None:
        return Greeting(refusal=_NO_WORKER).to_json()
    with _Desk.lock:
        try:
            _Desk.bench = _Desk.bench or _Desk.opener()
            return greet(_Desk.bench).to_json()
        except Exception as error:
            if _Desk.bench is not None:
                _Desk.bench.close(job)
            return Greeting(refusal=_explained(error), is_taken=isinstance(error, Taken)).to_json()


def assess(job: bytes) -> str:
    """Estimate how fast this worker would work on a job, without opening it. Returns an Estimate as JSON."""
    if _Desk.opener is None:
        return Estimate(refusal=_NO_WORKER).to_json()
    with _Desk.lock:
        try:
            _Desk.bench = _Desk.bench or _Desk.opener()
            return _Desk.bench.assess(SharedJob.from_bytes(job)).to_json()
        except Exception as error:
            return Estimate(refusal=_explained(error)).to_json()


def predict(job: str, step: int, windows: Sequence[Window], latents: np.ndarray) -> Answer:
    """Return the predictions of tiles at `step` of the job named `job`; `latents` are (n, C, h, w)."""
    with _Desk.lock:
        start, bench = time.perf_counter(), _Desk.bench
        if bench is None or job not in bench.jobs:
            return Answer(None, 0.0, 0, "works for another render now", is_closed=True)
        try:
            predictions = bench.predict(job, step, windows, latents)
        except Exception as error:
            is_numerical = isinstance(error, NumericalError)
            return Answer(None, time.perf_counter() - start, bench.peak_rss_bytes, _explained(error), is_numerical)
        return Answer(predictions, time.perf_counter() - start, bench.peak_rss_bytes)


def decode(job: str, place: BandPlace, row: int, columns: np.ndarray | None) -> Answer:
    """Return the next rows of pixels, (3, n, w), of a band of the job named `job`, from `row` on; its latents,
    (1, C, h, w), come with the first request."""
    with _Desk.lock:
        start, bench = time.perf_counter(), _Desk.bench
        try:
            rows = None if bench is None else bench.decode(job, place, row, columns)
        except Exception as error:
            is_numerical = isinstance(error, NumericalError)
            return Answer(None, time.perf_counter() - start, 0, _explained(error), is_numerical)
        if bench is None or rows is None:
            return Answer(None, 0.0, 0, "works for another render now", is_closed=True)
        return Answer(rows, time.perf_counter() - start, bench.peak_rss_bytes)


def run_slab(job: str, number: int, asked: Begin | Orders | Fetch) -> SlabAnswer:
    """Do what comes next for the slab of the job named `job`: it gets messages from the `number` 0 on."""
    with _Desk.lock:
        start, bench = time.perf_counter(), _Desk.bench
        try:
            told = None if bench is None else bench.run_slab(job, number, asked)
        except Exception as error:
            return SlabAnswer(None, time.perf_counter() - start, 0, _explained(error))
        if bench is None or told is None:
            return SlabAnswer(None, 0.0, 0, "works for another render now", is_closed=True)
        _forget_later()
        return SlabAnswer(told, time.perf_counter() - start, bench.peak_rss_bytes)


def _forget_later() -> None:
    """Close what nobody has used for long, if no other slab's message comes before: scratch files of a render that was
    killed may have gigabytes."""
    if _Desk.timer is not None:
        _Desk.timer.cancel()
    _Desk.timer = threading.Timer(FORGOTTEN + 1, _forget)
    _Desk.timer.daemon = True
    _Desk.timer.start()


def _forget() -> None:
    with _Desk.lock:
        if _Desk.bench is not None:
            _Desk.bench.forget()


def close(job: str) -> None:
    """Close the job named `job`, and the models that no other job uses."""
    with _Desk.lock:
        if _Desk.bench is not None:
            _Desk.bench.close(job)


def facts() -> str:
    """Return the facts that `tiler cluster status` shows, as JSON."""
    if _Desk.opener is None:
        return json.dumps({"error": _NO_WORKER})
    return json.dumps(dict(_Desk.facts) | {"rss_bytes": read_rss().now} | (_Desk.bench.facts() if _Desk.bench else {}))


def _explained(error: Exception) -> str:
    if is_out_of_memory(error):
        return "the system refused an allocation"
    text = str(error).partition("\n")[0]
    return text if isinstance(error, TilerError) else f"{type(error).__name__}: {text}"
