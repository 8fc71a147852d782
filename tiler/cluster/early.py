"""Workers open the model of a render while its prompts are encoded and its guide is made, so that the canvas need not
wait for them."""

from __future__ import annotations

import threading
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Self

from tiler.cluster import tasks

if TYPE_CHECKING:
    from tiler.cluster.engine import Engine

_LOOK_EVERY = 1.0  # seconds
_LEAVING = 5.0  # seconds in which a request to the scheduler may end


class Early:
    """A context manager that has each worker that is there or comes open the denoiser of `job`, in a thread. Nobody
    waits for their answers: what keeps a worker from it, its greeting tells."""

    def __init__(self, engine: Engine, job: bytes) -> None:
        self.told: set[str] = set()  # addresses
        self._engine, self._job = engine, job
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="early workers", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join(_LEAVING)

    def _run(self) -> None:
        with suppress(Exception):  # a scheduler that fails is noticed when the canvas begins
            while not self._over.is_set():
                for address in (self._engine.members() or {}).keys() - self.told:
                    self.told.add(address)
                    self._engine.tell(address, tasks.open_ahead, self._job)
                self._over.wait(_LOOK_EVERY)
