"""A job: the folder `NAME.png.tiler` beside a picture, from the start of the run until the picture is finished.

lock                    flock(2)
job.json                manifest.py
state-0, state-1        the newest states of a canvas, written in turn, so that one is always complete
smaller.png             the picture that is rendered first (progressive.py); until it is finished, it has a job too
reference.safetensors   the latents from which the canvas starts, once they exist
spool/                  a decoder's saved passes; beside the scratch files if these are in another folder
"""

from __future__ import annotations

import hashlib
import os
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Self

from tiler import interrupts
from tiler.decoding import spool as spools
from tiler.diffusion import stored_files
from tiler.errors import JobError, NameTaken, StorageError
from tiler.events import Note, OnEvent, Saved, Tensors
from tiler.jobs import layout, tensors
from tiler.jobs import manifest as manifests
from tiler.jobs.layout import LOCK, MANIFEST, REFERENCE, SLOTS, SMALLER, SPOOL, SUFFIX
from tiler.jobs.lock import Lock
from tiler.jobs.manifest import Manifest
from tiler.request import RenderRequest
from tiler.request.choices import STDOUT

if TYPE_CHECKING:
    from torch import Tensor

_EVERY = 60.0  # seconds between two saves
_SHARE = 50  # times the duration of the last save: saving takes at most 2 % of the time
_OF_SMALLER = " of a smaller picture"
_LONGEST = 240  # bytes in a folder's name


def folder_of(output: Path, job_dir: Path | None = None) -> Path:
    """The job folder of a picture."""
    absolute = Path(os.path.abspath(output))
    mark = hashlib.sha256(os.fsencode(absolute)).hexdigest()[:8]
    name = absolute.name
    if len(os.fsencode(name)) > _LONGEST - len(SUFFIX):
        name = f"{name[:40]}-{mark}"
    if job_dir is not None:  # pictures from several folders may share job_dir
        return job_dir / f"{name.removesuffix(f'-{mark}')}-{mark}{SUFFIX}"
    return absolute.parent / f"{name}{SUFFIX}"


class _Slot(NamedTuple):
    """The content of a state file."""

    phase: str
    stored: tensors.Stored


