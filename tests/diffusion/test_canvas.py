"""The canvas against a plain float64 reference, and its state at every tile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from tiler.diffusion import schedulers
from tiler.diffusion.calls import Calls
from tiler.diffusion.canvas import Denoising, SamplingState, StepDone, first_step, initial_noise
from tiler.diffusion.layouts import guide_tiles, plan_tiles, tiles_of_step
from tiler.diffusion.masks import mask_profile
from tiler.diffusion.runner import Conditions, LocalRunner, Share
from tiler.diffusion.tiles import Tiles
from tiler.errors import NumericalError
from tiler.models.samples import Prompt, Sample
from tiler.planning.resolve import fill
from tiler.request import Layout, Mask, Region, RenderRequest, ResolvedRequest, Scheduler, Wrap

CONFIG = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "clip_sample": False, "steps_offset": 1,
}  # fmt: skip


def request(**values: Any) -> ResolvedRequest:
    return fill(
        RenderRequest(
            **({"seed": 0} | {"prompt": "base", "output": Path("x.png"), "width": 128, "height": 128} | values)
        )
    )


def model(x: Tensor, embeds: Tensor) -> Tensor:
    """A made-up model, nonlinear in x and in the prompt, that sees its tile's surroundings."""
    return torch.tanh(x + embeds.mean(dim=(1, 2)).view(-1, 1, 1, 1)) * 0.7 + 0.1 * x.roll(1, dims=3)


def fake_predict(samples: Sequence[Sample], step: int) -> Tensor:
    return model(torch.cat([s.latents for s in samples]), torch.cat([s.prompt.tokens for s in samples]))


def prompts(count: int, generator: torch.Generator | None = None) -> Conditions:
    cond, uncond = (torch.randn(count, 4, 6, generator=generator).split(1) for _ in range(2))
    return Conditions([[Share(Prompt(tokens))] for tokens in cond], [Prompt(tokens) for tokens in uncond])


def denoise(
    latents: Tensor, steps: Sequence[Tiles], conditions: Conditions, schedule: schedulers.Schedule,
    predict: Callable[[Sequence[Sample], int], Tensor], generator: torch.Generator, batch: int = 1,
) -> Iterator[StepDone]:  # fmt: skip
    return Denoising(latents, steps, schedule, generator).run(LocalRunner(predict, lambda step: conditions, batch))


def reference_canvas(
    latents: Tensor, placed: list[tuple[int, int, int, int, float, Tensor]], conditions: Conditions, steps: int
) -> Tensor:
    """Mixture of Diffusers written out: all predictions, all masks, float64, DDIM's formula (Song et al. 2021, eq.
    12)."""
    scheduler = DDIMScheduler.from_config(CONFIG)
    scheduler.set_timesteps(steps)
    alphas = scheduler.alphas_cumprod.double()
    x = latents.double()
    for t in scheduler.timesteps.tolist():
        top, bottom = torch.zeros_like(x), torch.zeros_like(x)
        for row, col, size, condition, scale, mask in placed:
            crop = (..., slice(row, row + size), slice(col, col + size))
            u = model(x[crop], conditions.uncond[condition].tokens.double())
            c = model(x[crop], conditions.cond[condition][0].prompt.tokens.double())
            top[crop] += mask * (u + scale * (c - u))
            bottom[crop] += mask
        eps = top / bottom
        before = t - 1000 // steps
        a, b = alphas[t], alphas[before] if before >= 0 else scheduler.final_alpha_cumprod.double()
        x = b.sqrt() * (x - (1 - a).sqrt() * eps) / a.sqrt() + (1 - b).sqrt() * eps
    return x


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_a_canvas_of_several_regions_equals_the_formula(batch: int) -> None:
    left = Region(prompt="l", rows=(0, 128), cols=(0, 96), guidance_scale=3.0, mask=Mask.QUARTIC, mask_weight=2.0)
    right = Region(prompt="r", rows=(0, 128), cols=(64, 160), guidance_scale=5.0)
    asked = request(prompt=None, width=160, height=128, regions=(left, right))
    generator = torch.Generator().manual_seed(5)
    conditions = prompts(2, generator)
    noise, rng = initial_noise((1, 4, 16, 20), 9)
    tiles = plan_tiles(asked, canvas=(16, 20), tile=(8, 8), overlap=2)
    schedule = schedulers.build(Scheduler.DDIM, CONFIG, 5)
    states = list(denoise(noise, [tiles] * 5, conditions, schedule, fake_predict, rng, batch=batch))
    got = states[-1].latents
    placed = []
    for first, kind, weight, condition, scale in ((0, Mask.QUARTIC, 2.0, 0, 3.0), (8, Mask.GAUSSIAN, 1.0, 1, 5.0)):
        mask = weight * torch.outer(mask_profile(kind, 8), mask_profile(kind, 8))
        for row in (0, 4, 8):
            for col in (0, 4):
                placed.append((row, first + col, 8, condition, scale, mask))
    want = reference_canvas(noise, placed, conditions, 5)
    assert got is not None
    assert (got.double() - want).abs().max() <= 2e-5 * want.abs().max()


