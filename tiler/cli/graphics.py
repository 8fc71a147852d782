"""Pictures in a terminal: by kitty's graphics protocol, as sixels, or as coloured half blocks.

The terminal is asked which of these it understands. Kitty's protocol: sw.kovidgoyal.net/kitty/graphics-protocol;
sixels: DEC STD 070, chapter 14.
"""

from __future__ import annotations

import base64
import fcntl
import os
import re
import select
import struct
import termios
import time
import tty
from collections.abc import Iterator
from enum import StrEnum
from io import BytesIO
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console, ConsoleOptions
    from rich.segment import Segment

_WAIT = 0.5  # seconds for the terminal's answer
_COLUMNS, _ROWS = 60, 24  # cells that a picture may take, and at most half of the screen
_CELL = 10, 20  # pixels of a cell, if the terminal does not tell
_LEVELS = 6  # of each colour in the palette of sixels
_CHUNK = 4096  # bytes of base64 in one of kitty's commands


class Protocol(StrEnum):
    KITTY = "kitty"
    SIXEL = "sixel"
    BLOCKS = "blocks"


class Screen(NamedTuple):
    """A terminal: its size in cells, a cell's size in pixels, and the protocol for pictures."""

    columns: int
    rows: int
    cell: tuple[int, int]  # width, height
    protocol: Protocol

    def draw(self, pixels: np.ndarray) -> Drawn:
        """Pixels (h, w, 3) uint8, reduced so that they fit."""
        cell = (1, 2) if self.protocol is Protocol.BLOCKS else self.cell
        height, width = pixels.shape[:2]
        columns, rows = min(_COLUMNS, self.columns - 1), min(_ROWS, self.rows // 2)
        share = min(1.0, columns * cell[0] / width, rows * cell[1] / height)
        small = _reduced(pixels, max(1, int(height * share)), max(1, int(width * share)))
        lines, across = -(-small.shape[0] // cell[1]), -(-small.shape[1] // cell[0])
        if self.protocol is Protocol.KITTY:
            return Drawn(lines, _kitty(small, across, lines))
        return Drawn(lines, _sixels(small) if self.protocol is Protocol.SIXEL else _blocks(small))


class Drawn(NamedTuple):
    """Text that draws a picture from the cursor on, in so many lines. A renderable of rich, which leaves the cursor
    below."""

    lines: int
    text: str

    def plain(self) -> str:
        """What draws it at the left edge of an empty line."""
        return "\n" * self.lines + f"\x1b7\x1b[{self.lines}A\r{self.text}\x1b8"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        from rich.segment import ControlType, Segment

        yield Segment("\n" * self.lines)
        # A segment with a control code is passed on as it is.
        yield Segment(self.plain().lstrip("\n"), None, [(ControlType.CURSOR_FORWARD, 0)])


def screen_of(fd: int) -> Screen:
    """Ask the terminal at `fd`."""
    rows, columns, width, height = struct.unpack("HHHH", fcntl.ioctl(fd, termios.TIOCGWINSZ, bytes(8)))
    cell = (width // columns, height // rows) if columns and rows and width and height else _CELL
    said = _ask(fd, b"\x1b_Gi=1,s=1,v=1,a=q,t=d,f=24;AAAA\x1b\\\x1b[c")
    protocol = Protocol.BLOCKS
    if b"\x1b_Gi=1;OK" in said:
        protocol = Protocol.KITTY
    elif (attributes := re.search(rb"\x1b\[\?([\d;]*)c", said)) and b"4" in attributes[1].split(b";"):
        protocol = Protocol.SIXEL
    return Screen(columns or 80, rows or 24, cell, protocol)


def _ask(fd: int, question: bytes) -> bytes:
    """The terminal's answer up to its device attributes, which every terminal sends; what there is, if it is silent or
    we run in the background, where asking would stop the process."""
    try:
        if os.tcgetpgrp(fd) != os.getpgrp():
            return b""
    except OSError:
        pass  # not our controlling terminal
    answer, end = b"", time.monotonic() + _WAIT
    before = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd, termios.TCSANOW)
        os.write(fd, question)
        while not re.search(rb"\x1b\[\?[\d;]*c", answer) and (left := end - time.monotonic()) > 0:
            if not select.select([fd], [], [], left)[0] or not (read := os.read(fd, 1024)):
                break
            answer += read
    except OSError:
        pass  # it has gone, or is write-only
    finally:
        termios.tcsetattr(fd, termios.TCSANOW, before)
    return answer


def _reduced(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Means of areas: (h, w, 3) uint8 → (height, width, 3) uint8, no larger."""
    import numpy as np

    for axis, want in enumerate((height, width)):
        starts = np.arange(want + 1) * pixels.shape[axis] // want
        sums = np.add.reduceat(pixels, starts[:-1], axis=axis, dtype=np.float32)
        pixels = sums / np.diff(starts).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
    return (pixels + 0.5).astype(np.uint8)


def _kitty(pixels: np.ndarray, columns: int, rows: int) -> str:
    """A PNG over so many cells; the cursor does not move (C=1), and no answer comes (q=2)."""
    from tiler.output.png import PngWriter

    buffer = BytesIO()
    writer = PngWriter(buffer, pixels.shape[1], pixels.shape[0], {})
    writer.write(pixels)
    writer.close()
    data = base64.b64encode(buffer.getbuffer()).decode()
    parts = [data[at : at + _CHUNK] for at in range(0, len(data), _CHUNK)]
    commands = [f"m={int(n + 1 < len(parts))};{part}" for n, part in enumerate(parts)]
    commands[0] = f"a=T,f=100,q=2,C=1,c={columns},r={rows},{commands[0]}"
    return "".join(f"\x1b_G{command}\x1b\\" for command in commands)


def _sixels(pixels: np.ndarray) -> str:
    """In a palette of 216 colours, with ordered dithering (Bayer's matrix of 4 × 4)."""
    import numpy as np

    height, width = pixels.shape[:2]
    two = np.array([[0, 2], [3, 1]])
    bayer = (np.block([[4 * two, 4 * two + 2], [4 * two + 3, 4 * two + 1]]) + 0.5) / 16
    threshold = np.tile(bayer, (-(-height // 4), -(-width // 4)))[:height, :width, None]
    levels = (pixels / 255 * (_LEVELS - 1) + threshold).astype(np.uint8).clip(0, _LEVELS - 1)
    colours = levels @ np.array([_LEVELS**2, _LEVELS, 1], np.uint8)
    used = np.unique(colours).tolist()
    percent = [round(100 * n / (_LEVELS - 1)) for n in range(_LEVELS)]
    palette = (
        f"#{n};2;{percent[n // _LEVELS**2]};{percent[n // _LEVELS % _LEVELS]};{percent[n % _LEVELS]}" for n in used
    )
    bands = ("$".join(_band(colours[top : top + 6])) for top in range(0, height, 6))
    return f'\x1bP0;1q"1;1;{width};{height}' + "".join(palette) + "-".join(bands) + "\x1b\\"


def _band(rows: np.ndarray) -> Iterator[str]:
    """Up to six rows of colours, a colour at a time: a character holds a column's bits, and repeats are counted."""
    import numpy as np

    weights = (1 << np.arange(len(rows), dtype=np.uint8))[:, None]
    for colour in np.unique(rows).tolist():
        line = (63 + ((rows == colour) * weights).sum(axis=0)).astype(np.uint8).tobytes().decode()
        yield f"#{colour}" + re.sub(r"(.)\1{3,}", lambda run: f"!{len(run[0])}{run[1]}", line)


def _blocks(pixels: np.ndarray) -> str:
    """Two pixels in each cell: the upper half block's colour and its background."""
    lines = []
    for top in range(0, len(pixels), 2):
        upper, lower = pixels[top].tolist(), pixels[min(top + 1, len(pixels) - 1)].tolist()
        cells = ("\x1b[38;2;{};{};{};48;2;{};{};{}m▀".format(*a, *b) for a, b in zip(upper, lower, strict=True))
        lines.append("".join(cells) + "\x1b[0m")
    return "\r\n".join(lines)
