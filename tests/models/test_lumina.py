"""Lumina-Next against diffusers' own pipeline, transformer and scheduler, on a tiny checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LuminaPipeline
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from tests.models.rendering import FOUR_TILES, ask, edit, four_tiles, lose_shard, rendered
from tests.models.test_denoiser_files import assert_same_weights
from tiler import RenderRequest
from tiler.compute.native import reads_blocks
from tiler.compute.tuning import MAPPED_HEAP_SLACK
from tiler.models.built import Models
from tiler.models.family import Role, open_family, read_family
from tiler.models.lumina_blocks import quantised, read_once, rotation
from tiler.planning.peaks import ACTIVATIONS
from tiler.planning.resolve import resolve
from tiler.planning.tiling import plan_tiling
from tiler.planning.time import Counter
from tiler.request.model import ModelOptions
from tiler.weights import checkpoint

PROMPT = "A boat on a lake at DAWN "  # lower case and no blanks around it, as the pipeline makes it


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from checkpoints import lumina

    folder = tmp_path_factory.mktemp("lumina") / "tiny"
    lumina.write(folder, "tiny")
    return folder


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Any:
    found = LuminaPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    found.set_progress_bar_config(disable=True)
    return found


def wanted(pipe: Any, height: int, width: int, negative: str | None, scale: float = 4.0) -> Tensor:
    latents: Tensor = pipe(
        PROMPT, negative_prompt=negative, height=height, width=width, num_inference_steps=3, guidance_scale=scale,
        output_type="latent", generator=torch.Generator().manual_seed(5),
    ).images  # fmt: skip
    return latents


@pytest.mark.parametrize(
    ("height", "width", "negative", "scale"),
    [(128, 128, None, 4.0), (128, 128, "fog", 4.0), (96, 128, "fog", 4.0), (128, 128, None, 1.0)],
)
def test_one_tile_is_what_the_pipeline_gives(
    folder: Path, pipe: Any, tmp_path: Path, height: int, width: int, negative: str | None, scale: float
) -> None:
    """Three of the four channels are guided."""
    request = ask(
        folder, tmp_path, prompt=PROMPT, height=height, width=width, negative_prompt=negative, guidance_scale=scale
    )
    got, report = rendered(request)
    assert report["tiles"] == 1
    assert (got - wanted(pipe, height, width, negative, scale)).abs().max() < 1e-4
    if negative:
        assert (got - wanted(pipe, height, width, "a cat")).abs().max() > 1e-3


@pytest.mark.parametrize("sides", [(8, 8), (48, 85), (9, 4), (128, 128)])
def test_positions_are_diffusers_own(sides: tuple[int, int]) -> None:
    """Also for pictures larger than those of the training."""
    turns = rotation(*sides, 72, 64)
    nearer = (sides[0] * sides[1] / 64**2) ** 0.5
    want = get_2d_rotary_pos_embed_lumina(72, 384, 384, linear_factor=nearer)[: sides[0], : sides[1]].flatten(0, 1)
    assert torch.allclose(turns.values[:, 0], want, atol=1e-5)


def looped(
    pipe: Any, latents: Tensor, crops: list[tuple[Any, Tensor]], begin: int, reference: Tensor | None, steps: int
) -> Tensor:
    """Mixture of Diffusers with diffusers' own transformer and scheduler; `crops` holds (index, weights) of each
    tile."""
    with torch.no_grad():
        states, mask, no_states, no_mask = pipe.encode_prompt(PROMPT)
        given = {"encoder_hidden_states": torch.cat([states, no_states]), "encoder_mask": torch.cat([mask, no_mask])}
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
        scheduler.set_timesteps(steps)
        if reference is not None:
            sigma = scheduler.sigmas[begin]
            latents = sigma * latents + (1 - sigma) * reference
        scheduler.set_begin_index(begin)
        for timestep in scheduler.timesteps[begin:]:
            velocity = torch.zeros_like(latents)
            for where, weights in crops:
                tile = latents[where].repeat(2, 1, 1, 1)
                nearer = (tile.shape[2] * tile.shape[3] / 16**2) ** 0.5
                made = pipe.transformer(
                    tile, (1 - timestep / 1000).expand(2), return_dict=False, **given,
                    image_rotary_emb=get_2d_rotary_pos_embed_lumina(72, 384, 384, linear_factor=nearer),
                    cross_attention_kwargs={"base_sequence_length": 64},
                )[0][:, :4]  # fmt: skip
                conditional, unconditional = made.chunk(2)
                guided = unconditional + 4.0 * (conditional - unconditional)
                velocity[where] -= weights * torch.cat([guided[:, :3], conditional[:, 3:]], dim=1)
            latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    return latents


def test_four_tiles_with_a_guide_are_a_loop_over_diffusers_transformer(folder: Path, pipe: Any, tmp_path: Path) -> None:
    """A canvas of 24 × 20 latents, a guide that is not square; each tile has positions of its own."""
    got, want, report = four_tiles(ask(folder, tmp_path, prompt=PROMPT, **FOUR_TILES), partial(looped, pipe))
    assert (got - want).abs().max() < 1e-4
    assert report["denoiser_samples"] == 2 * (4 * 2 + 4)


def test_defaults_are_of_the_model_and_the_last_layer_of_its_encoder_is_not_read(folder: Path) -> None:
    family = read_family(checkpoint.resolve(str(folder)))
    filled = resolve(RenderRequest(prompt="x", model="m"), family)
    assert (filled.num_inference_steps, filled.guidance_scale, filled.strength) == (30, 4.0, 0.62)
    kept = "patch_embedder.proj.weight", "time_caption_embed.caption_embedder.1.weight", "layers.0.norm1.linear.weight"
    assert not any(map(quantised, kept)) and [name for name in kept if read_once(name)] == list(kept[1:])
    assert quantised("layers.1.feed_forward.linear_1.weight") and quantised("layers.0.attn2.to_k.weight")
    encoder = family.part(Role.TEXT_ENCODER)
    names = {name for name, _ in encoder.build().named_parameters()}
    assert "layers.1.mlp.up_proj.weight" in names and not any(name.startswith("layers.2.") for name in names)


def lose(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no transformer": (lambda f: lose(f / "transformer"), "transformer/config.json is missing; run: hf download Alpha"),
    "no Gemma": (lambda f: lose(f / "text_encoder"), "text_encoder/config.json is missing; run: hf download Alpha"),
    "no tokenizer": (lambda f: lose(f / "tokenizer/tokenizer.json"), "tokenizer.model is here; run: hf download Alpha"),
    "Gemma 2": (lambda f: edit(f, "text_encoder", model_type="gemma2"), "this model needs a Gemma text encoder"),
    "widths": (lambda f: edit(f, "transformer", cross_attention_dim=512), "text of width 512 (cross_attention_dim)"),
    "heads": (lambda f: edit(f, "transformer", num_kv_heads=3), "num_kv_heads = 3 is out of range"),
    "VAE": (lambda f: edit(f, "vae", latent_channels=16), "the VAE's latents have 16"),
    "Lumina 2": (lambda f: edit(f, "", _class_name="Lumina2Pipeline"), "this is Lumina-Image 2 (Lumina2Pipeline)"),
    "a shard lost": (lambda f: lose_shard(f, "text_encoder"), "model-00002-of-00002.safetensors"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_checkpoints_are_exit_3_and_one_line(in_process: Any, folder: Path, tmp_path: Path, case: str) -> None:
    damage, words = BAD[case]
    copy = shutil.copytree(folder, tmp_path / "model")
    damage(copy)
    ran = in_process("plan", "a boat", "--model", copy, "--size", 128)
    assert ran.code == 3 and words in ran.err and ran.err.count("\n") == 1, ran


def test_a_file_takes_the_place_of_a_folders_transformer(in_process: Any, folder: Path, tmp_path: Path) -> None:
    """Under diffusers' names; a file of the original repository is refused by its name."""
    (file,) = (folder / "transformer").glob("*.safetensors")
    lone = shutil.copy(file, tmp_path / "dit.safetensors")
    found = open_family(ModelOptions(model=str(folder), diffusion_model=str(lone)))
    assert {info.path for info in found.checkpoint.weights("transformer").values()} == {lone}
    assert_same_weights(read_family(checkpoint.resolve(str(folder))), found)
    alone = in_process("plan", "a boat", "--model", lone)
    assert alone.code == 3 and "a transformer of Lumina-Next alone; give --model FOLDER as well" in alone.err
    names = "pad_token", "cap_embedder.0.weight", "layers.0.attention.wq.weight", "x_embedder.weight"
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "original.safetensors")
    ran = in_process("plan", "a boat", "--model", folder, "--diffusion-model", "original.safetensors")
    assert ran.code == 3 and "Lumina-Next under its repository's own names" in ran.err and ran.err.count("\n") == 1


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--attention-window", 8, "Lumina-Next is a transformer"),
        ("--schedule-type", "karras", "not for flow-matching models"),
        ("--scheduler", "DPM++ 2M Karras", "not for flow-matching models"),
    ],
)
def test_what_makes_no_sense_is_exit_2(in_process: Any, folder: Path, option: str, value: object, words: str) -> None:
    ran = in_process("plan", "a boat", "--model", folder, option, value)
    assert ran.code == 2 and words in ran.err and ran.err.count("\n") == 1


