"""How a run is stopped from outside: the signal handler only sets a flag, and the work stops at a point where no data
is left half-written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tiler.errors import Interrupted


class _Wishes:
    """Requests that signals have made to this process."""

    stop = 0  # the signal's number
    save = False
    deferred = 0  # active `deferred` contexts


_wishes = _Wishes()


def stop(number: int) -> None:
    """Handle signal `number`: raise Interrupted at once, or, inside `deferred`, at the next `check`."""
    if not _wishes.deferred:
        raise Interrupted(number)
    _wishes.stop = number


def ask_to_save() -> None:
    """Called by a signal handler: the state is saved at the next opportunity, and the run continues."""
    _wishes.save = True


def take_save() -> bool:
    """Whether a save was requested. Reading the flag clears it."""
    asked, _wishes.save = _wishes.save, False
    return asked


def check() -> None:
    """Raise Interrupted if a stop is pending."""
    if _wishes.stop:
        number, _wishes.stop = _wishes.stop, 0
        raise Interrupted(number)


@contextmanager
def deferred() -> Iterator[None]:
    """Within this context, a stop waits until `check` is called or the context ends."""
    _wishes.deferred += 1
    try:
        yield
    finally:
        _wishes.deferred -= 1
    if not _wishes.deferred:
        check()
