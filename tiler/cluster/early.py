"""What a render does with its workers before its canvas begins: they open the model while prompts are encoded, and are
greeted while the guide is made."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from tiler.cluster import tasks

if TYPE_CHECKING:
    from tiler.cluster.engine import Engine
    from tiler.cluster.members import Members

_LOOK_EVERY = 0.5  # seconds
_ANSWER = 0.1  # seconds to wait for answers, which may keep the canvas waiting


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
    """A thread that has each worker open the denoiser of `job`, and, from `greet` on, greets them. Nobody waits for an
    opening: what keeps a worker from it, its greeting tells. An error in this thread ends no render."""

    def __init__(self, engine: Engine, job: bytes) -> None:
        self.told: set[str] = set()  # addresses
        self._engine, self._job = engine, job
        self._members: Members | None = None
        self.failure: Exception | None = None  # the last one while they were told to open it
        self.error: Exception | None = None  # with which the greeting ended; the answers that came with it are lost
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="early workers", daemon=True)
        self._thread.start()

    def end(self, at_most: float | None = None) -> None:
        """End the thread, after its present request to the scheduler; wait for that for `at_most` seconds."""
        self._over.set()
        self._thread.join(at_most)

    def greet(self, members: Members) -> None:
        """Greet workers from now on; until the thread ends, `members` belongs to it."""
        self._members = members

    def _run(self) -> None:
        while self._members is None and not self._over.is_set():
            try:
                self._have_them_open()
            except Exception as error:  # they open it when they are greeted
                self.failure = error
            self._over.wait(_LOOK_EVERY)
        try:
            while self._members is not None and not self._over.is_set():
                self._members.look()
                for ticket, value, failure in self._engine.answers(_ANSWER):
                    self._members.take(ticket, value, failure)
        except Exception as error:
            self.error = error

    def _have_them_open(self) -> None:
        for address in (self._engine.members() or {}).keys() - self.told:
            self.told.add(address)
            self._engine.tell(address, tasks.open_ahead, self._job)
