"""The standard streams and signals of a process: streams may be closed or lack characters, and their readers may go."""

from __future__ import annotations

import codecs
import os
import re
import shutil
import signal
import sys
import textwrap
from types import FrameType
from typing import TextIO

from tiler import interrupts

_PLAIN = {"×": "x", "–": "-", "…": "...", "²": "2", "·": "*", "→": "->"}

closed_streams: set[int] = set()
"""The standard descriptors (0, 1, 2) that were closed when this process started."""

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def prepare_streams() -> None:
    """Open standard streams that are closed, so that a picture never gets the descriptor to which libraries write
    errors, and make every character printable."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            closed_streams.add(number)
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if number == 0 else "w", encoding="utf-8", closefd=False))  # noqa: SIM115
    codecs.register_error("tiler", _spelt)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="tiler")


def _spelt(error: UnicodeError) -> tuple[str | bytes, int]:
    """Replace a character that the terminal lacks by one that it has. Bytes of a file name that are not UTF-8 are
    kept."""
    assert isinstance(error, UnicodeEncodeError)
    result = b""
    for character in error.object[error.start : error.end]:
        code = ord(character)
        result += bytes([code - 0xDC00]) if 0xDC80 <= code <= 0xDCFF else _PLAIN.get(character, "?").encode()
    return result, error.end


def harmless(text: str) -> str:
    """Escape the control characters of foreign text, which could move the cursor or rename the window."""
    return _CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def duration(seconds: float) -> str:
    """A duration for people: "1 h 5 min", "3 min 20 s", "12 s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def size(nbytes: int) -> str:
    """A file's size for people: "2.1 GB", "335 MB", "12 kB"."""
    if nbytes >= 999_500_000:
        return f"{nbytes / 1e9:.1f} GB"
    return f"{nbytes / 1e6:.0f} MB" if nbytes >= 10**6 else f"{-(-nbytes // 1000)} kB"


def wrapped(text: str, indent: int, width: int = 80) -> str:
    """`text` in lines of `width` columns, those after the first indented. Words, such as paths, stay in one piece."""
    return textwrap.fill(
        text[indent:], width, initial_indent=text[:indent], subsequent_indent=" " * indent,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def columns() -> int:
    """The width of lines: the terminal's width, and unlimited if the output is no terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000


def prepare_signals() -> None:
    """Let SIGINT, SIGTERM and SIGHUP stop the run, unless the process was started to ignore them (nohup), and let
    SIGUSR1 save it."""
    for number in (signal.SIGINT, signal.SIGTERM, *_known("SIGHUP")):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)
    for number in _known("SIGUSR1"):
        signal.signal(number, lambda number, frame: interrupts.ask_to_save())


def _known(name: str) -> tuple[signal.Signals, ...]:
    """The signal of that name, if the system has it."""
    return (getattr(signal, name),) if hasattr(signal, name) else ()


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Stop the run, which may first save its state; a second Ctrl-C or SIGTERM kills it at once. SIGHUP is ignored from
    now on, because a closing terminal may send it more than once."""
    for again in (signal.SIGINT, signal.SIGTERM):
        signal.signal(again, signal.SIG_DFL)
    for hangup in _known("SIGHUP"):
        signal.signal(hangup, signal.SIG_IGN)
    interrupts.stop(number)


def silence(stream: TextIO) -> None:
    """Discard what is still in the buffer of a stream that nobody reads any more."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)
