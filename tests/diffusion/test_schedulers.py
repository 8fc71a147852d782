"""Schedules against diffusers' own schedulers and pipeline, for every scheduler, spacing and number of steps."""

from __future__ import annotations

import inspect
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from torch import Tensor

import tiler.diffusion.schedulers as schedulers
from tiler.diffusion.scheduler_config import SPACINGS, correct_scheduler
from tiler.diffusion.timesteps import beta_quantiles, fault, levels
from tiler.errors import ModelError, TilerError, UsageError
from tiler.models.built import Models
from tiler.models.corrections import correct_unet
from tiler.models.family import read_family
from tiler.phases import make_plan
from tiler.planning.resolve import fill
from tiler.request import RenderRequest, Scheduler, ScheduleType, parse_scheduler
from tiler.request.choices import parse_schedule_type
from tiler.weights.checkpoint import resolve

CONFIG = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "clip_sample": False, "steps_offset": 1,
}  # fmt: skip
OWN_FIELDS: dict[Scheduler, dict[str, Any]] = {
    Scheduler.DPMPP_2M_KARRAS: {"use_karras_sigmas": True},
    Scheduler.DPMPP_2M_SDE: {"algorithm_type": "sde-dpmsolver++"},
    Scheduler.DPMPP_SDE: {
        "algorithm_type": "sde-dpmsolver++", "final_sigmas_type": "zero", "lower_order_final": True,
    },
}  # fmt: skip
NAMES = [name for name in Scheduler if name is not Scheduler.AUTO]


