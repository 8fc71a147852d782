"""A queue of pictures: one process for each, one after another, under one ceiling. Imports no torch."""

from __future__ import annotations

import ctypes
import hashlib
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
from typing import Any

from tiler.errors import Interrupted, StorageError, UsageError
from tiler.jobs import naming
from tiler.jobs.coding import encode
from tiler.jobs.rows import NAME, Row
from tiler.request import RenderRequest
from tiler.request.render import OF_THE_MACHINE

DONE, FAILED, INTERRUPTED, SKIPPED = "done", "failed", "interrupted", "skipped"
_PATIENCE = 600.0  # seconds that a picture has to save itself
_MOST_ROWS = 10**7  # whatever a damaged file of results says
_SHOWN = 10  # failed rows that the summary names
_PR_SET_PDEATHSIG = 1  # prctl(2)


def common_code(codes: Set[int]) -> int:
    """The exit code of many pictures: 0 where none failed, the one of those that did, or 1 where theirs differ."""
    failed = codes - {0}
    return 0 if not failed else next(iter(failed)) if len(failed) == 1 else 1


@dataclass(kw_only=True)
class Tally:
    """How a queue went."""

    statuses: Counter[str] = field(default_factory=Counter)
    codes: set[int] = field(default_factory=set)
    failed: list[int] = field(default_factory=list)  # the first rows that did

    @property
    def exit_code(self) -> int:
        """Of the failed rows."""
        return common_code(self.codes)

    def __str__(self) -> str:
        """ "3 done, 2 failed (rows 4, 7)"."""
        number, rows = self.statuses[FAILED], ", ".join(map(str, self.failed))
        which = f" (row{'s' * (number > 1)} {rows}{', …' * (number > len(self.failed))})"
        return ", ".join(f"{n} {status}{which if status == FAILED else ''}" for status, n in self.statuses.items())


