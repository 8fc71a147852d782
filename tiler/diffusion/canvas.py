"""The denoising loop of Mixture of Diffusers: tiles predict, the canvas blends, one scheduler step moves it all.

Jiménez 2023, arXiv:2302.02412: ε̂ = Σ m_r (u_r + g_r (c_r − u_r)) / Σ m_r, then x_{t−1} = step(ε̂, t, x_t).
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tiler.diffusion.runner import Runner, Tile
from tiler.diffusion.schedulers import Schedule, SchedulerState
from tiler.diffusion.tiles import Text2ImageRegion, Tiles, samples_before
from tiler.errors import NumericalError
from tiler.events import Journal, NoJournal


class StepDone(NamedTuple):
    """`samples` of `total` denoiser samples of step `step` (from 0) are in the canvas; `latents` is set when the step
    is complete."""

    step: int
    samples: int
    total: int
    latents: Tensor | None


@dataclass(frozen=True, kw_only=True)
class SamplingState:
    """Everything that a denoising loop needs to resume with the same bytes: its state before step `step`, of which the
    first `tiles_added` tiles are in `blended`. Latents and blended are (1, C, h, w) fp32, `generator` is its state,
    (n,) uint8."""

    phase: str
    step: int
    tiles_added: int
    latents: Tensor
    blended: Tensor | None  # None before the first tile of a step
    scheduler: SchedulerState
    generator: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """The state as a dict of tensors, for a `Journal`; the numbers are JSON in a tensor of bytes."""
        numbers = {
            "phase": self.phase,
            "step": self.step,
            "tiles_added": self.tiles_added,
            "scheduler": self.scheduler.numbers,
        }
        found = {
            "numbers": torch.tensor(list(json.dumps(numbers).encode()), dtype=torch.uint8),
            "latents": self.latents,
            "generator": self.generator,
        }
        if self.blended is not None:
            found["blended"] = self.blended
        for name, tensor in self.scheduler.tensors.items():
            whole = tensor.untyped_storage().nbytes() == tensor.nbytes
            found[f"scheduler.{name}"] = tensor if whole else tensor.clone()  # files refuse tensors that share memory
        return found

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> SamplingState:
        """The inverse of `tensors`."""
        numbers = json.loads(bytes(tensors["numbers"].tolist()))
        mark = "scheduler."
        remembered = {name.removeprefix(mark): t for name, t in tensors.items() if name.startswith(mark)}
        return cls(
            phase=numbers["phase"],
            step=numbers["step"],
            tiles_added=numbers["tiles_added"],
            latents=tensors["latents"],
            blended=tensors.get("blended"),
            scheduler=SchedulerState(numbers["scheduler"], remembered),
            generator=tensors["generator"],
        )


def initial_noise(
    shape: tuple[int, int, int, int], seed: int, reseeded: Sequence[tuple[tuple[slice, slice], int]] = ()
) -> tuple[Tensor, torch.Generator]:
    """Draw noise for the complete canvas from one CPU generator; return it with that generator, from which ancestral
    samplers continue to draw.

    A region with its own seed replaces its crop: `reseeded` holds (crop, seed).
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    noise = torch.randn(shape, generator=generator, dtype=torch.float32)
    for (rows, cols), own in reseeded:
        crop = noise[:, :, rows, cols]
        crop.copy_(torch.randn(crop.shape, generator=torch.Generator("cpu").manual_seed(own), dtype=torch.float32))
    return noise, generator


def first_step(num_inference_steps: int, strength: float) -> int:
    """The first step that the canvas computes itself; the guide determines those before it: t_start = N −
    round(N·d)."""
    return num_inference_steps - round(num_inference_steps * strength)


