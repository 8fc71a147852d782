"""A queue of pictures: each is drawn by a process of its own, one after another, under one ceiling. The queue's own
process stays in memory all the time, so it imports next to nothing; its rows have been interpreted elsewhere."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from tiler.errors import Interrupted, JobLocked, StorageError, UsageError
from tiler.jobs import claims, layout
from tiler.jobs.results import DONE, ELSEWHERE, FAILED, INTERRUPTED, SKIPPED, Results

OWN_BYTES = 20_000_000  # the share of the ceiling for this process
BESIDE = "TILER_BESIDE"  # environment variable for a picture's process: bytes of its ceiling that other processes use
BATCH = 64  # rows whose prompts are encoded together
_PATIENCE = 600.0  # seconds in which a picture can save its state
_SHOWN = 10  # failed rows named in the summary
_ORDER = (DONE, SKIPPED, ELSEWHERE, INTERRUPTED, FAILED)  # of the summary
_PR_SET_PDEATHSIG = 1  # prctl(2)


class Checked(NamedTuple):
    """A row with everything that can be known before it is drawn. `words` follow `tiler render`, without the output.
    `output` is relative to the queue's root, and `job` is the job folder. `digest` identifies everything that
    determines the picture and its place. `problem` says why the row cannot be drawn; the other fields are then empty.
    `wants_encoder` says that it pays to encode its prompts together with those of other rows."""

    row: int
    words: Sequence[str] = ()
    output: str = ""
    job: str = ""
    digest: int = 0
    notes: Sequence[str] = ()
    problem: str = ""
    wants_encoder: bool = False


def common_code(codes: Set[int]) -> int:
    """The exit code for many pictures: 0 if none failed, the common code of the failures, or 1 if their codes
    differ."""
    failed = codes - {0}
    return 0 if not failed else next(iter(failed)) if len(failed) == 1 else 1


@dataclass(kw_only=True)
class Tally:
    """The outcome of a queue."""

    statuses: Counter[str] = field(default_factory=Counter)
    codes: set[int] = field(default_factory=set)
    failed: list[int] = field(default_factory=list)  # the first failed rows

    @property
    def exit_code(self) -> int:
        """The common exit code of the failed rows."""
        return common_code(self.codes)

    def __str__(self) -> str:
        """A summary like "3 done, 2 failed (rows 4, 7)"."""
        number, rows = self.statuses[FAILED], ", ".join(map(str, self.failed))
        which = f" (row{'s' * (number > 1)} {rows}{', …' * (number > len(self.failed))})"
        return ", ".join(f"{n} {status}{which if status == FAILED else ''}" for status, n in self._ordered())

    def _ordered(self) -> list[tuple[str, int]]:
        return sorted(self.statuses.items(), key=lambda item: _ORDER.index(item[0]))


@dataclass(frozen=True, kw_only=True)
class Queue:
    """Draws rows below `root`, under one ceiling for this process and theirs. `results` gets a line for each row. With
    `shared`, rows that other machines draw are left to them. `encode` encodes the prompts of several rows ahead, `say`
    shows a line to the user, and `finished` receives a picture's report as `--json` prints it."""

    root: Path
    results: Results
    max_ram_bytes: int
    shared: bool = False
    fail_fast: bool = False
    encode: Callable[[list[Checked]], None] = lambda rows: None
    say: Callable[[str], None] = lambda text: None
    finished: Callable[[dict[str, Any]], None] = lambda report: None
    tally: Tally = field(default_factory=Tally)
    _outputs: array[int] = field(default_factory=lambda: array("Q"))  # hashes of the outputs so far

    def run(self, rows: Iterable[Iterable[Checked]]) -> Tally:
        """Draw all rows that are not done yet, group by group as they become known. Raises Interrupted, after the
        current picture has saved its state, and StorageError."""
        later: list[Checked] = []  # rows that another machine draws, or for which the disk is too full now
        for known in rows:
            for batch in _batches(self._undone(known)):
                self._draw_batch(batch, later)
                if self._is_over:
                    return self.tally
        for row in later:
            if self.results.is_done(row.row, row.digest) or not self._draw(row, is_last=True):
                self.tally.statuses[ELSEWHERE] += 1
            if self._is_over:
                break
        return self.tally

    @property
    def _is_over(self) -> bool:
        return self.fail_fast and bool(self.tally.codes)

    def _undone(self, rows: Iterable[Checked]) -> Iterator[Checked]:
        for row in rows:
            for note in row.notes:
                self.say(f"row {row.row}: {note}")
            problem = row.problem
            if not problem and not _add(self._outputs, hash(row.output) & (2**64 - 1)):
                problem = f"{self.root / row.output} is the output of another row too"
            if problem:
                self._note(row, FAILED, UsageError.exit_code, {"error": problem})
                if self.fail_fast:
                    return
            elif self._is_done(row):
                self.tally.statuses[SKIPPED] += 1
            else:
                yield row

    def _is_done(self, row: Checked) -> bool:
        if not (self.root / row.output).exists():
            return False
        if self.shared and not self.results.is_done(row.row, row.digest):
            self.results.look()
        return self.results.is_done(row.row, row.digest)

    def _draw_batch(self, batch: list[Checked], later: list[Checked]) -> None:
        wanting = [row for row in batch if row.wants_encoder]
        if len(wanting) > 1:
            self.encode(wanting)
        for row in batch:
            if not self._draw(row):
                later.append(row)
            if self._is_over:
                return

    def _draw(self, row: Checked, *, is_last: bool = False) -> bool:
        """Draw a row. Return False if another machine draws it, or if the disk is full and this is not the `is_last`
        attempt: other rows may need less space."""
        output, job = self.root / row.output, Path(row.job)
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            why = f"{output.parent}: cannot be made ({error.strerror}); choose another output"
            self._note(row, FAILED, StorageError.exit_code, {"error": why})
            return True
        if not self.shared:
            return self._draw_here(row, output, is_last=is_last)
        if not claims.claim(job):
            return False
        try:
            if self._is_done(row):  # finished between the first check and the claim
                self.tally.statuses[SKIPPED] += 1
                return True
            return self._draw_here(row, output, is_last=is_last)
        finally:
            claims.release(job)

    def _draw_here(self, row: Checked, output: Path, *, is_last: bool) -> bool:
        keeps = "--keep-job" in row.words
        own = ["--json", f"--max-ram={self.max_ram_bytes}", f"--output={output}", *["--keep-job"] * (not keeps)]
        at = row.words.index("--") if "--" in row.words else len(row.words)
        words = [*row.words[:at], *own, *row.words[at:]]
        self.say(f"row {row.row}: {output}")
        started, start = _now(), time.monotonic()
        process = popen([sys.executable, "-m", "tiler", "render", *words], stdout=subprocess.PIPE)
        try:
            with _pausing(process):
                told = self._told(process, Path(row.job))
        except (Interrupted, KeyboardInterrupt) as stop:
            number = int(stop.code or 0) - 128 if isinstance(stop, Interrupted) else signal.SIGINT
            end(process, number)
            self._note(row, INTERRUPTED, 128 + number, {"started": started})
            stop.add_note(f"{self.tally}; the same command continues")
            raise
        facts: dict[str, Any] = {"started": started, "seconds": round(time.monotonic() - start, 1)}
        code = process.returncode if process.returncode >= 0 else 128 - process.returncode
        if code == JobLocked.exit_code and self.shared:
            return False
        if code == StorageError.exit_code and not is_last and not self.fail_fast:
            self.say(f"row {row.row}: a file could not be written; trying again after the other rows")
            return False
        if code == 0:
            report = json.loads(told)
            facts |= {name: report[name] for name in ("seed", "peak_rss_bytes", "versions", "sha256")}
            self.finished(report)
        else:
            facts["error"] = _error_in(told, process.returncode)
        self._note(row, DONE if code == 0 else FAILED, code, facts)
        # Last: if the note is lost, the job still says that it is finished.
        if code == 0 and not keeps and not (self.shared and not claims.is_ours(Path(row.job))):
            layout.remove(Path(row.job))
        return True

    def _told(self, process: subprocess.Popen[bytes], job: Path) -> bytes:
        while True:
            try:
                told: bytes = process.communicate(timeout=claims.TOUCH_EVERY if self.shared else None)[0]
                return told
            except subprocess.TimeoutExpired:
                claims.touch(job)

    def _note(self, row: Checked, status: str, code: int, facts: dict[str, Any]) -> None:
        tally = self.tally
        tally.statuses[status] += 1
        if status == FAILED:
            tally.codes.add(code)
            tally.failed += [row.row] * (len(tally.failed) < _SHOWN)
            why = "" if "started" in facts else f": {facts['error']}"  # else the picture's process has printed it
            self.say(f"row {row.row}: failed with exit code {code}{why}")
        self.results.note(
            {
                "row": row.row, "digest": f"{row.digest:016x}", "status": status, "exit_code": code,
                "output": row.output or None, **facts,
            }
        )  # fmt: skip


