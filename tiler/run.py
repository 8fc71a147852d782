"""What every run has: models, a budget, events, and phases with a start and an end."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tiler import events
from tiler.compute import onednn
from tiler.compute.lending import lent
from tiler.compute.stream import Streamer
from tiler.decoding.scratch import free_bytes
from tiler.diffusion.guide_picture import GuidePicture
from tiler.events import OnEvent
from tiler.memory import process
from tiler.memory.budget import Budget
from tiler.models.built import Models
from tiler.native.library import has_bf16
from tiler.planning.facts import Facts
from tiler.weights.changes import Changes
from tiler.weights.index import TensorInfo
from tiler.weights.store import WeightStore, match_index

Names = Callable[[str], list[str]]


class WorkerUse(NamedTuple):
    """What a worker of a cluster did for a render, under its own ceiling."""

    name: str
    tiles: int
    seconds: float
    peak_rss_bytes: int
    max_ram_bytes: int


@dataclass(kw_only=True)
class Run:
    """A run in progress."""

    models: Models
    budget: Budget
    on_event: OnEvent

    def note(self, text: str) -> None:
        self.on_event(events.Note(text=text))

    def tell(self, notes: Iterable[str | None]) -> None:
        """Report the notes that are not None."""
        for note in notes:
            if note is not None:
                self.note(note)

    @contextmanager
    def phase(self, name: str, total: int) -> Iterator[None]:
        """Attribute time and memory to a phase, and report its start and end."""
        self.on_event(events.PhaseStarted(name=name, total=total))
        with self.budget.phase(name) as use:
            yield
            self.budget.check(name)
        if (warning := self.budget.swap_warning()) is not None:
            self.note(warning)
        self.on_event(events.PhaseDone(name=name, seconds=use.seconds, peak_rss_bytes=use.peak_rss_bytes))

    @contextmanager
    def streamed(
        self, module: Any, stored: dict[str, TensorInfo], names: Names,
        resident: dict[str, torch.dtype] | None = None, **options: Any,
    ) -> Iterator[Streamer]:  # fmt: skip
        """`run.streamed`; subclasses may count the bytes read."""
        with streamed(module, stored, names, resident, **options) as streamer:
            yield streamer


@contextmanager
def streamed(
    module: Any, stored: dict[str, TensorInfo], names: Names, resident: dict[str, torch.dtype] | None = None,
    *, changes: Changes | None = None, **options: Any,
) -> Iterator[Streamer]:  # fmt: skip
    """Stream the weights of one part of a checkpoint into a meta-device module until the block ends. Weights named in
    `resident` stay in memory; `changes` are what LoRAs add to them; `options` are the Streamer's."""
    index = match_index(module, stored, names)
    with WeightStore(index, changes=changes) as store:
        streamer = Streamer(store, **options)
        with lent(module, streamer):
            for name, dtype in (resident or {}).items():
                store.keep(name, dtype)
            yield streamer


def measure(scratch: Path, guide: GuidePicture | None = None) -> Facts:
    """Measure what planning must know of this process and machine. Call it after the models are built. `scratch` is the
    folder for scratch files, `guide` the user's picture. Raises StorageError if the folder cannot be used."""
    free = free_bytes(scratch)
    process.release_code()
    facts = Facts(rss_bytes=process.read_rss().now, scratch_free_bytes=free, int8=onednn.int8(), bf16=has_bf16())
    if guide is None:
        return facts
    return replace(facts, guide_pixels=math.prod(guide.shape[:2]), guide_load_bytes=guide.peak_bytes)
