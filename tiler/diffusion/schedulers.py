"""diffusers' schedulers by their common names, behind one interface: `Schedule`.

A schedule is built on the checkpoint's own noise levels. Everything that could go wrong with it is detected when it is
built, before any work: fields, timesteps, sigmas, and a rehearsal of all steps on a few made-up latents.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from tiler.diffusion import timesteps as times
from tiler.diffusion.calls import Calls
from tiler.diffusion.scheduler_config import Corrected, check_fields, correct_scheduler, is_replaceable, take_fields
from tiler.errors import ModelError, TilerError, UsageError
from tiler.memory.lean_imports import lean_imports
from tiler.request import MAX_STEPS, Scheduler, ScheduleType


class SchedulerState(NamedTuple):
    """The state that a schedule keeps between two steps: numbers that JSON can hold, and tensors, by name."""

    numbers: dict[str, Any]
    tensors: dict[str, Tensor]


class Schedule(Protocol):
    """The path from noise to a picture in N steps, each of one denoiser call or, for a solver of second order, of two.
    In the methods, a step is what follows a call; calls are numbered from 0. Latents and predictions are (1, C, h, w)
    fp32."""

    @property
    def calls(self) -> Calls:
        """The denoiser calls of each of the N steps."""
        ...

    @property
    def timesteps(self) -> Tensor:
        """(calls.count,): the timestep that the denoiser receives at each call."""
        ...

    def start(self, noise: Tensor, reference: Tensor | None, begin: int) -> Tensor:
        """The latents before step `begin`: pure noise, or `reference` with the noise of that step. Must be called
        first, and once."""
        ...

    def model_input(self, latents: Tensor, step: int) -> Tensor:
        """The latents as the denoiser's input at `step`."""
        ...

    def step(self, noise_pred: Tensor, step: int, latents: Tensor, generator: torch.Generator) -> Tensor:
        """The latents after `step`. A scheduler that adds random noise draws it from `generator`."""
        ...

    def state(self) -> SchedulerState:
        """The state to pass to `restore` of an identically built schedule, so that it continues with the same bits."""
        ...

    def restore(self, state: SchedulerState) -> None: ...


