"""Events that a long phase reports while it runs, and the journal in which it saves its state. The command line draws
the events; a library's caller may ignore them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol


class Phase(StrEnum):
    """The phases that read weights or pictures, those of a render in their order. A queue names others after its
    pictures."""

    LOAD_GUIDE = "load guide"
    ENCODE_PROMPTS = "encode prompts"
    GUIDE = "guide"
    GUIDE_PICTURE = "guide picture"
    CANVAS = "canvas"
    DECODE = "decode"
    WRITE = "write"
    PREVIEW = "preview"
    QUANTIZE = "quantize"


@dataclass(frozen=True, kw_only=True)
class PhaseStarted:
    name: str
    total: int  # units that Progress counts


@dataclass(frozen=True, kw_only=True)
class Working:
    """The weights of a phase are open, and its work begins or goes on after `done` of its units."""

    name: str
    done: int


@dataclass(frozen=True, kw_only=True)
class Progress:
    """`done` of `total` units of a phase: denoiser samples, or latent rows."""

    name: str
    done: int
    total: int
    detail: str  # "step 3/20, tile 7/25"


@dataclass(frozen=True, kw_only=True)
class PhaseDone:
    name: str
    seconds: float
    peak_rss_bytes: int


@dataclass(frozen=True, kw_only=True)
class Note:
    """Something the user should know: a rounded size, a truncated prompt."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Saved:
    """The state was saved, and the run can continue from here: `where` is like "canvas step 12/20"."""

    where: str


@dataclass(frozen=True, kw_only=True)
class WorkerState:
    """A worker of a cluster: the tiles that it has predicted and the time of each, its highest memory and its ceiling,
    and whether it takes so long with its present tiles that others predict them too."""

    name: str
    tiles: int
    seconds_per_tile: float
    peak_rss_bytes: int
    max_ram_bytes: int
    is_late: bool = False


@dataclass(frozen=True, kw_only=True)
class Workers:
    """The workers that predict the tiles of the canvas now."""

    workers: tuple[WorkerState, ...]


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A preview for which `--preview -` asked: `pixels` is an array (h, w, 3) uint8."""

    pixels: Any


Event = PhaseStarted | Working | Progress | PhaseDone | Saved | Shown | Note | Workers

OnEvent = Callable[[Event], None]


def percent(on_event: OnEvent, phase: str) -> Callable[[float], None]:
    """Return a function that reports progress in whole percent, each value once."""
    told = -1

    def tell(share: float) -> None:
        nonlocal told
        if (now := int(100 * share)) > told:
            told = now
            on_event(Progress(name=phase, done=now, total=100, detail=f"{now} %"))

    return tell


Tensors = Mapping[str, Any]
"""torch tensors by name; this module does not import torch."""


class Journal(Protocol):
    """The place where a phase saves its state, so that an interrupted run can continue."""

    def load(self, name: str) -> Tensors | None:
        """Return what was last saved under `name`, or None."""
        ...

    def save(self, name: str, tensors: Tensors, where: str) -> None:
        """Save `tensors` under `name`; `where` describes the progress of the phase to people."""
        ...

    def due(self) -> bool:
        """Whether enough time has passed since the last save."""
        ...


class NoJournal:
    """Saves nothing."""

    def load(self, name: str) -> None:
        return None

    def save(self, name: str, tensors: Tensors, where: str) -> None:
        return None

    def due(self) -> bool:
        return False
