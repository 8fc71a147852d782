"""The denoising loop of a canvas that does not fit in memory: its arrays lie in files, and its bytes are those of
`canvas.Denoising`.

All schedulers are elementwise, so a step processes a chunk at a time, in the order in which noise is drawn. Predictions
are stored as they arrive and blended at the end of the step, band by band, each pixel in the order of its tiles.
Whatever stops the loop, it resumes at the next tile.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tiler.diffusion import stored
from tiler.diffusion.canvas import StepDone
from tiler.diffusion.runner import Runner, Tile
from tiler.diffusion.schedulers import DiffusersSchedule, SchedulerState
from tiler.diffusion.stored import Shape, StoredArray, TileLog, chunks
from tiler.diffusion.stored_files import BLENDED, LATENTS, PREDICTIONS, SCHEDULER, STATE
from tiler.diffusion.tiles import Tiles, samples_before
from tiler.errors import JobError
from tiler.events import Journal
from tiler.files import replace_file


class Seeded(NamedTuple):
    """A part of the canvas whose noise has a seed of its own; rows and columns in latents."""

    rows: slice
    cols: slice
    seed: int


class StoredDenoising:
    """The denoising of one canvas, from noise to a picture, in `folder`; a canvas started there is resumed. A context
    manager. Raises StorageError and JobError."""

    def __init__(
        self, folder: Path, shape: Shape, steps: Sequence[Tiles], schedule: DiffusersSchedule, seed: int, *,
        reseeded: Sequence[Seeded] = (), reference: StoredArray | None = None, begin: int = 0,
    ) -> None:  # fmt: skip
        self.step = begin
        self._folder, self._shape, self._steps, self._schedule, self._begin = folder, shape, steps, schedule, begin
        self._generator = torch.Generator("cpu").manual_seed(seed)
        self._stack = ExitStack()
        self._arrays: dict[str, StoredArray] = {}  # the scheduler's state of each latent
        self._single: dict[str, Tensor] = {}  # and its state as a whole
        self._log: TileLog | None = None
        if (folder / STATE).exists():
            self._resume()
        else:
            self.latents = self._open(LATENTS, begin, new=True)
            self._draw(reseeded, reference)
            self._numbers = schedule.state().numbers
            self._save()

    def __enter__(self) -> StoredDenoising:
        return self

    def __exit__(self, *error: object) -> None:
        """Close the files without removing them."""
        self._stack.close()

    @property
    def end(self) -> int:
        """The number of the step after the last one."""
        return self._begin + len(self._steps)

    @property
    def samples_done(self) -> int:
        """The number of denoiser samples that have been predicted, over all steps."""
        return samples_before(self._steps, self.step - self._begin, self._tiles_done)

    def run(self, runner: Runner, journal: Journal) -> Generator[StepDone]:
        """Denoise to the end, yielding after each tile. Raises NumericalError when a prediction is not finite."""
        try:
            while self.step < self.end:
                for done in self._one_step(runner):
                    if journal.due():
                        self._note(journal)
                    yield done
        finally:
            self._note(journal)

    def _one_step(self, runner: Runner) -> Iterator[StepDone]:
        step, regions = self.step, self._steps[self.step - self._begin]
        shape = self._shape[1], *regions.tile
        with TileLog(self._folder / f"{PREDICTIONS}.{step}", shape, new=False) as log:
            self._log, first = log, log.count
            samples, total = regions.samples_of(first), regions.samples
            self._schedule.renew(SchedulerState(self._numbers, {}))

            def tiles() -> Iterator[Tile]:
                for number in range(first, len(regions)):
                    region = regions[number]
                    crop = self.latents.crop(region.top, region.left, region.height, region.width)
                    yield Tile(self._schedule.model_input(crop, step), region)

            if first < len(regions):
                for prediction in runner.predict(step, tiles()):
                    log.append(prediction)
                    if log.count < len(regions):
                        samples = regions.samples_of(log.count)
                        yield StepDone(step, samples, total, None)
            assert log.count == len(regions), "a runner answers for every tile"
            with StoredArray(self._folder / BLENDED, self._shape, new=True) as blended:
                self._blend(regions, log, blended)
                self._move(blended)
        self._log = None
        self._remove(step)
        yield StepDone(step, total, total, None)

    def _blend(self, regions: Tiles, log: TileLog, blended: StoredArray) -> None:
        """Blend the predictions of all tiles: Σ m_r ε_r / Σ m_r."""
        _, channels, height, width = self._shape
        rows = stored.band_rows(self._shape)
        for first in range(0, height, rows):
            last = min(height, first + rows)
            band = torch.zeros(1, channels, last - first, width)
            for number in regions.reaching(first, last):
                region = regions[number]
                lines = torch.arange(region.top, region.top + region.height) % height
                seen = ((lines >= first) & (lines < last)).nonzero()[:, 0]
                top, bottom = int(seen[0]), int(seen[-1]) + 1  # including the rows between, if a tile wraps around
                prediction = region.weights[top:bottom] * log.rows(number, top, bottom)
                cols = torch.arange(region.left, region.left + region.width) % width
                crop = (lines[seen] - first)[:, None], cols
                band[0, :, *crop] += prediction[:, seen - top]
            blended.put(band, first, 0)

    def _move(self, blended: StoredArray) -> None:
        """Take the scheduler's step, a chunk at a time, and store the scheduler's state of each chunk."""
        step, following = self.step, self.step + 1
        with ExitStack() as stack:
            latents = stack.enter_context(StoredArray(self._path(LATENTS, following), self._shape, new=True))
            arrays: dict[str, StoredArray] = {}
            numbers: dict[str, Any] = {}
            single: dict[str, Tensor] = {}
            for span in chunks(latents.count):
                remembered = self._single | {name: array.flat(span) for name, array in self._arrays.items()}
                self._schedule.renew(SchedulerState(self._numbers, remembered))
                now = self.latents.flat(span)
                self._schedule.model_input(now, step)  # some schedulers require this call
                latents.set_flat(span, self._schedule.step(blended.flat(span), step, now, self._generator))
                numbers, tensors = self._schedule.state()
                single = {name: tensor for name, tensor in tensors.items() if tensor.shape != now.shape}
                for name, tensor in tensors.items():
                    if name in single:
                        continue
                    if name not in arrays:
                        new = StoredArray(self._path(f"{SCHEDULER}.{name}", following), self._shape, new=True)
                        arrays[name] = stack.enter_context(new)
                    arrays[name].set_flat(span, tensor)
            for array in (latents, *arrays.values()):
                array.sync()
        self._stack.close()
        self.step, self._numbers, self._single = following, numbers, single
        self.latents = self._open(LATENTS, following)
        self._arrays = {name: self._open(f"{SCHEDULER}.{name}", following) for name in arrays}
        self._save()

    def _draw(self, reseeded: Sequence[Seeded], reference: StoredArray | None) -> None:
        """Draw noise for the complete canvas from one generator, as `canvas.initial_noise` does, and start the schedule
        with it."""
        for span in chunks(self.latents.count):
            self.latents.set_flat(span, torch.randn(span.last - span.first, generator=self._generator))
        for rows, cols, seed in reseeded:
            top, left = rows.start, cols.start
            height, width = rows.stop - top, cols.stop - left
            own = torch.Generator("cpu").manual_seed(seed)
            for span in chunks(self._shape[1] * height * width):
                noise = torch.randn(span.last - span.first, generator=own)
                self.latents.scatter(span.first, noise, top, left, height, width)
        for span in chunks(self.latents.count):
            begin = None if reference is None else reference.flat(span)
            self.latents.set_flat(span, self._schedule.start(self.latents.flat(span), begin, self._begin))
        self.latents.sync()

    @property
    def _tiles_done(self) -> int:
        return 0 if self._log is None else self._log.count

    def _path(self, name: str, step: int) -> Path:
        return self._folder / f"{name}.{step}"

    def _open(self, name: str, step: int, *, new: bool = False) -> StoredArray:
        return self._stack.enter_context(StoredArray(self._path(name, step), self._shape, new=new))

    def _save(self) -> None:
        said = {
            "step": self.step, "shape": self._shape, "numbers": self._numbers, "arrays": list(self._arrays),
            "single": {name: [str(t.dtype).removeprefix("torch."), t.tolist()] for name, t in self._single.items()},
            "generator": bytes(self._generator.get_state().tolist()).hex(),
        }  # fmt: skip
        replace_file(self._folder / STATE, [json.dumps(said).encode()], durable=True)

    def _resume(self) -> None:
        try:
            said = json.loads((self._folder / STATE).read_bytes())
            step, names, numbers = int(said["step"]), list(said["arrays"]), dict(said["numbers"])
            generator = torch.tensor(list(bytes.fromhex(said["generator"])), dtype=torch.uint8)
            single = {
                name: torch.tensor(value, dtype=getattr(torch, kind)) for name, (kind, value) in said["single"].items()
            }
            is_ours = tuple(said["shape"]) == self._shape and self._begin <= step <= self.end
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise JobError(f"{self._folder / STATE}: the job is damaged; start over with --restart") from error
        if not is_ours:
            raise JobError(f"{self._folder / STATE} belongs to another canvas; start over with --restart")
        chunk = torch.zeros(1, 1, 1, 16)
        self._schedule.start(chunk, None if not self._begin else chunk, self._begin)
        self.step, self._numbers, self._single = step, numbers, single
        self._generator.set_state(generator)
        self.latents = self._open(LATENTS, step)
        self._arrays = {name: self._open(f"{SCHEDULER}.{name}", step) for name in names}

    def _note(self, journal: Journal) -> None:
        """Save the progress to the journal. Only the step's predictions may still have to be flushed to the disk."""
        if self._log is not None:
            self._log.sync()
        done = self._tiles_done
        tiles = len(self._steps[self.step - self._begin]) if done else 0
        where = self._schedule.calls.where("canvas", self.step, done, tiles)
        journal.save("canvas", {"stored": torch.tensor([self.step, done])}, where)

    def _remove(self, step: int) -> None:
        """Remove the files of an earlier step."""
        for path in (*self._folder.glob(f"*.{step}"), self._folder / BLENDED):
            with suppress(OSError):
                os.unlink(path)


def bytes_of(shape: Shape, tiles: int, tile: tuple[int, int]) -> int:
    """The most disk space that a canvas takes: latents before and after a step, two scheduler tensors before and after
    it, the blended prediction, the reference, and the predictions."""
    return 4 * (8 * math.prod(shape) + tiles * (shape[1] * math.prod(tile) + 1))
