"""A queue of pictures: one process for each, one after another, under one ceiling. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiler.errors import Interrupted, StorageError, UsageError
from tiler.jobs.rows import Row, output_of

DONE, FAILED, INTERRUPTED, SKIPPED = "done", "failed", "interrupted", "skipped"
_PATIENCE = 600.0  # seconds that a picture has to save itself


@dataclass(kw_only=True)
class Tally:
    """How a queue went."""

    statuses: Counter[str] = field(default_factory=Counter)
    codes: set[int] = field(default_factory=set)

    @property
    def exit_code(self) -> int:
        """0, the failed rows' code, or 1 where they differ."""
        return 0 if not self.codes else next(iter(self.codes)) if len(self.codes) == 1 else 1


@dataclass(frozen=True, kw_only=True)
class Queue:
    """`defaults` are words of `tiler render` that stand before each row's; `results` gets a JSON object for each row."""

    root: Path
    results: Path
    defaults: Sequence[str]
    max_ram_bytes: int
    fail_fast: bool = False
    say: Callable[[str], None] = lambda text: None

    def run(self, rows: Iterable[Row]) -> Tally:
        """Draw all rows that are not done yet. Raises Interrupted, after the picture under way has saved itself, and
        StorageError."""
        tally, done, outputs = Tally(), self._done(), set[int]()
        for row in rows:
            for note in row.notes:
                self.say(f"row {row.index}: {note}")
            try:
                if row.problem is not None:
                    raise UsageError(row.problem)
                output = output_of(row, self.root)
                if (mark := hash(str(output))) in outputs:
                    raise UsageError(f"{output} is the output of another row too")
                outputs.add(mark)
            except UsageError as error:
                self._note(tally, row, None, FAILED, 2, {"error": str(error)})
                if self.fail_fast:
                    break
                continue
            if done.get(row.index) == row.digest and output.exists():
                tally.statuses[SKIPPED] += 1
                continue
            self._draw(tally, row, output)
            if self.fail_fast and tally.codes:
                break
        return tally

    def _draw(self, tally: Tally, row: Row, output: Path) -> None:
        output.parent.mkdir(parents=True, exist_ok=True)
        own = ["--json", f"--max-ram={self.max_ram_bytes}", f"--output={output}"]
        prompt = [] if row.prompt is None else ["--", row.prompt]
        command = [sys.executable, "-m", "tiler", "render", *self.defaults, *row.words, *own, *prompt]
        self.say(f"row {row.index}: {output}")
        started, start = _now(), time.monotonic()
        # A group of its own: what the terminal sends arrives here, once, and is handed on.
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, process_group=0)
        try:
            told, _ = process.communicate()
        except (Interrupted, KeyboardInterrupt) as stop:
            number = int(stop.code or 0) - 128 if isinstance(stop, Interrupted) else signal.SIGINT
            process.send_signal(number)
            try:
                process.communicate(timeout=_PATIENCE)
            except BaseException:
                process.kill()
                raise
            self._note(tally, row, output, INTERRUPTED, 128 + number, {"started": started})
            raise
        facts: dict[str, Any] = {"started": started, "seconds": round(time.monotonic() - start, 1)}
        code = process.returncode if process.returncode >= 0 else 128 - process.returncode
        if code == 0:
            report = json.loads(told)
            facts |= {name: report[name] for name in ("seed", "peak_rss_bytes", "versions")}
            facts["sha256"] = _sha256(output)
        self._note(tally, row, output, DONE if code == 0 else FAILED, code, facts)

    def _note(self, tally: Tally, row: Row, output: Path | None, status: str, code: int, facts: dict[str, Any]) -> None:
        tally.statuses[status] += 1
        if code and status == FAILED:
            tally.codes.add(code)
            self.say(
                f"row {row.index}: failed with exit code {code}{': ' if 'error' in facts else ''}{facts.get('error', '')}"
            )
        line = {
            "row": row.index, "digest": row.digest, "status": status, "exit_code": code,
            "output": None if output is None else str(output.relative_to(self.root)), **facts,
        }  # fmt: skip
        try:
            with self.results.open("ab") as file:
                file.write(json.dumps(line).encode() + b"\n")
        except OSError as error:
            raise StorageError(f"{self.results}: cannot be written ({error.strerror}); free some space") from error

    def _done(self) -> dict[int, str]:
        """By row, what it said when it was drawn."""
        done = dict[int, str]()
        if not self.results.exists():
            return done
        try:
            with self.results.open("rb") as file:
                for line in file:
                    try:
                        found = json.loads(line)
                        if found["status"] == DONE:
                            done[int(found["row"])] = str(found["digest"])
                    except (ValueError, KeyError, TypeError):
                        continue  # half a line, of a power cut
        except OSError as error:
            raise StorageError(f"{self.results}: cannot be read ({error.strerror})") from error
        return done


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def lower_priority(nice: int) -> None:
    """So that other programs come first; what cannot be lowered stays."""
    if nice:
        os.nice(nice)
