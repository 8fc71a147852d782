"""PixArt-α and PixArt-Σ against diffusers' own pipelines, transformer and scheduler, on tiny checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtSigmaPipeline
from diffusers.models.embeddings import PatchEmbed
from PIL import Image
from torch import Tensor

from tests.models.rendering import FOUR_TILES, ask, edit, four_tiles, lose_shard, rendered
from tiler import RenderRequest
from tiler.errors import ModelError
from tiler.models.family import Family, Options, Part, Role, read_family
from tiler.models.pixart import quantised, read_once
from tiler.models.pixart_blocks import Grid, add_positions
from tiler.models.samples import Place, Prompt, Sample
from tiler.planning.resolve import resolve
from tiler.run import streamed
from tiler.weights import checkpoint

PROMPT = "A boat on a lake at DAWN "  # lower case and no blanks around it, as the pipelines make it


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """α is the model for 1024 px: its pipeline passes sizes only if sample_size is 128."""
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


def apart(got: Tensor, want: Tensor) -> float:
    """The largest difference, for latents scaled to unit size: with random weights and noise levels that start near
    pure noise, they grow to hundreds."""
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
    got, _ = rendered(ask(folders["sigma"], tmp_path, prompt=PROMPT, size=128, negative_prompt=negative))
    assert apart(got, wanted(pipelines["sigma"], 128, 128, negative)) < 1e-4
    assert apart(got, wanted(pipelines["sigma"], 128, 128, "a cat")) > 1e-2


def test_a_picture_that_is_not_square_is_told_to_alpha(
    folders: dict[str, Path], pipelines: dict[str, Any], tmp_path: Path
) -> None:
    got, report = rendered(ask(folders["alpha"], tmp_path, prompt=PROMPT, height=192, width=336, negative_prompt="fog"))
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
    """The pipeline's own 120 rows with their mask, at 768 × 1360 pixels and as a small tile, for both halves of the
    guidance."""
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
    """Mixture of Diffusers with diffusers' own transformer and scheduler; `crops` holds (index, weights) of each
    tile."""
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
    got, want, report = four_tiles(
        ask(folders["sigma"], tmp_path, prompt=PROMPT, **FOUR_TILES), partial(looped, pipelines["sigma"])
    )
    assert apart(got, want) < 1e-4
    assert report["denoiser_samples"] == 2 * (4 * 2 + 4)


def test_defaults_are_of_the_model(folders: dict[str, Path], tmp_path: Path) -> None:
    family = read_family(checkpoint.resolve(str(folders["alpha"])))
    filled = resolve(RenderRequest(prompt="x", model="m"), family)
    assert (filled.num_inference_steps, filled.guidance_scale, filled.strength) == (20, 4.5, 0.35)
    assert (family.traits.title, family.native, family.notes) == ("PixArt-α", 128, ())
    folder = shutil.copytree(folders["alpha"], tmp_path / "lcm")
    scheduler = folder / "scheduler/scheduler_config.json"
    scheduler.write_text(json.dumps({"_class_name": "LCMScheduler", "beta_schedule": "linear"}))
    few = read_family(checkpoint.resolve(str(folder)))
    filled = resolve(RenderRequest(prompt="x", model="m"), few)
    assert (filled.num_inference_steps, filled.guidance_scale, filled.strength) == (4, 1.0, 0.5)
    assert "few-step model" in few.notes[0]


def test_the_published_configs_are_read(tmp_path: Path) -> None:
    """Those of diffusers' older class, and those of the larger models with a native tile of 2048 px. A missing field
    has diffusers' default."""
    from checkpoints import pixart

    pixart.write(tmp_path, "tiny", sample_size=256)
    family = read_family(checkpoint.resolve(str(tmp_path)))
    assert family.native == 256 and family.part(Role.DENOISER).config["use_additional_conditions"] is False
    edit(tmp_path, "transformer", use_additional_conditions=None, sample_size=128)
    module = read_family(checkpoint.resolve(str(tmp_path))).part(Role.DENOISER).build()
    assert module.adaln_single.emb.use_additional_conditions  # diffusers' rule for 1024 px
    assert all(parameter.is_meta for parameter in module.parameters())
    assert module.pos_embed.pos_embed.numel() == 288  # a table of one token


def test_blocks_alone_become_int8_and_what_is_read_once_is_not_kept() -> None:
    kept = (
        "pos_embed.proj.weight",
        "caption_projection.linear_1.weight",
        "adaln_single.linear.weight",
        "proj_out.weight",
    )
    assert not any(map(quantised, kept))
    assert quantised("transformer_blocks.0.attn2.to_k.weight") and quantised("transformer_blocks.9.ff.net.2.weight")
    assert [name for name in kept if read_once(name)] == list(kept[1:3])


