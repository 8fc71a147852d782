"""The processes that draw the pictures of a queue: how they start, speak, pause and end."""

from __future__ import annotations

import ctypes
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NamedTuple

OWN_BYTES = 20_000_000  # the share of the ceiling for the queue's process
BESIDE = "TILER_BESIDE"  # environment variable for a picture's process: bytes of its ceiling that other processes use
NOTED = "TILER_NOTED"  # environment variable for a picture's process: what its options mean has been told already
_PATIENCE = 600.0  # seconds in which pictures can save their states
_PIECE = 65536
_PR_SET_PDEATHSIG = 1  # prctl(2)


class Ended(NamedTuple):
    """A process that has ended: the number of its row, its return code, and what it printed."""

    row: int
    returncode: int
    told: bytes


class _Stream:
    """A pipe from a process; `hear` is told each whole line of it, or nobody, and then everything is kept."""

    def __init__(self, row: int, fd: int, hear: Callable[[int, bytes], None] | None) -> None:
        self.row, self.fd, self._hear, self.kept = row, fd, hear, bytearray()
        os.set_blocking(fd, False)

    def read(self) -> bool:
        """Take what has come. Returns False at the end of the stream."""
        while True:
            try:
                piece = os.read(self.fd, _PIECE)
            except BlockingIOError:
                return True
            if not piece:
                self.flush()
                return False
            self.kept += piece
            if self._hear is not None:
                *lines, rest = bytes(self.kept).split(b"\n")
                self.kept = bytearray(rest)
                for line in lines:
                    self._hear(self.row, line)

    def flush(self) -> None:
        """Tell what is left of a line without an end."""
        if self._hear is not None and self.kept:
            self._hear(self.row, bytes(self.kept))
            self.kept.clear()


class Drawings:
    """The processes under way, by the numbers of their rows. `hear` is told each line that they write to standard
    error; without it they write to this process's own."""

    def __init__(self, hear: Callable[[int, bytes], None] | None = None) -> None:
        self._hear = hear
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._selector = selectors.DefaultSelector()

    def begin(self, row: int, command: list[str], beside_bytes: int) -> None:
        """Start a process whose ceiling it shares with `beside_bytes` of others."""
        error = None if self._hear is None else subprocess.PIPE
        process = popen(command, beside_bytes, stdout=subprocess.PIPE, stderr=error)
        self._processes[row] = process
        for pipe, hear in ((process.stdout, None), (process.stderr, self._hear)):
            if pipe is not None:
                self._selector.register(pipe, selectors.EVENT_READ, _Stream(row, pipe.fileno(), hear))

    def next_ended(self, seconds: float | None = None) -> Ended | None:
        """Wait until a process ends, at most `seconds`."""
        until = None if seconds is None else time.monotonic() + seconds
        while True:
            left = None if until is None else max(0.0, until - time.monotonic())
            ready = self._selector.select(left)
            for key, _ in ready:
                if not key.data.read():
                    if key.fileobj is self._processes[key.data.row].stdout:
                        return self._collect(key.data)
                    self._selector.unregister(key.fileobj)
            if not ready and left is not None:
                return None

    def _collect(self, output: _Stream) -> Ended:
        """The end of a process that has closed its standard output. If a signal interrupts the wait, the pipe is still
        watched, and tells of the end again."""
        process = self._processes[output.row]
        returncode = process.wait()
        for pipe in (process.stderr, process.stdout):
            if pipe is None:
                continue
            with suppress(KeyError):  # a command that it started may hold its standard error open
                said = self._selector.unregister(pipe).data
                said.read()
                said.flush()
            pipe.close()
        del self._processes[output.row]
        return Ended(output.row, returncode, bytes(output.kept))

    def end(self, number: int) -> Iterator[Ended]:
        """Forward a signal to all, and wait while they save their states."""
        until = time.monotonic() + _PATIENCE
        self._send(number)
        try:
            while self._processes and (ended := self.next_ended(max(0.0, until - time.monotonic()))) is not None:
                yield ended
        finally:
            self._send(signal.SIGKILL)  # to those that have not obeyed

    def _send(self, number: int) -> None:
        for process in self._processes.values():
            process.send_signal(number)

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """Let Ctrl-Z also stop the pictures' processes, and `fg` continue all."""

        def stop(number: int, frame: FrameType | None) -> None:
            self._send(signal.SIGSTOP)
            os.kill(os.getpid(), signal.SIGSTOP)
            self._send(signal.SIGCONT)

        before = signal.signal(signal.SIGTSTP, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGTSTP, before)


def popen(command: list[str], beside_bytes: int = OWN_BYTES, **options: object) -> subprocess.Popen[bytes]:
    """Start a process of the queue in a process group of its own. Signals from the terminal thus reach only this
    process, which forwards them once."""
    environment = {**os.environ, BESIDE: str(beside_bytes)}
    options = {"stdin": subprocess.DEVNULL, **options}
    return subprocess.Popen(  # type: ignore[call-overload]
        command, process_group=0, preexec_fn=_end_with_parent, env=environment, **options
    )


def end(process: subprocess.Popen[bytes], number: int) -> None:
    """Forward a signal, and wait while the process saves its state."""
    process.send_signal(number)
    try:
        process.communicate(timeout=_PATIENCE)
    except BaseException:
        process.kill()
        raise


def _end_with_parent() -> None:
    """Called in the new process: when its parent ends for any reason, SIGTERM makes it save the picture and end too."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