def test_work_is_counted_whole(folder: Path) -> None:
    """At 512 px, where tokens are computed in several chunks: the work of two blocks by a closed formula."""
    family = read_family(checkpoint.resolve(str(folder)))
    width, keys, text, hidden, tokens = 288, 144, 256, 768, 32 * 32
    attention = tokens * width * (width + 2 * keys) + tokens * 2 * width**2 + 2 * text * 256 * keys
    block = attention + 3 * tokens * width * hidden
    request = RenderRequest(prompt="x", size=512, guide=False, num_inference_steps=1, guidance_scale=1.0)
    family = replace(family, traits=family.traits._replace(native=64))
    work = Counter(Models(family)).count(plan_tiling(resolve(request, family), family), None)
    assert work.layers == pytest.approx(2 * 2 * block, rel=0.02)  # the layers around the blocks are small


def test_int8_weights_that_all_stay_in_memory_are_not_planned_as_held_too(
    in_process: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a tile of 512 px, where a feed-forward decides the peak: its three weights are the difference."""
    model = Path(shutil.copytree(folder, tmp_path / "model"))
    edit(model, "transformer", sample_size=64)
    asked = "plan", "x", "--model", model, "--size", 512, "--no-guide", "--precision", "int8", "--max-ram", "4GB"

    def canvas() -> dict[str, int]:
        phases = {phase["name"]: phase["terms"] for phase in in_process(*asked, "--json").json["phases"]}
        return dict(phases["canvas"])

    roomy = canvas()
    monkeypatch.setattr("tiler.planning.fit._choose_resident", lambda streamed, room: {})
    short = canvas()
    assert "resident weights" in roomy and "resident weights" not in short
    module: Any = read_family(checkpoint.resolve(str(model))).part(Role.DENOISER).build()
    weights = sum(weight.numel() for weight in module.layers[0].feed_forward.parameters())
    held = weights if reads_blocks() else 0
    assert short[ACTIVATIONS] - roomy[ACTIVATIONS] == pytest.approx((1 + MAPPED_HEAP_SLACK) * held, abs=2)


def test_smaller_tiles_are_of_the_size_that_was_asked_for(in_process: Any, folder: Path) -> None:
    """Tiles of 64 pixels instead of 128, overlapping by half, and a guide no larger; sizes that the model cannot take
    are exit 2."""
    asked = "plan", "a boat", "--model", folder, "--size", 128, "--json", "--tile-size"
    planned = in_process(*asked, 64).json
    assert (planned["tiles"], planned["guide"]) == (9, "64×64")
    for wrong in (72, 144, 16):
        ran = in_process(*asked, wrong)
        assert ran.code == 2 and f"--tile-size {wrong}: Lumina-Next takes multiples of 16 from 64 to 128" in ran.err


def test_the_program_encodes_renders_and_tells_of_the_model(
    tiler: Any, in_process: Any, folder: Path, tmp_path: Path
) -> None:
    """The render runs in a process of its own, which imports less, from prompts that another process encoded."""
    model = "--model", folder
    assert in_process("encode", PROMPT, "-n", "fog", *model, "-o", "words.safetensors").code == 0
    asked = "render", *model, "-W", 160, "-H", 128, "--steps", 2, "--seed", 1
    ran = tiler(*asked, "--precision", "fp32", "--prompt-embeds", "words.safetensors", "-o", "x.png")
    assert ran.code == 0, ran.err
    for precision in ("fp32", "int8"):
        ran = in_process(*asked, PROMPT, "-n", "fog", "--precision", precision, "-o", f"{precision}.png")
        assert ran.code == 0, ran.err
    encoded, whole, rounded = (Image.open(tmp_path / name) for name in ("x.png", "fp32.png", "int8.png"))
    assert encoded.size == (160, 128) and encoded.tobytes() == whole.tobytes() != rounded.tobytes()
    told = in_process("doctor", *model)
    assert told.code == 0 and "Lumina-Next" in told.out and "tokenizer" in told.out
    assert "Lumina-Next" in in_process("models", folder.parent).out
