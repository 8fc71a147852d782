"""The first requests to the workers of a render."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from tiler.cluster import tasks
from tiler.cluster.shared import window_of
from tiler.diffusion.runner import Tile

_MOST_TILES, _MOST_BYTES = 32, 2**21  # in one task, each way: 32 tiles of SD 1.5's, 2 of the largest


class Request(NamedTuple):
    """A task that answers with a Greeting as JSON, and its arguments. A large one should not take long, since it waits
    until no other is under way."""

    task: Callable[..., str]
    arguments: tuple[Any, ...]
    is_large: bool = False


class Asked(Protocol):
    """The first requests to each worker, one after another; the answer to the last one counts. `samples` of a pass are
    one unit of work, and one task has at most `most` units."""

    @property
    def requests(self) -> tuple[Request, ...]: ...

    @property
    def samples(self) -> int: ...

    @property
    def most(self) -> int: ...


_LARGE = 2**20  # bytes of a job from which on it goes to one worker at a time


@dataclass(frozen=True)
class Probe:
    """The first requests of a canvas: the job without its encoded prompts, which suffices to open the denoiser; all of
    it; and a tile of noise in the place of a tile of its first step."""

    name: str
    opening: bytes
    job: bytes
    step: int
    tile: Tile

    @property
    def requests(self) -> tuple[Request, ...]:
        job = np.frombuffer(self.job, np.uint8)  # dask sends arrays without a copy
        probe = self.name, self.step, window_of(self.tile), self.tile.latents.numpy()
        return (
            Request(tasks.open_ahead, (self.opening,)),
            Request(tasks.open_job, (job,), is_large=len(self.job) > _LARGE),
            Request(tasks.hello, probe),
        )

    @property
    def samples(self) -> int:
        return self.tile.region.samples

    @property
    def most(self) -> int:
        return min(_MOST_TILES, max(1, _MOST_BYTES // self.tile.latents.nbytes))
