"""diffusers' schedulers by the names people know them under, built on the checkpoint's own noise schedule."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tiler.errors import ModelError
from tiler.memory.lean_imports import lean_imports
from tiler.request import Scheduler


class _Recipe(NamedTuple):
    module: str
    cls: str
    overrides: dict[str, Any]


_RECIPES = {
    Scheduler.DDIM: _Recipe("scheduling_ddim", "DDIMScheduler", {}),
    Scheduler.EULER: _Recipe("scheduling_euler_discrete", "EulerDiscreteScheduler", {}),
    Scheduler.EULER_A: _Recipe("scheduling_euler_ancestral_discrete", "EulerAncestralDiscreteScheduler", {}),
    Scheduler.DPMPP_2M: _Recipe(
        "scheduling_dpmsolver_multistep", "DPMSolverMultistepScheduler", {"use_karras_sigmas": False}
    ),
    Scheduler.DPMPP_2M_KARRAS: _Recipe(
        "scheduling_dpmsolver_multistep", "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}
    ),
    Scheduler.UNIPC: _Recipe("scheduling_unipc_multistep", "UniPCMultistepScheduler", {}),
    Scheduler.LCM: _Recipe("scheduling_lcm", "LCMScheduler", {}),
}
_OWN = {recipe.cls: name for name, recipe in _RECIPES.items() if name is not Scheduler.DPMPP_2M_KARRAS}


def choose(asked: Scheduler, config: dict[str, Any]) -> Scheduler:
    """AUTO becomes the checkpoint's own scheduler when tiler has it, else DPM++ 2M Karras."""
    if asked is not Scheduler.AUTO:
        return asked
    own = _OWN.get(str(config.get("_class_name")), Scheduler.DPMPP_2M_KARRAS)
    return Scheduler.DPMPP_2M_KARRAS if own is Scheduler.DPMPP_2M and config.get("use_karras_sigmas") else own


def build(name: Scheduler, config: dict[str, Any], num_inference_steps: int) -> Any:
    """A fresh diffusers scheduler with its timesteps set. `name` is not AUTO. Raises ModelError for an unusable config."""
    recipe = _RECIPES[name]
    with lean_imports():
        cls = getattr(import_module(f"diffusers.schedulers.{recipe.module}"), recipe.cls)
    kind = config.get("prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction"):
        raise ModelError(f"the checkpoint's prediction_type is {kind!r}; tiler supports epsilon and v_prediction")
    try:
        scheduler = cls.from_config(config, **recipe.overrides)
        scheduler.set_timesteps(num_inference_steps)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ModelError(
            f"scheduler_config.json does not work with {name.value}: {str(error).splitlines()[0]}"
        ) from error
    return scheduler


def step(scheduler: Any, noise_pred: Tensor, timestep: Tensor, latents: Tensor, generator: torch.Generator) -> Tensor:
    """One scheduler step on the whole canvas; fp32 whatever the scheduler returns.

    Ancestral noise comes from `generator`, drawn once for the canvas.
    """
    extra = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    return scheduler.step(noise_pred, timestep, latents, return_dict=False, **extra)[0].float()
