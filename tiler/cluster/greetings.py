"""The first requests to the workers of a render."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from tiler.cluster import tasks
from tiler.cluster.shared import window_of
from tiler.diffusion.runner import Tile


class Request(NamedTuple):
    """A task that answers with a Greeting as JSON, and its arguments."""

    task: Callable[..., str]
    arguments: tuple[Any, ...]


class Asked(Protocol):
    """The first requests to each worker. If `greeting` is large, `opening` comes before it and does what takes long,
    and only one greeting is under way at a time. `samples` of a pass are one unit of work."""

    @property
    def opening(self) -> Request | None: ...

    @property
    def greeting(self) -> Request: ...

    @property
    def samples(self) -> int: ...


@dataclass(frozen=True)
class Probe:
    """The first request of a canvas: the job, and a tile of noise in the place of a tile of its first step."""

    job: bytes
    step: int
    tile: Tile
    opening = None

    @property
    def greeting(self) -> Request:
        return Request(tasks.hello, (self.job, self.step, window_of(self.tile), self.tile.latents.numpy()))

    @property
    def samples(self) -> int:
        return self.tile.region.samples