class Job:
    """The job of a run, as a context manager, and the `Journal` of the run. Entering it creates nothing: `begin` does
    that once it is certain that the render can run. On exit, the folder is removed if the picture is complete or
    nothing was saved; otherwise a note on the error says where the folder is, unless the job lies inside another."""

    def __init__(
        self, request: RenderRequest, on_event: OnEvent = lambda event: None, *, inside: Job | None = None
    ) -> None:
        self.output = request.output or Path("tiler.png")
        self.folder = folder_of(self.output, request.job_dir)
        self.manifest: Manifest | None = None  # of the existing job, then of this one
        self.resumed = False
        self.facts: dict[str, str] = {}  # stored with each state
        self._request, self._on_event, self._inside = request, on_event, inside
        self._lock, self._begun, self._number = Lock(self.folder / LOCK), False, 0
        self._due = time.monotonic() + _EVERY
        self._full = False  # whether the last save failed

    def __enter__(self) -> Self:
        """Look for a job to continue. Raises JobLocked, JobError and StorageError."""
        if self.output == STDOUT or not self.folder.is_dir():
            return self
        self._lock.take()
        try:
            if self._request.restart:
                return self  # the old job stays until `begin`: this command may still be refused
            if (self.folder / MANIFEST).exists():
                self.manifest = manifests.read(self.folder / MANIFEST)
                self.resumed = True
            elif self._holds_work():
                raise JobError(f"{self.folder}: {MANIFEST} is missing; start over with --restart")
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if not self._begun:
                if self._lock.held and not (self.folder / MANIFEST).exists() and not self._holds_work():
                    self._remove()
            elif error is None or isinstance(error, NameTaken):
                if self._request.keep_job:
                    self.clear_spool()
                    self._clear_canvas()
                else:
                    self._remove()
            elif not self._holds_work():
                self._remove()
            elif self._inside is None:
                error.add_note(self.how_to_continue())
        finally:
            self._lock.release()

    def how_to_continue(self) -> str:
        """One line that tells the user how to continue the job."""
        where, _ = self.found()
        at = f" at {where}" if where else ""
        return f"the job is saved{at} in {self.folder}; continue with the same command, or: tiler resume {self.folder}"

    def adopt(self, request: RenderRequest) -> RenderRequest:
        """The request, with the job's seed if it has none."""
        if self.manifest is None or request.seed is not None:
            return request
        return replace(request, seed=self.manifest.seed)

    @property
    def is_finished(self) -> bool:
        """Whether the picture already has its final name, and only the job folder is left."""
        if self.manifest is None or not self.manifest.finished:
            return False
        try:
            return _facts_of(os.stat(self.output)) == self.manifest.finished
        except OSError:
            return False

    def begin(self, manifest: Manifest) -> None:
        """Create the job folder, in place of an existing one with --restart, or continue with the existing one. Raises
        JobError naming the first difference between the two, JobLocked and StorageError."""
        if self.manifest is not None:
            if (first := next(manifests.differences(self.manifest, manifest), None)) is not None:
                raise JobError(
                    f"{self.folder} is the job of another picture: {first}; finish that one with `tiler resume {self.folder}`, "
                    "or start over with --restart"
                )
            self._begun = True
            spool, canvas = _spool_of(self.folder, manifest), _canvas_of(self.folder, self.manifest)
            if _spool_of(self.folder, self.manifest) != spool:
                self.clear_spool()
            if canvas != _canvas_beside(spool) and stored_files.holds_work(canvas):
                self._on_event(Note(text=f"the canvas stays in {canvas.parent}, where it was begun"))
            else:
                canvas = _canvas_beside(spool)
                self._clear_canvas(but=canvas)
            now = {name: getattr(manifest, name) for name in ("said", "max_ram_bytes", "spool")}
            manifest = replace(self.manifest, **now, canvas=str(canvas))
        else:
            try:
                self.folder.mkdir(parents=self._request.job_dir is not None, exist_ok=True)
            except OSError as error:
                raise StorageError(
                    f"{self.folder}: cannot be created ({error.strerror}); give another folder with --job-dir"
                ) from error
            if not self._lock.held:
                self._lock.take()
            if self._request.restart:
                self._remove_old()
            self._begun = True
        self.manifest = manifest
        manifests.write(self.folder / MANIFEST, manifest)

    def found(self) -> tuple[str, str]:
        """The progress of the job, and the time since it was saved: "canvas step 12/20", "3 min"."""
        return newest_facts(self.folder, self.manifest)

    def spool_folder(self, scratch: Path) -> Path:
        """The folder for the saved passes of a decoder whose scratch files are in `scratch`."""
        outermost = self
        while outermost._inside is not None:
            outermost = outermost._inside
        # A picture on standard output has no job: then all files of the smaller one lie in one temporary folder.
        is_temporary = self._inside is not None and not outermost._begun
        if is_temporary or os.path.realpath(scratch) == os.path.realpath(outermost.folder.parent):
            return self.folder / SPOOL
        return scratch.absolute() / _name_elsewhere(self.folder)

    def held_bytes(self, scratch: Path) -> int:
        """The disk space that the passes and the canvas of this job, or of the one that it replaces, already use."""
        spool = self.spool_folder(scratch)
        places = spool, _canvas_beside(spool) if self.manifest is None else _canvas_of(self.folder, self.manifest)
        return sum(map(spools.bytes_in, places))

    @property
    def canvas_folder(self) -> Path | None:
        """The folder for a canvas too large for memory; None without a started job."""
        return None if self.spool is None else _canvas_of(self.folder, self.manifest)

    @property
    def spool(self) -> Path | None:
        """The folder with the decoder's saved passes; None without a started job."""
        return _spool_of(self.folder, self.manifest) if self._begun and self.manifest is not None else None

    @property
    def smaller_picture(self) -> Path | None:
        """The file for the picture that is rendered first; None without a started job."""
        return self.folder / SMALLER if self._begun else None

    def clear_spool(self) -> None:
        """Delete the decoder's saved passes, which are no longer needed."""
        spools.clear(_spool_of(self.folder, self.manifest))

    def note_finished(self, whole: os.stat_result) -> None:
        """Record that the picture is complete on disk, just before it gets its final name."""
        if self._begun and self.manifest is not None:
            with suppress(StorageError):
                manifests.write(self.folder / MANIFEST, replace(self.manifest, finished=_facts_of(whole)))

    # The journal of the canvas.

    def load(self, name: str) -> Tensors | None:
        """The newest complete state, if it belongs to phase `name`. Raises JobError if the existing state files are
        damaged."""
        slot = self._newest()
        return slot.stored.tensors if slot is not None and slot.phase == name else None

    def due(self) -> bool:
        return self._begun and (interrupts.take_save() or time.monotonic() >= self._due)

    def save(self, name: str, state: Tensors, where: str) -> None:
        if not self._begun:
            return
        start, number = time.monotonic(), self._number + 1
        facts = {"phase": name, "where": where, "number": str(number), **self.facts}
        try:
            tensors.write(self.folder / SLOTS[number % 2], state, facts)
        except StorageError as error:  # the older state still exists
            self._due = time.monotonic() + _EVERY
            if not self._full:
                self._full = True
                self._on_event(Note(text=f"the state could not be saved: {error}"))
            return
        self._number, self._full = number, False
        now = time.monotonic()
        self._due = now + max(_EVERY, _SHARE * (now - start))
        self._on_event(Saved(where=where))

    def _newest(self) -> _Slot | None:
        """Read the newest state, or the older one if the newer one is damaged."""
        if not self._begun:
            return None
        numbers = {path: _number_of(path) for path in (self.folder / name for name in SLOTS) if path.exists()}
        for path in sorted(numbers, key=lambda path: numbers[path], reverse=True):
            stored = tensors.read(path)
            if stored is not None and numbers[path] >= 0:
                self._number = numbers[path]
                return _Slot(stored.facts.get("phase", ""), stored)
        if numbers:
            raise JobError(f"{next(iter(numbers))}: the job's state is damaged; start over with --restart")
        return None

    # The reference, which one phase passes to the next.

    @property
    def has_reference(self) -> bool:
        places = self.folder / REFERENCE, _canvas_of(self.folder, self.manifest) / stored_files.REFERENCE
        return self._begun and any(place.exists() for place in places)

    def load_reference(self) -> Tensor:
        """The saved reference, (1, C, H, W) in fp32. Raises JobError."""
        stored = tensors.read(self.folder / REFERENCE)
        if stored is None:
            raise JobError(f"{self.folder / REFERENCE}: the job is damaged; start over with --restart")
        return stored.tensors["reference"]

    def save_reference(self, reference: Tensor) -> None:
        """Save the reference. A full disk is not an error here."""
        if self._begun:
            with suppress(StorageError):
                tensors.write(self.folder / REFERENCE, {"reference": reference}, {})

    def _remove_old(self) -> None:
        """Remove the files of the job that --restart replaces."""
        with suppress(JobError, StorageError):
            self.manifest = manifests.read(self.folder / MANIFEST)
        self._remove(keep=(LOCK,))
        spool = self.spool_folder(self._request.scratch or self.output.parent)  # where job.json is damaged
        spools.clear(spool)
        stored_files.clear(_canvas_beside(spool))
        self.manifest = None

    def _remove(self, keep: tuple[str, ...] = ()) -> None:
        _remove(self.folder, self.manifest, keep)

    def _clear_canvas(self, but: Path | None = None) -> None:
        if (canvas := _canvas_of(self.folder, self.manifest)) != but:
            stored_files.clear(canvas)

    def _holds_work(self) -> bool:
        smaller = self.folder / SMALLER
        known = (*(self.folder / name for name in (*SLOTS, REFERENCE)), smaller, folder_of(smaller))
        return any(path.exists() for path in known) or self.has_reference


