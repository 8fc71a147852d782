"""Flow matching (Lipman et al. 2023, arXiv:2210.02747): x = (1 − σ)·x₀ + σ·n, the model predicts v = n − x₀, and an
Euler step is x += (σ′ − σ)·v, as in diffusers' FlowMatchEulerDiscreteScheduler.

All solvers use that scheduler's list of σ. It is shifted by a constant or, for models trained at several sizes, by μ,
which grows with the number of tokens that the model sees at once: those of a tile, never those of the canvas.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tiler.diffusion.schedulers import DiffusersSchedule
from tiler.diffusion.timesteps import set_levels
from tiler.errors import ModelError, UsageError
from tiler.memory.lean_imports import lean_imports
from tiler.request import Scheduler

_SOLVERS = {
    Scheduler.DPMPP_2M: ("scheduling_dpmsolver_multistep", "DPMSolverMultistepScheduler"),
    Scheduler.UNIPC: ("scheduling_unipc_multistep", "UniPCMultistepScheduler"),
}
_KNOWN = (Scheduler.EULER, Scheduler.HEUN, *_SOLVERS, Scheduler.LCM)
_OWN = {
    "FlowMatchEulerDiscreteScheduler": Scheduler.EULER,
    "FlowMatchHeunDiscreteScheduler": Scheduler.HEUN,
    "FlowMatchLCMScheduler": Scheduler.LCM,
}
_NUMBERS = {
    "num_train_timesteps": (1, 100_000), "shift": (1e-3, 1e3), "base_shift": (-20, 20), "max_shift": (-20, 20),
    "base_image_seq_len": (1, 1e6), "max_image_seq_len": (1, 1e6),
}  # fmt: skip
_BELOW_ONE = 1 - 1e-6  # largest first σ: multistep solvers take the logarithm of 1 − σ


class FlowSchedule(DiffusersSchedule):
    """A `Schedule` that wraps one of diffusers' flow-matching schedulers, which take unscaled latents."""

    def start(self, noise: Tensor, reference: Tensor | None, begin: int) -> Tensor:
        self.scheduler.set_begin_index(begin)
        if reference is None:
            return noise
        if begin >= len(self.timesteps):
            return reference.clone()
        return self.noised(reference, noise, begin)

    def noised(self, reference: Tensor, noise: Tensor, step: int) -> Tensor:
        if step >= len(self.timesteps):
            return reference
        sigma = self.scheduler.sigmas[step]
        noised: Tensor = sigma * noise + (1 - sigma) * reference
        return noised

    def model_input(self, latents: Tensor, step: int) -> Tensor:
        return latents

    def _denoised(self, given: tuple[Tensor, ...], noise_pred: Tensor, step: int, latents: Tensor) -> Tensor:
        """x₀ = x − σ·v."""
        return latents - float(self.scheduler.sigmas[step]) * noise_pred


def build(
    asked: Scheduler,
    config: Mapping[str, Any],
    num_inference_steps: int,
    *,
    tokens: int = 4096,
    even_sigmas: bool = False,
) -> FlowSchedule:
    """Build the flow schedule of a checkpoint's scheduler_config.json for a model that sees `tokens` at once. With
    `even_sigmas`, σ falls from 1 to 1/N in equal steps before it is shifted; otherwise it falls to the scheduler's own
    smallest σ.

    Raises UsageError for a scheduler that is not for flow matching, ModelError for a config that does not work.
    """
    name = choose(asked, config)
    _check(config)
    euler = _euler(config, stochastic=name is Scheduler.LCM)
    count = num_inference_steps
    mu = shift_of(tokens, euler.config) if euler.config.use_dynamic_shifting else None
    try:
        euler.set_timesteps(count, sigmas=np.linspace(1, 1 / count, count) if even_sigmas else None, mu=mu)
    except (TypeError, ValueError, ImportError) as error:
        raise _unworkable(error) from error
    sigmas = euler.sigmas
    # Two shifts give equal σ only if nothing is left between them.
    if not bool(sigmas.isfinite().all()) or sigmas[0] > 1 or bool((sigmas.diff() >= 0).any()):
        raise ModelError(
            f"scheduler_config.json: its sigmas do not fall from 1 to 0 in {count} steps; correct the file"
        )
    if name is Scheduler.HEUN:
        return FlowSchedule(_heun(euler), name)
    return FlowSchedule(_solver(name, euler) if name in _SOLVERS else euler, name)


