"""The streams and signals that a process finds: closed, broken, of another alphabet, or on their way out."""

from __future__ import annotations

import codecs
import os
import signal
import sys
from types import FrameType
from typing import TextIO

from tiler.errors import Interrupted

_PLAIN = {"×": "x", "–": "-", "…": "...", "²": "2", "·": "*", "→": "->"}


def prepare_streams() -> None:
    """Open what is closed, so that no picture gets the number of stderr and a library's words; let every character be
    printed in some way."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
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


def prepare_signals() -> None:
    """SIGINT, SIGTERM and SIGHUP become Interrupted, unless the process was started to ignore them (nohup)."""
    for number in (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """What was begun may be saved in peace; a second Ctrl-C ends it at once."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    for other in (signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])):
        signal.signal(other, signal.SIG_IGN)
    raise Interrupted(number)


def silence(stream: TextIO) -> None:
    """Nobody reads this stream any more: what is still in its buffer goes nowhere."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)
