"""Check the timesteps of diffusers' schedulers, and repair those that rounding or an offset spoils.

The formulas of the spacings fail at some step counts: `trailing` yields one timestep too many if N · (T/N) is slightly
more than T; an offset leads beyond the last trained timestep; and near T steps two of them round to the same timestep.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Levels(NamedTuple):
    """The timesteps at which the steps of a scheduler begin, (N,), and the sigmas there and at the end, (N + 1,) or
    more; no sigmas for schedulers that know none."""

    timesteps: Tensor
    sigmas: Tensor | None


def levels(scheduler: Any) -> Levels:
    """Those of a diffusers scheduler; one of order 2 holds all but the first and the last twice."""
    order, sigmas = scheduler.order, getattr(scheduler, "sigmas", None)
    if order == 1 or sigmas is None:
        return Levels(scheduler.timesteps, sigmas)
    return Levels(scheduler.timesteps[::order], torch.cat([sigmas[:-1:order], sigmas[-1:]]))


def set_levels(scheduler: Any, timesteps: Tensor, sigmas: Tensor | None) -> None:
    """The inverse of `levels`; without `sigmas` those that the scheduler has stay."""
    order = scheduler.order
    scheduler.timesteps = torch.cat([timesteps[:1], timesteps[1:].repeat_interleave(order)])
    if sigmas is not None:
        scheduler.sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(order), sigmas[-1:]])


def mend(scheduler: Any, count: int) -> None:
    """Give a diffusers scheduler whose timesteps are set exactly `count` timesteps within range and falling sigmas,
    unless it has them already. Schedules defined by sigmas (Karras and the like) derive their timesteps from these and
    are left alone."""
    if not fault(scheduler, count) or not hasattr(scheduler.config, "timestep_spacing") or _by_sigmas(scheduler):
        return
    trained = int(scheduler.config.num_train_timesteps)
    own = levels(scheduler).timesteps
    timesteps = own[:count].to(torch.float64)
    timesteps = timesteps - max(0.0, float(timesteps.max()) - (trained - 1))
    if len(timesteps) < count or float(timesteps.min()) < 0 or bool((timesteps.diff() >= 0).any()):
        first = min(trained - 1.0, float(own.max()))
        if count > first + 1:
            first = trained - 1.0
        if count > first + 1:
            return
        timesteps = torch.linspace(first, 0, count, dtype=torch.float64).round()
    _set(scheduler, timesteps)


def _set(scheduler: Any, timesteps: Tensor) -> None:
    """Set the scheduler's timesteps, (N,) fp64, and the matching sigmas."""
    scheduler.num_inference_steps, sigmas = len(timesteps), None
    if hasattr(scheduler, "sigmas") and getattr(scheduler.config, "interpolation_type", "linear") == "linear":
        known = trained_sigmas(scheduler)
        found = np.interp(timesteps.numpy(), np.arange(len(known)), known)
        sigmas = torch.from_numpy(np.append(found, float(scheduler.sigmas[-1])).astype(np.float32))
    set_levels(scheduler, timesteps.to(scheduler.timesteps.dtype), sigmas)


def set_beta_sigmas(scheduler: Any, count: int) -> None:
    """Set sigmas at the quantiles of a beta distribution with α = β = 0.6 (Lee et al. 2024, arXiv:2407.12173), as
    diffusers does if scipy is installed. The scheduler's timesteps must be set."""
    known = trained_sigmas(scheduler)
    # Euler spreads them over the sigmas of its own spacing, the multistep solvers over all that the model was trained
    # on.
    own = np.interp(levels(scheduler).timesteps.numpy(), np.arange(len(known)), known)
    spread = own if _is_euler(scheduler) else known[::-1]
    low, high = getattr(scheduler.config, "sigma_min", None), getattr(scheduler.config, "sigma_max", None)
    low, high = float(spread[-1]) if low is None else low, float(spread[0]) if high is None else high
    sigmas = low + beta_quantiles(1 - np.linspace(0, 1, count), 0.6) * (high - low)
    timesteps = np.array([scheduler._sigma_to_t(sigma, np.log(known)) for sigma in sigmas])
    last = 0.0 if getattr(scheduler.config, "final_sigmas_type", "zero") == "zero" else float(sigmas[-1])
    scheduler.num_inference_steps = count
    set_levels(
        scheduler,
        torch.from_numpy(timesteps).to(scheduler.timesteps.dtype),
        torch.from_numpy(np.append(sigmas, last).astype(np.float32)),
    )


