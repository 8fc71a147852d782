"""Stable Diffusion 3 and 3.5 against diffusers' own pipeline, transformer and scheduler, on tiny checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Img2ImgPipeline, StableDiffusion3Pipeline
from torch import Tensor

from tests.models.rendering import FOUR_TILES, ask, edit, four_tiles, lose_shard, rendered
from tiler import RenderRequest, plan
from tiler.diffusion.guide import guide_size, upscale
from tiler.models.family import Part, Role, read_family
from tiler.models.sd3_blocks import quantised, read_once
from tiler.planning.resolve import resolve
from tiler.request import Decode, GuideUpscale, Precision, ScratchDtype
from tiler.run import streamed
from tiler.weights import checkpoint

# SD 3's; 3.5 medium's blocks that attend twice, queries and keys normed, a table of odd sides; 3.5 large's.
KINDS: dict[str, dict[str, Any]] = {
    "sd3": {"t5": False},
    "t5": {},
    "medium": {"qk_norm": "rms_norm", "dual_attention_layers": [0, 1], "pos_embed_max_size": 25, "t5": False},
    "large": {"qk_norm": "rms_norm", "t5": False},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from checkpoints import sd3

    folder = tmp_path_factory.mktemp("sd3")
    for kind, changes in KINDS.items():
        sd3.write(folder / kind, "tiny", **changes)
    return {kind: folder / kind for kind in KINDS}


@pytest.fixture(scope="module")
def pipelines(folders: dict[str, Path]) -> dict[str, StableDiffusion3Pipeline]:
    absent = {"text_encoder_3": None, "tokenizer_3": None}
    found = {
        kind: StableDiffusion3Pipeline.from_pretrained(
            folder, variant="fp16", torch_dtype=torch.float32, **({} if kind == "t5" else absent)
        )
        for kind, folder in folders.items()
    }
    for pipe in found.values():
        pipe.set_progress_bar_config(disable=True)
    return found


@pytest.mark.parametrize("kind", ["sd3", "t5"])
def test_prompts_are_diffusers_own(
    folders: dict[str, Path], pipelines: dict[str, StableDiffusion3Pipeline], kind: str
) -> None:
    """An absent negative prompt is the empty one; a prompt too long for one chunk of CLIP gets another chunk."""
    family, said = read_family(checkpoint.resolve(str(folders[kind]))), []
    texts = ["a boat", "", None, "fog " * 40]

    @contextmanager
    def opened(part: Part) -> Iterator[Any]:
        module = part.build()
        with streamed(module, family.checkpoint.weights(part.name), part.aliases):
            yield module

    with torch.no_grad():
        encoded = family.encode(texts, opened, said.append)
        for text, prompt in zip(texts, encoded, strict=True):
            tokens, _, pooled, _ = pipelines[kind].encode_prompt(text or "", None, None)
            more = prompt.tokens.shape[1] - tokens.shape[1]
            assert more == (77 if text == texts[-1] else 0)
            got = torch.cat([prompt.tokens[:, :77], prompt.tokens[:, 77 + more :]], dim=1)
            assert (got - tokens).abs().max() < 1e-5
            assert bool(got[:, 77:].any()) == (kind == "t5")
            assert prompt.pooled is not None and (prompt.pooled - pooled).abs().max() < 1e-5
    assert not said


@pytest.mark.parametrize(
    ("kind", "negative", "scale", "size"),
    [
        ("sd3", None, 7.0, (128, 128)),
        ("t5", "fog", 7.0, (80, 128)),
        ("medium", "fog", 4.5, (128, 128)),
        ("large", None, 1.0, (128, 128)),
    ],
)
def test_one_tile_is_what_diffusers_pipeline_gives(
    folders: dict[str, Path], pipelines: dict[str, StableDiffusion3Pipeline], tmp_path: Path, kind: str,
    negative: str | None, scale: float, size: tuple[int, int],
) -> None:  # fmt: skip
    """With and without T5; a picture smaller than a tile is a tile of its own size."""
    height, width = size
    want = pipelines[kind](
        "a boat", negative_prompt=negative, height=height, width=width, num_inference_steps=3, guidance_scale=scale,
        output_type="latent", generator=torch.Generator().manual_seed(5),
    ).images  # fmt: skip
    asked = ask(folders[kind], tmp_path, negative_prompt=negative, height=height, width=width, guidance_scale=scale)
    got, report = rendered(asked)
    assert got.shape == (1, 16, height // 8, width // 8)
    assert (got - want).abs().max() < 1e-4
    assert report["denoiser_samples"] == (3 if scale <= 1 else 6)


def test_a_wide_picture_takes_the_middle_of_the_positions(
    folders: dict[str, Path], pipelines: dict[str, StableDiffusion3Pipeline], tmp_path: Path
) -> None:
    """The guide of a panorama is 10 × 25 latents of a table for 24 × 24 patches."""
    size = guide_size((16, 44), 16, 2)
    assert size is not None and size.width > 16 > size.height
    pipe = pipelines["sd3"]
    with torch.no_grad():
        latents = torch.randn(1, 16, *size[:2], generator=torch.Generator().manual_seed(1))
        tokens, _, pooled, _ = pipe.encode_prompt("a boat", None, None)
        whole = pipe.transformer(latents, tokens, pooled, torch.tensor([500.0]), return_dict=False)[0]
        moved = pipe.transformer.pos_embed.pos_embed.roll(1, 1)
        kept, pipe.transformer.pos_embed.pos_embed = pipe.transformer.pos_embed.pos_embed, moved
        other = pipe.transformer(latents, tokens, pooled, torch.tensor([500.0]), return_dict=False)[0]
        pipe.transformer.pos_embed.pos_embed = kept
    assert (whole - other).abs().max() > 0.01  # positions matter here
    request = ask(
        folders["sd3"], tmp_path, height=128, width=352, guide=True, strength=0.01, guide_upscale=GuideUpscale.LATENT,
        guidance_scale=1.0,
    )  # fmt: skip
    got, report = rendered(request)
    assert report["denoiser_samples"] == 3
    want = pipe(
        "a boat", height=8 * size.height, width=8 * size.width, num_inference_steps=3, guidance_scale=1.0,
        output_type="latent", generator=torch.Generator().manual_seed(5),
    ).images  # fmt: skip
    assert (got - upscale(want, size, (16, 44), (False, False))).abs().max() < 1e-4


def looped(
    pipe: StableDiffusion3Pipeline, latents: Tensor, crops: list[tuple[Any, Tensor]], begin: int,
    reference: Tensor | None, steps: int,
) -> Tensor:  # fmt: skip
    """Mixture of Diffusers with diffusers' own transformer and scheduler; `crops` holds (index, weights) of each
    tile."""
    with torch.no_grad():
        tokens, negative, pooled, negative_pooled = pipe.encode_prompt("a boat", None, None, negative_prompt="fog")
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
        scheduler.set_timesteps(steps)
        scheduler.set_begin_index(begin)
        if reference is not None:
            latents = scheduler.scale_noise(reference, scheduler.timesteps[begin : begin + 1], latents)
        for timestep in scheduler.timesteps[begin:]:
            velocity = torch.zeros_like(latents)
            for where, weights in crops:
                tile = latents[where].expand(2, -1, -1, -1)
                texts, vectors = torch.cat([negative, tokens]), torch.cat([negative_pooled, pooled])
                made = pipe.transformer(tile, texts, vectors, timestep.expand(2), return_dict=False)[0]
                velocity[where] += weights * (made[:1] + 4.0 * (made[1:] - made[:1]))
            latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    return latents


def test_four_tiles_with_a_guide_are_a_loop_over_diffusers_transformer(
    folders: dict[str, Path], pipelines: dict[str, StableDiffusion3Pipeline], tmp_path: Path
) -> None:
    """A canvas of 24 × 20 latents, a guide that is not square."""
    got, want, report = four_tiles(
        ask(folders["medium"], tmp_path, **FOUR_TILES, guidance_scale=4.0, negative_prompt="fog"),
        partial(looped, pipelines["medium"]),
    )
    assert (got - want).abs().max() < 1e-4
    assert report["denoiser_samples"] == 2 * (4 * 2 + 4)


def test_a_guide_image_starts_as_diffusers_img2img_does(
    folders: dict[str, Path], pipelines: dict[str, StableDiffusion3Pipeline], tmp_path: Path
) -> None:
    """With a flat picture, whose latents do not depend on the resizing, and with the mean around which img2img
    samples."""
    from PIL import Image

    Image.new("RGB", (128, 128), (90, 120, 200)).save(tmp_path / "flat.png")
    parts = {k: v for k, v in pipelines["sd3"].components.items() if k not in ("image_encoder", "feature_extractor")}
    pipe = StableDiffusion3Img2ImgPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        picture = pipe.image_processor.preprocess(Image.open(tmp_path / "flat.png"))
        mean = pipe.vae.encode(picture).latent_dist.mean
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(5))
        pipe.scheduler.set_timesteps(6)
        timesteps, _ = pipe.get_timesteps(6, 0.5, "cpu")
        pipe.scheduler.set_begin_index(3)
        latents = pipe.scheduler.scale_noise((mean - 0.0609) * 1.5305, timesteps[:1], noise)
        tokens, _, pooled, _ = pipe.encode_prompt("a boat", None, None)
        for timestep in timesteps:
            made = pipe.transformer(latents, tokens, pooled, timestep.expand(1), return_dict=False)[0]
            latents = pipe.scheduler.step(made, timestep, latents, return_dict=False)[0]
    asked = ask(
        folders["sd3"], tmp_path, size=128, num_inference_steps=6, strength=0.5, guidance_scale=1.0, guide=True,
        guide_image=tmp_path / "flat.png", scratch_dtype=ScratchDtype.FP32, decode=Decode.EXACT,
    )  # fmt: skip
    got, report = rendered(asked)
    assert report["denoiser_samples"] == 3
    assert (got - latents).abs().max() < 1e-3


def test_defaults_are_of_the_model(folders: dict[str, Path], tmp_path: Path) -> None:
    turbo = tmp_path / "stable-diffusion-3.5-large-turbo"
    turbo.symlink_to(folders["large"])
    rows = {
        folders["t5"]: (28, 7.0, 0.35), folders["medium"]: (40, 4.5, 0.35), folders["large"]: (28, 4.5, 0.35),
        turbo: (4, 1.0, 0.5),
    }  # fmt: skip
    for folder, want in rows.items():
        family = read_family(checkpoint.resolve(str(folder)))
        filled = resolve(RenderRequest(prompt="x", model=str(folder)), family)
        assert (filled.num_inference_steps, filled.guidance_scale, filled.strength) == want
        assert any("text_encoder_3 (T5) is missing" in note for note in family.notes) == (folder != folders["t5"])
    assert any("few-step model" in note for note in family.notes)


def test_int8_is_near_fp32_and_leaves_what_is_read_once(folders: dict[str, Path], tmp_path: Path) -> None:
    plain, _ = rendered(ask(folders["medium"], tmp_path, size=128))
    int8, _ = rendered(
        ask(folders["medium"], tmp_path, size=128, precision=Precision.INT8, cache_dir=tmp_path / "packed")
    )
    assert not torch.equal(plain, int8)
    assert (int8 - plain).norm() < 0.05 * plain.norm()
    part = read_family(checkpoint.resolve(str(folders["medium"]))).part(Role.DENOISER)
    names = [name for name, _ in part.build().named_parameters()]
    assert any(map(read_once, names)) and not any(read_once(name) and quantised(name) for name in names)
    assert all(read_once(name) for name in names if ".linear." in name)


def test_the_table_of_positions_is_not_computed(folders: dict[str, Path]) -> None:
    """diffusers makes 226 MB of values for SD 3's 192 × 192 positions."""
    model = read_family(checkpoint.resolve(str(folders["sd3"]))).part(Role.DENOISER).build()
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.pos_embed.buffers()))
    assert sum(p.numel() for p in model.pos_embed.parameters()) == 24 * 24 * 256 + 256 * 16 * 2 * 2 + 256


