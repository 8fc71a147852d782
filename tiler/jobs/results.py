"""The file FILE.results.jsonl, which gets a line for each row of a queue that was drawn or failed, and from which the
queue learns which rows are done."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Any

from tiler.errors import StorageError

DONE, FAILED, INTERRUPTED, SKIPPED, ELSEWHERE = "done", "failed", "interrupted", "skipped", "left to other machines"
_MOST_ROWS = 10**7  # a limit for damaged files
_SUFFIX = ".results.jsonl"


def file_of(queue: Path, host: str = "") -> Path:
    """The results file of a queue's file. With several machines, each has a results file of its own."""
    return queue.with_name(f"{queue.name}{f'.{host}' if host else ''}{_SUFFIX}")


class Results:
    """The results in the file `path`, read once and then appended to. With `shared`, the results files of other
    machines beside it are read too; `look` reads what was appended to them since."""

    def __init__(self, path: Path, queue: str, *, shared: bool) -> None:
        self.path = path
        self._queue, self._shared = queue, shared
        self._done = array("Q")  # by row: its digest when it was drawn, or 0
        self._read = dict[Path, int]()  # bytes read, by file
        self._torn = False  # whether the last line of `path` is incomplete
        self.look()

    def is_done(self, row: int, digest: int) -> bool:
        return row < len(self._done) and self._done[row] == digest

    def look(self) -> None:
        """Read the lines that were appended since the last call. Raises StorageError."""
        others = self.path.parent.glob(f"{_quoted(self._queue)}*{_SUFFIX}") if self._shared else ()
        for path in {self.path, *others}:
            if path.exists():
                self._take(path)

    def note(self, line: dict[str, Any]) -> None:
        """Append a line. Raises StorageError."""
        try:
            with self.path.open("ab") as file:
                file.write(b"\n" * self._torn + json.dumps(line).encode() + b"\n")
            self._torn = False
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be written ({error.strerror}); free some space") from error

    def _take(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                while line := file.readline():
                    if line.endswith(b"\n"):  # else incomplete, after a power cut or while another machine writes it
                        self._read[path] = file.tell()
                        self._learn(line)
                    elif path == self.path:
                        self._torn = True
        except OSError as error:
            raise StorageError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error

    def _learn(self, line: bytes) -> None:
        try:
            found = json.loads(line)
            row, digest = int(found["row"]), int(found["digest"], 16)
            if found["status"] == DONE and 0 <= row <= _MOST_ROWS:
                self._done.extend([0] * (row + 1 - len(self._done)))
                self._done[row] = digest
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return


def _quoted(name: str) -> str:
    """Escape a name for a glob pattern."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
