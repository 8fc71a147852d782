"""What a long phase tells while it runs. The CLI draws these; a library's caller may ignore them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


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


Event = PhaseStarted | Progress | PhaseDone | Note

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
