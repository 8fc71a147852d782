"""Bands that other processes decode: what they are asked for and give back, and where their rows wait for the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from tiler.decoding.rows import Latents
from tiler.decoding.scratch import Rows, Scratch, free_bytes

DECODERS = 8  # processes at a time that decode: each is sent the statistics, up to 17 MB
SENDING_BYTES = 16_000_000  # of bands that are on their way at a time: as many as that holds, but at least one
PIECE_BYTES = 4_000_000  # of pixels in one answer, at least
ANSWER_BYTES = 4_400_000  # of pixels in one answer, at most: a strip more
_ROOM = 2  # times what early rows take: the space that must be free for them


class Band(NamedTuple):
    """Columns of latents: those that are pushed, and those of them that are kept."""

    first: int
    last: int
    keep: slice


def sending_at_once(band_bytes: int) -> int:
    """How many bands of so many bytes are on their way at a time."""
    return max(1, SENDING_BYTES // band_bytes)


def held_bytes(band_bytes: int, bands: int, statistics_bytes: int) -> int:
    """What a process holds that has others decode `bands` bands: those on their way and the statistics twice, as they
    are here and as they are sent, and two answers of each other process, one that waits and one that arrives."""
    sending = min(bands, sending_at_once(band_bytes))
    return 2 * (sending * band_bytes + statistics_bytes + min(DECODERS, bands) * ANSWER_BYTES)


class Work(NamedTuple):
    """All that others need: the held statistics, the latents (1, C, h, w) and their bands; and a few latents, `small`,
    with the pixels (3, h, w) that `frozen.probe` makes of them here."""

    statistics: bytes
    latents: Latents
    bands: list[Band]
    small: Tensor
    probe: Tensor


class Apart(Protocol):
    """Other processes that decode bands."""

    def begin(self, number: int, row: int) -> None:
        """Have the band of this number decoded from a row of pixels on."""
        ...

    def next(self) -> tuple[int, Tensor] | None:
        """The next rows, (3, n, w) fp32, of a band that has begun, with its number: the rows of each come in their
        order. None if all have come, or if nobody is left who decodes."""
        ...


Elsewhere = Callable[[Work], AbstractContextManager[Apart | None]]
"""What opens the connection to others. None if there is nobody."""


class Waiting:
    """The rows of a band, (channels, width) each and `rows` when it is whole, which wait in the scratch, and in its
    spool if it has one."""

    def __init__(self, scratch: Scratch, number: int, channels: int, width: int, rows: int) -> None:
        known = None if scratch.spool is None else scratch.spool.of(number)
        self._stored, self._rows = Rows(scratch, channels, width, number=number, known=known), rows
        self._scratch = scratch
        self.is_whole = known is not None and known.whole

    @property
    def count(self) -> int:
        return self._stored.count

    def add(self, strip: Tensor) -> None:
        """Append rows, (channels, n, width)."""
        stored, spool = self._stored, self._scratch.spool
        stored.append(strip[None])
        self.is_whole = stored.count >= self._rows
        if spool is not None:
            spool.note(stored.line(whole=self.is_whole), stored.fd)

    def read(self, first: int, last: int) -> Tensor:
        """Rows as (channels, n, width)."""
        return self._stored.read(first, last)[0]


class Early:
    """Rows, (3, n, w) fp32, of the last band that come before all others are whole: they wait in a file, in full."""

    def __init__(self, folder: Path, width: int, rows: int) -> None:
        self._scratch = Scratch(folder, torch.float32)
        self._stored = Rows(self._scratch, 3, width)
        self._taken = 0
        self.has_room = free_bytes(folder) >= _ROOM * self._stored.row_bytes * rows

    def add(self, strip: Tensor) -> None:
        self._stored.append(strip[None])

    def take(self) -> Iterator[Tensor]:
        """The rows that have not been taken yet."""
        for strip in self._stored.strips(begin=self._taken):
            self._taken += strip.shape[2]
            yield strip[0]

    def close(self) -> None:
        self._scratch.__exit__()


def rows_of_all(
    waiting: list[Waiting], begin: int, rows: int, here: Callable[[int, int], Iterator[Tensor]],
    apart: Apart | None, early: Early | None, tell: Callable[[int], None],
) -> Iterator[Tensor]:  # fmt: skip
    """Store the rows of the `waiting` bands and yield those of the last one, from the row `begin` of `rows` on, once
    the others are whole. They come from `apart` as long as anybody is there; `here` makes the rest, called with the
    number of a band and a row. `tell` gets the number of rows, of all bands together, that are done."""
    row = begin

    def told(strip: Tensor) -> Tensor:
        nonlocal row
        row += strip.shape[1]
        tell(row + sum(band.count for band in waiting))
        return strip

    if apart is not None and early is not None:
        for strip in _from(apart, waiting, early, begin, lambda: told(_NOTHING)):
            yield told(strip)
    for number, band in enumerate(waiting):
        if not band.is_whole:
            for strip in here(number, band.count):
                band.add(strip)
                told(_NOTHING)
    for strip in early.take() if early is not None else ():
        yield told(strip)
    if row < rows:
        for strip in here(len(waiting), row):
            yield told(strip)


_NOTHING = torch.empty(3, 0, 0)


def _from(
    apart: Apart, waiting: list[Waiting], early: Early, begin: int, stored: Callable[[], object]
) -> Iterator[Tensor]:
    for number, band in enumerate(waiting):
        if not band.is_whole:
            apart.begin(number, band.count)
    is_begun = early.has_room or all(band.is_whole for band in waiting)
    if is_begun:
        apart.begin(len(waiting), begin)
    while (arrived := apart.next()) is not None:
        number, strip = arrived
        if number < len(waiting):
            waiting[number].add(strip)
            stored()
            if all(band.is_whole for band in waiting):
                yield from early.take()
                if not is_begun:
                    is_begun = True
                    apart.begin(len(waiting), begin)
        elif all(band.is_whole for band in waiting):
            yield strip
        else:
            early.add(strip)