def lose(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def pickle_alone(folder: Path) -> None:
    weights = folder / "transformer/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))


def other_words(folder: Path) -> None:
    from checkpoints import _t5

    _t5.write_encoder(folder / "text_encoder", _t5.config(vocab_size=20))


BAD = {
    "no transformer": (
        lambda f: lose(f / "transformer"),
        "transformer/config.json is missing; run: hf download PixArt-alpha/",
    ),
    "no encoder": (
        lambda f: lose(f / "text_encoder"),
        "text_encoder/config.json is missing; run: hf download PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers",
    ),
    "no tokenizer": (
        lambda f: lose(f / "tokenizer/spiece.model"),
        "spiece.model is here; run: hf download PixArt-alpha/",
    ),
    "pickle": (pickle_alone, "a pickle can run code"),
    "widths": (lambda f: edit(f, "transformer", caption_channels=512), "expects text of width 512 (caption_channels)"),
    "no T5": (lambda f: edit(f, "text_encoder", model_type="clip_text_model"), "needs a T5 encoder"),
    "other norm": (lambda f: edit(f, "transformer", norm_type="ada_norm_zero"), "norm_type = 'ada_norm_zero'"),
    "other class": (lambda f: edit(f, "transformer", _class_name="DiTTransformer2DModel"), "the class is 'DiT"),
    "outputs": (lambda f: edit(f, "transformer", out_channels=3), "out_channels = 3"),
    "heads": (lambda f: edit(f, "transformer", num_attention_heads=0), "num_attention_heads = 0 is out of range"),
    "cross attention": (lambda f: edit(f, "transformer", cross_attention_dim=64), "cross_attention_dim = 64"),
    "VAE": (lambda f: edit(f, "vae", latent_channels=16), "the VAE's latents have 16"),
    "ControlNet": (lambda f: edit(f, "", _class_name="PixArtSigmaControlNetPipeline"), "a ControlNet pipeline"),
    "a shard lost": (lambda f: lose_shard(f, "text_encoder"), "model-00002-of-00002.safetensors"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_checkpoints_are_exit_3_and_one_line(
    in_process: Any, folders: dict[str, Path], tmp_path: Path, case: str
) -> None:
    damage, words = BAD[case]
    folder = shutil.copytree(folders["sigma"], tmp_path / "model")
    damage(folder)
    ran = in_process("plan", "a boat", "--model", folder, "--size", 128)
    assert ran.code == 3 and words in ran.err and ran.err.count("\n") == 1, ran


def test_a_tokenizer_of_more_words_than_the_encoder_has_is_found_before_it_is_run(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folders["sigma"], tmp_path / "model")
    other_words(folder)
    family = read_family(checkpoint.resolve(str(folder)))
    with pytest.raises(ModelError, match="do not belong together"):
        family.encode([PROMPT], partial(opened, family), pytest.fail)


def test_windows_of_attention_are_exit_2(in_process: Any, folders: dict[str, Path]) -> None:
    ran = in_process("plan", "a boat", "--model", folders["sigma"], "--attention-window", 8)
    assert ran.code == 2 and "PixArt-Σ is a transformer" in ran.err


def test_the_program_plans_quantizes_renders_and_decodes(
    tiler: Any, in_process: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    """The render runs in a process of its own, which imports less."""
    model = "--model", folders["sigma"]
    planned = in_process("plan", "a boat", *model, "--size", 256, "--json")
    assert planned.code == 0 and planned.json["tiles"] == 9 and planned.json["guide"] == "128×128"
    assert in_process("quantize", folders["sigma"], "--cache-dir", "packed").code == 0
    asked = "render", "a boat", *model, "-W", 160, "-H", 128, "--steps", 2, "--negative-prompt", "fog", "--seed", 1
    options = "--precision", "int8", "--cache-dir", "packed", "--save-latents", "x.safetensors", "-o", "x.png"
    ran = tiler(*asked, *options)
    assert ran.code == 0, ran.err
    assert "int8 weights are made" not in ran.err
    assert in_process("decode", "x.safetensors", *model, "-o", "y.png").code == 0
    pictures = [Image.open(tmp_path / name) for name in ("x.png", "y.png")]
    assert pictures[0].size == (160, 128) and pictures[0].tobytes() == pictures[1].tobytes()