def test_batch_does_not_change_a_bit() -> None:
    tiles = plan_tiles(request(width=200, height=136), canvas=(17, 25), tile=(8, 8), overlap=3)
    conditions = prompts(1)
    results = []
    for batch in (1, 2, 5, 7):
        noise, rng = initial_noise((1, 4, 17, 25), 1)
        schedule = schedulers.build(Scheduler.EULER_A, CONFIG, 4)
        states = list(
            denoise(
                schedule.start(noise, None, 0),
                [tiles] * 4,
                conditions,
                schedule,
                fake_predict,
                rng,
                batch=batch,
            )
        )
        results.append(states[-1].latents)
    assert all(torch.equal(r, results[0]) for r in results)


@pytest.mark.parametrize("of", ["canvas", "guide"])
def test_a_canvas_that_wraps_has_no_beginning(of: str) -> None:
    """Noise rolled by the tiles' stride becomes the rolled picture: all pixels are equally far from a border."""
    conditions = prompts(1)

    def predict(samples: Sequence[Sample], step: int) -> Tensor:
        sides = (
            torch.linspace(0, 1, n) for n in samples[0].latents.shape[2:]
        )  # it knows where in its tile a pixel lies
        return fake_predict(samples, step) * torch.outer(*sides)

    def picture(noise: Tensor, wrap: Wrap) -> Tensor:
        asked, size = request(width=96, height=144, wrap=wrap), (18, 12)
        tiles = (
            plan_tiles(asked, canvas=size, tile=(8, 8), overlap=2) if of == "canvas" else guide_tiles(size, wrap, 7.5)
        )
        schedule = schedulers.build(Scheduler.DPMPP_2M, CONFIG, 3)
        states = denoise(noise, [tiles] * 3, conditions, schedule, predict, torch.Generator(), batch=3)
        latents = list(states)[-1].latents
        assert latents is not None
        return latents

    noise, _ = initial_noise((1, 4, 18, 12), 3)
    for wrap, stride in ((Wrap.XY, (6, 6) if of == "canvas" else (9, 6)), (Wrap.X, (0, 6))):
        rolled = picture(noise.roll(stride, (2, 3)), wrap)
        assert torch.allclose(rolled, picture(noise, wrap).roll(stride, (2, 3)), atol=1e-4)
        assert not torch.allclose(rolled, picture(noise, Wrap.NONE).roll(stride, (2, 3)), atol=1e-2)


def test_guidance_of_one_runs_no_unconditional_half() -> None:
    tiles = plan_tiles(request(guidance_scale=1.0), canvas=(16, 16), tile=(8, 8), overlap=2)
    calls: list[int] = []

    def predict(samples: Sequence[Sample], step: int) -> Tensor:
        calls.append(len(samples))
        return fake_predict(samples, step)

    schedule = schedulers.build(Scheduler.DDIM, CONFIG, 1)
    noise, rng = initial_noise((1, 4, 16, 16), 1)
    list(denoise(noise, [tiles], prompts(1), schedule, predict, rng, batch=100))
    assert calls == [len(tiles)]


