"""PixArt-α and PixArt-Σ against diffusers' own pipelines, transformer and scheduler, on tiny checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtSigmaPipeline
from diffusers.models.embeddings import PatchEmbed
from safetensors.torch import load_file
from torch import Tensor

from tiler import Budget, RenderRequest, render
from tiler.diffusion.guide import guide_size, upscale
from tiler.diffusion.tiles import plan_tiles
from tiler.memory.process import read_rss
from tiler.models.family import Family, Options, Part, Role, read_family
from tiler.models.pixart_blocks import Grid, add_positions
from tiler.models.samples import Place, Prompt, Sample
from tiler.phases import streamed
from tiler.planning.resolve import resolve
from tiler.request import GuideUpscale, Precision
from tiler.weights import checkpoint

PROMPT = "A boat on a lake at DAWN "


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """α is of 1024 px: its pipeline tells of sizes only where sample_size is 128."""
    from checkpoints import pixart

    folder = tmp_path_factory.mktemp("pixart")
    pixart.write(folder / "sigma", "tiny")
    pixart.write(folder / "alpha", "tiny", alpha=True, sample_size=128)
    return {kind: folder / kind for kind in ("sigma", "alpha")}


@pytest.fixture(scope="module")
def pipelines(folders: dict[str, Path]) -> dict[str, Any]:
    classes = {"sigma": PixArtSigmaPipeline, "alpha": PixArtAlphaPipeline}
    found = {kind: cls.from_pretrained(folders[kind], torch_dtype=torch.float32) for kind, cls in classes.items()}
    for pipe in found.values():
        pipe.set_progress_bar_config(disable=True)
    return found


def ask(model: Path, folder: Path, **values: Any) -> RenderRequest:
    defaults: dict[str, Any] = {
        "prompt": PROMPT, "model": str(model), "num_inference_steps": 3, "guide": False, "seed": 5,
        "precision": Precision.FP32, "output": folder / "x.png", "save_latents": folder / "x.safetensors", "force": True,
    }  # fmt: skip
    return RenderRequest(**(defaults | values))


def rendered(request: RenderRequest) -> tuple[Tensor, dict[str, Any]]:
    result = render(request, Budget(read_rss().now + 10**9))
    assert request.save_latents is not None
    return load_file(request.save_latents)["latents"], result.report


def apart(got: Tensor, want: Tensor) -> float:
    """The largest difference, for latents of unit size: random weights and noise levels that begin near pure noise let them grow
    to hundreds."""
    return float((got - want).abs().max() / want.std())


def wanted(pipe: Any, height: int, width: int, negative: str | None, scale: float = 4.5) -> Tensor:
    latents: Tensor = pipe(
        PROMPT, negative_prompt=negative or "", height=height, width=width, num_inference_steps=3,
        guidance_scale=scale, output_type="latent", use_resolution_binning=False,
        generator=torch.Generator().manual_seed(5),
    ).images  # fmt: skip
    return latents


@pytest.mark.parametrize("negative", [None, "", "blurry, low quality"])
def test_one_tile_is_what_the_pipeline_gives(
    folders: dict[str, Path], pipelines: dict[str, Any], tmp_path: Path, negative: str | None
) -> None:
    got, _ = rendered(ask(folders["sigma"], tmp_path, size=128, negative_prompt=negative))
    assert apart(got, wanted(pipelines["sigma"], 128, 128, negative)) < 1e-4
    assert apart(got, wanted(pipelines["sigma"], 128, 128, "a cat")) > 1e-2


def test_a_picture_that_is_not_square_is_told_to_alpha(
    folders: dict[str, Path], pipelines: dict[str, Any], tmp_path: Path
) -> None:
    got, report = rendered(ask(folders["alpha"], tmp_path, height=192, width=336, negative_prompt="fog"))
    assert report["tiles"] == 1
    assert apart(got, wanted(pipelines["alpha"], 192, 336, "fog")) < 1e-4


@contextmanager
def opened(family: Family, part: Part) -> Iterator[Any]:
    module = part.build()
    with streamed(module, family.checkpoint.weights(part.name), part.aliases):
        yield module


def predicted(family: Family, latents: Tensor, prompts: list[Prompt], timestep: int) -> Tensor:
    part = family.part(Role.DENOISER)
    height, width = (8 * side for side in latents.shape[2:])
    place = Place(64, 128, height, width, (4096, 4096))  # where it lies is nothing to it
    samples = [Sample(latents, prompt, place, 4.5) for prompt in prompts]
    module = part.build()
    with torch.no_grad(), streamed(module, family.checkpoint.weights(part.name), part.aliases) as streamer:
        prepared = family.prepare(module, streamer, torch.tensor([999, timestep]), prompts, Options())
        return family.predict(module, streamer, samples, 1, prepared)


@pytest.mark.parametrize("sides", [(96, 170), (16, 16)])
def test_padding_left_out_is_padding_masked(
    folders: dict[str, Path], pipelines: dict[str, Any], sides: tuple[int, int]
) -> None:
    """The pipeline's own 120 rows and their mask, at 768 × 1360 pixels and as a small tile: both halves of a guidance."""
    pipe, family = pipelines["alpha"], read_family(checkpoint.resolve(str(folders["alpha"])))
    with torch.no_grad():
        rows, mask, no_rows, no_mask = pipe.encode_prompt(PROMPT, negative_prompt="fog", clean_caption=True)
        prompts = family.encode([PROMPT, "fog"], partial(opened, family), pytest.fail)
    assert [prompt.tokens.shape[1] for prompt in prompts] == [int(mask.sum()), int(no_mask.sum())]
    latents = torch.randn(1, 4, *sides, generator=torch.Generator().manual_seed(1))
    height, width = 8.0 * sides[0], 8.0 * sides[1]
    with torch.no_grad():
        want = pipe.transformer(
            latents.repeat(2, 1, 1, 1), encoder_hidden_states=torch.cat([rows, no_rows]),
            encoder_attention_mask=torch.cat([mask, no_mask]), timestep=torch.tensor([500, 500]),
            added_cond_kwargs={
                "resolution": torch.tensor([[height, width]] * 2), "aspect_ratio": torch.tensor([[height / width]] * 2)
            },
            return_dict=False,
        )[0]  # fmt: skip
    got = predicted(family, latents, prompts, 500)
    assert want.shape[1] == 8 and (got - want[:, :4]).abs().max() < 1e-4