def test_a_guide_is_no_longer_than_the_table_of_positions(folders: dict[str, Path], tmp_path: Path) -> None:
    """24 patches; with the native area it would be 72 latents long."""
    planned = plan(
        RenderRequest(prompt="x", model=str(folders["sd3"]), width=2560, height=128, output=tmp_path / "x.png")
    )
    assert planned.plan.guide is not None and planned.plan.guide[:2] == (4, 48)


BAD: dict[str, tuple[Callable[[Path], object], str]] = {}


BAD["no encoder"] = (
    lambda f: shutil.rmtree(f / "text_encoder_2"),
    "text_encoder_2/config.json is missing; run: hf download",
)
BAD["no tokenizer"] = lambda f: shutil.rmtree(f / "tokenizer_2"), "tokenizer_2: neither tokenizer.json nor vocab.json"
BAD["no transformer"] = lambda f: shutil.rmtree(f / "transformer"), "transformer/config.json is missing"
BAD["no weights"] = (
    lambda f: (f / "text_encoder/model.fp16.safetensors").unlink(),
    "text_encoder: no *.safetensors here",
)
BAD["no shard"] = lambda f: lose_shard(f, "transformer"), "-00002-of-00002.safetensors cannot be found"
BAD["controlnet"] = lambda f: edit(f, "", _class_name="StableDiffusion3ControlNetPipeline"), "a ControlNet pipeline"
BAD["inpainting"] = lambda f: edit(f, "", _class_name="StableDiffusion3InpaintPipeline"), "an inpainting model"
BAD["no T5 tokenizer"] = (
    lambda f: shutil.rmtree(f / "tokenizer_3"),
    "tokenizer_3: neither tokenizer.json nor spiece.model is here; run: hf download",
)
BAD["no T5 weights"] = (
    lambda f: next(f.glob("text_encoder_3/*.safetensors")).unlink(),
    "text_encoder_3: no *.safetensors",
)
BAD["T5 width"] = lambda f: edit(f, "text_encoder_3", d_model=128), "text of width 256 (joint_attention_dim)"
BAD["channels"] = lambda f: edit(f, "transformer", in_channels=33), "the transformer takes 33 channels"
BAD["text width"] = lambda f: edit(f, "transformer", joint_attention_dim=64), "joint_attention_dim = 64"
BAD["pooled width"] = lambda f: edit(f, "text_encoder", projection_dim=16), "pooled_projection_dim = 56"
BAD["width"] = lambda f: edit(f, "transformer", caption_projection_dim=128), "caption_projection_dim = 128"
BAD["norm"] = lambda f: edit(f, "transformer", qk_norm="layer_norm"), "qk_norm = 'layer_norm'"
BAD["layers"] = lambda f: edit(f, "transformer", dual_attention_layers=[3]), "dual_attention_layers"
BAD["weights"] = lambda f: edit(f, "transformer", num_layers=4), "tensor 'transformer_blocks."
BAD["table"] = lambda f: edit(f, "transformer", pos_embed_max_size=20), "pos_embed.pos_embed"


