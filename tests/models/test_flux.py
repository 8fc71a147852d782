"""Flux.1 dev and schnell against diffusers' own pipeline, transformer and scheduler, on a tiny checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from torch import Tensor

from tests.models.rendering import FOUR_TILES, ask, edit, four_tiles, lose_shard, rendered
from tiler import Region, RenderRequest, plan
from tiler.compute.layers import SMALL
from tiler.models.family import Guidance, Options, Role, read_family
from tiler.models.flux import Flux, quantised, read_once
from tiler.models.patches import pack, unpack
from tiler.models.samples import Place, Prompt, Sample
from tiler.planning.resolve import resolve
from tiler.request import Precision
from tiler.run import streamed
from tiler.weights import checkpoint
from tiler.weights.index import read_index

LENGTHS = {"dev": 512, "schnell": 256}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from checkpoints import flux

    folder = tmp_path_factory.mktemp("flux")
    for kind in LENGTHS:
        flux.write(folder / kind, "tiny", schnell=kind == "schnell")
    return {kind: folder / kind for kind in LENGTHS}


@pytest.fixture(scope="module")
def pipelines(folders: dict[str, Path]) -> dict[str, FluxPipeline]:
    found = {kind: FluxPipeline.from_pretrained(folder, torch_dtype=torch.float32) for kind, folder in folders.items()}
    for pipe in found.values():
        pipe.set_progress_bar_config(disable=True)
    return found


def by_pipeline(pipe: FluxPipeline, kind: str, scale: float, height: int = 128, width: int = 128) -> Tensor:
    """The latents of one native tile, three steps."""
    packed = pipe(
        "a boat", height=height, width=width, num_inference_steps=3, guidance_scale=scale, output_type="latent",
        max_sequence_length=LENGTHS[kind], generator=torch.Generator().manual_seed(5),
    ).images  # fmt: skip
    return unpack(packed, height // 16)


@pytest.mark.parametrize(("kind", "scale", "negative"), [("dev", 3.5, "fog"), ("dev", 1.0, None), ("schnell", 1.0, "")])
def test_one_tile_is_what_flux_pipeline_gives(
    folders: dict[str, Path],
    pipelines: dict[str, FluxPipeline],
    tmp_path: Path,
    kind: str,
    scale: float,
    negative: str | None,
) -> None:
    """dev's shift is dynamic. A guidance scale of 1 is an ordinary input; a negative prompt has no effect, and a note
    says so."""
    said: list[str] = []
    request = ask(folders[kind], tmp_path, size=128, guidance_scale=scale, negative_prompt=negative)
    got, report = rendered(request, said)
    assert (got - by_pipeline(pipelines[kind], kind, scale)).abs().max() < 1e-4
    assert report["denoiser_samples"] == 3  # no unconditional half
    assert any("negative prompt has no effect on Flux.1 dev" in text for text in said) is bool(negative)


def test_a_long_picture_of_the_native_area_is_one_tile(
    folders: dict[str, Path], pipelines: dict[str, FluxPipeline], tmp_path: Path
) -> None:
    """As 768 × 1360 pixels are for the published model: no guide, and nothing is cut."""
    got, report = rendered(ask(folders["schnell"], tmp_path, height=96, width=160, guidance_scale=1.0, guide=True))
    assert (got - by_pipeline(pipelines["schnell"], "schnell", 1.0, 96, 160)).abs().max() < 1e-4
    assert (report["tiles"], report["denoiser_samples"]) == (1, 3)


def looped(
    pipe: FluxPipeline,
    latents: Tensor,
    crops: list[tuple[Any, Tensor]],
    begin: int,
    reference: Tensor | None,
    steps: int,
) -> Tensor:
    """Mixture of Diffusers with diffusers' own transformer and scheduler; `crops` holds (index, weights) of each
    tile."""
    with torch.no_grad():
        tokens, pooled, text_ids = pipe.encode_prompt("a boat", max_sequence_length=512)
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
        shift = 0.5 + (1.15 - 0.5) * (64 - 256) / (4096 - 256)  # a native tile has 64 patches
        scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist(), mu=shift)
        if reference is not None:
            sigma = scheduler.sigmas[begin]
            latents = sigma * latents + (1 - sigma) * reference
        scheduler.set_begin_index(begin)
        for timestep in scheduler.timesteps[begin:]:
            velocity = torch.zeros_like(latents)
            for where, weights in crops:
                tile = latents[where]
                rows, cols = tile.shape[2] // 2, tile.shape[3] // 2
                ids = pipe._prepare_latent_image_ids(1, rows, cols, "cpu", torch.float32)
                made = pipe.transformer(
                    hidden_states=pack(tile), timestep=timestep.expand(1) / 1000, guidance=torch.tensor([3.5]),
                    pooled_projections=pooled, encoder_hidden_states=tokens, txt_ids=text_ids, img_ids=ids,
                    return_dict=False,
                )[0]  # fmt: skip
                velocity[where] += weights * unpack(made, rows)
            latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    return latents


def test_four_tiles_with_a_guide_are_a_loop_over_diffusers_transformer(
    folders: dict[str, Path], pipelines: dict[str, FluxPipeline], tmp_path: Path
) -> None:
    """A canvas of 24 × 20 latents, a guide that is not square; each tile has a grid of its own."""
    got, want, report = four_tiles(ask(folders["dev"], tmp_path, **FOUR_TILES), partial(looped, pipelines["dev"]))
    assert (got - want).abs().max() < 1e-4
    assert report["denoiser_samples"] == 4 * 2 + 4


def test_defaults_are_of_the_model(folders: dict[str, Path], tmp_path: Path) -> None:
    for kind, want in {"dev": (28, 3.5, 0.34), "schnell": (4, 1.0, 0.5)}.items():
        family = read_family(checkpoint.resolve(str(folders[kind])))
        filled = resolve(RenderRequest(prompt="x", model=str(folders[kind])), family)
        assert (filled.num_inference_steps, filled.guidance_scale, filled.strength) == want
    assert family.traits.guidance is Guidance.NONE


def test_regions_have_guidance_of_their_own(folders: dict[str, Path], tmp_path: Path) -> None:
    def two(scale: float | None) -> Tensor:
        halves = (
            Region(prompt="a boat", rows=(0, 128), cols=(0, 128)),
            Region(prompt="fog", rows=(0, 128), cols=(128, 256), guidance_scale=scale),
        )
        return rendered(ask(folders["dev"], tmp_path, prompt=None, width=256, height=128, regions=halves))[0]

    same, other = two(None), two(9.0)
    assert torch.equal(same[..., :16], other[..., :16])
    assert (same[..., 16:] - other[..., 16:]).abs().max() > 1e-3


def test_int8_is_near_fp32_and_leaves_what_is_read_once(
    folders: dict[str, Path], pipelines: dict[str, FluxPipeline], tmp_path: Path
) -> None:
    plain = by_pipeline(pipelines["dev"], "dev", 3.5)
    int8, _ = rendered(ask(folders["dev"], tmp_path, size=128, precision=Precision.INT8, cache_dir=tmp_path / "packed"))
    assert 1e-4 * plain.norm() < (int8 - plain).norm() < 0.05 * plain.norm()
    family = read_family(checkpoint.resolve(str(folders["dev"])))
    (packed,) = (tmp_path / "packed").glob("*.safetensors")
    assert not any(map(read_once, read_index(packed)))
    part = family.part(Role.DENOISER)
    names = [name for name, _ in part.build().named_parameters()]
    assert any(map(read_once, names)) and not any(read_once(name) and quantised(name) for name in names)
    assert all(read_once(name) for name in names if ".linear." in name)


@torch.no_grad()
def test_modulations_are_read_once_and_not_in_a_pass(folders: dict[str, Path], tmp_path: Path) -> None:
    family = read_family(checkpoint.resolve(str(folders["dev"])))
    part, prompt = family.part(Role.DENOISER), Prompt(torch.zeros(1, 512, 64), torch.zeros(1, 32))
    stored, module = family.checkpoint.weights(part.name), part.build()
    large = {name: info.nbytes for name, info in stored.items() if len(info.shape) == 2 and info.nbytes > 2 * SMALL}
    sample = Sample(torch.zeros(1, 16, 16, 16), prompt, Place(0, 0, 128, 128, (128, 128)), 2.0)
    with streamed(module, stored, part.aliases) as streamer:
        assert streamer.store is not None
        counts = [streamer.store.bytes_read]
        prepared = family.prepare(
            module, streamer, torch.tensor([900.0, 500.0]), [prompt], Options(guidance=(2.0, 3.0), scratch=tmp_path)
        )
        counts.append(streamer.store.bytes_read)
        for step in (0, 1):
            family.predict(module, streamer, [sample], step, prepared)
            counts.append(streamer.store.bytes_read)
    read = [b - a for a, b in pairwise(counts)]
    assert read[0] == sum(nbytes for name, nbytes in large.items() if read_once(name))
    assert read[1] == sum(nbytes for name, nbytes in large.items() if not read_once(name))
    assert read[2] == pytest.approx(read[1], rel=0.05)  # what comes first in a pass may be read ahead at its end


@torch.no_grad()
def test_diffusers_own_forward_gives_the_same_from_the_same_files(folders: dict[str, Path]) -> None:
    """diffusers' module, unchanged, with its layers streamed; a grid that is not square."""
    family = read_family(checkpoint.resolve(str(folders["schnell"])))
    part, generator = family.part(Role.DENOISER), torch.Generator().manual_seed(1)
    tokens, pooled, latents = (torch.randn(1, *n, generator=generator) for n in ((256, 64), (32,), (16, 12, 20)))
    sample = Sample(latents, Prompt(tokens, pooled), Place(0, 0, 96, 160, (96, 160)), 1.0)
    ids = FluxPipeline._prepare_latent_image_ids(1, 6, 10, "cpu", torch.float32)
    module = part.build()
    with streamed(module, family.checkpoint.weights(part.name), part.aliases) as streamer:
        prepared = family.prepare(module, streamer, torch.tensor([700.0]), [sample.prompt], Options())
        got = family.predict(module, streamer, [sample], 0, prepared)
        want = module(
            hidden_states=pack(latents), encoder_hidden_states=tokens, pooled_projections=pooled, img_ids=ids,
            timestep=torch.tensor([0.7]), txt_ids=torch.zeros(256, 3), return_dict=False,
        )[0]  # fmt: skip
    assert (got - unpack(want, 6)).abs().max() < 1e-5


