"""The command line, one file per command: parse the options, make a request, run it, print the result. Imports no
torch."""

from __future__ import annotations

import time

_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)  # counts while the machine sleeps, where there is one
_STARTED = time.clock_gettime(_CLOCK)


def age() -> float:
    """Seconds since this program began. Its process may be older: a shell's, which became this program by exec."""
    return time.clock_gettime(_CLOCK) - _STARTED