class DiffusersSchedule:
    """A `Schedule` that wraps one of diffusers' schedulers for discrete noise levels, with its timesteps set. `notes`
    explain to the user how the scheduler was chosen."""

    def __init__(self, scheduler: Any, name: Scheduler, notes: tuple[str, ...] = ()) -> None:
        self.scheduler, self.name, self.notes = scheduler, name, notes
        self.on_step: Callable[[int, Callable[[], Tensor]], None] | None = (
            None  # called with each step's number, from 0, and a function that returns the denoised picture
        )
        self._takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        # Lists are copied, because some schedulers shift their history in place.
        self._fresh = {k: list(v) if isinstance(v, list) else v for k, v in vars(scheduler).items()}

    @property
    def calls(self) -> Calls:
        order = int(self.scheduler.order)
        return Calls(steps=len(self.timesteps[::order]), order=order)

    @property
    def timesteps(self) -> Tensor:
        timesteps: Tensor = self.scheduler.timesteps
        return timesteps

    def start(self, noise: Tensor, reference: Tensor | None, begin: int) -> Tensor:
        if hasattr(self.scheduler, "set_begin_index"):
            # Also at 0: looking up a step by its timestep is ambiguous if two timesteps are equal.
            self.scheduler.set_begin_index(begin)
        if reference is None:
            return noise * float(self.scheduler.init_noise_sigma)
        if begin >= len(self.timesteps):
            return reference.clone()
        noised: Tensor = self.scheduler.add_noise(reference, noise, self.timesteps[begin : begin + 1])
        return noised.float()

    def noised(self, reference: Tensor, noise: Tensor, step: int) -> Tensor:
        """`reference`, (1, C, h, w), with as much of `noise` as the latents contain before `step`, the step after the
        last one taken; without noise after the last step."""
        if step >= len(self.timesteps):
            return reference
        noised: Tensor = self.scheduler.add_noise(reference, noise, self.timesteps[step : step + 1])
        return noised.float()

    def model_input(self, latents: Tensor, step: int) -> Tensor:
        scaled: Tensor = self.scheduler.scale_model_input(latents, self.timesteps[step])
        return scaled

    def step(self, noise_pred: Tensor, step: int, latents: Tensor, generator: torch.Generator) -> Tensor:
        extra = {"generator": generator} if self._takes_generator else {}
        given = self.scheduler.step(noise_pred, self.timesteps[step], latents, return_dict=False, **extra)
        calls = self.calls
        if self.on_step is not None and step + 1 == calls.first_of(done := calls.step_of(step + 1)):
            self.on_step(done - 1, lambda: self._denoised(given, noise_pred, step, latents))
        after: Tensor = given[0].float()  # whatever dtype the scheduler returns
        return after

    def _denoised(self, given: tuple[Tensor, ...], noise_pred: Tensor, step: int, latents: Tensor) -> Tensor:
        """The picture that a step aimed at, (1, C, h, w): taken from the scheduler's output or from its memory; the
        latents if it has neither."""
        if len(given) > 1:
            return given[1]
        remembered = [t for t in getattr(self.scheduler, "model_outputs", ()) if t is not None]
        config = self.scheduler.config
        aims = config.get("predict_x0") or str(config.get("algorithm_type")).endswith("++")
        return remembered[-1] if remembered and aims else given[0]

    def state(self) -> SchedulerState:
        """Everything that differs from a fresh scheduler with the same timesteps, so that no scheduler class has to be
        known here."""
        numbers: dict[str, Any] = {}
        tensors: dict[str, Tensor] = {}
        for name, value in vars(self.scheduler).items():
            if name in self._fresh and _same(value, self._fresh[name]):
                continue
            if isinstance(value, list):
                numbers[name] = [None if isinstance(item, Tensor) else item for item in value]
                tensors |= {f"{name}.{i}": item for i, item in enumerate(value) if isinstance(item, Tensor)}
            elif isinstance(value, Tensor):
                tensors[name] = value
            else:
                numbers[name] = value
        return SchedulerState(numbers, tensors)

    def renew(self, state: SchedulerState) -> None:
        """`restore` for a schedule that may have advanced since."""
        for name in [name for name in vars(self.scheduler) if name not in self._fresh]:
            delattr(self.scheduler, name)
        for name, value in self._fresh.items():
            setattr(self.scheduler, name, list(value) if isinstance(value, list) else value)
        self.restore(state)

    def restore(self, state: SchedulerState) -> None:
        for name, value in state.numbers.items():
            setattr(self.scheduler, name, list(value) if isinstance(value, list) else value)
        for name, tensor in state.tensors.items():
            attribute, _, place = name.partition(".")
            if place:
                getattr(self.scheduler, attribute)[int(place)] = tensor
            else:
                setattr(self.scheduler, attribute, tensor)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return a is b or (not (isinstance(a, Tensor | list) or isinstance(b, Tensor | list)) and bool(a == b))


class _Recipe(NamedTuple):
    module: str
    cls: str
    overrides: dict[str, Any]