def run(schedule: schedulers.Schedule, begin: int = 0, seed: int = 0) -> Tensor:
    """All steps from `begin` on small latents, with random predictions."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, 4, 2, 2, generator=generator)
    latents = schedule.start(noise, None if begin == 0 else noise * 0.5, begin)
    for step in range(begin, len(schedule.timesteps)):
        prediction = torch.tanh(schedule.model_input(latents, step)) + 0.1 * torch.randn(
            1, 4, 2, 2, generator=generator
        )
        latents = schedule.step(prediction, step, latents, generator)
    return latents


def by_diffusers(scheduler: Any, steps: int, seed: int = 0) -> Tensor:
    """The same steps, as diffusers' pipelines drive their schedulers."""
    generator = torch.Generator().manual_seed(seed)
    scheduler.set_timesteps(steps)
    latents = torch.randn(1, 4, 2, 2, generator=generator) * scheduler.init_noise_sigma
    extra = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for timestep in scheduler.timesteps:
        prediction = torch.tanh(scheduler.scale_model_input(latents, timestep))
        prediction = prediction + 0.1 * torch.randn(1, 4, 2, 2, generator=generator)
        latents = scheduler.step(prediction, timestep, latents, return_dict=False, **extra)[0]
    return latents


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", [n for n in NAMES if n is not Scheduler.LCM])
def test_every_number_of_steps_has_its_timesteps(name: Scheduler, spacing: str) -> None:
    config = CONFIG | {"timestep_spacing": spacing}
    # Karras sigmas are slow to make, and do not depend on the spacing.
    counts = range(1, 1001) if name is not Scheduler.DPMPP_2M_KARRAS else [*range(1, 100), 500, 999, 1000]
    if name is Scheduler.DPMPP_SDE:  # which has one timestep fewer
        counts = range(1, 1000)
    for count in counts:
        scheduler = schedulers.assemble(name, config, count).scheduler
        assert len(scheduler.timesteps) == scheduler.order * (count - 1) + 1
        timesteps = scheduler.timesteps[:: scheduler.order].tolist()
        assert len(timesteps) == count
        assert timesteps == sorted(timesteps, reverse=True)
        assert timesteps[0] <= 999
        assert timesteps[-1] >= 0
        if (sigmas := getattr(scheduler, "sigmas", None)) is not None:
            falls = sigmas.diff() < 0
            if scheduler.order == 2:  # every step but the last ends with a call on the next one's level
                assert not bool(falls[1::2].any())
                falls = falls[::2]
            assert len(falls) == count and bool(falls.all())


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", NAMES)
def test_runs_to_the_end(name: Scheduler, spacing: str) -> None:
    counts = (1, 2, 3, 21, 35, 50) if name is Scheduler.LCM else (1, 2, 21, 61, 999)
    for kind in ("epsilon", "v_prediction"):
        zero_snr = kind == "v_prediction"
        for count in counts[: None if zero_snr else 4]:
            if count > 100 and spacing != SPACINGS[0]:  # the timesteps of all spacings are looked at above
                continue
            config = CONFIG | {"timestep_spacing": spacing, "prediction_type": kind, "rescale_betas_zero_snr": zero_snr}
            schedule = schedulers.build(name, config, count)
            assert bool(torch.isfinite(run(schedule)).all())
            if count > 100:
                continue
            again = schedulers.build(name, config, count)
            assert bool(torch.isfinite(run(again, begin=again.calls.first_of(count // 2))).all())


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", NAMES)
def test_steps_are_diffusers_own(name: Scheduler, spacing: str) -> None:
    """Wherever diffusers works, the bits are equal."""
    for count in (1, 2, 7, 20, 50):
        schedule = schedulers.build(name, CONFIG | {"timestep_spacing": spacing}, count)
        config = OWN_FIELDS.get(name, {})
        own = type(schedule.scheduler).from_config(CONFIG | {"timestep_spacing": spacing} | config)
        if name is Scheduler.DPMPP_2M_KARRAS:  # its repeated timesteps lead diffusers astray without a begin index
            own.set_timesteps(count)
            assert torch.equal(schedule.timesteps, own.timesteps)
            continue
        assert torch.equal(run(schedule), by_diffusers(own, count))


@pytest.mark.parametrize("kind", [ScheduleType.KARRAS, ScheduleType.EXPONENTIAL, ScheduleType.SIMPLE])
@pytest.mark.parametrize(
    "name", [Scheduler.EULER, Scheduler.HEUN, Scheduler.DPMPP_2M, Scheduler.DPMPP_2M_SDE, Scheduler.UNIPC]
)
def test_schedule_types_are_diffusers_own(name: Scheduler, kind: ScheduleType) -> None:
    """For every sampler, and whatever the checkpoint's config says."""
    fields = {"timestep_spacing": "trailing"} if kind is ScheduleType.SIMPLE else {f"use_{kind}_sigmas": True}
    schedule = schedulers.build(name, CONFIG | {"timestep_spacing": "leading"}, 20, schedule_type=kind)
    own = type(schedule.scheduler).from_config(
        CONFIG | {"timestep_spacing": "leading"} | OWN_FIELDS.get(name, {}) | fields
    )
    own.set_timesteps(20)
    assert schedule.name is name
    assert torch.equal(schedule.timesteps, own.timesteps) and torch.equal(schedule.scheduler.sigmas, own.sigmas)
    assert bool(torch.isfinite(run(schedule, begin=schedule.calls.first_of(9))).all())


def test_schedule_types_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UsageError, match="Euler a has no --schedule-type karras"):
        schedulers.build(Scheduler.EULER_A, CONFIG, 5, schedule_type=ScheduleType.KARRAS)
    with pytest.raises(UsageError, match="contradict"):
        schedulers.build(Scheduler.DPMPP_2M_KARRAS, CONFIG, 5, schedule_type=ScheduleType.BETA)
    auto = schedulers.build(Scheduler.AUTO, CONFIG, 5, schedule_type=ScheduleType.BETA)
    assert auto.name is Scheduler.DPMPP_2M
    beta = schedulers.build(Scheduler.DPMPP_2M, CONFIG, 5, schedule_type=ScheduleType.BETA)
    assert torch.equal(auto.timesteps, beta.timesteps)
    with pytest.raises(UsageError, match="--schedule-type karras"):
        parse_scheduler("DPM++ 2M SDE Karras")
    assert parse_schedule_type("SGM Uniform") is ScheduleType.SGM_UNIFORM


def test_lcm_takes_at_most_its_original_steps() -> None:
    assert len(schedulers.build(Scheduler.LCM, CONFIG, 50).timesteps) == 50
    with pytest.raises(UsageError, match=r"LCM cannot take 51 steps .* --steps 50$"):
        schedulers.build(Scheduler.LCM, CONFIG, 51)
    own = CONFIG | {"_class_name": "LCMScheduler", "original_inference_steps": 100}
    assert len(schedulers.build(Scheduler.AUTO, own, 100).timesteps) == 100
    # Of another class's config the field is nobody's.
    with pytest.raises(UsageError, match=r"--steps 50$"):
        schedulers.build(Scheduler.LCM, own | {"_class_name": "DDIMScheduler"}, 60)
    few = CONFIG | {"num_train_timesteps": 100}
    with pytest.raises(UsageError, match=r"DDIM cannot take 200 steps .* --steps 100$"):
        schedulers.build(Scheduler.DDIM, few, 200)


@pytest.mark.parametrize(("shape", "quantile"), [(0.5, lambda p: math.sin(math.pi * p / 2) ** 2), (1.0, lambda p: p)])
def test_quantiles_of_the_beta_distribution(shape: float, quantile: Any) -> None:
    """Closed forms: the arcsine law and the uniform one."""
    shares = np.linspace(0, 1, 41)
    assert beta_quantiles(shares, shape) == pytest.approx([quantile(p) for p in shares], abs=1e-6)


@pytest.mark.parametrize(
    "cls", ["EulerDiscreteScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"]
)
def test_beta_sigmas_need_no_scipy(cls: str) -> None:
    config = CONFIG | {"_class_name": cls, "use_beta_sigmas": True}
    for count in (1, 2, 20, 300, 1000):
        schedule = schedulers.build(Scheduler.AUTO, config, count)
        assert fault(schedule.scheduler, count) is None
    sigmas = levels(schedulers.build(Scheduler.AUTO, config | {"timestep_spacing": "trailing"}, 5).scheduler).sigmas
    assert sigmas is not None
    # The distribution is symmetric: the median is the mean of the ends.
    assert float(sigmas[2]) == pytest.approx(float(sigmas[0] + sigmas[4]) / 2, rel=1e-6)
    euler = CONFIG | {"_class_name": "EulerDiscreteScheduler", "use_beta_sigmas": True, "use_karras_sigmas": True}
    with pytest.raises(ModelError, match="beta sigmas and for another kind"):
        schedulers.build(Scheduler.AUTO, euler, 5)


def test_a_recipe_takes_the_noise_and_leaves_the_solver() -> None:
    """A checkpoint saved with DEIS: its noise levels are used, its solver's fields mean nothing to other solvers."""
    deis = CONFIG | {
        "_class_name": "DEISMultistepScheduler", "algorithm_type": "deis", "solver_type": "logrho", "solver_order": 3,
        "thresholding": True, "use_exponential_sigmas": True, "beta_end": 0.02, "timestep_spacing": "trailing",
        "final_sigmas_type": "sigma_min", "lower_order_final": False,
    }  # fmt: skip
    for name in [Scheduler.AUTO, *NAMES]:
        schedule = schedulers.build(name, deis, 10)
        config = schedule.scheduler.config
        assert config.beta_end == 0.02
        assert getattr(config, "timestep_spacing", "trailing") == "trailing"  # DPM++ SDE knows none
        assert not getattr(config, "thresholding", False)
        assert not getattr(config, "use_exponential_sigmas", False)
        assert getattr(config, "solver_order", 2) == 2
    assert schedulers.build(Scheduler.AUTO, deis, 10).name is Scheduler.DPMPP_2M_KARRAS
    own = CONFIG | {
        "_class_name": "DPMSolverMultistepScheduler",
        "solver_order": 3,
        "algorithm_type": "sde-dpmsolver++",
    }
    assert schedulers.build(Scheduler.AUTO, own, 10).scheduler.config.solver_order == 3
    assert torch.equal(
        run(schedulers.build(Scheduler.AUTO, own, 10)), by_diffusers(DPMSolverMultistepScheduler.from_config(own), 10)
    )
    assert schedulers.build(Scheduler.UNIPC, own, 10).scheduler.config.solver_order == 2


def test_auto_takes_the_checkpoints_own_scheduler_and_says_when_it_cannot() -> None:
    def auto(**fields: Any) -> schedulers.DiffusersSchedule:
        return schedulers.build(Scheduler.AUTO, CONFIG | fields, 4)

    ours = auto(_class_name="DDIMScheduler")
    assert (ours.name, ours.notes) == (Scheduler.DDIM, ())
    assert auto(_class_name="DPMSolverMultistepScheduler", use_karras_sigmas=True).name is Scheduler.DPMPP_2M_KARRAS
    other = auto(_class_name="PNDMScheduler")
    assert other.name is Scheduler.DPMPP_2M_KARRAS
    assert other.notes == ("the checkpoint's scheduler is PNDMScheduler: DPM++ 2M Karras takes its place",)
    with pytest.raises(ModelError, match="'DDIMSheduler' is no scheduler of diffusers"):
        auto(_class_name="DDIMSheduler")
    for name in (Scheduler.AUTO, Scheduler.EULER):
        with pytest.raises(ModelError, match="flow matching"):
            schedulers.build(name, CONFIG | {"_class_name": "FlowMatchEulerDiscreteScheduler"}, 4)
    assert schedulers.build(Scheduler.LCM, CONFIG | {"_class_name": "DDIMScheduler"}, 4).name is Scheduler.LCM


@pytest.mark.parametrize(
    ("fields", "blamed"),
    [
        ({"trained_betas": [0.1, 0.2]}, "trained_betas .* 2 values where num_train_timesteps says 1000"),
        ({"trained_betas": [2.0] * 1000}, "trained_betas"), ({"trained_betas": "many"}, "trained_betas"),
        ({"num_train_timesteps": 0}, "num_train_timesteps = 0"), ({"num_train_timesteps": -5}, "num_train_timesteps"),
        ({"num_train_timesteps": 400_000_000}, "num_train_timesteps"), ({"num_train_timesteps": 1e3}, "num_train_timesteps"),
        ({"num_train_timesteps": None}, "num_train_timesteps"), ({"beta_start": 0}, "beta_start"),
        ({"beta_end": float("nan")}, "beta_end"), ({"beta_end": "0.012"}, "beta_end"), ({"beta_start": 0.5}, "beta_start"),
        ({"beta_schedule": "cosine"}, "beta_schedule"), ({"prediction_type": "sample"}, "prediction_type"),
        ({"prediction_type": "flow_prediction"}, "prediction_type"), ({"timestep_spacing": "even"}, "timestep_spacing"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"), ({"rescale_betas_zero_snr": "no"}, "rescale_betas_zero_snr"),
        ({"steps_offset": -1}, "steps_offset"), ({"use_flow_sigmas": True}, "use_flow_sigmas"),
        ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 10**9}, "solver_order"),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "none"}, "none"),
        ({"_class_name": "LCMScheduler", "original_inference_steps": 0}, "original_inference_steps"),
        ({"_class_name": "LCMScheduler", "original_inference_steps": "50"}, "original_inference_steps"),
        ({"_class_name": ["DDIMScheduler"]}, "_class_name"),
        ({"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": None}, "scheduler_config.json"),
        ({"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": "yes"}, "scheduler_config.json"),
        ({"_class_name": "UniPCMultistepScheduler", "solver_p": {}, "solver_type": "x"}, "scheduler_config.json"),
        ({"_class_name": "DPMSolverMultistepScheduler", "variance_type": "learned_range"}, "scheduler_config.json"),
    ],
)  # fmt: skip
def test_fields_that_cannot_be_are_blamed_by_name(fields: dict[str, Any], blamed: str) -> None:
    with pytest.raises(ModelError, match=blamed):
        schedulers.build(Scheduler.AUTO, {"_class_name": "DDIMScheduler"} | CONFIG | fields, 4)


