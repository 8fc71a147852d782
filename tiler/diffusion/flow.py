"""Flow matching (Lipman et al. 2023, arXiv:2210.02747): x = (1 − σ)·x₀ + σ·n, the model predicts v = n − x₀, and a step is
x += (σ′ − σ)·v, as diffusers' FlowMatchEulerDiscreteScheduler does it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tiler.diffusion.schedulers import DiffusersSchedule
from tiler.errors import ModelError, UsageError
from tiler.memory.lean_imports import lean_imports
from tiler.request import Scheduler


class FlowSchedule(DiffusersSchedule):
    """A `Schedule` around FlowMatchEulerDiscreteScheduler, whose latents are taken as they are."""

    def start(self, noise: Tensor, reference: Tensor | None, begin: int) -> Tensor:
        self.scheduler.set_begin_index(begin)
        if reference is None:
            return noise
        if begin >= len(self.timesteps):
            return reference.clone()
        noised: Tensor = self.scheduler.scale_noise(reference, self.timesteps[begin : begin + 1], noise)
        return noised.float()

    def model_input(self, latents: Tensor, step: int) -> Tensor:
        return latents


def build(asked: Scheduler, config: Mapping[str, Any], num_inference_steps: int) -> FlowSchedule:
    """The flow schedule of a checkpoint's scheduler_config.json. Raises UsageError for a scheduler that is not for flow
    matching, ModelError for a config that does not work."""
    if asked not in (Scheduler.AUTO, Scheduler.EULER):
        raise UsageError(f"--scheduler {asked.value} is not for flow-matching models; leave it out, or take Euler")
    with lean_imports():
        from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
    try:
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(dict(config))
        scheduler.set_timesteps(num_inference_steps)
    except (TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"scheduler_config.json does not work ({reason}); download it again") from error
    return FlowSchedule(scheduler, Scheduler.EULER)