def beta_quantiles(shares: np.ndarray, shape: float) -> np.ndarray:
    """The quantiles of the symmetric beta distribution with α = β = `shape` at `shares`, (n,) fp64 from 0 to 1.

    Its density has a pole at each end; with t = u^(1/shape) the lower half's integral, ∫ t^(a−1) (1 − t)^(a−1) dt from
    0 to x, becomes 1/a ∫ (1 − u^(1/a))^(a−1) du, which is smooth, and the upper half mirrors it.
    """
    u = np.linspace(0, 0.5**shape, 20_001)
    density = (1 - u ** (1 / shape)) ** (shape - 1)
    step = u[1] - u[0]
    middles = (1 - ((u[1:] + u[:-1]) / 2) ** (1 / shape)) ** (shape - 1)
    areas = step / 6 * (density[1:] + 4 * middles + density[:-1])  # Simpson's rule
    below = np.concatenate([[0.0], np.cumsum(areas)])
    lower = np.minimum(shares, 1 - shares)
    found = np.interp(lower, below / (2 * below[-1]), u) ** (1 / shape)
    return np.where(shares <= 0.5, found, 1 - found)


def trained_sigmas(scheduler: Any) -> np.ndarray:
    """σ = √((1 − ᾱ)/ᾱ) of every trained timestep, increasing, (T,) fp32."""
    alphas = scheduler.alphas_cumprod
    return np.array(((1 - alphas) / alphas) ** 0.5)


def fault(scheduler: Any, count: int) -> str | None:
    """A description, for people, of the fault in a scheduler's timesteps or sigmas; None if there is none."""
    (timesteps, sigmas), config = levels(scheduler), scheduler.config
    if len(timesteps) != count:
        return f"it has {len(timesteps)} timesteps for {count} steps"
    if not bool(torch.isfinite(timesteps).all()):
        return "a timestep is not finite"
    if bool((timesteps.diff() > 0).any()):
        return "its timesteps rise"
    continuous = getattr(config, "timestep_type", "discrete") == "continuous"  # then they are logarithms of sigmas
    if not continuous and not 0 <= float(timesteps.min()) <= float(timesteps.max()) <= config.num_train_timesteps - 1:
        return f"its timesteps leave the trained range, 0–{config.num_train_timesteps - 1}"
    if sigmas is None:
        return "two timesteps are equal" if bool((timesteps.diff() == 0).any()) else None
    if len(sigmas) <= count or not bool(torch.isfinite(sigmas).all()):
        return "a sigma is missing or not finite"
    # After the last timestep the last trained sigma may stay (final_sigmas_type "sigma_min").
    if bool((sigmas[:count].diff() >= 0).any()) or float(sigmas[count]) > float(sigmas[count - 1]):
        return "its sigmas do not fall"
    return None


def _by_sigmas(scheduler: Any) -> bool:
    fields = ("use_karras_sigmas", "use_exponential_sigmas", "use_lu_lambdas")
    return any(getattr(scheduler.config, field, False) for field in fields)


def _is_euler(scheduler: Any) -> bool:
    return type(scheduler).__name__ in ("EulerDiscreteScheduler", "HeunDiscreteScheduler")


def nearest_count(works: Callable[[int], bool], asked: int, most: int) -> int | None:
    """The number of steps nearest to `asked`, from 1 to `most`, for which `works` is true; the smaller one of two that
    are equally near."""
    for distance in range(1, max(asked, most) + 1):
        for count in (asked - distance, asked + distance):
            if 1 <= count <= most and works(count):
                return count
    return None