def _remove(folder: Path, manifest: Manifest | None, keep: tuple[str, ...] = ()) -> None:
    """Remove a job's files, wherever they are, and the unfinished job of a smaller picture inside it."""
    if (inner := folder_of(folder / SMALLER)).is_dir():
        begun = None
        with suppress(JobError, StorageError):
            begun = manifests.read(inner / MANIFEST)
        _remove(inner, begun)
    spools.clear(_spool_of(folder, manifest))
    stored_files.clear(_canvas_of(folder, manifest))
    layout.remove(folder, keep)


def _number_of(path: Path) -> int:
    """The number of a state, as recorded in its file; -1 if there is none."""
    number = tensors.read_facts(path).get("number", "")
    return int(number) if number.isdecimal() else -1


def _spool_of(folder: Path, manifest: Manifest | None) -> Path:
    """The spool folder that the manifest names. Without a manifest, or with one from an earlier version that names
    none, it is in the job folder. Since the folder gets emptied, a name that no job of ours would have is ignored:
    others may have written it."""
    said = Path(manifest.spool) if manifest is not None and manifest.spool else folder / SPOOL
    return said if said.name == _name_elsewhere(folder) else folder / SPOOL


def _canvas_of(folder: Path, manifest: Manifest | None) -> Path:
    """The canvas folder that the manifest names, with the same check; beside the spool if it names none."""
    beside = _canvas_beside(_spool_of(folder, manifest))
    if manifest is None or not manifest.canvas:
        return beside
    said = Path(manifest.canvas)
    return said if said.name == _canvas_beside(Path(_name_elsewhere(folder))).name else _canvas_beside(folder / SPOOL)


