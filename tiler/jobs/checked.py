"""What a queue knows of its rows before they are drawn, and what it says of them at the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field
from typing import NamedTuple

from tiler.jobs.results import DONE, ELSEWHERE, FAILED, INTERRUPTED, SKIPPED

SHOWN = 10  # failed rows named in the summary, and different errors that are remembered
_ORDER = (DONE, SKIPPED, ELSEWHERE, INTERRUPTED, FAILED)  # of the summary


class Checked(NamedTuple):
    """A row with everything that can be known before it is drawn. `words` follow `tiler render`, without the output.
    `output` is relative to the queue's root, and `job` is the job folder. `digest` identifies everything that
    determines the picture and its place, `denoiser` the model and what else workers of a cluster share by rows.
    `problem` says why the row cannot be drawn; the other fields are then empty. `wants_encoder` says that it pays to
    encode its prompts together with those of other rows."""

    row: int
    words: Sequence[str] = ()
    output: str = ""
    job: str = ""
    digest: int = 0
    denoiser: int = 0
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
    """The outcome of a queue. `noun` is what messages call its rows: those of a command have no file."""

    noun: str = "row"
    statuses: Counter[str] = field(default_factory=Counter)
    codes: set[int] = field(default_factory=set)
    failed: list[int] = field(default_factory=list)  # the first failed rows
    _alike: dict[str, list[int]] = field(default_factory=dict)  # by error: its first row, and how many more had it

    def note_failure(self, row: int, code: int, error: str) -> bool:
        """Count a failed row. Returns whether its error has to be told, as no row before had the same one."""
        self.statuses[FAILED] += 1
        self.codes.add(code)
        self.failed += [row] * (len(self.failed) < SHOWN)
        if error in self._alike:
            self._alike[error][1] += 1
            return False
        if len(self._alike) < SHOWN:
            self._alike[error] = [row, 0]
        return True

    def repeated(self) -> Iterator[str]:
        """A line for each error that several rows had."""
        for first, more in self._alike.values():
            if more:
                yield f"{self.noun} {first}: {more} more {self.noun}{'s' * (more > 1)} failed for the same reason"

    @property
    def exit_code(self) -> int:
        """The common exit code of the failed rows."""
        return common_code(self.codes)

    def __str__(self) -> str:
        """A summary like "3 done, 2 failed (rows 4, 7)"."""
        number, rows = self.statuses[FAILED], ", ".join(map(str, self.failed))
        which = f" ({self.noun}{'s' * (number > 1)} {rows}{', …' * (number > len(self.failed))})"
        return ", ".join(f"{n} {status}{which if status == FAILED else ''}" for status, n in self._ordered())

    def _ordered(self) -> list[tuple[str, int]]:
        return sorted(self.statuses.items(), key=lambda item: _ORDER.index(item[0]))