def test_old_scheduler_configs_are_corrected_as_diffusers_does(old: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(
        old, variant="fp16", torch_dtype=torch.float32, safety_checker=None, feature_extractor=None
    )
    config = json.loads((old / "scheduler" / "scheduler_config.json").read_text())
    assert "clip_sample" not in config
    for fields in ({}, {"clip_sample": True, "steps_offset": 0}):
        schedule = schedulers.build(Scheduler.AUTO, config | fields, 20)
        assert len(schedule.notes) == 2
        assert "clip_sample" in schedule.notes[0]
        assert "steps_offset" in schedule.notes[1]
        pipe.scheduler.set_timesteps(20)
        assert torch.equal(schedule.timesteps, pipe.scheduler.timesteps)
        assert not schedule.scheduler.config.clip_sample
        assert not pipe.scheduler.config.clip_sample
    assert torch.equal(run(schedule), by_diffusers(pipe.scheduler, 20))
    unet, notes = correct_unet({"_diffusers_version": "0.8.0", "sample_size": 32})
    assert unet["sample_size"] == pipe.unet.config.sample_size == 64
    assert len(notes) == 1
    for kept in (
        {"_diffusers_version": "0.9.0", "sample_size": 32},
        {"sample_size": 8},
        {"_diffusers_version": "0.6.0"},
    ):
        assert correct_unet(kept) == (kept, ())
    assert correct_scheduler(CONFIG).notes == ()


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import make_checkpoint

    return make_checkpoint.make("tiny-old", tmp_path_factory.mktemp("old"))


@pytest.mark.parametrize("begin", [0, 3])
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        *((name, {}) for name in NAMES),
        (Scheduler.DPMPP_2M, {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3}),
        (Scheduler.DPMPP_2M, {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}),
        (Scheduler.UNIPC, {"_class_name": "UniPCMultistepScheduler", "solver_order": 3}),
    ],
)
def test_a_schedule_goes_on_with_the_same_bits(name: Scheduler, fields: dict[str, Any], begin: int) -> None:
    def fresh() -> schedulers.DiffusersSchedule:
        return schedulers.build(name, CONFIG | fields, 8)

    noise, reference = torch.randn(1, 4, 2, 2), torch.randn(1, 4, 2, 2)
    calls = fresh().calls
    predictions, first = torch.randn(calls.count, 1, 4, 2, 2), calls.first_of(begin)
    for stop in range(first, calls.count):
        results = []
        for interrupted in (False, True):
            schedule, generator = fresh(), torch.Generator().manual_seed(4)
            latents = schedule.start(noise, reference if begin else None, first)
            for step in range(first, calls.count):
                if interrupted and step == stop:
                    state, drawn = schedule.state(), generator.get_state()
                    schedule, generator = fresh(), torch.Generator()
                    schedule.restore(state)
                    generator.set_state(drawn)
                given = schedule.model_input(latents, step) + predictions[step]
                latents = schedule.step(given, step, latents, generator)
            results.append(latents)
        assert torch.equal(*results)