def steps_of(asked: ResolvedRequest, size: tuple[int, int]) -> list[Tiles]:
    tiles = plan_tiles(asked, canvas=size, tile=(8, 8), overlap=2)
    return [tiles_of_step(tiles, asked, number) for number in range(asked.num_inference_steps)]


def canvas_of(steps: list[Tiles], size: tuple[int, int], predict: Any = fake_predict) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    conditions = prompts(1, generator)
    noise, rng = initial_noise((1, 4, *size), 1)
    schedule = schedulers.build(Scheduler.DDIM, CONFIG, len(steps))
    latents = list(denoise(noise, steps, conditions, schedule, predict, rng, batch=3))[-1].latents
    assert latents is not None
    return latents


def test_guidance_works_in_its_interval_alone() -> None:
    """Kynkäänniemi et al. 2024: outside the interval, the conditional prediction is used unchanged."""
    size, counts = (16, 16), {}
    for interval in ((0.0, 1.0), (0.2, 0.6), (0.9, 1.0)):
        asked = request(num_inference_steps=10, guidance_interval=interval)
        counts[interval] = [sum(tile.samples for tile in step) for step in steps_of(asked, size)]
    assert counts[0.0, 1.0] == [18] * 10
    assert counts[0.2, 0.6] == [9] * 2 + [18] * 4 + [9] * 4
    assert counts[0.9, 1.0] == [9] * 9 + [18]
    plain = [plan_tiles(request(), canvas=size, tile=(8, 8), overlap=2)] * 10
    assert torch.equal(canvas_of(steps_of(request(num_inference_steps=10), size), size), canvas_of(plain, size))
    unguided = [plan_tiles(request(guidance_scale=1.0), canvas=size, tile=(8, 8), overlap=2)] * 10
    mixed = canvas_of(unguided[:2] + plain[:4] + unguided[:4], size)
    got = canvas_of(steps_of(request(num_inference_steps=10, guidance_interval=(0.2, 0.6)), size), size)
    assert torch.equal(got, mixed)


def test_a_shift_of_nothing_is_a_grid_without_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    size = (16, 24)
    asked = request(width=192, height=128, num_inference_steps=3, layout=Layout.SHIFT)
    moved = canvas_of(steps_of(asked, size), size)
    monkeypatch.setattr("random.Random.randrange", lambda self, n: 0)
    grid = [plan_tiles(request(width=192, height=128), canvas=size, tile=(8, 8), overlap=0)] * 3
    assert torch.equal(canvas_of(steps_of(asked, size), size), canvas_of(grid, size))
    assert not torch.allclose(moved, canvas_of(grid, size), atol=1e-3)


def test_noise_and_seeds() -> None:
    noise, _ = initial_noise((1, 4, 16, 24), 7)
    assert torch.equal(noise, torch.randn(1, 4, 16, 24, generator=torch.Generator().manual_seed(7)))
    crop = (slice(0, 8), slice(8, 16))
    mixed, _ = initial_noise((1, 4, 16, 24), 7, [(crop, 3)])
    assert torch.equal(mixed[:, :, :8, 8:16], torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3)))
    mixed[:, :, :8, 8:16] = noise[:, :, :8, 8:16]
    assert torch.equal(mixed, noise)


@pytest.mark.parametrize(
    ("steps", "strength", "begin"), [(50, 0.2, 40), (20, 0.5, 10), (20, 1.0, 0), (20, 0.0, 20), (3, 0.5, 1)]
)
def test_strength_is_the_share_that_the_canvas_denoises(steps: int, strength: float, begin: int) -> None:
    assert first_step(steps, strength) == begin


