"""Runners predict the guided noise of a step's tiles, in tile order, in this process or elsewhere. The canvas does the
blending, and with it determines the order of every sum, so the bytes of a picture do not depend on the runner."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import reduce
from itertools import islice
from operator import add
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from tiler.decoding import FACTOR
from tiler.diffusion.tiles import Text2ImageRegion
from tiler.errors import NumericalError
from tiler.models.samples import Place, Prompt, Sample


class Tile(NamedTuple):
    """A crop of the canvas at one step, (1, C, h, w) fp32, scaled as the denoiser's input, with its position."""

    latents: Tensor
    region: Text2ImageRegion


class Runner(Protocol):
    """Predicts noise for tiles."""

    def predict(self, step: int, tiles: Iterable[Tile]) -> Iterator[Tensor]:
        """Yield the guided predictions u + g · (c − u), (C, h, w) fp32, one for each tile, in their order, checked to
        be finite.

        Take `tiles` from the iterable only as needed: a large canvas has gigabytes of crops.
        """
        ...


class Share(NamedTuple):
    """One of the prompts of a condition, and its factor in the guidance (1 for a single prompt)."""

    prompt: Prompt
    factor: float = 1.0


class Conditions(NamedTuple):
    """The encoded prompts of a step: entry i of `cond`, which has one prompt or more, belongs to entry i of
    `uncond`."""

    cond: Sequence[Sequence[Share]]
    uncond: Sequence[Prompt]


Predict = Callable[[Sequence[Sample], int], Tensor]
"""(n samples, step) → their noise predictions, (n, C, h, w) fp32."""


class LocalRunner:
    """Predicts in this process, with `batch` samples in each call of `predict`; half as many from the next call on
    whenever `is_tight` returns True, which is reported to `on_smaller`.

    The halves of a guidance are separate samples that share their latents tensor; a tile without guidance has no
    unconditional half. `conditions` returns the conditions of a step. Only the first `guided_channels` of a prediction
    are guided; the others are those of the conditional half. The result does not depend on `batch`.
    """

    def __init__(
        self, predict: Predict, conditions: Callable[[int], Conditions], batch: int = 1, *,
        is_tight: Callable[[], bool] = lambda: False, on_smaller: Callable[[int], None] = lambda batch: None,
        guided_channels: int | None = None,
    ) -> None:  # fmt: skip
        self._predict, self._conditions, self._batch = predict, conditions, batch
        self._is_tight, self._on_smaller, self._guided = is_tight, on_smaller, guided_channels

    def _size(self) -> int:
        """The number of samples in the next call."""
        if self._is_tight() and self._batch > 1:
            self._batch //= 2
            self._on_smaller(self._batch)
        return self._batch

    def predict(self, step: int, tiles: Iterable[Tile]) -> Iterator[Tensor]:
        conditions = self._conditions(step)
        # They wait for the tile's last half, which may be in the next group.
        unconditional: Tensor | None = None
        conditional: list[Tensor] = []
        for group in _groups(self._halves(tiles, conditions), self._size):
            predictions = self._predict([sample for _, sample, _ in group], step)
            for (tile, _, is_conditional), prediction in zip(group, predictions, strict=True):
                check_finite(prediction, step, tile.region)
                if not is_conditional:
                    unconditional = prediction
                    continue
                conditional.append(prediction)
                shares = conditions.cond[tile.region.condition]
                if len(conditional) == len(shares):
                    factors = [share.factor for share in shares]
                    guided = guide(unconditional, conditional, factors, tile.region.guidance_scale)
                    if self._guided is not None and unconditional is not None:
                        guided[self._guided :] = guide(None, [c[self._guided :] for c in conditional], factors, 1.0)
                    yield guided
                    unconditional, conditional = None, []

    def _halves(self, tiles: Iterable[Tile], conditions: Conditions) -> Iterator[tuple[Tile, Sample, bool]]:
        """Yield (tile, sample, whether it is a conditional half)."""
        for tile in tiles:
            region = tile.region
            top, left, *whole = (FACTOR * side for side in region.place)
            place = Place(top, left, region.height * FACTOR, region.width * FACTOR, (whole[0], whole[1]))
            shares = conditions.cond[region.condition]
            assert region.samples - len(shares) in (0, 1), "the planner counts as many prompts"
            prompts = [(conditions.uncond[region.condition], False)] if region.samples > len(shares) else []
            for prompt, conditional in (*prompts, *((share.prompt, True) for share in shares)):
                yield tile, Sample(tile.latents, prompt, place, region.guidance_scale), conditional


def guide(
    unconditional: Tensor | None, conditional: Sequence[Tensor], factors: Sequence[float], scale: float
) -> Tensor:
    """Classifier-free guidance for one prompt or several, u + g · Σ f (c − u) (Liu et al. 2022, arXiv:2206.01714);
    without an unconditional half, Σ f c / Σ f."""
    if len(conditional) == 1 and factors[0] == 1:
        only = conditional[0]
        return only if unconditional is None else unconditional + scale * (only - unconditional)
    if unconditional is None:
        return reduce(add, (f * c for f, c in zip(factors, conditional, strict=True))) / sum(factors)
    apart = reduce(add, (f * (c - unconditional) for f, c in zip(factors, conditional, strict=True)))
    return unconditional + scale * apart


def check_finite(prediction: Tensor, step: int, region: Text2ImageRegion) -> None:
    """Raise NumericalError, naming the step and the tile, if a prediction is not finite."""
    if not bool(torch.isfinite(prediction).all()):
        raise NumericalError(
            f"NaN or Inf in the noise prediction at step {step + 1}, tile at row {FACTOR * region.top}, column "
            f"{FACTOR * region.left}; the weights may be damaged, or the guidance scale too high"
        )


def _groups(
    samples: Iterable[tuple[Tile, Sample, bool]], size: Callable[[], int]
) -> Iterator[list[tuple[Tile, Sample, bool]]]:
    """Split into groups; `size` is called before each group."""
    waiting = iter(samples)
    while group := list(islice(waiting, size())):
        yield group