@pytest.mark.parametrize("name", NAMES)
def test_starting_from_a_reference_is_its_noise_at_that_step(name: Scheduler) -> None:
    schedule = schedulers.build(name, CONFIG, 10)
    reference, noise = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    first = schedule.calls.first_of
    assert torch.equal(schedulers.build(name, CONFIG, 10).start(noise, reference, first(10)), reference)
    got = schedule.start(noise, reference, first(6))
    scheduler = schedule.scheduler
    if name in (Scheduler.EULER, Scheduler.EULER_A, Scheduler.HEUN):
        want = reference + levels(scheduler).sigmas[6] * noise  # type: ignore[index]
    elif hasattr(scheduler, "sigmas"):
        alpha = 1 / (scheduler.sigmas[6] ** 2 + 1).sqrt()
        want = alpha * reference + scheduler.sigmas[6] * alpha * noise
    else:
        alpha = scheduler.alphas_cumprod[int(scheduler.timesteps[6])]
        want = alpha.sqrt() * reference + (1 - alpha).sqrt() * noise
    assert torch.allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "want"),
    [("ddim", Scheduler.DDIM), ("EULER A", Scheduler.EULER_A), ("dpm++ 2m karras", Scheduler.DPMPP_2M_KARRAS), ("Euler_a", Scheduler.EULER_A),
     ("DPMSolverMultistepScheduler", Scheduler.DPMPP_2M), ("UniPCMultistepScheduler", Scheduler.UNIPC), ("lcm", Scheduler.LCM), ("heun", Scheduler.HEUN),
     ("HeunDiscreteScheduler", Scheduler.HEUN), ("Auto", Scheduler.AUTO)],
)  # fmt: skip
def test_scheduler_names(text: str, want: Scheduler) -> None:
    assert parse_scheduler(text) is want
    with pytest.raises(UsageError, match="DPM\\+\\+ 2M Karras"):
        parse_scheduler("dpm fast")