def test_a_prediction_that_is_not_finite_stops_the_run() -> None:
    tiles = plan_tiles(request(width=64, height=64, guidance_scale=1.0), canvas=(8, 8), tile=(8, 8), overlap=2)
    schedule = schedulers.build(Scheduler.DDIM, CONFIG, 3)
    noise, rng = initial_noise((1, 4, 8, 8), 1)
    loop = denoise(
        noise,
        [tiles] * 3,
        prompts(1),
        schedule,
        lambda samples, step: samples[0].latents * float("nan"),
        rng,
    )
    with pytest.raises(NumericalError, match="step 1, tile at row 0"):
        list(loop)


class Saved:
    """A journal in memory that is due every `every`th time it is asked."""

    def __init__(self, every: int) -> None:
        self.every, self.asked = every, 0
        self.kept: dict[str, dict[str, Tensor]] = {}

    def load(self, name: str) -> dict[str, Tensor] | None:
        return self.kept.get(name)

    def save(self, name: str, tensors: Any, where: str) -> None:
        self.kept[name] = {key: tensor.clone() for key, tensor in tensors.items()}

    def due(self) -> bool:
        self.asked += 1
        return self.asked % self.every == 0


@pytest.mark.parametrize("begin", [0, 2])
@pytest.mark.parametrize("name", [n for n in Scheduler if n is not Scheduler.AUTO])
def test_interrupted_between_any_two_tiles_it_goes_on_with_the_same_bytes(name: Scheduler, begin: int) -> None:
    """Each loop ends after k more tiles; the next one, built from scratch, starts from the journal."""
    asked, size = request(width=96, height=96, guidance_interval=(0.0, 0.6), num_inference_steps=6), (12, 12)
    calls, tiles = Calls(steps=6, order=name.order), steps_of(asked, size)
    first = calls.first_of(begin)
    steps = [tiles[calls.step_of(call)] for call in range(first, calls.count)]
    conditions, noise = prompts(1), initial_noise((1, 4, *size), 3)[0]

    def fresh() -> Denoising:
        generator = initial_noise((1, 4, *size), 3)[1]
        schedule = schedulers.build(name, CONFIG, 6)
        return Denoising(
            schedule.start(noise, noise if begin else None, first), steps, schedule, generator, begin=first
        )

    whole = fresh()
    assert (
        sum(done.latents is not None for done in whole.run(LocalRunner(fake_predict, lambda step: conditions, 3)))
        == calls.count - first
    )
    for every in (1, 3, 5):
        journal = Saved(every)
        for _ in range(200):
            denoising = fresh()
            for told, _ in enumerate(denoising.run(LocalRunner(fake_predict, lambda step: conditions, 2), journal), 1):
                if told == every:
                    break
            else:
                break
        assert torch.equal(denoising.latents, whole.latents)
        # What is finished stays so.
        assert list(fresh().run(LocalRunner(fake_predict, lambda step: conditions), journal)) == []


def test_calls_belong_to_steps() -> None:
    """With Heun's method, the last of N steps has one call, all others have two."""
    calls = Calls(steps=3, order=2)
    assert [calls.step_of(call) for call in range(calls.count)] == [0, 0, 1, 1, 2]
    assert [calls.first_of(step) for step in range(4)] == [0, 2, 4, 5]
    assert calls.step_of(calls.count) == 3
    one = Calls(steps=3)
    assert all(one.step_of(call) == one.first_of(call) == call for call in range(4))