_DPM = "scheduling_dpmsolver_multistep", "DPMSolverMultistepScheduler"
_RECIPES = {
    Scheduler.DDIM: _Recipe("scheduling_ddim", "DDIMScheduler", {}),
    Scheduler.EULER: _Recipe("scheduling_euler_discrete", "EulerDiscreteScheduler", {}),
    Scheduler.HEUN: _Recipe("scheduling_heun_discrete", "HeunDiscreteScheduler", {}),
    Scheduler.EULER_A: _Recipe("scheduling_euler_ancestral_discrete", "EulerAncestralDiscreteScheduler", {}),
    Scheduler.DPMPP_2M: _Recipe(*_DPM, {"use_karras_sigmas": False}),
    Scheduler.DPMPP_2M_KARRAS: _Recipe(
        *_DPM, {"use_karras_sigmas": True, "use_exponential_sigmas": False, "use_beta_sigmas": False}
    ),
    Scheduler.DPMPP_2M_SDE: _Recipe(*_DPM, {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": False}),
    Scheduler.DPMPP_SDE: _Recipe(
        "scheduling_dpmsolver_singlestep",
        "DPMSolverSinglestepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "final_sigmas_type": "zero", "lower_order_final": True},
    ),
    Scheduler.UNIPC: _Recipe("scheduling_unipc_multistep", "UniPCMultistepScheduler", {}),
    Scheduler.LCM: _Recipe("scheduling_lcm", "LCMScheduler", {}),
}
_DERIVED = (Scheduler.DPMPP_2M_KARRAS, Scheduler.DPMPP_2M_SDE, Scheduler.DPMPP_SDE)  # variants of another's class
_OWN = {recipe.cls: name for name, recipe in _RECIPES.items() if name not in _DERIVED}
_TYPE_FIELDS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
_LCM_ORIGINAL_STEPS = 50  # diffusers' default, used to distil common consistency models


def choose(asked: Scheduler, config: Mapping[str, Any]) -> Scheduler:
    """Replace AUTO by the checkpoint's own scheduler if tiler supports it, else by DPM++ 2M Karras. Raises ModelError
    if the checkpoint's scheduler belongs to another kind of model or is not a scheduler."""
    cls = config.get("_class_name")
    if not isinstance(cls, str | None):
        raise ModelError(f"scheduler_config.json: _class_name = {cls!r} is not a name; correct the file")
    if cls is not None and ("Flow" in cls or "EDM" in cls):
        kind = "flow matching" if "Flow" in cls else "EDM"
        raise ModelError(f"scheduler_config.json: _class_name = {cls!r}: tiler does not support {kind} models")
    if asked is not Scheduler.AUTO:
        return asked
    if cls is not None and cls not in _OWN and not is_replaceable(cls):
        names = ", ".join(name.value for name in _RECIPES)
        raise ModelError(
            f"scheduler_config.json: _class_name = {cls!r} is no scheduler of diffusers for this kind of model; "
            f"correct the file, or choose with --scheduler: {names}"
        )
    own = _OWN.get(str(cls), Scheduler.DPMPP_2M_KARRAS)
    return Scheduler.DPMPP_2M_KARRAS if own is Scheduler.DPMPP_2M and config.get("use_karras_sigmas") else own


def build(
    asked: Scheduler,
    config: Mapping[str, Any],
    num_inference_steps: int,
    *,
    correct: bool = True,
    schedule_type: ScheduleType | None = None,
) -> DiffusersSchedule:
    """Build a schedule of `num_inference_steps` on the noise levels of a checkpoint's scheduler_config.json, checked to
    the end. With `correct`, the fields of old configs are corrected, as the pipelines of SD 1.x and 2.x do and SDXL's
    does not. `schedule_type` overrides the config's spacing of the levels.

    Raises ModelError for a config that no work should start with, and UsageError for a number of steps that the
    algorithm cannot take, with the nearest one that it can.
    """
    name, cls = choose(asked, config), config.get("_class_name")
    if schedule_type is not None and name is Scheduler.DPMPP_2M_KARRAS:
        if asked is name and schedule_type is not ScheduleType.KARRAS:
            raise UsageError(
                f"{name.value} and --schedule-type {schedule_type} contradict each other; take --scheduler 'DPM++ 2M'"
            )
        name = Scheduler.DPMPP_2M
    check_fields(config)
    corrected = correct_scheduler(config) if correct else Corrected(dict(config), ())
    notes = corrected.notes
    if asked is Scheduler.AUTO and cls not in _OWN:
        notes += (f"the checkpoint's scheduler is {cls or 'not named'}: {name.value} takes its place",)
    try:
        schedule = assemble(name, corrected.config, num_inference_steps, notes, schedule_type)
        _rehearse(assemble(name, corrected.config, num_inference_steps, (), schedule_type))
    except _Unworkable as error:
        raise _refusal(name, corrected.config, num_inference_steps, str(error), schedule_type) from error
    return schedule


class _Unworkable(Exception):
    """The reason, in words for the user, why a scheduler cannot run with a number of steps."""


def assemble(
    name: Scheduler,
    config: Mapping[str, Any],
    num_inference_steps: int,
    notes: tuple[str, ...] = (),
    schedule_type: ScheduleType | None = None,
) -> DiffusersSchedule:
    """Create a schedule from a corrected config, without a rehearsal. Raises ModelError if the fields do not work
    together, UsageError if the scheduler has no such type."""
    recipe = _RECIPES[name]
    with lean_imports():
        cls = getattr(import_module(f"diffusers.schedulers.{recipe.module}"), recipe.cls)
    accepted = frozenset(inspect.signature(cls.__init__).parameters)
    fields = take_fields(config, recipe.cls, accepted) | recipe.overrides
    if schedule_type is not None:
        for field in _TYPE_FIELDS:
            fields.pop(field, None)
        spaced = schedule_type in (ScheduleType.SGM_UNIFORM, ScheduleType.SIMPLE)
        field = "timestep_spacing" if spaced else f"use_{schedule_type}_sigmas"
        if field not in accepted:
            raise UsageError(f"{name.value} has no --schedule-type {schedule_type}; leave it out, or take DPM++ 2M")
        fields[field] = "trailing" if spaced else True
    by_beta = bool(fields.pop("use_beta_sigmas", False))  # diffusers would require scipy
    if by_beta and (fields.get("use_karras_sigmas") or fields.get("use_exponential_sigmas")):
        raise ModelError("scheduler_config.json asks for beta sigmas and for another kind; keep one of them")
    if name is Scheduler.LCM:
        fields.setdefault("original_inference_steps", min(_LCM_ORIGINAL_STEPS, config.get("num_train_timesteps", 1000)))
    try:
        scheduler = cls(**fields)
    except Exception as error:
        raise ModelError(
            f"scheduler_config.json does not work with {name.value}: {_first_line(error)}; correct the file"
        ) from error
    if name is Scheduler.LCM and num_inference_steps > scheduler.config.original_inference_steps:
        original = scheduler.config.original_inference_steps
        raise _Unworkable(f"it chooses its steps among {original} original ones (original_inference_steps)")
    try:
        scheduler.set_timesteps(num_inference_steps)
        times.mend(scheduler, num_inference_steps)
        if by_beta:
            times.set_beta_sigmas(scheduler, num_inference_steps)
        fault = times.fault(scheduler, num_inference_steps)
    except Exception as error:
        fault = _first_line(error)
    if fault is not None:
        trained = scheduler.config.num_train_timesteps
        raise _Unworkable(fault if num_inference_steps <= trained else f"it was trained with {trained} timesteps")
    return DiffusersSchedule(scheduler, name, notes)


def _rehearse(schedule: DiffusersSchedule) -> None:
    """Run all steps on 16 made-up latents, because an error or a non-finite value would otherwise show up after hours
    of work."""
    generator = torch.Generator("cpu").manual_seed(0)
    noise = torch.randn(1, 4, 2, 2, generator=generator)
    latents = schedule.start(noise, None, 0)
    for step in range(len(schedule.timesteps)):
        try:
            latents = schedule.step(schedule.model_input(latents, step), step, latents, generator)
        except Exception as error:
            raise _Unworkable(_first_line(error)) from error
        if not bool(torch.isfinite(latents).all()):
            raise _Unworkable(f"step {step + 1} gives NaN or Inf")


def _refusal(
    name: Scheduler, config: Mapping[str, Any], asked: int, reason: str, schedule_type: ScheduleType | None
) -> TilerError:
    def works(count: int) -> bool:
        try:
            _rehearse(assemble(name, config, count, (), schedule_type))
        except _Unworkable:
            return False
        return True

    nearest = times.nearest_count(works, asked, MAX_STEPS)
    if nearest is None:
        return ModelError(f"scheduler_config.json does not work with {name.value}: {reason}; correct the file")
    return UsageError(
        f"{name.value} cannot take {asked} steps with this model: {reason}; the nearest number that works is "
        f"--steps {nearest}"
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
