"""The denoising loop of Mixture of Diffusers: tiles predict, the canvas blends, one scheduler step moves it all.

Jiménez 2023, arXiv:2302.02412: ε̂ = Σ m_r (u_r + g_r (c_r − u_r)) / Σ m_r, then x_{t−1} = step(ε̂, t, x_t).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tiler.diffusion.schedulers import Schedule
from tiler.diffusion.tiles import Text2ImageRegion
from tiler.errors import NumericalError

PredictNoise = Callable[[list[Tensor], Tensor, list[Tensor]], Tensor]
"""(n latents (1, C, h, w), timestep, n prompt_embeds (1, tokens, width)) → (n, C, h, w), all fp32."""


class Conditions(NamedTuple):
    """Encoded prompts: row i of `cond` and of `uncond` belong together. (n, tokens, width) fp32 each."""

    cond: Tensor
    uncond: Tensor


class StepDone(NamedTuple):
    """`samples` of `total` UNet samples of step `step` (from 0) are done; `latents` is set when the step is complete."""

    step: int
    samples: int
    total: int
    latents: Tensor | None


class _Sample(NamedTuple):
    region: Text2ImageRegion
    embeds: Tensor  # (1, tokens, width)
    unconditional: bool


def initial_noise(
    shape: tuple[int, int, int, int], seed: int, reseeded: Sequence[tuple[tuple[slice, slice], int]] = ()
) -> tuple[Tensor, torch.Generator]:
    """Noise for the whole canvas from one CPU generator, and that generator (ancestral samplers go on with it).

    A region's own seed replaces its crop: `reseeded` holds (crop, seed).
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    noise = torch.randn(shape, generator=generator, dtype=torch.float32)
    for (rows, cols), own in reseeded:
        crop = noise[:, :, rows, cols]
        crop.copy_(torch.randn(crop.shape, generator=torch.Generator("cpu").manual_seed(own), dtype=torch.float32))
    return noise, generator


def first_step(num_inference_steps: int, strength: float) -> int:
    """The schedule's steps that the guide rules: t_start = N − round(N·d)."""
    return num_inference_steps - round(num_inference_steps * strength)


def denoise(
    latents: Tensor,
    steps: Iterable[Sequence[Text2ImageRegion]],
    conditions: Conditions,
    schedule: Schedule,
    predict_noise: PredictNoise,
    generator: torch.Generator,
    *,
    begin: int = 0,
    batch: int = 1,
) -> Iterator[StepDone]:
    """Denoise the canvas `latents` (1, C, h, w) fp32 from timestep number `begin` on, yielding after each UNet call. `steps`
    are the tiles of each step from there.

    `batch` samples go through the UNet at a time; both halves of the guidance are samples of their own, and a tile
    with guidance_scale ≤ 1 has no unconditional half. The result does not depend on `batch`.
    Raises NumericalError when a prediction is not finite.
    """
    blended = torch.zeros_like(latents)
    for number, regions in zip(range(begin, len(schedule.timesteps)), steps, strict=True):
        samples = [s for region in regions for s in _samples(region, conditions)]
        timestep = schedule.timesteps[number]
        scaled = schedule.model_input(latents, number)
        blended.zero_()
        held: Tensor | None = None  # an unconditional prediction waiting for its conditional half
        for first in range(0, len(samples), batch):
            group = samples[first : first + batch]
            inputs: list[Tensor] = []
            for i, s in enumerate(group):  # both halves of a guidance get the same tensor
                shared = i > 0 and s.region is group[i - 1].region
                inputs.append(inputs[-1] if shared else scaled[:, :, *s.region.crop])
            predictions = predict_noise(inputs, timestep, [s.embeds for s in group])
            for i, sample in enumerate(group):
                prediction, region = predictions[i], sample.region
                if not bool(torch.isfinite(prediction).all()):
                    raise NumericalError(
                        f"NaN or Inf in the noise prediction at step {number + 1}, tile at row {8 * region.top}, column "
                        f"{8 * region.left}; the weights may be damaged, or the guidance scale too high"
                    )
                if sample.unconditional:
                    held = prediction
                    continue
                if held is not None:
                    prediction = held + region.guidance_scale * (prediction - held)
                    held = None
                blended[0, :, *region.crop] += region.weights * prediction
            done = min(first + batch, len(samples))
            if done < len(samples):
                yield StepDone(number, done, len(samples), None)
        latents = schedule.step(blended, number, latents, generator)
        yield StepDone(number, len(samples), len(samples), latents)


def _samples(region: Text2ImageRegion, conditions: Conditions) -> list[_Sample]:
    index = slice(region.condition, region.condition + 1)
    with_prompt = _Sample(region, conditions.cond[index], False)
    if region.samples == 1:
        return [with_prompt]
    return [_Sample(region, conditions.uncond[index], True), with_prompt]
