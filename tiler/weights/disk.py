"""Measure how fast weights can be read that are not in the page cache."""

from __future__ import annotations

import math
import mmap
import os
import time
from pathlib import Path

_READ = 4 * 2**20  # bytes at a time, as a piece of weights
_BYTES = 32 * 2**20  # bytes of a measurement: a fifth of a second at 160 MB/s
_FEWEST = 8 * 2**20  # a smaller file is not measured


def disk_speed(path: Path) -> float:
    """The bytes per second read from the middle of the file past the page cache; infinite if the file is small or its
    file system has no direct reads."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return math.inf
    try:
        with mmap.mmap(-1, _READ) as buffer:  # direct reads need page-aligned buffers
            first = os.fstat(file).st_size // 2 // mmap.PAGESIZE * mmap.PAGESIZE
            begin, done = time.perf_counter(), 0
            while done < _BYTES and (got := os.preadv(file, [buffer], first + done)) == _READ:
                done += got
            return done / (time.perf_counter() - begin) if done >= _FEWEST else math.inf
    except OSError:
        return math.inf
    finally:
        os.close(file)
