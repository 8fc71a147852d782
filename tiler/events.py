"""What a long phase tells while it runs, and where it saves what it could not bear to lose. The CLI draws the events; a
library's caller may ignore them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, kw_only=True)
class PhaseStarted:
    name: str
    total: int  # steps of the finest grain that Progress will count


@dataclass(frozen=True, kw_only=True)
class Progress:
    """`done` of `total` grains of a phase: UNet samples, or latent rows."""

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
    """The run could go on from here: `where` is "canvas step 12/20"."""

    where: str


Event = PhaseStarted | Progress | PhaseDone | Saved | Note

OnEvent = Callable[[Event], None]


def percent(on_event: OnEvent, phase: str) -> Callable[[float], None]:
    """Progress in whole percents, each told once."""
    told = -1

    def tell(share: float) -> None:
        nonlocal told
        if (now := int(100 * share)) > told:
            told = now
            on_event(Progress(name=phase, done=now, total=100, detail=f"{now} %"))

    return tell


Tensors = Mapping[str, Any]
"""Tensors of torch, which this module does not know, by name."""


class Journal(Protocol):
    """Where a phase saves its state, so that a run that was stopped can go on."""

    def load(self, name: str) -> Tensors | None:
        """What was saved last under `name`; None if nothing was."""
        ...

    def save(self, name: str, tensors: Tensors, where: str) -> None:
        """`where` says to people how far the phase is."""
        ...

    def due(self) -> bool:
        """Whether the last save is so long ago that it is time for another."""
        ...


class NoJournal:
    """Saves nothing."""

    def load(self, name: str) -> None:
        return None

    def save(self, name: str, tensors: Tensors, where: str) -> None:
        return None

    def due(self) -> bool:
        return False
