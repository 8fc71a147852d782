"""The streams and signals that a process finds: closed, broken, of another alphabet, or on their way out."""

from __future__ import annotations

import codecs
import os
import re
import shutil
import signal
import sys
from types import FrameType
from typing import TextIO

from tiler import interrupts

_PLAIN = {"×": "x", "–": "-", "…": "...", "²": "2", "·": "*", "→": "->"}

closed_streams: set[int] = set()
"""Of 0, 1 and 2 those that this process was started without."""

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def prepare_streams() -> None:
    """Open what is closed, so that no picture gets the number of stderr and a library's words; let every character be
    printed in some way."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            closed_streams.add(number)
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if number == 0 else "w", encoding="utf-8", closefd=False))  # noqa: SIM115
    codecs.register_error("tiler", _spelt)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="tiler")


def _spelt(error: UnicodeError) -> tuple[str | bytes, int]:
    """A character that the terminal lacks, by one that it has; a byte of a file's name that was no UTF-8, as it was."""
    assert isinstance(error, UnicodeEncodeError)
    result = b""
    for character in error.object[error.start : error.end]:
        code = ord(character)
        result += bytes([code - 0xDC00]) if 0xDC80 <= code <= 0xDCFF else _PLAIN.get(character, "?").encode()
    return result, error.end


def harmless(text: str) -> str:
    """Text of others, whose control characters could move the cursor or rename the window, with these spelt out."""
    return _CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def columns() -> int:
    """How wide lines may be: as wide as the terminal, and as long as they like elsewhere."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000


def prepare_signals() -> None:
    """SIGINT, SIGTERM and SIGHUP stop the run, unless the process was started to ignore them (nohup); SIGUSR1 saves
    it."""
    for number in (signal.SIGINT, signal.SIGTERM, *_known("SIGHUP")):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)
    for number in _known("SIGUSR1"):
        signal.signal(number, lambda number, frame: interrupts.ask_to_save())


def _known(name: str) -> tuple[signal.Signals, ...]:
    """The signal of that name, where the system has it."""
    return (getattr(signal, name),) if hasattr(signal, name) else ()


def _interrupt(number: int, frame: FrameType | None) -> None:
    """What was begun may be saved in peace; a second Ctrl-C or SIGTERM ends it at once. A terminal that closes may send
    SIGHUP more than once."""
    for again in (signal.SIGINT, signal.SIGTERM):
        signal.signal(again, signal.SIG_DFL)
    for hangup in _known("SIGHUP"):
        signal.signal(hangup, signal.SIG_IGN)
    interrupts.stop(number)


def silence(stream: TextIO) -> None:
    """Nobody reads this stream any more: what is still in its buffer goes nowhere."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)
