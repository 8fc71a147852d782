"""What a render does with its workers before its canvas begins: they open the model while prompts are encoded, and are
greeted while the guide is made."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Self

from tiler.cluster import tasks

if TYPE_CHECKING:
    from tiler.cluster.engine import Engine
    from tiler.cluster.members import Members

_LOOK_EVERY = 0.5  # seconds


class Notes:
    """Keeps notes until they may be told: those of the thread wait for the main one."""

    def __init__(self) -> None:
        self._kept: list[str] = []
        self._tell: Callable[[str], None] = self._kept.append

    def __call__(self, text: str) -> None:
        self._tell(text)

    def tell(self, tell: Callable[[str], None]) -> None:
        """Tell what has been kept, and all that follows."""
        self._tell = tell
        for text in self._kept:
            tell(text)


class Early:
    """A context manager with a thread that has each worker open the denoiser of `job`, and, from `greet` on, greets
    them. Nobody waits for an opening: what keeps a worker from it, its greeting tells."""

    def __init__(self, engine: Engine, job: bytes) -> None:
        self.told: set[str] = set()  # addresses
        self._engine, self._job = engine, job
        self._members: Members | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="early workers", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the thread, after its present request to the scheduler."""
        self._over.set()
        self._thread.join()

    def greet(self, members: Members) -> None:
        """Greet workers from now on; until the context ends, `members` belongs to the thread."""
        self._members = members

    def _run(self) -> None:
        with suppress(Exception):  # a scheduler that fails is noticed when the canvas begins
            while not self._over.is_set():
                if self._members is None:
                    self._have_them_open()
                    self._over.wait(_LOOK_EVERY)
                else:
                    self._members.look()
                    for ticket, value, error in self._engine.answers(_LOOK_EVERY):
                        self._members.take(ticket, value, error)

    def _have_them_open(self) -> None:
        for address in (self._engine.members() or {}).keys() - self.told:
            self.told.add(address)
            self._engine.tell(address, tasks.open_ahead, self._job)
