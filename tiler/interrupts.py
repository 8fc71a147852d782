"""How a run is stopped from outside: a signal's handler only takes note, and the work under way ends where nothing is
torn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tiler.errors import Interrupted


class _Wishes:
    """What signals have asked of this process."""

    stop = 0  # the signal's number
    save = False
    deferred = 0  # blocks that want to end by themselves


_wishes = _Wishes()


def stop(number: int) -> None:
    """Called by the handler of signal `number`: raises Interrupted at once, or from the next `check` inside
    `deferred`."""
    if not _wishes.deferred:
        raise Interrupted(number)
    _wishes.stop = number


def ask_to_save() -> None:
    """Called by a handler: what can be saved is saved at the next opportunity, and the run goes on."""
    _wishes.save = True


def take_save() -> bool:
    """Whether saving was asked for; the next call says no."""
    asked, _wishes.save = _wishes.save, False
    return asked


def check() -> None:
    """Raise Interrupted where a stop is waiting."""
    if _wishes.stop:
        number, _wishes.stop = _wishes.stop, 0
        raise Interrupted(number)


@contextmanager
def deferred() -> Iterator[None]:
    """While the block lasts, a stop waits for a call of `check`, or for the block's end."""
    _wishes.deferred += 1
    try:
        yield
    finally:
        _wishes.deferred -= 1
    if not _wishes.deferred:
        check()
