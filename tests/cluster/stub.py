"""A worker with made-up predictions, computed by numpy alone: it joins at once, needs no model, and fails on request.

python -m tests.cluster.stub ADDRESS --keys FOLDER --name a --seconds 0.1 --dies-at 0,16
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tiler.cluster import tasks
from tiler.cluster.shared import Answer, Greeting, Window, digest_of
from tiler.memory.process import read_rss

if TYPE_CHECKING:
    from torch import Tensor

    from tiler.diffusion.runner import Tile

BALLAST = 100_000_000  # bytes that an open job takes


def made_up(step: int, windows: Sequence[Window], latents: np.ndarray) -> np.ndarray:
    """Predictions for (n, C, h, w) fp32, of the same shape. Each is made from a few numbers, so that every machine
    rounds them the same way."""
    places = np.array([[w[0] + 3 * w[1] + 5 * step] for w in windows], np.float32).reshape(-1, 1, 1, 1)
    found: np.ndarray = latents * np.float32(0.5) + places * np.float32(2**-10)
    return found


class Local:
    """A runner for the coordinator with the same made-up predictions."""

    def predict(self, step: int, tiles: Iterable[Tile]) -> Iterator[Tensor]:
        import torch

        from tiler.cluster.shared import window_of

        for tile in tiles:
            yield torch.from_numpy(made_up(step, [window_of(tile)], tile.latents.numpy()))[0]


@contextmanager
def open_local(*run: Any) -> Iterator[Local]:
    """Replaces `open_denoiser`."""
    yield Local()


def main() -> None:
    import dask

    from tiler.cluster import worker
    from tiler.memory.budget import Budget

    dask.config.set({"distributed.comm.timeouts.connect": "3s"})  # also the longest pause until it tries again

    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("--keys", type=Path)
    parser.add_argument("--name", default="stub")
    parser.add_argument("--seconds", type=float, default=0.02, help="that a tile takes")
    parser.add_argument("--dies-at", default="", help="the place of a tile that ends the process")
    parser.add_argument("--hangs-at", default="", help="the place of a tile that is never done")
    parser.add_argument("--says", default="", help="instead of any prediction")
    parser.add_argument("--refuses", default="", help="why it takes no job")
    parser.add_argument("--contact-address")
    told = parser.parse_args()
    ballast: list[bytearray] = []

    def opened(job: object) -> str:
        return Greeting(refusal=told.refuses).to_json()

    def hello(job: str, step: int, window: Window, latents: np.ndarray) -> str:
        ballast[:] = [bytearray(b"x") * BALLAST]
        tasks._Desk.bench = tasks._Desk.bench or tasks._Desk.opener()  # type: ignore[misc]
        digest = digest_of(made_up(step, [window], latents))
        return Greeting(digest=digest, seconds=told.seconds, batch=4, max_ram_bytes=10**9).to_json()

    def predict(job: str, step: int, windows: Sequence[Window], latents: np.ndarray) -> Answer:
        if any(f"{window[0]},{window[1]}" == told.dies_at for window in windows):
            os._exit(9)
        while any(f"{window[0]},{window[1]}" == told.hangs_at for window in windows):
            time.sleep(1)
        time.sleep(told.seconds * len(windows))
        if told.says:
            return Answer(None, 0.1, 0, told.says, "NaN" in told.says)
        return Answer(made_up(step, windows, latents), told.seconds * len(windows), read_rss().now)

    tasks.open_ahead = tasks.open_job = opened
    tasks.hello, tasks.predict = hello, predict
    worker.open_bench = lambda *asked: object()  # type: ignore[assignment, return-value]
    worker._AGAIN = 0.2
    joining = worker.Joining(
        address=told.address, name=told.name, keys=told.keys, quiet=True, contact_address=told.contact_address
    )
    worker.work(joining, Budget("1GB"))


if __name__ == "__main__":
    main()