class Denoising:
    """The denoising of one canvas, from noise to a picture. Its state can be taken and restored at any step and between
    any two tiles, with equal bytes."""

    def __init__(
        self,
        latents: Tensor,
        steps: Sequence[Tiles],
        schedule: Schedule,
        generator: torch.Generator,
        *,
        begin: int = 0,
        phase: str = "canvas",
    ) -> None:
        """`latents` (1, C, h, w) fp32 is the result of `schedule.start` for step `begin`; `steps` holds the tiles of
        each step from there on, with one step per denoiser call, as in the schedule; `generator` is the one that drew
        the noise."""
        self.latents, self.step = latents, begin
        self._steps, self._schedule, self._generator = steps, schedule, generator
        self._begin, self._phase = begin, phase
        self._tiles_added = 0
        self._blended: Tensor | None = None
        self._torn = False  # in the middle of a sum or of a scheduler's step
        self._taken_up = False

    def state(self) -> SamplingState:
        """A copy of the state that the loop does not modify: a step creates new latents, but tiles add to `blended` in
        place."""
        return SamplingState(
            phase=self._phase, step=self.step, tiles_added=self._tiles_added, latents=self.latents,
            blended=None if self._blended is None else self._blended.clone(), scheduler=self._schedule.state(),
            generator=self._generator.get_state(),
        )  # fmt: skip

    def restore(self, state: SamplingState) -> None:
        """Continue from `state`, taken from a loop that was built in the same way."""
        assert state.phase == self._phase
        self.latents, self.step, self._tiles_added = state.latents, state.step, state.tiles_added
        self._blended = None if state.blended is None else state.blended.clone()
        self._schedule.restore(state.scheduler)
        self._generator.set_state(state.generator)

    def take_up(self, journal: Journal) -> bool:
        """Continue from the state that `journal` holds for this phase; done only once. Return whether anything is left
        to do."""
        if not self._taken_up and (saved := journal.load(self._phase)) is not None:
            self.restore(SamplingState.from_tensors(saved))
        self._taken_up = True
        return self.step < self.end

    def run(self, runner: Runner, journal: Journal | None = None) -> Generator[StepDone]:
        """Denoise to the end, yielding after each tile. Start from the state that `journal` holds for this phase, if
        any; save the state there whenever that is due, and when the loop ends for any reason. Raises NumericalError if
        a prediction is not finite."""
        journal = journal or NoJournal()
        if not self.take_up(journal):
            return
        try:
            while self.step < self.end:
                for done in self._one_step(runner):
                    if journal.due():
                        self._save(journal)
                    yield done
        except NumericalError:
            raise  # resuming would fail again
        except BaseException:
            if not self._torn:
                self._save(journal)
            raise
        self._save(journal)

    @property
    def end(self) -> int:
        """The number of the step after the last one."""
        return self._begin + len(self._steps)

    @property
    def samples_done(self) -> int:
        """The number of denoiser samples that have been predicted, over all steps."""
        return samples_before(self._steps, self.step - self._begin, self._tiles_added)

    def _save(self, journal: Journal) -> None:
        tiles = len(self._steps[self.step - self._begin]) if self._tiles_added else 0
        where = self._schedule.calls.where(self._phase, self.step, self._tiles_added, tiles)
        journal.save(self._phase, self.state().tensors(), where)

    def _one_step(self, runner: Runner) -> Iterator[StepDone]:
        step, first, regions = self.step, self._tiles_added, self._steps[self.step - self._begin]
        samples, total = regions.samples_of(first), regions.samples
        scaled = self._schedule.model_input(self.latents, step)
        if self._blended is None:
            self._blended = torch.zeros_like(self.latents)
        blended = self._blended
        waiting: deque[Text2ImageRegion] = deque()  # handed to the runner, not answered yet

        def tiles() -> Iterator[Tile]:
            for number in range(first, len(regions)):
                region = regions[number]
                waiting.append(region)
                yield Tile(scaled[:, :, *region.crop], region)

        for prediction in runner.predict(step, tiles()):
            region = waiting.popleft()
            self._torn = True
            blended[0, :, *region.crop] += region.weights * prediction
            self._tiles_added += 1
            self._torn = False
            samples += region.samples
            if self._tiles_added < len(regions):
                yield StepDone(step, samples, total, None)
        assert self._tiles_added == len(regions), "a runner answers for every tile"
        self._torn = True
        self.latents = self._schedule.step(blended, step, self.latents, self._generator)
        # The next step blends in a new tensor, because some schedulers keep this one.
        self.step, self._tiles_added, self._blended, self._torn = step + 1, 0, None, False
        yield StepDone(step, total, total, self.latents)
