"""Remembered passes: a decoder's rows in named files, and a journal with a line for each complete pass; or, for a
decoder without passes, the rows of the picture that are finished (kept.py), and for an encoder those of the latents.

A line records the rows, the statistics that the next norm needs, and the earlier files that are no longer read. After a
kill all of this is intact, because the page cache outlives a process. After a power cut, which means another boot, only
synced lines count.
"""

from __future__ import annotations

import errno
import json
import os
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tiler.errors import StorageError
from tiler.files import make_own_folder

JOURNAL = "journal.jsonl"
MEASURED, BANDS = (
    400,
    500,
)  # numbers behind those of passes: what was measured of the whole picture, bands of its columns
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_SYNC_EVERY = 60.0  # seconds of work that a power cut may take
_PART_EVERY = 5.0  # seconds of a pass's work that a kill may take, where it can go on in the middle


@dataclass(frozen=True, kw_only=True)
class Line:
    """A pass, or its first rows if it is not `whole`. `statistics` are count, means and sums of squares by group, with
    floats in hexadecimal; `scales` belong to rows that are stored scaled; `closes` lists the passes whose rows are no
    longer needed; `strips` are the heights of the strips of a finished picture, in runs of equal ones: (height, how
    many)."""

    number: int
    channels: int
    width: int
    count: int
    row_bytes: int
    whole: bool
    statistics: tuple[int, list[str], list[str]] | None = None
    scales: list[float] | None = None
    closes: tuple[int, ...] = ()
    strips: list[tuple[int, int]] | None = None
    boot: str = ""
    synced: bool = False


class Spool:
    """A folder for one decode (or encode), identified by the text `of`: files of another one are removed. `what`
    describes it to people; `on_pass` is called with a description of each completed pass. Raises StorageError."""

    def __init__(self, folder: Path, what: str, of: str, on_pass: Callable[[str], None] = lambda where: None) -> None:
        self.folder, self._what, self._on_pass = folder, what, on_pass
        self._boot = _boot()
        self._synced = self._told = time.monotonic()
        try:
            make_own_folder(folder)
            self._known = self._load(of)
        except OSError as error:
            raise self._lost(error) from error

    @property
    def is_empty(self) -> bool:
        """Whether no pass is remembered."""
        return not self._known

    def of(self, number: int) -> Line | None:
        """The remembered state of a pass."""
        return self._known.get(number)

    def open(self, number: int) -> int:
        """The file of a pass's rows; -1 if the rows were already read and removed."""
        line = self._known.get(number)
        mode = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (0 if line is not None else os.O_CREAT | os.O_TRUNC)
        with suppress(FileNotFoundError):
            return os.open(self._path(number), mode, 0o666)
        return -1

    def remove(self, number: int) -> None:
        """Delete the rows of a pass, which are no longer read."""
        with suppress(FileNotFoundError):
            os.unlink(self._path(number))

    def note(self, line: Line, fd: int) -> None:
        """Record a complete pass, or the part that the line describes; `fd` is its file. Only some parts are
        recorded."""
        now = time.monotonic()
        if not line.whole and now - self._told < _PART_EVERY:
            return
        synced = now - self._synced >= _SYNC_EVERY
        try:
            if synced:
                _sync(fd)
            self._write(asdict(line) | {"boot": self._boot, "synced": synced}, synced=synced)
        except OSError as error:
            raise self._lost(error) from error
        self._told = now
        if synced:
            self._synced = now
        if line.whole or line.strips is not None or line.number >= BANDS:
            self._on_pass(_where(line.number, line.count, self._what, has_rows=line.strips is not None))

    def _write(self, said: dict[str, Any], *, synced: bool) -> None:
        text = json.dumps(said)
        data = f"{zlib.crc32(text.encode()):08x} {text}\n".encode()
        fd = os.open(
            self.folder / JOURNAL, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666
        )
        try:
            if os.write(fd, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if synced:
                _sync(fd)
        finally:
            os.close(fd)

    def _load(self, of: str) -> dict[int, Line]:
        """The longest prefix of the journal whose files all exist; the rest is dropped."""
        lines, ends = list[Line](), list[int]()
        begun = False
        for said, end in _read(self.folder / JOURNAL):
            if not begun:
                if said.get("of") != of:
                    break
                begun = True
                ends.append(end)
                continue
            try:
                lines.append(Line(**said))
            except TypeError:
                break
            ends.append(end)
        if not begun:
            clear(self.folder)
            self.folder.mkdir(mode=0o700, exist_ok=True)
            self._write({"of": of, "what": self._what}, synced=False)
            return {}
        length = next(n for n in range(len(lines), -1, -1) if self._stands(lines[:n]))
        os.truncate(self.folder / JOURNAL, ends[length])
        known = {line.number: line for line in lines[:length]}
        for path in self.folder.glob("*.rows"):
            if path.name not in {self._path(number).name for number in _live(lines[:length])}:
                path.unlink()
        return known

    def _stands(self, lines: list[Line]) -> bool:
        for line in _live(lines).values():
            try:
                size = self._path(line.number).stat().st_size
            except FileNotFoundError:
                return False
            if size < line.count * line.row_bytes or not (line.synced or line.boot == self._boot):
                return False
        return True

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:02}.rows"

    def _lost(self, error: OSError) -> StorageError:
        return StorageError(f"{self.folder}: cannot be used ({error.strerror}); give another folder with --scratch")