@pytest.mark.parametrize("name", BAD)
def test_what_it_cannot_take_is_exit_3_and_one_line(
    in_process, folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    change, message = BAD[name]
    folder = tmp_path / "model"
    shutil.copytree(folders["t5"], folder)
    change(folder)
    ran = in_process("render", "a boat", "--model", folder, "--size", 128, "--no-guide", "-o", tmp_path / "y.png", "-q")
    assert ran.code == 3
    line = ran.err.strip()
    assert message in line and len(line.splitlines()) == 1
    assert not (tmp_path / "y.png").exists()


@pytest.mark.parametrize("option", [("--scheduler", "DPM++ 2M Karras"), ("--attention-window", "16")])
def test_options_for_other_models_are_exit_2(in_process, folders: dict[str, Path], option: tuple[str, str]) -> None:
    ran = in_process("plan", "a boat", "--model", folders["sd3"], "--size", 128, *option)
    assert ran.code == 2 and option[0] in ran.err and len(ran.err.strip().splitlines()) == 1


def test_commands(tiler, in_process, folders: dict[str, Path], tmp_path: Path) -> None:
    """The render runs in a process of its own, which imports less."""
    model = folders["t5"]
    assert in_process("plan", "a boat", "-m", model, "--size", 192, "--json").code == 0
    assert in_process("quantize", model, "--cache-dir", tmp_path / "packed").code == 0
    done = tiler(
        "render", "a boat", "-m", model, "-W", 192, "-H", 128, "--steps", 2, "--scheduler", "UniPC", "--save-latents",
        "x.safetensors", "--cache-dir", tmp_path / "packed", "-o", "x.png",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert in_process("decode", "x.safetensors", "-m", model, "-o", "again.png").code == 0
    assert (tmp_path / "again.png").is_file()


def test_plan_knows_the_size_of_the_work(folders: dict[str, Path], tmp_path: Path) -> None:
    planned = plan(RenderRequest(prompt="x", model=str(folders["sd3"]), size=256, output=tmp_path / "x.png"))
    assert planned.plan.batch == 1
    assert planned.plan.denoiser_samples == 2 * (28 + round(28 * 0.35) * 9)