def test_positions_are_diffusers_own() -> None:
    for side, scale, height, width in ((16, 2.0, 8, 8), (128, 2.0, 64, 64), (16, 0.5, 5, 9)):
        embed = PatchEmbed(side, side, 2, 4, 48, interpolation_scale=scale)
        x = torch.zeros(1, height * width, 48)
        add_positions(x, height, Grid(side // 2, scale))
        with torch.no_grad():
            embed.proj.weight.zero_()
            embed.proj.bias.zero_()
            assert torch.equal(x, embed(torch.zeros(1, 4, 2 * height, 2 * width)))


def looped(
    pipe: Any, latents: Tensor, crops: list[tuple[Any, Tensor]], begin: int, reference: Tensor | None, steps: int
) -> Tensor:
    """Mixture of Diffusers by diffusers' own transformer and scheduler: `crops` are (index, weights) of each tile."""
    with torch.no_grad():
        rows, mask, no_rows, no_mask = pipe.encode_prompt(PROMPT, clean_caption=True)
        given = {
            "encoder_hidden_states": torch.cat([no_rows, rows]), "encoder_attention_mask": torch.cat([no_mask, mask])
        }  # fmt: skip
        scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        scheduler.set_timesteps(steps)
        if reference is not None:
            latents = scheduler.add_noise(reference, latents, scheduler.timesteps[begin : begin + 1])
        scheduler.set_begin_index(begin)
        for timestep in scheduler.timesteps[begin:]:
            noise = torch.zeros_like(latents)
            for where, weights in crops:
                tile = latents[where].repeat(2, 1, 1, 1)
                made = pipe.transformer(tile, timestep=timestep.expand(2), return_dict=False, **given)[0][:, :4]
                unconditional, conditional = made.chunk(2)
                noise[where] += weights * (unconditional + 4.5 * (conditional - unconditional))
            latents = scheduler.step(noise, timestep, latents, return_dict=False)[0]
    return latents


def test_four_tiles_with_a_guide_are_a_loop_over_diffusers_transformer(
    folders: dict[str, Path], pipelines: dict[str, Any], tmp_path: Path
) -> None:
    """A canvas of 24 × 20 latents, a guide that is not square; each tile has a grid of its own."""
    steps, canvas = 4, (24, 20)
    request = ask(
        folders["sigma"], tmp_path, height=192, width=160, num_inference_steps=steps, guide=True, strength=0.5,
        guide_upscale=GuideUpscale.LATENT,
    )  # fmt: skip
    got, report = rendered(request)
    size = guide_size(canvas, 16, 2)
    assert size is not None and size.height != size.width
    everything = [((slice(None), slice(None), slice(None), slice(None)), torch.ones(()))]
    pipe = pipelines["sigma"]

    def noise(height: int, width: int) -> Tensor:
        return torch.randn(1, 4, height, width, generator=torch.Generator().manual_seed(5))

    guide = looped(pipe, noise(size.height, size.width), everything, 0, None, steps)
    resolved = resolve(request, read_family(checkpoint.resolve(str(folders["sigma"]))))
    tiles = plan_tiles(resolved, canvas=canvas, tile=(16, 16), overlap=4)
    assert len(tiles) == 4 and all(tile.top % 2 == tile.left % 2 == 0 for tile in tiles)
    crops = [((slice(None), slice(None), *tile.crop), tile.weights) for tile in tiles]
    want = looped(pipe, noise(*canvas), crops, 2, upscale(guide, size, canvas, (False, False)), steps)
    assert apart(got, want) < 1e-4
    assert report["denoiser_samples"] == 2 * (4 * 2 + steps)