@pytest.mark.parametrize("cls", [DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_final_sigmas_may_stay(cls: Any) -> None:
    """With final_sigmas_type "sigma_min", every spacing ends at the last trained level."""
    for spacing in SPACINGS:
        for count in (1, 20, 999):
            config = CONFIG | {
                "_class_name": cls.__name__,
                "final_sigmas_type": "sigma_min",
                "timestep_spacing": spacing,
            }
            try:
                assert bool(torch.isfinite(run(schedulers.build(Scheduler.AUTO, config, count))).all())
            except TilerError as error:
                pytest.fail(str(error))


def test_the_default_model_takes_every_number_of_steps() -> None:
    family = read_family(resolve("mini"))
    for count in range(1, 1001):
        assert (
            len(schedulers.assemble(Scheduler.DDIM, correct_scheduler(family.scheduler).config, count).timesteps)
            == count
        )
    for name, count in ((Scheduler.AUTO, 61), (Scheduler.DPMPP_2M_KARRAS, 21), (Scheduler.DPMPP_2M_KARRAS, 40)):
        assert bool(torch.isfinite(run(schedulers.build(name, family.scheduler, count))).all())


def test_the_plan_refuses_before_any_work() -> None:
    family, asked = read_family(resolve("mini")), {"prompt": "x", "output": Path("x.png")}
    with pytest.raises(UsageError, match="LCM cannot take 60 steps"):
        make_plan(fill(RenderRequest(**asked, scheduler=Scheduler.LCM, num_inference_steps=60)), Models(family), 10**9)
    spoilt = replace(family, scheduler=family.scheduler | {"num_train_timesteps": 0})
    with pytest.raises(ModelError, match="num_train_timesteps"):
        make_plan(fill(RenderRequest(**asked)), Models(spoilt), 10**9)
