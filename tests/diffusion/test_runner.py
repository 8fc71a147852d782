"""Runners: in this process, and in another one that answers out of order and is killed."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from multiprocessing.connection import Connection

import numpy as np
import pytest
import torch
from torch import Tensor

from tiler.diffusion import schedulers
from tiler.diffusion.canvas import Denoising, initial_noise
from tiler.diffusion.layouts import plan_tiles, tiles_of_step
from tiler.diffusion.runner import Conditions, LocalRunner, Runner, Share, Tile, check_finite, guide
from tiler.errors import NumericalError
from tiler.models.samples import Prompt, Sample
from tiler.planning.resolve import fill
from tiler.request import RenderRequest, Scheduler

CONDITIONS = Conditions([[Share(Prompt(torch.full((1, 2, 3), 0.3)))]], [Prompt(torch.full((1, 2, 3), -0.2))])
STEPS = 3


def model(x: np.ndarray, prompt: float) -> np.ndarray:
    """A made-up model in numpy, because a forked process must not use torch's threads."""
    return np.tanh(x + np.float32(prompt)) * np.float32(0.7)


def predict(samples: Sequence[Sample], step: int) -> Tensor:
    found = [model(s.latents.numpy(), float(s.prompt.tokens.mean())) for s in samples]
    return torch.from_numpy(np.concatenate(found))


def work(pipe: Connection, dies: bool) -> None:
    """Answer the tiles of a window from the last to the first; with `dies`, end after the first answer."""
    while True:
        for number, x, prompts in reversed(pipe.recv()):
            pipe.send((number, [model(x, prompt) for prompt in prompts]))
            if dies:
                os._exit(1)


class ElsewhereRunner:
    """Predicts in another process, a window of tiles at a time, and restarts that process if it ends."""

    def __init__(self, window: int) -> None:
        self.window, self.deaths, self.swapped = window, 0, 0
        self._begin(dies=True)

    def _begin(self, dies: bool) -> None:
        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, dies), daemon=True)
        self.process.start()
        theirs.close()

    def predict(self, step: int, tiles: Iterable[Tile]) -> Iterator[Tensor]:
        window: list[Tile] = []
        for tile in tiles:
            window.append(tile)
            if len(window) == self.window:
                yield from self._answers(step, window)
                window = []
        yield from self._answers(step, window)

    def _answers(self, step: int, window: list[Tile]) -> Iterator[Tensor]:
        found: dict[int, list[np.ndarray]] = {}
        while len(found) < len(window):
            asked = [i for i in range(len(window)) if i not in found]
            self.pipe.send([(i, window[i].latents.numpy(), self._prompts(window[i])) for i in asked])
            try:
                for _ in asked:
                    assert self.pipe.poll(60)
                    number, predictions = self.pipe.recv()
                    self.swapped += number + 1 < len(window) and number + 1 in found
                    found[number] = predictions
            except EOFError:
                self.deaths += 1
                self._begin(dies=False)
        for i, tile in enumerate(window):
            halves = [torch.from_numpy(p)[0] for p in found[i]]
            for half in halves:
                check_finite(half, step, tile.region)
            yield guide(halves[0] if len(halves) == 2 else None, halves[-1:], [1], tile.region.guidance_scale)

    @staticmethod
    def _prompts(tile: Tile) -> list[float]:
        pairs = [CONDITIONS.uncond, [share.prompt for share in CONDITIONS.cond[0]]][2 - tile.region.samples :]
        return [float(prompt[tile.region.condition].tokens.mean()) for prompt in pairs]


def latents_by(runner: Runner) -> Tensor:
    asked = fill(
        RenderRequest(
            prompt="x", seed=0, width=160, height=128, num_inference_steps=STEPS, guidance_interval=(0.0, 0.5)
        )
    )
    tiles = plan_tiles(asked, canvas=(16, 20), tile=(8, 8), overlap=3)
    config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    schedule = schedulers.build(Scheduler.EULER_A, config, STEPS)
    noise, generator = initial_noise((1, 4, 16, 20), 5)
    steps = [tiles_of_step(tiles, asked, number) for number in range(STEPS)]
    denoising = Denoising(schedule.start(noise, None, 0), steps, schedule, generator)
    list(denoising.run(runner))
    return denoising.latents


def test_a_runner_elsewhere_that_answers_out_of_order_and_dies_gives_the_same_bytes() -> None:
    here = latents_by(LocalRunner(predict, lambda step: CONDITIONS, 3))
    elsewhere = ElsewhereRunner(window=5)
    try:
        assert torch.equal(latents_by(elsewhere), here)
    finally:
        elsewhere.process.kill()
    assert elsewhere.deaths == 1
    assert elsewhere.swapped > 0


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 100])
def test_the_halves_of_a_guidance_share_their_latents_and_groups_change_no_bit(batch: int) -> None:
    sizes: list[int] = []

    def watched(samples: Sequence[Sample], step: int) -> Tensor:
        sizes.append(len(samples))
        for a, b in pairwise(samples):
            assert (a.place == b.place) == (a.latents is b.latents)
        return predict(samples, step)

    assert torch.equal(
        latents_by(LocalRunner(watched, lambda step: CONDITIONS, batch)),
        latents_by(LocalRunner(predict, lambda step: CONDITIONS)),
    )
    assert max(sizes) <= batch
    tiles = 12
    assert sum(sizes) == tiles * (2 + 2 + 1)


def test_tiles_are_taken_as_needed() -> None:
    taken = 0
    asked = fill(RenderRequest(prompt="x", seed=0, size=320))

    def tiles() -> Iterator[Tile]:
        nonlocal taken
        for region in plan_tiles(asked, canvas=(40, 40), tile=(8, 8), overlap=2):
            taken += 1
            yield Tile(torch.zeros(1, 4, 8, 8), region)

    next(LocalRunner(predict, lambda step: CONDITIONS, 4).predict(0, tiles()))
    assert taken == 2


def test_a_prediction_that_is_not_finite_names_its_step_and_tile() -> None:
    region = plan_tiles(fill(RenderRequest(prompt="x", seed=0, size=128)), canvas=(16, 16), tile=(8, 8), overlap=2)[4]
    with pytest.raises(NumericalError, match="step 3, tile at row 32, column 32"):
        check_finite(torch.tensor([0.0, float("inf")]), 2, region)


def test_joined_prompts_share_a_guidance() -> None:
    """u + g · Σ f (c − u), or without an unconditional half, their mean."""
    u, a, b = (torch.full((1, 2, 2), value) for value in (1.0, 3.0, 7.0))
    assert torch.equal(guide(u, [a, b], [1.0, 0.5], 2.0), torch.full((1, 2, 2), 1 + 2 * (2.0 + 0.5 * 6)))
    assert torch.equal(guide(None, [a, b], [3.0, 1.0], 2.0), torch.full((1, 2, 2), 4.0))
    assert torch.equal(guide(u, [a], [0.5], 2.0), torch.full((1, 2, 2), 3.0))


def test_34_near_the_ceiling_calls_get_smaller_and_the_bytes_stay() -> None:
    sizes, told, warnings = list[int](), list[int](), iter([False, True, False, True, True])

    def watched(samples: Sequence[Sample], step: int) -> Tensor:
        sizes.append(len(samples))
        return predict(samples, step)

    runner = LocalRunner(
        watched, lambda step: CONDITIONS, 5, is_tight=lambda: next(warnings, True), on_smaller=told.append
    )
    assert torch.equal(latents_by(runner), latents_by(LocalRunner(predict, lambda step: CONDITIONS)))
    assert sizes[:5] == [5, 2, 2, 1, 1] and told == [2, 1]