@dataclass(frozen=True, kw_only=True)
class Queue:
    """`defaults` are words of `tiler render` that stand before each row's, `check` parses them together, and raises
    UsageError. `results` gets a JSON object for each row; `say` a line for people, `finished` a picture's report as
    `--json` gives it."""

    root: Path
    results: Path
    defaults: Sequence[str]
    max_ram_bytes: int
    check: Callable[[Sequence[str]], RenderRequest]
    name: str = NAME
    fail_fast: bool = False
    say: Callable[[str], None] = lambda text: None
    finished: Callable[[dict[str, Any]], None] = lambda report: None

    def run(self, rows: Iterable[Row]) -> Tally:
        """Draw all rows that are not done yet. Raises Interrupted, after the picture under way has saved itself, and
        StorageError."""
        tally, done, outputs = Tally(), self._done(), array("Q")
        for row in rows:
            for note in row.notes:
                self.say(f"row {row.index}: {note}")
            try:
                asked = self.ask(row)
                output = self.output_of(row, asked)
                if not _add(outputs, _hash(str(output))):
                    raise UsageError(f"{output} is the output of another row too")
            except UsageError as error:
                self._note(tally, row, 0, None, FAILED, error.exit_code, {"error": str(error)})
                if self.fail_fast:
                    break
                continue
            digest = _digest(asked, output)
            if row.index < len(done) and done[row.index] == digest and output.exists():
                tally.statuses[SKIPPED] += 1
                continue
            self._draw(tally, row, digest, output)
            if self.fail_fast and tally.codes:
                break
        return tally

    def ask(self, row: Row) -> RenderRequest:
        """The request of a row. Raises UsageError for one that cannot be drawn."""
        if row.problem is not None:
            raise UsageError(row.problem)
        return self.check(self._words(row))

    def output_of(self, row: Row, asked: RenderRequest) -> Path:
        """Where a row's picture goes: below the root, whatever it says. Raises UsageError."""
        template = self.name if row.output is None else row.output
        return naming.below(self.root, naming.fill(template, index=row.index, seed=asked.seed, prompt=asked.prompt))

    def _words(self, row: Row, *own: str) -> list[str]:
        """What follows `tiler render`. Of an option that is given twice the last one holds; a prompt comes after
        `--`."""
        words = list(self.defaults)
        at = words.index("--") if "--" in words else len(words)
        prompt = words[at:] if row.prompt is None else ["--", row.prompt]
        return [*words[:at], *row.words, "--count=1", "--output-dir=", *own, *prompt]

    def _draw(self, tally: Tally, row: Row, digest: int, output: Path) -> None:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            why = f"{output.parent}: cannot be made ({error.strerror}); choose another output"
            self._note(tally, row, digest, output, FAILED, StorageError.exit_code, {"error": why})
            return
        words = self._words(row, "--json", f"--max-ram={self.max_ram_bytes}", f"--output={output}")
        self.say(f"row {row.index}: {output}")
        started, start = _now(), time.monotonic()
        # A group of its own: what the terminal sends arrives here, once, and is handed on.
        process = subprocess.Popen(
            [sys.executable, "-m", "tiler", "render", *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            process_group=0, preexec_fn=_end_with_parent,
        )  # fmt: skip
        try:
            with _pausing(process):
                told, _ = process.communicate()
        except (Interrupted, KeyboardInterrupt) as stop:
            number = int(stop.code or 0) - 128 if isinstance(stop, Interrupted) else signal.SIGINT
            process.send_signal(number)
            try:
                process.communicate(timeout=_PATIENCE)
            except BaseException:
                process.kill()
                raise
            self._note(tally, row, digest, output, INTERRUPTED, 128 + number, {"started": started})
            stop.add_note(f"{tally}; the same command goes on")
            raise
        facts: dict[str, Any] = {"started": started, "seconds": round(time.monotonic() - start, 1)}
        code = process.returncode if process.returncode >= 0 else 128 - process.returncode
        if code == 0:
            report = json.loads(told)
            facts |= {name: report[name] for name in ("seed", "peak_rss_bytes", "versions")}
            facts["sha256"] = _sha256(output)
            self.finished(report)
        else:
            facts["error"] = _error_in(told, process.returncode)
        self._note(tally, row, digest, output, DONE if code == 0 else FAILED, code, facts)

    def _note(
        self, tally: Tally, row: Row, digest: int, output: Path | None, status: str, code: int, facts: dict[str, Any]
    ) -> None:
        tally.statuses[status] += 1
        if status == FAILED:
            tally.codes.add(code)
            tally.failed += [row.index] * (len(tally.failed) < _SHOWN)
            why = "" if "started" in facts else f": {facts['error']}"  # else the picture's process has said it
            self.say(f"row {row.index}: failed with exit code {code}{why}")
        line = {
            "row": row.index, "digest": f"{digest:016x}", "status": status, "exit_code": code,
            "output": None if output is None else str(output.relative_to(self.root)), **facts,
        }  # fmt: skip
        try:
            with self.results.open("ab") as file:
                file.write(json.dumps(line).encode() + b"\n")
        except OSError as error:
            raise StorageError(f"{self.results}: cannot be written ({error.strerror}); free some space") from error

    def _done(self) -> array[int]:
        """By row, the digest of what it said when it was drawn; 0 where it was not."""
        done = array("Q")
        if not self.results.exists():
            return done
        try:
            with self.results.open("rb") as file:
                for line in file:
                    try:
                        found = json.loads(line)
                        row, digest = int(found["row"]), int(found["digest"], 16)
                        if found["status"] == DONE and 0 <= row <= _MOST_ROWS:
                            done.extend([0] * (row + 1 - len(done)))
                            done[row] = digest
                    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                        continue  # half a line, of a power cut
        except OSError as error:
            raise StorageError(f"{self.results}: cannot be read ({error.strerror}); check its permissions") from error
        return done


@contextmanager
def _pausing(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Let Ctrl-Z stop the picture's process as well, and `fg` go on with both."""

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
    """In the new process: when this one ends, however that comes, the picture is saved and its process ends too."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _error_in(told: bytes, returncode: int) -> str:
    """What `--json` printed of an error."""
    try:
        return str(json.loads(told)["error"])
    except (ValueError, KeyError, TypeError):
        if returncode == -signal.SIGKILL:
            return "killed, perhaps by the system for want of memory; lower --max-ram"
        return "its process ended without a word"


def _add(found: array[int], value: int) -> bool:
    """Put `value` into a rising array, unless it is there: 8 bytes a row, where a set takes 80."""
    at = bisect_left(found, value)
    if at < len(found) and found[at] == value:
        return False
    found.insert(at, value)
    return True


def _digest(asked: RenderRequest, output: Path) -> int:
    """Of all that decides a picture, and of its place."""
    said = {name: value for name, value in encode(asked).items() if name not in OF_THE_MACHINE}
    return _hash(json.dumps([str(output), said], sort_keys=True))


def _hash(text: str) -> int:
    """64 bits of SHA-256."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def _sha256(path: Path) -> str | None:
    """None where the picture is gone by now: --on-done may have taken it elsewhere."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def lower_priority(nice: int) -> None:
    """So that other programs come first."""
    if nice:
        os.nice(nice)