def where_in(folder: Path) -> str:
    """A description of the last complete pass, like "pass 12 of the decoder", of the last band, complete or not, or of
    the last row, like "row 640 of the decoder", else "the beginning of the decoder"; empty if it has not begun."""
    said = [each for each, _ in _read(folder / JOURNAL)]
    of_picture = [each for each in said if each.get("strips") is not None]
    whole = of_picture or [each for each in said if each.get("whole") or each.get("number", 0) >= BANDS]
    if not whole:
        return f"the beginning of {said[0].get('what', '')}" if said else ""
    last = max(whole, key=lambda each: (each["number"], each["count"]))
    return _where(last["number"], last["count"], said[0].get("what", ""), has_rows=bool(of_picture))


def _where(number: int, rows: int, what: str, *, has_rows: bool) -> str:
    if has_rows:
        return f"row {rows} of {what}"
    if number >= BANDS:
        return f"band {number - BANDS + 1} of {what}"
    return f"the beginning of {what}" if number >= MEASURED else f"pass {number + 1} of {what}"


def bytes_in(folder: Path) -> int:
    """The size of the folder's files."""
    with suppress(OSError):
        return sum(path.stat().st_blocks * 512 for path in folder.iterdir())
    return 0


def clear(folder: Path) -> None:
    """Delete the files of a spool, and the folder if it contains nothing else."""
    if folder.is_symlink():  # of whoever may write there: the files are others'
        return
    with suppress(OSError):
        for path in (*folder.glob("*.rows"), folder / JOURNAL):
            path.unlink(missing_ok=True)
        folder.rmdir()


def _live(lines: list[Line]) -> dict[int, Line]:
    """The passes whose rows are still needed after these lines."""
    live: dict[int, Line] = {}
    for line in lines:
        live[line.number] = line
        for closed in line.closes:
            live.pop(closed, None)
    return live


def _read(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """The journal's lines up to the first damaged one, and the position where each ends."""
    at = 0
    with suppress(OSError, ValueError), open(path, "rb") as file:
        for line in file:
            at += len(line)
            check, _, text = line.partition(b" ")
            if not line.endswith(b"\n") or int(check, 16) != zlib.crc32(text[:-1]):
                return
            yield json.loads(text), at


def _sync(fd: int) -> None:
    """Flush a folder or file; not every file system can."""
    try:
        os.fdatasync(fd)
    except OSError as error:
        if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise


def _boot() -> str:
    with suppress(OSError):
        return _BOOT.read_text().strip()
    return ""
