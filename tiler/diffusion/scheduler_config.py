"""Check a checkpoint's scheduler_config.json, correct it as diffusers' pipeline does, and select the fields that a
scheduler accepts. Plain data: no scheduler is built here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from tiler.errors import ModelError

MAX_TRAIN_TIMESTEPS = 100_000
SPACINGS = ("leading", "linspace", "trailing")
_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")

# What describes the noise that the model was trained on: it holds whatever scheduler is asked for. All other fields
# describe one scheduler's way of solving, and mean something else, or nothing, to another.
_NOISE_FIELDS = frozenset({
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
    "timestep_spacing", "steps_offset", "rescale_betas_zero_snr", "set_alpha_to_one", "flow_shift",
})  # fmt: skip

# Schedulers of diffusers for models like these: another one can take their place.
_REPLACEABLE = frozenset(
    {
        "DDPMScheduler",
        "DDPMParallelScheduler",
        "DDIMParallelScheduler",
        "DDIMInverseScheduler",
        "PNDMScheduler",
        "IPNDMScheduler",
        "LMSDiscreteScheduler",
        "DPMSolverSinglestepScheduler",
        "DPMSolverSDEScheduler",
        "DPMSolverMultistepInverseScheduler",
        "KDPM2DiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "DEISMultistepScheduler",
        "SASolverScheduler",
        "TCDScheduler",
    }
)


class Corrected(NamedTuple):
    """A corrected config, with a sentence about each correction."""

    config: dict[str, Any]
    notes: tuple[str, ...]


def is_replaceable(class_name: str) -> bool:
    """Whether the class is one of diffusers' schedulers for discrete noise levels."""
    return class_name in _REPLACEABLE


def check_fields(config: Mapping[str, Any]) -> None:
    """Raise ModelError, naming the field, for values that no scheduler can work with."""
    count = config.get("num_train_timesteps", 1000)
    if not _is_int(count) or not 1 <= count <= MAX_TRAIN_TIMESTEPS:
        raise _bad("num_train_timesteps", count, f"it must be a whole number from 1 to {MAX_TRAIN_TIMESTEPS}")
    _one_of(config, "prediction_type", "epsilon", ("epsilon", "v_prediction"))
    _one_of(config, "timestep_spacing", "leading", SPACINGS)
    for field in ("rescale_betas_zero_snr", "clip_sample", "set_alpha_to_one", "use_flow_sigmas"):
        if not isinstance(config.get(field), bool | None):
            raise _bad(field, config[field], "it must be true or false")
    offset = config.get("steps_offset") or 0
    if not _is_int(offset) or not 0 <= offset < max(count, 2):
        raise _bad("steps_offset", offset, f"it must be a whole number from 0 to {count - 1}")
    if config.get("use_flow_sigmas"):
        raise _bad("use_flow_sigmas", True, "tiler does not support flow matching")
    if config.get("rescale_betas_zero_snr") and config.get("prediction_type", "epsilon") == "epsilon":
        raise _bad(
            "rescale_betas_zero_snr", True,
            "the first step would be pure noise, of which a model with prediction_type 'epsilon' learns nothing; "
            "one of the two fields is wrong",
        )  # fmt: skip
    own = config.get("_class_name")  # whose fields these are: to other schedulers they say nothing
    order = config.get("solver_order", 2)
    if own in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler") and not (_is_int(order) and 1 <= order <= 8):
        raise _bad("solver_order", order, "it must be a whole number from 1 to 8")
    original = config.get("original_inference_steps", 1)
    if own == "LCMScheduler" and not (_is_int(original) and 1 <= original <= count):
        raise _bad("original_inference_steps", original, f"it must be a whole number from 1 to {count}")
    _check_betas(config, count)


def _check_betas(config: Mapping[str, Any], count: int) -> None:
    trained = config.get("trained_betas")
    if trained is not None:
        if not isinstance(trained, list) or not all(_is_number(b) and 0 < b < 1 for b in trained):
            raise _bad("trained_betas", _short(trained), "it must be a list of numbers between 0 and 1")
        if len(trained) != count:
            raise _bad(
                "trained_betas", _short(trained),
                f"it holds {len(trained)} values where num_train_timesteps says {count}",
            )  # fmt: skip
        return
    _one_of(config, "beta_schedule", "linear", _BETA_SCHEDULES)
    start, end = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
    for field, value in (("beta_start", start), ("beta_end", end)):
        if not _is_number(value) or not 0 < value < 1:
            raise _bad(field, value, "it must be a number between 0 and 1")
    if start > end:
        raise _bad("beta_start", start, f"it must not be larger than beta_end = {end}")


def correct_scheduler(config: Mapping[str, Any]) -> Corrected:
    """Apply the corrections that diffusers' StableDiffusionPipeline makes to old configs: samples are not clipped, and
    leading timesteps start at 1.

    diffusers 0.42.1, pipelines/stable_diffusion/pipeline_stable_diffusion.py, `__init__`. An absent `clip_sample`
    counts as true only for DDIM, where true is the default.
    """
    clips = config.get("clip_sample", config.get("_class_name") == "DDIMScheduler")
    offset, notes = config.get("steps_offset", 0), []
    if clips:
        notes.append("scheduler_config.json is old: clip_sample is taken as false, as diffusers does")
    if offset != 1 and config.get("timestep_spacing", _default_spacing(config)) == "leading":
        notes.append(f"scheduler_config.json is old: steps_offset is taken as 1 instead of {offset}, as diffusers does")
    return Corrected(dict(config) | {"clip_sample": False, "steps_offset": 1}, tuple(notes))


def take_fields(config: Mapping[str, Any], cls: str, accepted: frozenset[str]) -> dict[str, Any]:
    """The fields of `config` for the constructor of `cls`: all that it accepts if the config was written for this
    class, else only those that describe the noise."""
    own = config.get("_class_name") == cls
    wanted = accepted if own else accepted & (_NOISE_FIELDS | {"clip_sample"})
    return {name: value for name, value in config.items() if name in wanted}


def _default_spacing(config: Mapping[str, Any]) -> str:
    """The timestep spacing that the config's own class uses if its file names none."""
    by_linspace = ("Euler", "DPMSolver", "UniPC", "DEIS", "LMS", "Heun", "KDPM2")
    return "linspace" if str(config.get("_class_name")).startswith(by_linspace) else "leading"


def _one_of(config: Mapping[str, Any], field: str, default: str, known: tuple[str, ...]) -> None:
    if (value := config.get(field, default)) not in known:
        raise _bad(field, value, f"tiler supports {', '.join(known)}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "…"


def _bad(field: str, value: object, why: str) -> ModelError:
    shown = repr(value) if isinstance(value, str) and field != "trained_betas" else _short(value)
    return ModelError(f"scheduler_config.json: {field} = {shown}: {why}; correct the file")
