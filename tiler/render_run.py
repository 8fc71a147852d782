"""The state of one render."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from tiler.denoiser import DenoiserRun
from tiler.diffusion import stored_files
from tiler.encoding import Spoken
from tiler.errors import StorageError
from tiler.events import Phase
from tiler.files import make_own_folder
from tiler.jobs.folder import Job
from tiler.jobs.layout import SMALLER
from tiler.jobs.temporary import own_folder
from tiler.pixels import Decoding
from tiler.previewing import Preview
from tiler.request import RenderRequest
from tiler.run import WorkerUse
from tiler.weights.identity import model_id


@dataclass(kw_only=True)
class RenderRun(DenoiserRun):
    """One render in progress."""

    said: RenderRequest
    job: Job
    spoken: Spoken
    texts: dict[str, str] = field(default_factory=dict)  # the picture's metadata
    workers: list[WorkerUse] = field(default_factory=list)  # the cluster's workers that predicted tiles
    is_alone: bool = False  # no worker was in the cluster when the canvas ended
    decoders: list[WorkerUse] = field(default_factory=list)  # those that decoded; their `tiles` are rows
    encoders: list[WorkerUse] = field(default_factory=list)  # those that encoded the guide's picture; also rows
    preview: Preview | None = None
    first_peak_bytes: int = 0  # predicted for the picture that was rendered first
    told: set[str] = field(default_factory=set)  # notes
    files: ExitStack = field(default_factory=ExitStack)  # open until the picture is written

    def note(self, text: str) -> None:
        self.told.add(text)
        super().note(text)

    @cached_property
    def stored_folder(self) -> Path:
        """The folder for a canvas too large for memory: in the job, or, without a job, a temporary one. Raises
        StorageError."""
        folder, scratch = self.job.canvas_folder, self.request.scratch_folder
        try:
            if folder is None:
                folder = Path(tempfile.mkdtemp(prefix="tiler-canvas-", dir=scratch))
                self.files.callback(stored_files.clear, folder)
            make_own_folder(folder, parents=True)
        except OSError as error:
            place = folder or scratch
            raise StorageError(
                f"{place}: the canvas cannot be stored there ({error.strerror}); choose another --scratch"
            ) from error
        return folder

    @cached_property
    def smaller_picture(self) -> Path:
        """The file for the picture that is rendered first: in the job, or, without a job, in a temporary folder. Raises
        StorageError."""
        if (path := self.job.smaller_picture) is not None:
            return path
        scratch = self.request.scratch_folder
        try:
            return self.files.enter_context(own_folder("tiler-smaller-", scratch)) / SMALLER
        except OSError as error:
            raise StorageError(
                f"{scratch}: nothing can be written there ({error.strerror}); choose another --scratch"
            ) from error

    @cached_property
    def model_id(self) -> str:
        """A string that identifies the checkpoint's weights and configs."""
        return model_id(self.plan.family.checkpoint, [part.name for part in self.plan.family.parts])

    @property
    def decoding(self) -> Decoding:
        plan = self.plan
        return Decoding(
            plan.decoder,
            plan.methods[Phase.DECODE],
            plan.resident[Phase.DECODE],
            plan.memory.peak_of(Phase.DECODE),
            plan.crop,
        )
