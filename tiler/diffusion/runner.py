"""Who predicts: a runner answers the guided noise predictions of a step's tiles, in their order, wherever it computes them.

Blending, and so the order of every sum, stays with the canvas: its bytes do not depend on the runner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from tiler.decoding import FACTOR
from tiler.diffusion.tiles import Text2ImageRegion
from tiler.errors import NumericalError
from tiler.models.samples import Place, Prompt, Sample


class Tile(NamedTuple):
    """A crop of the canvas at one step: (1, C, h, w) fp32, scaled as the denoiser takes it, and where it lies."""

    latents: Tensor
    region: Text2ImageRegion


class Runner(Protocol):
    """Predicts noise for tiles."""

    def predict(self, step: int, tiles: Iterable[Tile]) -> Iterator[Tensor]:
        """The guided predictions u + g · (c − u), (C, h, w) fp32, one for each tile, in their order, checked to be finite.

        `tiles` is to be taken as needed: a large canvas has gigabytes of crops.
        """
        ...


class Conditions(NamedTuple):
    """Encoded prompts: number i of `cond` and of `uncond` belong together."""

    cond: Sequence[Prompt]
    uncond: Sequence[Prompt]


Predict = Callable[[Sequence[Sample], int], Tensor]
"""(n samples, step) → their noise predictions, (n, C, h, w) fp32."""


class LocalRunner:
    """Predicts in this process, `batch` samples for each call of `predict`.

    Both halves of a guidance are samples of their own, which share their latents tensor; a tile without guidance has no
    unconditional half. The result does not depend on `batch`.
    """

    def __init__(self, predict: Predict, conditions: Conditions, batch: int = 1) -> None:
        self._predict, self._conditions, self._batch = predict, conditions, batch

    def predict(self, step: int, tiles: Iterable[Tile]) -> Iterator[Tensor]:
        unconditional: Tensor | None = None  # waits for its conditional half, which may be of the next group
        for group in _groups(self._halves(tiles), self._batch):
            predictions = self._predict([sample for _, sample, _ in group], step)
            for (tile, _, conditional), prediction in zip(group, predictions, strict=True):
                check_finite(prediction, step, tile.region)
                if not conditional:
                    unconditional = prediction
                    continue
                yield guide(unconditional, prediction, tile.region.guidance_scale)
                unconditional = None

    def _halves(self, tiles: Iterable[Tile]) -> Iterator[tuple[Tile, Sample, bool]]:
        """(tile, sample, whether it is the conditional half)."""
        for tile in tiles:
            region = tile.region
            place = Place(
                region.top % region.canvas[0] * FACTOR, region.left % region.canvas[1] * FACTOR,
                region.height * FACTOR, region.width * FACTOR,
                (region.canvas[0] * FACTOR, region.canvas[1] * FACTOR),
            )  # fmt: skip
            prompts = [(self._conditions.uncond, False), (self._conditions.cond, True)][2 - region.samples :]
            for prompt, conditional in prompts:
                sample = Sample(tile.latents, prompt[region.condition], place, region.guidance_scale)
                yield tile, sample, conditional


def guide(unconditional: Tensor | None, conditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance, u + g · (c − u); the conditional prediction as it is where there is no other half."""
    return conditional if unconditional is None else unconditional + scale * (conditional - unconditional)


def check_finite(prediction: Tensor, step: int, region: Text2ImageRegion) -> None:
    """Raises NumericalError, naming the step and the tile."""
    if not bool(torch.isfinite(prediction).all()):
        raise NumericalError(
            f"NaN or Inf in the noise prediction at step {step + 1}, tile at row {FACTOR * region.top}, column "
            f"{FACTOR * region.left}; the weights may be damaged, or the guidance scale too high"
        )


def _groups(samples: Iterable[tuple[Tile, Sample, bool]], size: int) -> Iterator[list[tuple[Tile, Sample, bool]]]:
    group: list[tuple[Tile, Sample, bool]] = []
    for sample in samples:
        group.append(sample)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