def shift_of(tokens: int, config: Any) -> float:
    """The μ for a picture of `tokens`, on the line through (base_image_seq_len, base_shift) and (max_image_seq_len,
    max_shift), as in diffusers' pipelines (`calculate_shift`)."""
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    return float(config.base_shift + slope * (tokens - config.base_image_seq_len))


def choose(asked: Scheduler, config: Mapping[str, Any]) -> Scheduler:
    """Choose the solver: AUTO becomes the checkpoint's own. Raises ModelError, and UsageError for a scheduler that is
    not for flow matching."""
    cls = config.get("_class_name", "FlowMatchEulerDiscreteScheduler")
    if cls not in _OWN:
        known = ", ".join(_OWN)
        raise ModelError(
            f"scheduler_config.json: _class_name = {str(cls)[:60]!r} is not for this flow-matching model; tiler takes {known}"
        )
    if asked is Scheduler.AUTO:
        return _OWN[cls]
    if asked not in _KNOWN:
        *others, last = (name.value for name in _KNOWN)
        raise UsageError(
            f"--scheduler {asked.value} is not for flow-matching models; leave it out, or take {', '.join(others)} or {last}"
        )
    return asked


def _check(config: Mapping[str, Any]) -> None:
    for field, (low, high) in _NUMBERS.items():
        value = config.get(field, low)
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or not low <= value <= high:
            raise ModelError(
                f"scheduler_config.json: {field} = {str(value)[:40]}: it must be a number from {low:g} to {high:g}; "
                "correct the file"
            )
    if config.get("use_dynamic_shifting") and config.get("max_image_seq_len") == config.get("base_image_seq_len", 256):
        raise ModelError("scheduler_config.json: max_image_seq_len equals base_image_seq_len; correct the file")
    if config.get("invert_sigmas"):
        raise ModelError("scheduler_config.json: invert_sigmas is for video models; tiler does not support it")


def _euler(config: Mapping[str, Any], *, stochastic: bool) -> Any:
    """FlowMatchEuler with the config's noise. With `stochastic`, each step leads to σ = 0 and then adds noise again, as
    diffusers' FlowMatchLCMScheduler does."""
    with lean_imports():
        from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
    fields = {name: value for name, value in config.items() if not name.startswith("_")}
    try:
        return FlowMatchEulerDiscreteScheduler.from_config(
            fields | ({"stochastic_sampling": True} if stochastic else {})
        )
    except (TypeError, ValueError, ImportError) as error:
        raise _unworkable(error) from error


def _solver(name: Scheduler, euler: Any) -> Any:
    """A multistep solver that uses the σ and timesteps of `euler`."""
    module, cls = _SOLVERS[name]
    with lean_imports():
        solver = getattr(import_module(f"diffusers.schedulers.{module}"), cls)(
            num_train_timesteps=euler.config.num_train_timesteps,
            use_flow_sigmas=True,
            prediction_type="flow_prediction",
        )
    solver.set_timesteps(len(euler.timesteps))
    solver.timesteps = euler.timesteps
    solver.sigmas = torch.cat([euler.sigmas[:1].clamp(max=_BELOW_ONE), euler.sigmas[1:]])
    return solver


def _heun(euler: Any) -> Any:
    """Heun's method with the σ and timesteps of `euler`."""
    with lean_imports():
        from diffusers.schedulers.scheduling_flow_match_heun_discrete import FlowMatchHeunDiscreteScheduler
    heun = FlowMatchHeunDiscreteScheduler(num_train_timesteps=euler.config.num_train_timesteps)
    heun.set_timesteps(len(euler.timesteps))
    set_levels(heun, euler.timesteps, euler.sigmas)
    return heun


def _unworkable(error: Exception) -> ModelError:
    reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    return ModelError(f"scheduler_config.json does not work ({reason}); download it again")