def _batches(rows: Iterable[Checked]) -> Iterator[list[Checked]]:
    """Group rows that want an encoder; each other row ends its batch, so that it is drawn at once."""
    batch: list[Checked] = []
    for row in rows:
        batch.append(row)
        if len(batch) == BATCH or not row.wants_encoder:
            yield batch
            batch = []
    if batch:
        yield batch


def popen(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
    """Start a process of the queue in a process group of its own. Signals from the terminal thus reach only this
    process, which forwards them once."""
    environment = {**os.environ, BESIDE: str(OWN_BYTES)}
    options = {"stdin": subprocess.DEVNULL, **options}
    return subprocess.Popen(command, process_group=0, preexec_fn=_end_with_parent, env=environment, **options)


def end(process: subprocess.Popen[bytes], number: int) -> None:
    """Forward a signal, and wait while the process saves its state."""
    process.send_signal(number)
    try:
        process.communicate(timeout=_PATIENCE)
    except BaseException:
        process.kill()
        raise


@contextmanager
def _pausing(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Let Ctrl-Z also stop the picture's process, and `fg` continue both."""

    def stop(number: int, frame: FrameType | None) -> None:
        process.send_signal(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        process.send_signal(signal.SIGCONT)

    before = signal.signal(signal.SIGTSTP, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTSTP, before)


def _end_with_parent() -> None:
    """Called in the new process: when its parent ends for any reason, SIGTERM makes it save the picture and end too."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _error_in(told: bytes, returncode: int) -> str:
    """The error in a process's `--json` output."""
    try:
        return str(json.loads(told)["error"])
    except (ValueError, KeyError, TypeError):
        if returncode == -signal.SIGKILL:
            return "killed, perhaps by the system for want of memory; lower --max-ram"
        return "its process ended without a word"


def _add(found: array[int], value: int) -> bool:
    """Insert `value` into a sorted array, and return whether it was new. An array takes 8 bytes a row, a set 80."""
    at = bisect_left(found, value)
    if at < len(found) and found[at] == value:
        return False
    found.insert(at, value)
    return True


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
