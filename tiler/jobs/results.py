"""FILE.results.jsonl: a line for each row of a queue that was drawn or failed, appended; and which rows are done by
it."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Any

from tiler.errors import StorageError

DONE, FAILED, INTERRUPTED, SKIPPED, ELSEWHERE = "done", "failed", "interrupted", "skipped", "left to other machines"
_MOST_ROWS = 10**7  # whatever a damaged file says
_SUFFIX = ".results.jsonl"


def file_of(queue: Path, host: str = "") -> Path:
    """Where the results of a queue's file go; each of several machines has a file of its own."""
    return queue.with_name(f"{queue.name}{f'.{host}' if host else ''}{_SUFFIX}")


class Results:
    """`path` is written, and read once; with `shared`, so are those of other machines beside it, and `look` reads what
    they have appended."""

    def __init__(self, path: Path, queue: str, *, shared: bool) -> None:
        self.path = path
        self._queue, self._shared = queue, shared
        self._done = array("Q")  # by row, the digest of what it said when it was drawn; 0 where it was not
        self._read = dict[Path, int]()  # how far
        self._torn = False  # the file's last line
        self.look()

    def is_done(self, row: int, digest: int) -> bool:
        return row < len(self._done) and self._done[row] == digest

    def look(self) -> None:
        """Raises StorageError."""
        others = self.path.parent.glob(f"{_quoted(self._queue)}*{_SUFFIX}") if self._shared else ()
        for path in {self.path, *others}:
            if path.exists():
                self._take(path)

    def note(self, line: dict[str, Any]) -> None:
        """Raises StorageError."""
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
                    if line.endswith(b"\n"):  # else half a line, of a power cut, or of a machine that is writing it
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
    """For a glob."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
