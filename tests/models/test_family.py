"""A family that tiler does not know, registered by a test: everything outside models/ accepts it unchanged."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from tiler import Budget, RenderRequest, render
from tiler.compute.stream import Streamer
from tiler.errors import ModelError
from tiler.memory.process import read_rss
from tiler.models import family as families
from tiler.models.built import Models
from tiler.models.family import (
    Family,
    OpenPart,
    Options,
    Part,
    Role,
    Traits,
    VaeSpec,
    build_vae,
    plain_names,
    read_family,
)
from tiler.models.meta import on_meta
from tiler.models.reading import READING, Reading
from tiler.models.samples import Place, Prompt, Sample
from tiler.packing import packed_names, packed_weights
from tiler.planning.peaks import DenoiserPeaks, text_phase
from tiler.planning.resolve import fill
from tiler.planning.table import Term
from tiler.planning.tiling import plan_tiling
from tiler.planning.time import Counter
from tiler.request import Precision
from tiler.run import streamed
from tiler.weights.checkpoint import Checkpoint, resolve

CHANNELS, PATCH, NATIVE, WIDTH, LENGTH = 16, 2, 16, 320, 5
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
WIDTHS = {"text_encoder": 128, "text_encoder_2": 192}


class Encoder(nn.Module):
    """A table of letters, a layer, and a pooled vector."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(64, width), nn.Linear(width, 384)
        self.out = nn.Linear(384, width)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.out(torch.tanh(self.layer(self.table(ids))))
        return tokens, tokens.mean(1)


