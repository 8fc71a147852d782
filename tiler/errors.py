"""Errors that a user can act on. Each message says what happened, which value caused it and what to do next; each class
has its own exit code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


class TilerError(Exception):
    """Base of every error that is not a bug in tiler."""

    exit_code = 1


class UsageError(TilerError):
    """An option, a prompt file or a guide image is wrong."""

    exit_code = 2


class ModelError(TilerError):
    """The checkpoint is missing, unreadable, unsafe or of another kind."""

    exit_code = 3


class BudgetRefused(TilerError):
    """The plan needs more memory than the ceiling; nothing was started. With `smallest_bytes`, if known, it would fit;
    `table` shows the memory of each phase, and `facts` are what programs are told of the plan besides."""

    exit_code = 4

    def __init__(self, message: str, smallest_bytes: int | None = None, table: str = "") -> None:
        super().__init__(message)
        self.smallest_bytes, self.table = smallest_bytes, table
        self.facts: Mapping[str, Any] = {}


class BudgetExceeded(TilerError):
    """The ceiling was reached while running."""

    exit_code = 5


class StorageError(TilerError):
    """Reading or writing a file failed: disk full, I/O error, read-only folder."""

    exit_code = 6


class NameTaken(StorageError):
    """A finished file could not get its name and was left at `kept` instead, so nothing is lost."""

    def __init__(self, message: str, kept: Path) -> None:
        super().__init__(message)
        self.kept = kept


class Interrupted(SystemExit):
    """SIGINT, SIGTERM or SIGHUP; the exit code is 128 plus the signal's number. A SystemExit, because some libraries
    swallow KeyboardInterrupt."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


class NumericalError(TilerError):
    """A NaN or an Inf, with the tensor or the step where it was first seen."""

    exit_code = 7


class JobLocked(TilerError):
    """Another process is working on the same job."""

    exit_code = 8


class OfflineError(TilerError):
    """The checkpoint is not in the hub's cache and the hub cannot or may not be reached."""

    exit_code = 9


class JobError(TilerError):
    """A job's folder is damaged, or belongs to another request."""

    exit_code = 10


class DamagedJob(JobError):
    """A job's folder is damaged."""


class ClusterError(TilerError):
    """No scheduler or no worker can be reached, or none of them may do this work."""

    exit_code = 11
