"""A queue of pictures: each is drawn by a process of its own, all under one ceiling, one after another or, if a cluster
predicts their tiles, several at a time. The queue's own process stays in memory all the time, so it imports next to
nothing; its rows have been interpreted elsewhere."""

from __future__ import annotations

import json
import signal
import sys
import time
from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tiler.errors import BudgetRefused, Interrupted, JobLocked, StorageError, TilerError, UsageError
from tiler.jobs import claims, layout
from tiler.jobs.checked import Checked, Tally
from tiler.jobs.drawing import OWN_BYTES, Drawings, Ended
from tiler.jobs.results import DONE, ELSEWHERE, FAILED, INTERRUPTED, SKIPPED, Results

BATCH = 64  # rows whose prompts are encoded together


class NoCluster(TilerError):
    """What a queue's cluster needs cannot start, so no row can be drawn; with the exit code of the failure."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Together(NamedTuple):
    """How many pictures may be under way at a time, the bytes of the ceiling that they share, and the words that each
    process gets in addition."""

    most: int
    room_bytes: int
    words: Sequence[str] = ()


class _Turn(NamedTuple):
    """A row whose turn it is. `is_last`: it is not postponed any more; `needs_bytes`: the smallest ceiling that it
    needs, once that is known."""

    row: Checked
    is_last: bool = False
    needs_bytes: int = 0


class _Open(NamedTuple):
    """A row that is being drawn, since `start`, under `share_bytes` of the ceiling."""

    turn: _Turn
    share_bytes: int
    started: str
    start: float


@dataclass(kw_only=True)
class Queue:
    """Draws rows below `root`, under one ceiling for this process and theirs. `results` gets a line for each row. With
    `shared`, rows that other machines draw are left to them. `encode` encodes the prompts of several rows ahead, `say`
    shows a line to the user, `warn` one about a failure, `hear` gets the lines that the processes of rows write to
    standard error, and `finished`
    receives a picture's report as `--json` prints it. `together`, called with the first row to be drawn, says how many
    may be drawn at a time; it may raise TilerError if that row cannot be drawn, and NoCluster to end the queue."""

    root: Path
    results: Results
    max_ram_bytes: int
    shared: bool = False
    fail_fast: bool = False
    encode: Callable[[list[Checked]], None] = lambda rows: None
    say: Callable[[str], None] = lambda text: None
    warn: Callable[[str], None] = lambda text: None
    hear: Callable[[int, bytes], None] | None = None
    finished: Callable[[dict[str, Any]], None] = lambda report: None
    together: Callable[[Checked], Together] | None = None
    tally: Tally = field(default_factory=Tally)
    _outputs: array[int] = field(default_factory=lambda: array("Q"))  # hashes of the outputs so far
    _turns: deque[_Turn] = field(default_factory=deque)
    _later: list[Checked] = field(default_factory=list)  # drawn elsewhere, or the disk is too full now
    _open: dict[int, _Open] = field(default_factory=dict)  # by row
    _needs_bytes: int = 0  # the smallest ceiling of the rows so far, as far as it is known
    _limits: Together | None = None
    _touched: float = field(default_factory=time.monotonic)  # when the claims were touched last
    _drawings: Drawings = field(init=False)

    def run(self, rows: Iterable[Iterable[Checked]]) -> Tally:
        """Draw all rows that are not done yet, group by group as they become known. Raises Interrupted, after the
        pictures under way have saved their states, and StorageError."""
        self._drawings = Drawings(self.hear)
        with self._drawings.pausing():
            try:
                self._draw_all(rows)
            except (Interrupted, KeyboardInterrupt) as stop:
                self._interrupt(int(stop.code or 0) - 128 if isinstance(stop, Interrupted) else signal.SIGINT)
                stop.add_note(f"{self.tally}; the same command continues")
                raise
            except BaseException:
                self._interrupt(signal.SIGTERM)
                raise
            self._interrupt(signal.SIGTERM)  # what is still under way after a failure that ends the queue
            for line in self.tally.repeated():
                self.warn(line)
        return self.tally

    def _draw_all(self, rows: Iterable[Iterable[Checked]]) -> None:
        for known in rows:
            for batch in _batches(self._undone(known)):
                wanting = [row for row in batch if row.wants_encoder]
                if len(wanting) > 1:
                    self._advance(until_all_are_done=True)  # an encoder takes the whole ceiling
                    self.encode(wanting)
                for row in batch:
                    self._draw(_Turn(row))
                    if self._is_over:
                        return
            self._advance(until_all_are_done=True)  # so does what reads the next rows
            if self._is_over:
                return
        for row in self._later:
            if self.results.is_done(row.row, row.digest):
                self.tally.statuses[ELSEWHERE] += 1
            else:
                self._draw(_Turn(row, is_last=True))
            if self._is_over:
                return
        self._advance(until_all_are_done=True)

    @property
    def _is_over(self) -> bool:
        return self.fail_fast and bool(self.tally.codes)

    def _undone(self, rows: Iterable[Checked]) -> Iterator[Checked]:
        for row in rows:
            for note in row.notes:
                self.say(f"{self.tally.noun} {row.row}: {note}")
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

    def _draw(self, turn: _Turn) -> None:
        """Begin a row as soon as there is room for it, and return when another may begin."""
        self._turns.append(turn)
        self._advance()

    def _advance(self, *, until_all_are_done: bool = False) -> None:
        """Begin the rows whose turn it is, and wait until another may begin."""
        while not self._is_over:
            most = 1 if self._limits is None else self._limits.most
            if self._turns and (share := self._share_of(self._turns[0])):
                self._begin(self._turns.popleft(), share)
            elif self._open and (self._turns or until_all_are_done or len(self._open) >= most):
                self._wait()
            elif not self._turns:
                return

    def _share_of(self, turn: _Turn) -> int:
        """The bytes of the ceiling that a row may have now; 0 while it has to wait."""
        if self._limits is None:
            if self.together is None:
                self._limits = Together(1, self.max_ram_bytes - OWN_BYTES)
            else:
                try:
                    self._limits = self.together(turn.row)
                except NoCluster:
                    raise
                except TilerError as error:
                    self._turns.popleft()
                    self._note(turn.row, FAILED, error.exit_code, {"error": str(error)})
                    return 0
        most, room, _ = self._limits
        share = min(room, max(room // most, self._needs_bytes, turn.needs_bytes))
        under_way = self._open.values()
        if (
            len(under_way) >= most
            or share > room - sum(other.share_bytes for other in under_way)
            or any(other.turn.row.denoiser != turn.row.denoiser for other in under_way)
        ):
            return 0
        return share

    def _begin(self, turn: _Turn, share: int) -> None:
        row, output = turn.row, self.root / turn.row.output
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            why = f"{output.parent}: cannot be made ({error.strerror}); choose another output"
            self._note(row, FAILED, StorageError.exit_code, {"error": why})
            return
        if self.shared:
            if not claims.claim(Path(row.job)):
                self._postpone(turn)
                return
            if self._is_done(row):  # finished between the first check and the claim
                self.tally.statuses[SKIPPED] += 1
                claims.release(Path(row.job))
                return
        assert self._limits is not None
        own = ["--json", f"--max-ram={self.max_ram_bytes}", f"--output={output}", *self._limits.words]
        own += ["--keep-job"] * ("--keep-job" not in row.words)
        at = row.words.index("--") if "--" in row.words else len(row.words)
        words = [*row.words[:at], *own, *row.words[at:]]
        self.say(f"{self.tally.noun} {row.row}: {output}")
        self._open[row.row] = _Open(turn, share, _now(), time.monotonic())
        command = [sys.executable, "-m", "tiler", "render", *words]
        self._drawings.begin(row.row, command, self.max_ram_bytes - share)

    def _wait(self) -> None:
        """Wait until a row has been drawn."""
        while (ended := self._drawings.next_ended(self._touch())) is None:
            pass
        under_way = self._open.pop(ended.row)
        try:
            self._finish(under_way, ended)
        finally:
            if self.shared:
                claims.release(Path(under_way.turn.row.job))

    def _touch(self) -> float | None:
        """Touch the claims if it is time to, however many rows have ended meanwhile. Return the seconds until the next
        time, or None without claims."""
        if not self.shared:
            return None
        now = time.monotonic()
        if now >= self._touched + claims.TOUCH_EVERY:
            for under_way in self._open.values():
                claims.touch(Path(under_way.turn.row.job))
            self._touched = now
        return self._touched + claims.TOUCH_EVERY - now

    def _finish(self, under_way: _Open, ended: Ended) -> None:
        turn, row, said = under_way.turn, under_way.turn.row, _said_in(ended.told)
        facts: dict[str, Any] = {
            "started": under_way.started, "seconds": round(time.monotonic() - under_way.start, 1),
        }  # fmt: skip
        code = ended.returncode if ended.returncode >= 0 else 128 - ended.returncode
        if code == JobLocked.exit_code and self.shared:
            self._postpone(turn)
            return
        if code == StorageError.exit_code and not turn.is_last and not self.fail_fast:
            self.say(f"{self.tally.noun} {row.row}: a file could not be written; trying again after the others")
            self._later.append(row)
            return
        if code == BudgetRefused.exit_code and self._retries(turn, under_way.share_bytes, said.get("smallest_bytes")):
            return
        if code == 0:
            facts |= {name: said[name] for name in ("seed", "peak_rss_bytes", "versions", "sha256")}
            self.finished(said)
        else:
            facts["error"] = said.get("error") or _why(ended.returncode)
        self._note(row, DONE if code == 0 else FAILED, code, facts, said.get("notes", ()))
        # Last: if the note is lost, the job still says that it is finished.
        if code == 0 and "--keep-job" not in row.words and not (self.shared and not claims.is_ours(Path(row.job))):
            layout.remove(Path(row.job))

    def _retries(self, turn: _Turn, share: int, smallest: int | None) -> bool:
        """Whether a row that needs more than its share has its turn again as soon as so much is free; `smallest` is the
        ceiling in bytes that would do, as far as it is known."""
        assert self._limits is not None
        room = self._limits.room_bytes
        needs = smallest or room
        if share >= room or not share < needs <= room:
            return False
        self.say(f"{self.tally.noun} {turn.row.row}: waits until more of the ceiling is free")
        self._needs_bytes = max(self._needs_bytes, needs)
        self._turns.appendleft(turn._replace(needs_bytes=needs))
        return True

    def _postpone(self, turn: _Turn) -> None:
        """Leave a row to another machine for now, or, if it is the last attempt, for good."""
        if turn.is_last:
            self.tally.statuses[ELSEWHERE] += 1
        else:
            self._later.append(turn.row)

    def _interrupt(self, number: int) -> None:
        """End the rows under way, which save their states."""
        for ended in self._drawings.end(number):
            under_way = self._open.pop(ended.row)
            if ended.returncode == 0:
                self._finish(under_way, ended)
            else:
                self._note(under_way.turn.row, INTERRUPTED, 128 + number, {"started": under_way.started})
            if self.shared:
                claims.release(Path(under_way.turn.row.job))

    def _note(self, row: Checked, status: str, code: int, facts: dict[str, Any], notes: Sequence[str] = ()) -> None:
        if status != FAILED:
            self.tally.statuses[status] += 1
        elif self.tally.note_failure(row.row, code, facts["error"]):
            self.warn(
                "; ".join((f"{self.tally.noun} {row.row}: failed with exit code {code}: {facts['error']}", *notes))
            )
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


def _said_in(told: bytes) -> dict[str, Any]:
    """A process's `--json` output, its report or its error; empty if it ended without a word."""
    try:
        said = json.loads(told)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _why(returncode: int) -> str:
    """The error of a process that has told none."""
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
