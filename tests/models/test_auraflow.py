"""AuraFlow against diffusers' own pipeline, transformer and scheduler, on a tiny checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AuraFlowPipeline, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from tests.models.rendering import FOUR_TILES, ask, edit, four_tiles, lose_shard, rendered
from tiler import RenderRequest, plan
from tiler.models.auraflow_blocks import quantised, read_once
from tiler.models.family import Part, Role, read_family
from tiler.planning.resolve import resolve
from tiler.request import Precision
from tiler.run import streamed
from tiler.weights import checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from checkpoints import auraflow

    folder = tmp_path_factory.mktemp("auraflow")
    auraflow.write(folder / "model", "tiny")
    return folder / "model"


@pytest.fixture(scope="module")
def pipe(folder: Path) -> AuraFlowPipeline:
    found = AuraFlowPipeline.from_pretrained(folder, variant="fp16", torch_dtype=torch.float32)
    found.set_progress_bar_config(disable=True)
    return found


def test_prompts_are_diffusers_own(folder: Path, pipe: AuraFlowPipeline) -> None:
    """256 rows, zero after the prompt; an absent negative prompt is the empty one."""
    family, said = read_family(checkpoint.resolve(str(folder))), []
    texts = ["a boat on a lake", "", None, "fog over the harbour " * 100]

    @contextmanager
    def opened(part: Part) -> Iterator[Any]:
        module = part.build()
        with streamed(module, family.checkpoint.weights(part.name), part.aliases, arena_bytes=part.arena_bytes):
            yield module

    with torch.no_grad():
        for text, prompt in zip(texts, family.encode(texts, opened, said.append), strict=True):
            tokens, _, _, _ = pipe.encode_prompt(text or "", do_classifier_free_guidance=False)
            assert prompt.tokens.shape == (1, 256, 256) and prompt.pooled is None
            assert (prompt.tokens - tokens).abs().max() < 2e-5
    assert len(said) == 1 and "longer than 256 tokens" in said[0]


@pytest.mark.parametrize(("negative", "size"), [(None, (128, 128)), ("fog", (80, 128))])
def test_one_tile_is_what_diffusers_pipeline_gives(
    folder: Path, pipe: AuraFlowPipeline, tmp_path: Path, negative: str | None, size: tuple[int, int]
) -> None:
    height, width = size
    want = pipe(
        "a boat", negative_prompt=negative, height=height, width=width, num_inference_steps=3, guidance_scale=3.5,
        output_type="latent", generator=torch.Generator().manual_seed(5),
    ).images  # fmt: skip
    got, report = rendered(ask(folder, tmp_path, negative_prompt=negative, height=height, width=width))
    assert (got - want).abs().max() < 1e-4
    assert report["denoiser_samples"] == 6


def test_positions_are_those_of_the_middle(folder: Path, pipe: AuraFlowPipeline) -> None:
    """Sides whose halves are even and odd, which classes of diffusers round differently; and positions matter."""
    from tiler.models.family import Options
    from tiler.models.samples import Place, Prompt, Sample

    family = read_family(checkpoint.resolve(str(folder)))
    part, generator = family.part(Role.DENOISER), torch.Generator().manual_seed(0)
    tokens = torch.randn(1, 256, 256, generator=generator)
    for height, width in ((20, 12), (10, 26), (6, 48)):
        latents, module = torch.randn(1, 4, height, width, generator=generator), part.build()
        with torch.no_grad(), streamed(module, family.checkpoint.weights(part.name), part.aliases) as streamer:
            prepared = family.prepare(module, streamer, torch.tensor([900.0, 400.0]), [], Options())
            sample = Sample(latents, Prompt(tokens), Place(0, 0, 8, 8, (8, 8)), 1.0)
            got = family.predict(module, streamer, [sample], 1, prepared)
            want = pipe.transformer(latents, tokens, torch.tensor([0.4]), return_dict=False)[0]
            kept = pipe.transformer.pos_embed.pos_embed.data
            pipe.transformer.pos_embed.pos_embed.data = kept.roll(1, 1)
            other = pipe.transformer(latents, tokens, torch.tensor([0.4]), return_dict=False)[0]
            pipe.transformer.pos_embed.pos_embed.data = kept
        assert (got - want).abs().max() < 1e-5
        assert (other - want).abs().max() > 0.01


def looped(
    pipe: AuraFlowPipeline, latents: Tensor, crops: list[tuple[Any, Tensor]], begin: int, reference: Tensor | None,
    steps: int,
) -> Tensor:  # fmt: skip
    """Mixture of Diffusers with diffusers' own transformer and scheduler; `crops` holds (index, weights) of each
    tile."""
    with torch.no_grad():
        tokens, _, negative, _ = pipe.encode_prompt("a boat", "fog")
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
        scheduler.set_timesteps(steps)
        scheduler.set_begin_index(begin)
        if reference is not None:
            latents = scheduler.scale_noise(reference, scheduler.timesteps[begin : begin + 1], latents)
        for timestep in scheduler.timesteps[begin:]:
            velocity = torch.zeros_like(latents)
            for where, weights in crops:
                tile, texts = latents[where].expand(2, -1, -1, -1), torch.cat([negative, tokens])
                made = pipe.transformer(tile, texts, timestep.expand(2) / 1000, return_dict=False)[0]
                velocity[where] += weights * (made[:1] + 3.0 * (made[1:] - made[:1]))
            latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    return latents


def test_four_tiles_with_a_guide_are_a_loop_over_diffusers_transformer(
    folder: Path, pipe: AuraFlowPipeline, tmp_path: Path
) -> None:
    """A canvas of 24 × 20 latents, a guide that is not square."""
    got, want, report = four_tiles(
        ask(folder, tmp_path, **FOUR_TILES, guidance_scale=3.0, negative_prompt="fog"), partial(looped, pipe)
    )
    assert (got - want).abs().max() < 1e-4
    assert report["denoiser_samples"] == 2 * (4 * 2 + 4)


def test_traits_are_of_the_model(folder: Path, tmp_path: Path) -> None:
    """Its sample_size counts patches; a panorama's guide is no longer than the learned positions."""
    request = RenderRequest(prompt="x", model=str(folder), width=2560, height=128, output=tmp_path / "x.png")
    planned = plan(request).plan
    assert planned.family.native == 16
    assert planned.guide is not None and planned.guide[:2] == (4, 48)
    filled = resolve(request, planned.family)
    assert (filled.num_inference_steps, filled.guidance_scale, filled.strength) == (50, 3.5, 0.48)