class Denoiser(nn.Module):
    """Packed latents, to which prompt, timestep, guidance and place are added."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(CHANNELS * PATCH**2, WIDTH)
        self.pooled = nn.Linear(WIDTHS["text_encoder_2"], WIDTH)
        self.text = nn.Linear(sum(WIDTHS.values()), WIDTH)
        self.scalars = nn.Linear(8, WIDTH)
        self.mix, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CHANNELS * PATCH**2)

    def forward(self, packed: Tensor, tokens: Tensor, pooled: Tensor, scalars: Tensor) -> Tensor:
        """packed: (n, tokens, 64); tokens: (n, length, 320); pooled: (n, 192); scalars: (n, 8)."""
        told = self.pooled(pooled) + self.scalars(scalars) + self.text(tokens).mean(1)
        return self.out(torch.tanh(self.mix(self.into(packed) + told[:, None])))


class Dummy(Family):
    def encode(
        self,
        prompts: Sequence[str | None],
        open_part: OpenPart,
        warn: Callable[[str], None],
        reading: Reading = READING,
    ) -> list[Prompt]:
        first, second = self.encoders
        texts = [prompt for prompt in prompts if prompt is not None]
        ids = [torch.tensor([[ord(c) % 64 for c in text[:LENGTH].ljust(LENGTH)]]) for text in texts]
        with open_part(first) as encoder:
            tokens = [encoder(row)[0] for row in ids]
        with open_part(second) as encoder:
            both = [encoder(row) for row in ids]
        encoded = iter([Prompt(torch.cat([a, b], -1), pooled) for a, (b, pooled) in zip(tokens, both, strict=True)])
        absent = Prompt(torch.zeros(1, LENGTH, sum(WIDTHS.values())), torch.zeros(1, WIDTHS["text_encoder_2"]))
        return [absent if prompt is None else next(encoded) for prompt in prompts]

    def prepare(
        self, model: Any, streamer: Streamer, timesteps: Tensor, prompts: Sequence[Prompt], options: Options
    ) -> Tensor:
        return timesteps / 1000

    def predict(
        self,
        model: Any,
        streamer: Streamer,
        samples: Sequence[Sample],
        step: int,
        prepared: Tensor,
        check: Callable[[str], None] = lambda where: None,
    ) -> Tensor:
        check("denoiser")
        calls = []
        for latents, prompt, place, guidance in samples:
            height, width = place.canvas
            told = [place.top % height / height, place.left % width / width, place.height / height, place.width / width]
            scalars = latents.new_empty(1, 8)
            if not latents.is_meta:
                scalars = torch.tensor([[*told, guidance, float(prepared[step]), 0, 0]])
            assert prompt.pooled is not None
            packed = (
                nn.functional.pixel_unshuffle(latents, PATCH)
                if not latents.is_meta
                else latents.new_empty(1, CHANNELS * PATCH**2, latents.shape[2] // PATCH, latents.shape[3] // PATCH)
            )
            calls.append((packed.flatten(2).transpose(1, 2), prompt.tokens, prompt.pooled, scalars))
        sides = [side // PATCH for side in samples[0].latents.shape[2:]]
        results = streamer.run(model, calls)
        planes = torch.cat(results).transpose(1, 2).unflatten(2, sides)
        if planes.is_meta:
            return planes.new_empty(len(samples), *samples[0].latents.shape[1:])
        return nn.functional.pixel_shuffle(planes, PATCH)

    def example(self, tiles: Sequence[int], sides: tuple[int, int]) -> list[Sample]:
        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, device="meta")

        latents = {tile: empty(1, CHANNELS, *sides) for tile in tiles}
        height, width = 8 * sides[0], 8 * sides[1]
        place = Place(0, 0, height, width, (height, width))
        prompt = Prompt(empty(1, LENGTH, sum(WIDTHS.values())), empty(1, WIDTHS["text_encoder_2"]))
        return [Sample(latents[tile], prompt, place, 1.0) for tile in tiles]


def build(module: Callable[[], nn.Module]) -> nn.Module:
    with on_meta():
        return module().eval().requires_grad_(False)


def read(checkpoint: Checkpoint, name: str) -> Dummy:
    def part(name: str, role: Role, module: Callable[[], nn.Module]) -> Part:
        return Part(
            name=name, role=role, config={}, build=partial(build, module), aliases=plain_names,
            quantise=lambda parameter: parameter in ("mix.weight", "layer.weight"),
            example=lambda module: module(torch.zeros(1, LENGTH, dtype=torch.int64)),
        )  # fmt: skip

    vae = VaeSpec(checkpoint=checkpoint, part="vae", config=checkpoint.config("vae"))
    parts = [part(name, Role.TEXT_ENCODER, partial(Encoder, width)) for name, width in WIDTHS.items()]
    picture = replace(part("vae", Role.VAE, nn.Identity), build=partial(build_vae, vae))
    return Dummy(
        checkpoint=checkpoint,
        traits=Traits(
            title="Dummy", native=NATIVE, granularity=PATCH, channels=CHANNELS, width=WIDTH, flow=True, patch=PATCH
        ),
        parts=(*parts, part("mover", Role.DENOISER, Denoiser), picture), vae=vae,
        scheduler=FLOW,
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "DummyFlowPipeline"}))
    for name, module in {**{n: Encoder(w) for n, w in WIDTHS.items()}, "mover": Denoiser()}.items():
        (tmp_path / name).mkdir()
        save_file(module.state_dict(), tmp_path / name / "model.safetensors")
    AutoencoderKL(
        latent_channels=CHANNELS, block_out_channels=(32,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    ).save_pretrained(tmp_path / "vae")  # fmt: skip
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler/scheduler_config.json").write_text(json.dumps(FLOW))
    return tmp_path


@pytest.fixture
def dummy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Family:
    for module in ("tiler.compute.layers", "tiler.models.unet"):
        monkeypatch.setattr(f"{module}.SMALL", 500)
    monkeypatch.setitem(sys.modules, "a_family_of_a_test", SimpleNamespace(read=read))  # type: ignore[arg-type]
    monkeypatch.setitem(families.REGISTRY, "DummyFlow", "a_family_of_a_test")
    return read_family(resolve(str(folder)))


@contextmanager
def opened(family: Family, part: Part) -> Iterator[Any]:
    module = part.build()
    with streamed(module, family.checkpoint.weights(part.name), part.aliases):
        yield module


def encoded(family: Family) -> list[Prompt]:
    with torch.no_grad():
        return family.encode(["a boat", "", None], partial(opened, family), pytest.fail)


def predicted(family: Family, samples: Sequence[Sample], step: int = 1) -> Tensor:
    part = family.part(Role.DENOISER)
    module = part.build()
    with torch.no_grad(), streamed(module, family.checkpoint.weights(part.name), part.aliases) as streamer:
        prompts = [sample.prompt for sample in samples]
        prepared = family.prepare(module, streamer, torch.tensor([900.0, 400.0]), prompts, Options())
        return family.predict(module, streamer, samples, step, prepared)


def test_an_unknown_class_is_not_taken_for_a_registered_family(folder: Path) -> None:
    with pytest.raises(ModelError, match="unet"):
        read_family(resolve(str(folder)))


def test_prompts_of_two_encoders_tell_absent_from_empty(dummy: Family) -> None:
    boat, empty, absent = encoded(dummy)
    for prompt in (boat, empty, absent):
        assert prompt.tokens.shape == (1, LENGTH, 320)
        assert prompt.pooled is not None and prompt.pooled.shape == (1, 192)
    assert not torch.equal(boat.tokens, empty.tokens)
    assert empty.tokens.any() and not absent.tokens.any()


def test_a_prediction_is_the_resident_models_and_depends_on_all_that_a_sample_holds(
    dummy: Family, folder: Path
) -> None:
    from safetensors.torch import load_file

    boat, empty, _ = encoded(dummy)
    latents = torch.randn(1, CHANNELS, NATIVE, NATIVE, generator=torch.Generator().manual_seed(1))
    sample = Sample(latents, boat, Place(64, 0, 128, 128, (256, 256)), 3.5)
    others = [
        sample._replace(prompt=empty),
        sample._replace(place=sample.place._replace(left=128)),
        sample._replace(guidance=1.0),
    ]
    got = predicted(dummy, [sample, *others])
    reference = Denoiser().eval()
    reference.load_state_dict(load_file(folder / "mover/model.safetensors"))
    packed = nn.functional.pixel_unshuffle(latents, PATCH).flatten(2).transpose(1, 2)
    assert boat.pooled is not None
    with torch.no_grad():
        want = reference(packed, boat.tokens, boat.pooled, torch.tensor([[0.25, 0, 0.5, 0.5, 3.5, 0.4, 0, 0]]))
    want = nn.functional.pixel_shuffle(want.transpose(1, 2).unflatten(2, (NATIVE // 2, NATIVE // 2)), PATCH)
    assert torch.allclose(got[:1], want, atol=1e-5)
    for other in got[1:]:
        assert not torch.allclose(other, got[0], atol=1e-5)
    assert not torch.equal(predicted(dummy, [sample], step=0), got[:1])
    around = sample._replace(place=sample.place._replace(top=64 + 256))
    assert torch.equal(predicted(dummy, [around]), got[:1])  # places are taken modulo the canvas


def test_planner_and_time_estimate_take_the_family_as_it_is(dummy: Family) -> None:
    fixed = [Term(name="python + libraries", nbytes=300_000_000)]
    encoding = text_phase(Models(dummy), fixed)
    held, states = 4 * 2 * 192 * 384, 4 * LENGTH * 384  # of the wider encoder
    packed = 4 * 192 * 384  # of one layer, while it is brought into a kernel's order
    (used,) = (term.nbytes for term in encoding.terms if term.name.startswith("activations"))
    assert held + states <= used <= held + packed + 6 * states
    peaks = DenoiserPeaks(Models(dummy), Precision.FP32)
    one, two = (peaks.activations(tiles, NATIVE, NATIVE) for tiles in ((0,), (0, 1)))
    assert one >= 4 * WIDTH * (NATIVE // PATCH) ** 2
    assert two > one
    request = fill(RenderRequest(prompt="x", size=128, guide=False, num_inference_steps=3, guidance_scale=1.0))
    work = Counter(Models(dummy)).count(plan_tiling(request, dummy), None)
    pixels = (NATIVE // PATCH) ** 2
    products = pixels * (2 * 64 * WIDTH + WIDTH * WIDTH) + 192 * WIDTH + 8 * WIDTH + LENGTH * 320 * WIDTH
    assert work[:2] == (3 * 2 * products, 0)


def test_its_weights_are_packed_by_its_own_rule(dummy: Family, tmp_path: Path) -> None:
    index = packed_weights(Models(dummy), tmp_path / "packed", lambda share, why: None)
    integers = {name for name, info in index.items() if info.dtype == "I8"}
    assert integers == {"mix.weight", "text_encoder.layer.weight", "text_encoder_2.layer.weight"}
    second = dummy.encoders[1]
    module = second.build()
    with streamed(module, index, packed_names(second), int8_products=False), torch.no_grad():
        tokens, _ = module(torch.tensor([[1, 2, 3, 4, 5]]))
    assert tokens.shape == (1, LENGTH, 192) and bool(tokens.isfinite().all())


@pytest.mark.parametrize("negative", [None, "", "fog"])
def test_it_renders_through_the_whole_pipeline(
    dummy: Family, folder: Path, tmp_path: Path, negative: str | None
) -> None:
    """Against a loop over diffusers' scheduler and the bare modules: first one tile without a guide, then tiles and a
    guide."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from safetensors.torch import load_file

    asked = RenderRequest(
        prompt="a boat",
        negative_prompt=negative,
        model=str(folder),
        size=128,
        num_inference_steps=3,
        guidance_scale=2.0,
        seed=5,
        guide=False,
        precision=Precision.FP32,
        output=tmp_path / "x.png",
        save_latents=tmp_path / "x.safetensors",
    )
    roomy = read_rss().now + 10**9
    render(asked, Budget(roomy))
    latents = torch.randn(1, CHANNELS, NATIVE, NATIVE, generator=torch.Generator().manual_seed(5))
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(FLOW)
    scheduler.set_timesteps(3)
    with torch.no_grad():
        prompts = dummy.encode(["a boat", negative], partial(opened, dummy), pytest.fail)
    part, place = dummy.part(Role.DENOISER), Place(0, 0, 128, 128, (128, 128))
    module = part.build()
    with torch.no_grad(), streamed(module, dummy.checkpoint.weights(part.name), part.aliases) as streamer:
        prepared = dummy.prepare(module, streamer, scheduler.timesteps, prompts, Options())
        for step, timestep in enumerate(scheduler.timesteps):
            samples = [Sample(latents, prompt, place, 2.0) for prompt in prompts]
            with_prompt, without = dummy.predict(module, streamer, samples, step, prepared).split(1)
            guided = without + 2.0 * (with_prompt - without)
            latents = scheduler.step(guided, timestep, latents, return_dict=False)[0]
    assert torch.allclose(load_file(tmp_path / "x.safetensors")["latents"], latents, atol=1e-5)
    tiled = replace(asked, size=200, guide=True, seed=6, force=True)
    assert render(tiled, Budget(roomy)).report["tiles"] == 4
    assert Image.open(tmp_path / "x.png").size == (200, 200)
