"""HunyuanDiT against diffusers' own pipeline, transformer and scheduler, on tiny checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import _single_dit
from diffusers import DDIMScheduler, HunyuanDiTPipeline
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid
from PIL import Image
from torch import Tensor

from tests.models.rendering import FOUR_TILES, ask, edit, four_tiles, lose_shard, rendered
from tests.models.test_denoiser_files import assert_same_weights
from tiler import RenderRequest
from tiler.models.family import open_family, read_family
from tiler.models.hunyuandit_blocks import quantised, read_once, rotation
from tiler.planning.resolve import resolve
from tiler.request import Scheduler
from tiler.request.model import ModelOptions
from tiler.weights import checkpoint

PROMPT = "a boat on a lake, 船"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from checkpoints import hunyuandit

    folder = tmp_path_factory.mktemp("hunyuandit")
    for kind in ("1.2", "1.1"):
        hunyuandit.write(folder / kind, "tiny", told_sizes=kind == "1.1")
    return {kind: folder / kind for kind in ("1.2", "1.1")}


@pytest.fixture(scope="module")
def pipelines(folders: dict[str, Path]) -> dict[str, Any]:
    """Pipelines with a scheduler that draws no noise."""
    found = {kind: HunyuanDiTPipeline.from_pretrained(at, torch_dtype=torch.float32) for kind, at in folders.items()}
    for pipe in found.values():
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    return found


def boat(folder: Path, at: Path, **values: Any) -> RenderRequest:
    return ask(folder, at, prompt=PROMPT, scheduler=Scheduler.DDIM, **values)


def apart(got: Tensor, want: Tensor) -> float:
    """The largest difference, for latents of unit size."""
    return float((got - want).abs().max() / want.std())


def wanted(pipe: Any, height: int, width: int, negative: str | None) -> Tensor:
    latents: Tensor = pipe(
        PROMPT, negative_prompt=negative, height=height, width=width, num_inference_steps=3, guidance_scale=5.0,
        output_type="latent", use_resolution_binning=False, generator=torch.Generator().manual_seed(5),
    ).images  # fmt: skip
    return latents


@pytest.mark.parametrize(
    ("kind", "height", "width", "negative"),
    [("1.2", 128, 128, None), ("1.2", 128, 128, "fog, low quality"), ("1.1", 96, 128, "fog")],
)
def test_one_tile_is_what_the_pipeline_gives(
    folders: dict[str, Path], pipelines: dict[str, Any], tmp_path: Path, kind: str, height: int, width: int,
    negative: str | None,
) -> None:  # fmt: skip
    got, report = rendered(boat(folders[kind], tmp_path, height=height, width=width, negative_prompt=negative))
    assert report["tiles"] == 1
    assert apart(got, wanted(pipelines[kind], height, width, negative)) < 1e-4
    assert apart(got, wanted(pipelines[kind], height, width, "a cat")) > 1e-3


def turns(size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The rotary embedding that the pipeline passes for height × width patches."""
    found: tuple[Tensor, Tensor] = get_2d_rotary_pos_embed(88, get_resize_crop_region_for_grid(size, 32), size)
    return found


@pytest.mark.parametrize("size", [(8, 8), (48, 85), (9, 4), (64, 64)])
def test_positions_are_diffusers_own(size: tuple[int, int]) -> None:
    got = rotation(*size, 88)[:, 0]
    for part, want in zip((got.real, got.imag), turns(size), strict=True):
        assert torch.allclose(part, want[:, ::2], atol=1e-6)