def _name_elsewhere(folder: Path) -> str:
    """The name of a job's spool outside its `folder`."""
    mark = hashlib.sha256(os.fsencode(os.path.abspath(folder))).hexdigest()[:8]
    return f"tiler-{mark}.{SPOOL}"


def _canvas_beside(spool: Path) -> Path:
    return spool.with_name(spool.name.removesuffix(SPOOL) + "canvas")


def newest_facts(folder: Path, manifest: Manifest | None) -> tuple[str, str]:
    """The progress of a job, and the time since it was saved: "canvas step 12/20", "3 min". Both are empty if nothing
    is saved. The state files are not verified."""
    spool = _spool_of(folder, manifest)
    if where := spools.where_in(spool):
        return where, _age(spool / spools.JOURNAL)
    found = [
        (int(number), facts.get("where", ""), folder / name)
        for name in SLOTS
        if (number := (facts := tensors.read_facts(folder / name)).get("number", "")).isdecimal()
    ]
    if found:
        _, where, path = max(found)
        return where, _age(path)
    smaller = folder / SMALLER
    if smaller.exists():
        return "the end of a smaller picture", _age(smaller)
    if (inner := folder_of(smaller)).is_dir():
        with suppress(JobError, StorageError):
            where, age = newest_facts(inner, manifests.read(inner / MANIFEST))
            return where and f"{where.removesuffix(_OF_SMALLER)}{_OF_SMALLER}", age
    return "", ""


def _age(path: Path) -> str:
    """The time since a file was written, in words."""
    return spell_seconds(max(0.0, time.time() - path.stat().st_mtime))


def spell_seconds(seconds: float) -> str:
    """A duration in words: "40 s", "3 min", "5 h", "2 days"."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= (2 if unit == "days" else 1) * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def _facts_of(found: os.stat_result) -> dict[str, int]:
    return {"bytes": found.st_size, "inode": found.st_ino, "time": found.st_mtime_ns}