def test_a_state_is_a_copy_and_survives_a_file(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    size = (12, 12)
    steps, conditions = steps_of(request(width=96, height=96, num_inference_steps=4), size), prompts(1)
    for name in (Scheduler.UNIPC, Scheduler.EULER_A):
        noise, generator = initial_noise((1, 4, *size), 3)
        schedule = schedulers.build(name, CONFIG, 4)
        denoising = Denoising(schedule.start(noise, None, 0), steps, schedule, generator)
        loop = denoising.run(LocalRunner(fake_predict, lambda step: conditions))
        for _ in range(10):
            next(loop)
        state = denoising.state()
        assert (state.step, state.tiles_added) == (2, 2)
        save_file(state.tensors(), tmp_path / "state.safetensors")
        list(loop)
        other = schedulers.build(name, CONFIG, 4)
        again = Denoising(torch.zeros(1, 4, *size), steps, other, torch.Generator())
        again.restore(SamplingState.from_tensors(load_file(tmp_path / "state.safetensors")))
        list(again.run(LocalRunner(fake_predict, lambda step: conditions)))
        assert torch.equal(again.latents, denoising.latents)


class Flow:
    """Rectified flow with Euler steps: x_σ = (1 − σ) x₀ + σ n, v = n − x₀."""

    def __init__(self, steps: int) -> None:
        self.sigmas = torch.linspace(1, 0, steps + 1)

    @property
    def calls(self) -> Calls:
        return Calls(steps=len(self.timesteps))

    @property
    def timesteps(self) -> Tensor:
        return self.sigmas[:-1]

    def start(self, noise: Tensor, reference: Tensor | None, begin: int) -> Tensor:
        sigma = self.sigmas[begin]
        return noise if reference is None else (1 - sigma) * reference + sigma * noise

    def model_input(self, latents: Tensor, step: int) -> Tensor:
        return latents

    def step(self, noise_pred: Tensor, step: int, latents: Tensor, generator: torch.Generator) -> Tensor:
        return latents + (self.sigmas[step + 1] - self.sigmas[step]) * noise_pred

    def state(self) -> schedulers.SchedulerState:
        return schedulers.SchedulerState({}, {})

    def restore(self, state: schedulers.SchedulerState) -> None:
        pass


@pytest.mark.parametrize("begin", [0, 4])
def test_a_flow_schedule_fits_the_canvas(begin: int) -> None:
    """A model that knows the picture, v = (x − x₀)/σ, reaches it from any start."""
    size, target = (12, 12), torch.randn(1, 4, 12, 12)
    steps = steps_of(request(width=96, height=96, num_inference_steps=10, guidance_scale=1.0), size)[begin:]
    schedule = Flow(10)

    def predict(samples: Sequence[Sample], step: int) -> Tensor:
        found = []
        for s in samples:
            top, left = s.place.top // 8, s.place.left // 8
            crop = target[..., top : top + 8, left : left + 8]
            found.append((s.latents - crop) / schedule.timesteps[step])
        return torch.cat(found)

    noise, generator = initial_noise((1, 4, *size), 1)
    latents = schedule.start(noise, target if begin else None, begin)
    denoising = Denoising(latents, steps, schedule, generator, begin=begin)
    list(denoising.run(LocalRunner(predict, lambda step: prompts(1), 3)))
    assert torch.allclose(denoising.latents, target, atol=1e-4)


def test_blending_noise_blends_pictures() -> None:
    """For one shared x_t, the picture predicted from the blend is the blend of the pictures predicted from the
    tiles."""
    size = (8, 12)
    tiles = plan_tiles(request(width=96, height=64, guidance_scale=1.0), canvas=size, tile=(8, 8), overlap=4)
    schedule = schedulers.build(Scheduler.DDIM, CONFIG, 1)
    noise, generator = initial_noise((1, 4, *size), 1)
    predicted = torch.randn(len(tiles), 4, 8, 8)
    answers = iter(predicted)
    denoising = Denoising(noise, [tiles], schedule, generator)
    list(denoising.run(LocalRunner(lambda samples, step: next(answers)[None], lambda step: prompts(1))))
    alpha = schedule.scheduler.alphas_cumprod[int(schedule.timesteps[0])]
    last = schedule.scheduler.final_alpha_cumprod
    assert last == 1
    want = torch.zeros(1, 4, *size)
    for tile, eps in zip(tiles, predicted, strict=True):
        want[0, :, *tile.crop] += tile.weights * (noise[0, :, *tile.crop] - (1 - alpha).sqrt() * eps) / alpha.sqrt()
    assert torch.allclose(denoising.latents, want, atol=1e-5)
