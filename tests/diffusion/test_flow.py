"""Flow schedules against diffusers' scheduler, driven as its pipelines do, and against a flow with a known end."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3_img2img import StableDiffusion3Img2ImgPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_heun_discrete import FlowMatchHeunDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_lcm import FlowMatchLCMScheduler
from torch import Tensor

from tiler.diffusion import flow
from tiler.diffusion.calls import Calls
from tiler.diffusion.canvas import first_step
from tiler.errors import ModelError, UsageError
from tiler.request import Scheduler

STATIC = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
DYNAMIC = STATIC | {
    "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}  # fmt: skip
SOLVERS = (Scheduler.EULER, Scheduler.HEUN, Scheduler.DPMPP_2M, Scheduler.UNIPC)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def walk(schedule: flow.FlowSchedule, latents: Tensor, velocity: Any, begin: int = 0) -> Tensor:
    for step in range(begin, len(schedule.timesteps)):
        prediction = velocity(schedule.model_input(latents, step), schedule.timesteps[step] / 1000)
        latents = schedule.step(prediction, step, latents, generator())
    return latents


@pytest.mark.parametrize("steps", [1, 2, 4, 28])
def test_a_constant_shift_has_diffusers_own_sigmas(steps: int) -> None:
    """diffusers shifts the smallest σ twice: 3 · 0.003 / (1 + 2 · 0.003) = 0.0089, not 0.003."""
    want = FlowMatchEulerDiscreteScheduler.from_config(STATIC)
    want.set_timesteps(steps)
    got = flow.build(Scheduler.AUTO, STATIC, steps)
    assert torch.equal(got.scheduler.sigmas, want.sigmas)
    assert torch.equal(got.timesteps, want.timesteps)
    if steps > 1:
        once = 3 * 0.001 / (1 + 2 * 0.001)
        assert float(want.sigmas[-2]) == pytest.approx(3 * once / (1 + 2 * once))


@pytest.mark.parametrize("side", [32, 64, 128])
def test_a_dynamic_shift_is_that_of_a_tile_as_diffusers_flux_pipeline_sets_it(side: int) -> None:
    tokens, steps = (side // 2) ** 2, 20
    want = FlowMatchEulerDiscreteScheduler.from_config(DYNAMIC)
    want.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=calculate_shift(tokens, 256, 4096, 0.5, 1.15))
    got = flow.build(Scheduler.AUTO, DYNAMIC, steps, tokens=tokens, even_sigmas=True)
    assert torch.allclose(got.scheduler.sigmas, want.sigmas, atol=1e-7, rtol=0)
    even = 1 - 10 / steps
    mu = math.exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256))
    assert float(got.scheduler.sigmas[10]) == pytest.approx(mu / (mu + 1 / even - 1), rel=1e-5)


def test_even_sigmas_without_a_shift_are_a_straight_line() -> None:
    got = flow.build(Scheduler.AUTO, STATIC | {"shift": 1.0}, 4, even_sigmas=True)
    assert got.scheduler.sigmas.tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert got.timesteps.tolist() == [1000, 750, 500, 250]


@pytest.mark.parametrize("strength", [0.3, 0.35, 0.6, 1.0])
def test_a_start_from_a_picture_is_diffusers_img2img(strength: float) -> None:
    steps = 20
    want = FlowMatchEulerDiscreteScheduler.from_config(STATIC)
    want.set_timesteps(steps)
    pipeline = type("Pipeline", (), {"scheduler": want})()
    timesteps, _ = StableDiffusion3Img2ImgPipeline.get_timesteps(pipeline, steps, strength, "cpu")
    noise, picture = torch.randn(2, 1, 16, 4, 4, generator=generator()).unbind()
    latents = want.scale_noise(picture, timesteps[:1], noise)
    got, begin = flow.build(Scheduler.AUTO, STATIC, steps), first_step(steps, strength)
    ours = got.start(noise, picture, begin)
    assert torch.equal(ours, latents)
    assert torch.equal(got.timesteps[begin:], timesteps)
    for timestep in timesteps:
        latents = want.step(torch.tanh(latents) * timestep / 1000, timestep, latents, return_dict=False)[0]
    assert torch.allclose(walk(got, ours, lambda x, t: torch.tanh(x) * t, begin), latents, atol=1e-6)


def test_a_picture_after_the_last_step_stays_as_it_is() -> None:
    noise, picture = torch.randn(2, 1, 4, 4, 4, generator=generator()).unbind()
    assert torch.equal(flow.build(Scheduler.AUTO, STATIC, 4).start(noise, picture, 4), picture)


def gaussian(x: Tensor, sigma: Tensor) -> Tensor:
    """E[n − x₀ | x] if every x₀ is normal with mean 0.7 and deviation 0.3: then x is normal too, and this is linear in
    it."""
    mean, deviation = 0.7, 0.3
    variance = ((1 - sigma) * deviation) ** 2 + sigma**2
    ahead = x - (1 - sigma) * mean
    return sigma * ahead / variance - (mean + (1 - sigma) * deviation**2 * ahead / variance)


@pytest.mark.parametrize("begin", [0, 9])
@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_ends_where_the_exact_flow_does(name: Scheduler, begin: int) -> None:
    """(x − mean of x) / deviation of x is constant along that flow, so its end is known."""
    noise, picture = torch.randn(2, 1, 4, 8, 8, generator=generator()).unbind()
    errors = []
    for times in (4, 8):
        schedule = flow.build(name, STATIC, 20 * times)
        first = schedule.calls.first_of(begin * times)
        latents = schedule.start(noise, picture if begin else None, first)
        sigma = schedule.scheduler.sigmas[first]
        exact = 0.7 + 0.3 * (latents - (1 - sigma) * 0.7) / (((1 - sigma) * 0.3) ** 2 + sigma**2).sqrt()
        errors.append(float((walk(schedule, latents, gaussian, first) - exact).abs().mean()))
    assert errors[0] < 0.015
    if name is Scheduler.HEUN:  # what is left is its last step, which is Euler's
        assert max(errors) < 1e-4
        return
    order = math.log2(errors[0] / errors[1])
    assert 0.9 < order < 1.1 if name is Scheduler.EULER else 1.8 < order < 2.6


def test_lcm_is_diffusers_own() -> None:
    want = FlowMatchLCMScheduler.from_config(STATIC)
    want.set_timesteps(4)
    latents = torch.randn(1, 4, 4, 4, generator=generator())
    got = flow.build(Scheduler.LCM, STATIC, 4)
    ours = walk(got, got.start(latents, None, 0), lambda x, t: torch.tanh(x) * t)
    for timestep in want.timesteps:
        made = torch.tanh(latents) * timestep / 1000
        latents = want.step(made, timestep, latents, generator=generator(), return_dict=False)[0]
    assert torch.allclose(ours, latents, atol=1e-6)


@pytest.mark.parametrize("name", [*SOLVERS, Scheduler.LCM])
@pytest.mark.parametrize("steps", [1, 2, 3, 50, 1000])
def test_any_number_of_steps_works(name: Scheduler, steps: int) -> None:
    schedule = flow.build(name, DYNAMIC, steps, tokens=1024)
    latents = walk(schedule, schedule.start(torch.ones(1, 1, 2, 2), None, 0), gaussian)
    assert bool(latents.isfinite().all())
    assert float(schedule.timesteps[0]) == 1000


@pytest.mark.parametrize("name", SOLVERS)
def test_a_schedule_goes_on_from_its_state(name: Scheduler) -> None:
    noise = torch.randn(1, 4, 4, 4, generator=generator())
    whole, first, second = (flow.build(name, STATIC, 6) for _ in range(3))
    latents = first.start(noise, None, 0)
    second.start(noise, None, 0)
    for step in range(3):
        latents = first.step(gaussian(latents, first.timesteps[step] / 1000), step, latents, generator())
    second.restore(first.state())
    assert torch.equal(walk(second, latents, gaussian, 3), walk(whole, whole.start(noise, None, 0), gaussian))


@pytest.mark.parametrize(
    "name", [s for s in Scheduler if s not in (Scheduler.AUTO, Scheduler.LCM, *SOLVERS)], ids=lambda name: name.name
)
def test_schedulers_for_other_models_are_refused(name: Scheduler) -> None:
    with pytest.raises(UsageError, match="Euler, Heun, DPM"):
        flow.build(name, STATIC, 4)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"_class_name": "PNDMScheduler"}, "PNDMScheduler"),
        ({"shift": 0}, "shift = 0"),
        ({"shift": "three"}, "shift = three"),
        ({"num_train_timesteps": True}, "num_train_timesteps"),
        ({"invert_sigmas": True}, "invert_sigmas"),
        ({"time_shift_type": "cubic"}, "time_shift_type"),
        ({"use_karras_sigmas": True, "use_exponential_sigmas": True}, "Only one"),
        ({"use_dynamic_shifting": True, "max_image_seq_len": 256}, "max_image_seq_len"),
        ({"use_dynamic_shifting": True, "max_shift": 20}, "do not fall"),
    ],
)
def test_a_config_that_does_not_work_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        flow.build(Scheduler.AUTO, STATIC | fields, 4)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_heun_is_diffusers_own(steps: int) -> None:
    own = STATIC | {"_class_name": "FlowMatchHeunDiscreteScheduler"}
    want = FlowMatchHeunDiscreteScheduler.from_config(own)
    want.set_timesteps(steps)
    latents = noise = torch.randn(1, 4, 4, 4, generator=generator())
    for timestep in want.timesteps:
        latents = want.step(gaussian(latents, timestep / 1000), timestep, latents, return_dict=False)[0]
    for config, asked in ((own, Scheduler.AUTO), (STATIC, Scheduler.HEUN)):
        schedule = flow.build(asked, config, steps)
        assert schedule.name is Scheduler.HEUN and schedule.calls == Calls(steps=steps, order=2)
        assert torch.equal(schedule.timesteps, want.timesteps)
        assert torch.equal(walk(schedule, schedule.start(noise, None, 0), gaussian), latents)