def looped(
    pipe: Any, latents: Tensor, crops: list[tuple[Any, Tensor]], begin: int, reference: Tensor | None, steps: int
) -> Tensor:
    """Mixture of Diffusers with diffusers' own transformer and scheduler; `crops` holds (index, weights) of each
    tile."""
    with torch.no_grad():
        words = [pipe.encode_prompt(PROMPT, text_encoder_index=i) for i in (0, 1)]
        (states, _, mask, _), (wide, _, wide_mask, _) = words
        (_, no_states, _, no_mask), (_, no_wide, _, no_wide_mask) = words
        given = {
            "encoder_hidden_states": torch.cat([no_states, states]), "text_embedding_mask": torch.cat([no_mask, mask]),
            "encoder_hidden_states_t5": torch.cat([no_wide, wide]),
            "text_embedding_mask_t5": torch.cat([no_wide_mask, wide_mask]),
        }  # fmt: skip
        scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        scheduler.set_timesteps(steps)
        if reference is not None:
            latents = scheduler.add_noise(reference, latents, scheduler.timesteps[begin : begin + 1])
        for timestep in scheduler.timesteps[begin:]:
            noise = torch.zeros_like(latents)
            for where, weights in crops:
                tile = latents[where].repeat(2, 1, 1, 1)
                made = pipe.transformer(
                    tile, timestep.expand(2).float(), return_dict=False, **given,
                    image_rotary_emb=turns((tile.shape[2] // 2, tile.shape[3] // 2)),
                )[0][:, :4]  # fmt: skip
                unconditional, conditional = made.chunk(2)
                noise[where] += weights * (unconditional + 5.0 * (conditional - unconditional))
            latents = scheduler.step(noise, timestep, latents, return_dict=False)[0]
    return latents


def test_four_tiles_with_a_guide_are_a_loop_over_diffusers_transformer(
    folders: dict[str, Path], pipelines: dict[str, Any], tmp_path: Path
) -> None:
    """A canvas of 24 × 20 latents, a guide that is not square; each tile has a grid of its own."""
    got, want, report = four_tiles(boat(folders["1.2"], tmp_path, **FOUR_TILES), partial(looped, pipelines["1.2"]))
    assert apart(got, want) < 1e-4
    assert report["denoiser_samples"] == 2 * (4 * 2 + 4)


def test_defaults_are_of_the_model(folders: dict[str, Path]) -> None:
    family = read_family(checkpoint.resolve(str(folders["1.2"])))
    filled = resolve(RenderRequest(prompt="x", model="m"), family)
    assert (filled.num_inference_steps, filled.guidance_scale, filled.strength) == (50, 5.0, 0.38)
    kept = "pos_embed.proj.weight", "time_extra_emb.pooler.k_proj.weight", "blocks.0.norm1.linear.weight"
    assert not any(map(quantised, kept)) and [name for name in kept if read_once(name)] == list(kept[1:])
    assert quantised("blocks.5.skip_linear.weight") and quantised("blocks.0.attn2.to_k.weight")


def lose(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no transformer": (lambda f: lose(f / "transformer"), "transformer/config.json is missing; run: hf download Tenc"),
    "no BERT": (lambda f: lose(f / "text_encoder"), "text_encoder/config.json is missing; run: hf download Tencent"),
    "no words": (lambda f: lose(f / "tokenizer/vocab.txt"), "nor vocab.txt is here; run: hf download Tencent"),
    "no pieces": (lambda f: lose(f / "tokenizer_2/spiece.model"), "spiece.model is here; run: hf download Tencent"),
    "CLIP": (lambda f: edit(f, "text_encoder", model_type="clip_text_model"), "this model needs a BERT encoder"),
    "widths": (lambda f: edit(f, "transformer", cross_attention_dim=512), "text of width 512 (cross_attention_dim)"),
    "wide": (lambda f: edit(f, "transformer", cross_attention_dim_t5=512), "of width 512 (cross_attention_dim_t5)"),
    "heads": (lambda f: edit(f, "transformer", num_attention_heads=0), "num_attention_heads = 0 is out of range"),
    "VAE": (lambda f: edit(f, "vae", latent_channels=16), "the VAE's latents have 16"),
    "ControlNet": (lambda f: edit(f, "", _class_name="HunyuanDiTControlNetPipeline"), "a ControlNet pipeline"),
    "a video model": (lambda f: edit(f, "", _class_name="HunyuanVideoPipeline"), "this is a video model"),
    "Latte": (lambda f: edit(f, "", _class_name="LattePipeline"), "this is a video model (LattePipeline)"),
    "a shard lost": (lambda f: lose_shard(f, "text_encoder_2"), "model-00002-of-00002.safetensors"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_checkpoints_are_exit_3_and_one_line(
    in_process: Any, folders: dict[str, Path], tmp_path: Path, case: str
) -> None:
    damage, words = BAD[case]
    folder = shutil.copytree(folders["1.2"], tmp_path / "model")
    damage(folder)
    ran = in_process("plan", "a boat", "--model", folder, "--size", 128)
    assert ran.code == 3 and words in ran.err and ran.err.count("\n") == 1, ran


@pytest.mark.parametrize(("kind", "named"), [("1.2", "original"), ("1.1", "original"), ("1.1", "diffusers")])
def test_a_file_takes_the_place_of_a_folders_transformer(
    in_process: Any, folders: dict[str, Path], tmp_path: Path, kind: str, named: str
) -> None:
    """Also in a folder of another version: what the file holds counts."""
    (own_file,) = (folders[kind] / "transformer").glob("*.safetensors")
    file = Path(shutil.copy(own_file, tmp_path / "dit.safetensors"))
    if named == "original":
        _single_dit.write_transformer(folders[kind], file, "hunyuandit")
    own = read_family(checkpoint.resolve(str(folders[kind])))
    found = open_family(ModelOptions(model=str(folders["1.2"]), diffusion_model=str(file)))
    assert {info.path for info in found.checkpoint.weights("transformer").values()} == {file}
    assert_same_weights(own, found)
    alone = in_process("plan", "a boat", "--diffusion-model", file)
    assert alone.code == 3 and "a transformer of HunyuanDiT alone; give --model FOLDER as well" in alone.err
    listed = in_process("models", tmp_path)
    assert listed.code == 0 and "HunyuanDiT" in listed.out and "--model" in listed.out


def test_flags_for_parts(in_process: Any, folders: dict[str, Path]) -> None:
    folder = folders["1.2"]
    asked = "plan", "a boat", "--size", 128, "--model", folder
    assert in_process(*asked, "--vae", folders["1.1"] / "vae").code == 0
    ran = in_process(*asked, "--t5xxl", folder / "text_encoder_2")
    assert ran.code == 2 and "--t5xxl: HunyuanDiT's text encoders are read in its folder" in ran.err


def test_windows_of_attention_are_exit_2(in_process: Any, folders: dict[str, Path]) -> None:
    ran = in_process("plan", "a boat", "--model", folders["1.2"], "--attention-window", 8)
    assert ran.code == 2 and "HunyuanDiT is a transformer" in ran.err


def test_the_program_encodes_renders_and_tells_of_the_model(
    tiler: Any, in_process: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    """The render runs in a process of its own, which imports less, from prompts that another process encoded."""
    model = "--model", folders["1.1"]
    assert in_process("encode", PROMPT, "-n", "fog", *model, "-o", "words.safetensors").code == 0
    asked = "render", *model, "-W", 160, "-H", 128, "--steps", 2, "--seed", 1, "--scheduler", "DDIM"
    ran = tiler(*asked, "--precision", "fp32", "--prompt-embeds", "words.safetensors", "-o", "x.png")
    assert ran.code == 0, ran.err
    for precision in ("fp32", "int8"):
        ran = in_process(*asked, PROMPT, "-n", "fog", "--precision", precision, "-o", f"{precision}.png")
        assert ran.code == 0, ran.err
    encoded, whole, rounded = (Image.open(tmp_path / name) for name in ("x.png", "fp32.png", "int8.png"))
    assert encoded.size == (160, 128) and encoded.tobytes() == whole.tobytes() != rounded.tobytes()
    told = in_process("doctor", *model)
    assert told.code == 0 and "HunyuanDiT" in told.out and "text_encoder_2" in told.out
    assert "HunyuanDiT" in in_process("models", folders["1.1"].parent).out