def test_int8_is_near_fp32_and_leaves_what_is_read_once(folder: Path, tmp_path: Path) -> None:
    plain, _ = rendered(ask(folder, tmp_path, size=128))
    int8, _ = rendered(ask(folder, tmp_path, size=128, precision=Precision.INT8, cache_dir=tmp_path / "packed"))
    assert not torch.equal(plain, int8)
    assert (int8 - plain).norm() < 0.05 * plain.norm()
    part = read_family(checkpoint.resolve(str(folder))).part(Role.DENOISER)
    names = [name for name, _ in part.build().named_parameters()]
    assert any(map(read_once, names)) and not any(read_once(name) and quantised(name) for name in names)
    assert all(read_once(name) for name in names if ".linear." in name)


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no encoder": (
        lambda f: shutil.rmtree(f / "text_encoder"),
        "text_encoder/config.json is missing; run: hf download",
    ),
    "no tokenizer": (
        lambda f: shutil.rmtree(f / "tokenizer"),
        "tokenizer: neither tokenizer.json nor spiece.model is here; run: hf download",
    ),
    "no weights": (lambda f: next(f.glob("transformer/*.safetensors")).unlink(), "transformer: no *.safetensors here"),
    "no shard": (lambda f: lose_shard(f, "text_encoder"), "-00002-of-00002.safetensors cannot be found"),
    "channels": (lambda f: edit(f, "transformer", in_channels=8), "the transformer takes 8 channels"),
    "text width": (lambda f: edit(f, "transformer", joint_attention_dim=512), "joint_attention_dim"),
    "width": (lambda f: edit(f, "transformer", caption_projection_dim=512), "caption_projection_dim = 512"),
    "positions": (lambda f: edit(f, "transformer", pos_embed_max_size=1000), "pos_embed_max_size = 1000"),
    "table": (lambda f: edit(f, "transformer", pos_embed_max_size=1024), "pos_embed.pos_embed"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_it_cannot_take_is_exit_3_and_one_line(in_process, folder: Path, tmp_path: Path, name: str) -> None:
    change, message = BAD[name]
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    change(model)
    ran = in_process("render", "a boat", "--model", model, "--size", 128, "--no-guide", "-o", tmp_path / "y.png", "-q")
    assert ran.code == 3
    line = ran.err.strip()
    assert message in line and len(line.splitlines()) == 1
    assert not (tmp_path / "y.png").exists()