def test_guide_and_canvas_share_what_is_read_once(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared: list[int] = []

    def counted(self: Flux, model: Any, streamer: Any, timesteps: Tensor, *more: Any) -> Any:
        if not timesteps.is_meta:
            prepared.append(len(timesteps))
        return prepare(self, model, streamer, timesteps, *more)

    prepare = Flux.prepare
    monkeypatch.setattr(Flux, "prepare", counted)
    rendered(ask(folders["schnell"], tmp_path, size=192, num_inference_steps=2, guide=True))
    assert prepared == [2]


KINDS: dict[str, tuple[Callable[[Path], None], str]] = {}


def bad(name: str, message: str) -> Callable[[Callable[[Path], None]], None]:
    def add(change: Callable[[Path], None]) -> None:
        KINDS[name] = change, message

    return add


bad("fill", "Flux.1 Fill")(lambda f: edit(f, "transformer", in_channels=384, out_channels=64))
bad("control", "control picture")(lambda f: edit(f, "transformer", in_channels=128, out_channels=64))
bad("fill by class", "Flux.1 Fill")(lambda f: edit(f, "", _class_name="FluxFillPipeline"))
bad("kontext", "Kontext")(lambda f: edit(f, "", _class_name="FluxKontextPipeline"))
bad("redux", "Redux")(lambda f: edit(f, "", _class_name="FluxPriorReduxPipeline"))
bad("flux 2", "FLUX.2")(lambda f: edit(f, "", _class_name="Flux2Pipeline"))
bad("no encoder", "hf download black-forest-labs/FLUX.1-dev --include 'text_encoder_2/*'")(
    lambda f: shutil.rmtree(f / "text_encoder_2")
)
bad("no weights", "text_encoder_2")(lambda f: (f / "text_encoder_2/model.safetensors").unlink())
bad("no tokenizer", "hf download black-forest-labs/FLUX.1-dev --include 'tokenizer_2/*'")(
    lambda f: shutil.rmtree(f / "tokenizer_2")
)
bad("no clip tokenizer", "--include 'tokenizer/*'")(lambda f: shutil.rmtree(f / "tokenizer"))
bad("text width", "pooled_projection_dim")(lambda f: edit(f, "transformer", pooled_projection_dim=64))
bad("rope", "axes_dims_rope")(lambda f: edit(f, "transformer", axes_dims_rope=[16, 16, 16]))


bad("no shard", "cannot be found")(lambda f: lose_shard(f, "transformer"))


@pytest.mark.parametrize("name", KINDS)
def test_what_it_cannot_take_is_exit_3_and_one_line(
    in_process, folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    change, message = KINDS[name]
    folder = tmp_path / "model"
    shutil.copytree(folders["schnell"], folder)
    change(folder)
    ran = in_process("render", "a boat", "--model", folder, "--size", 128, "--no-guide", "-o", tmp_path / "y.png", "-q")
    assert ran.code == 3
    line = ran.err.strip()
    assert message in line and len(line.splitlines()) == 1
    assert not (tmp_path / "y.png").exists()


def test_commands(tiler, in_process, folders: dict[str, Path], tmp_path: Path) -> None:
    """The render runs in a process of its own, which imports less."""
    model = folders["schnell"]
    assert in_process("plan", "a boat", "-m", model, "--size", 192, "--json").code == 0
    assert in_process("quantize", model, "--cache-dir", tmp_path / "packed").code == 0
    files = "--save-latents", "x.safetensors", "--cache-dir", tmp_path / "packed"
    done = tiler("render", "a boat", "-m", model, "-W", 192, "-H", 128, *files)
    assert done.code == 0, done.err
    assert in_process("decode", "x.safetensors", "-m", model, "-o", "again.png").code == 0
    assert (tmp_path / "again.png").read_bytes()[:4] == (tmp_path / "tiler.png").read_bytes()[:4]


def test_files_at_the_root_of_the_repository_are_not_fetched(folders: dict[str, Path]) -> None:
    from tiler.weights.hub import wanted

    index = json.loads((folders["dev"] / "model_index.json").read_text())
    shard = "transformer/diffusion_pytorch_model-00001-of-00003.safetensors"
    files = ["flux1-dev.safetensors", "ae.safetensors", "model_index.json", "dev_grid.jpg", shard]
    files += ["vae/diffusion_pytorch_model.safetensors"]
    files += [f"{part}/model.safetensors" for part in ("text_encoder", "text_encoder_2")]
    found = wanted("black-forest-labs/FLUX.1-dev", files, index, None)
    assert shard in found and "model_index.json" in found
    assert not {"flux1-dev.safetensors", "ae.safetensors", "dev_grid.jpg"} & set(found)


def test_plan_knows_the_size_of_the_work(folders: dict[str, Path], tmp_path: Path) -> None:
    planned = plan(RenderRequest(prompt="x", model=str(folders["dev"]), size=256, output=tmp_path / "x.png"))
    assert planned.plan.batch == 1
    assert planned.plan.denoiser_samples == 28 + round(28 * 0.34) * 9
