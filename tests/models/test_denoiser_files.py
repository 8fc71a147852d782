"""Files with only a transformer, with the names of the original repositories, and the flags that supply the other
parts."""

from __future__ import annotations

import hashlib
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import make_checkpoint
import numpy as np
import pytest
import torch
from checkpoints import _single, _single_dit
from safetensors.torch import load_file, save_file

from tests.models.rendering import ask, rendered
from tiler.errors import ModelError, UsageError
from tiler.models.contents import Kind, Naming, look
from tiler.models.conversions import renamed
from tiler.models.family import Family, open_family, read_family
from tiler.models.part_files import find_parts
from tiler.request import RenderRequest
from tiler.request.model import ModelOptions
from tiler.weights.checkpoint import resolve
from tiler.weights.index import Source, TensorInfo
from tiler.weights.store import WeightStore, match_index

PREFIXES = {"sd3": "model.diffusion_model.", "auraflow": "model.", "pixart": "3a6b11480ff055d9"}


@pytest.fixture(scope="module", params=["sd3", "auraflow", "pixart"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder, and a file with its transformer."""
    kind = request.param
    folder = make_checkpoint.make(f"tiny-{kind}", tmp_path_factory.mktemp("denoisers"))
    return folder, _single_dit.write_transformer(folder, folder.parent / "dit.safetensors", kind, PREFIXES[kind])


def assert_same_weights(one: Family, other: Family) -> None:
    for part, twin in zip(one.parts, other.parts, strict=True):
        indexes = [
            match_index(p.build(), family.checkpoint.weights(p.name), p.aliases)
            for family, p in ((one, part), (other, twin))
        ]
        assert indexes[0].keys() == indexes[1].keys()
        with WeightStore(indexes[0]) as first, WeightStore(indexes[1]) as second:
            assert all(torch.equal(first.load(name), second.load(name)) for name in indexes[0]), part.name


def test_a_file_takes_the_place_of_a_folders_transformer(pair: tuple[Path, Path]) -> None:
    folder, file = pair
    family = open_family(ModelOptions(model=str(folder), diffusion_model=str(file)))
    own = read_family(resolve(str(folder)))
    assert family.checkpoint.weights("transformer")
    assert {info.path for info in family.checkpoint.weights("transformer").values()} == {file}
    assert family.traits == own.traits
    assert_same_weights(own, family)


def test_flags_bring_the_other_parts(pair: tuple[Path, Path]) -> None:
    folder, file = pair
    own = read_family(resolve(str(folder)))
    encoders = {part.name: str(folder / part.name) for part in own.encoders}
    flags: dict[str, Any] = {"text_encoder": encoders["text_encoder"]}
    if len(encoders) == 3:
        flags = dict(zip(("clip_l", "clip_g", "t5xxl"), encoders.values(), strict=True))
    found = open_family(ModelOptions(diffusion_model=str(file), vae=str(folder / "vae"), **flags))
    assert [part.name for part in found.parts] == [part.name for part in own.parts]
    assert found.traits.title.split()[0] == own.traits.title.split()[0]
    for tokenizer in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        if (folder / tokenizer).is_dir():
            assert found.checkpoint.tokenizer(tokenizer) == folder / tokenizer
    for role in (own.encoders[-1].name, "vae"):
        assert {info.path.parent for info in found.checkpoint.weights(role).values()} == {folder / role}


def test_the_picture_is_the_folders(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = make_checkpoint.make("tiny-pixart", tmp_path_factory.mktemp("pixart"))
    file = _single_dit.write_transformer(folder, tmp_path / "dit.safetensors", "pixart")
    common = {"size": 128, "num_inference_steps": 2}
    expected, _ = rendered(ask(folder, tmp_path, **common))
    made, _ = rendered(ask(folder, tmp_path, diffusion_model=str(file), **common))
    assert torch.equal(made, expected)


def test_t5_without_a_tokenizer_names_the_file(
    in_process: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "none"))
    folder = make_checkpoint.make("tiny-pixart", tmp_path)
    _single_dit.write_transformer(folder, tmp_path / "dit.safetensors", "pixart")
    (t5,) = (folder / "text_encoder").glob("*.safetensors")
    t5.rename(tmp_path / "t5.safetensors")
    flags = "--vae", folder / "vae", "--t5xxl", "t5.safetensors"
    ran = in_process("plan", "x", "--diffusion-model", "dit.safetensors", *flags)
    assert ran.code == 3
    assert "spiece.model is missing; run: hf download google/t5-v1_1-xxl spiece.model --local-dir" in ran.err


def test_what_is_missing_is_named_with_its_flag(pair: tuple[Path, Path]) -> None:
    _, file = pair
    with pytest.raises(ModelError, match=r"this file has no autoencoder; give --vae FILE or FOLDER \(run: hf download"):
        open_family(ModelOptions(model=str(file)))


def test_flags_that_do_not_fit(pair: tuple[Path, Path], tiny: Path) -> None:
    folder, file = pair
    with pytest.raises(ModelError, match="give a --model of the same family"):
        open_family(ModelOptions(model=str(tiny), diffusion_model=str(file)))
    with pytest.raises(UsageError, match="--prediction is for"):
        open_family(ModelOptions(model=str(folder), prediction="v"))  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"this file holds a transformer of .*; --vae takes .* an autoencoder"):
        open_family(ModelOptions(model=str(folder), vae=str(file)))


def test_requests_pass_their_flags_on(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nowhere\.gguf: no such file or folder; --t5xxl takes"):
        open_family(RenderRequest(model=str(tmp_path_model(tmp_path)), t5xxl="nowhere.gguf"))


def tmp_path_model(folder: Path) -> Path:
    return make_checkpoint.make("tiny-pixart", folder)


def meta(cls: str, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    import diffusers

    with torch.device("meta"):
        return dict(getattr(diffusers, cls).from_config(config).state_dict())


def sdxl_unet() -> dict[str, torch.Tensor]:
    from checkpoints.sdxl import UNET

    return meta("UNet2DConditionModel", UNET)


def sd15_unet() -> dict[str, torch.Tensor]:
    return meta("UNet2DConditionModel", make_checkpoint.configs("sd15")["unet"])


def sd21_unet() -> dict[str, torch.Tensor]:
    return meta("UNet2DConditionModel", make_checkpoint.configs("sd21")["unet"])


def flux() -> dict[str, torch.Tensor]:
    from checkpoints.flux import _TRANSFORMER

    return meta("FluxTransformer2DModel", _TRANSFORMER)


def sd3() -> dict[str, torch.Tensor]:
    from checkpoints.sd3 import LARGE, TRANSFORMER

    state = meta("SD3Transformer2DModel", TRANSFORMER | LARGE | {"pos_embed_max_size": 1})
    return state | {"pos_embed.pos_embed": torch.empty(1, 192 * 192, 2432, device="meta")}


def pixart() -> dict[str, torch.Tensor]:
    from checkpoints.pixart import _TRANSFORMER

    return meta("PixArtTransformer2DModel", _TRANSFORMER)


def auraflow() -> dict[str, torch.Tensor]:
    from checkpoints.auraflow import TRANSFORMER

    return meta("AuraFlowTransformer2DModel", TRANSFORMER)


GOLDEN = {
    "sd1": (sd15_unet, "sd"), "sd2": (sd21_unet, "sd"), "sdxl": (sdxl_unet, "sd"), "flux": (flux, "flux"),
    "sd3": (sd3, "sd3"), "pixart": (pixart, "pixart"), "auraflow": (auraflow, "auraflow"),
}  # fmt: skip
HASHES = {
    "sd1": "f1f44ed08f650295", "sd2": "f1f44ed08f650295", "sdxl": "7bd3ac86df1f8cf7", "flux": "63ec982b3e6c3c72",
    "sd3": "09d3cefe983df546", "pixart": "3a6b11480ff055d9", "auraflow": "7552b7c81b2dfc18",
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN)
def test_the_map_is_the_one_that_was_checked(name: str) -> None:
    """For each parameter of a full-size denoiser, the tensor that holds it, and its rows there: another map would be
    another picture."""
    build, kind = GOLDEN[name]
    lines = mapped(build, kind)
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == HASHES[name], "\n".join(lines[:20])


def mapped(build: Callable[[], dict[str, torch.Tensor]], kind: str) -> list[str]:
    state = build()
    prefix = "model.diffusion_model."
    if kind == "sd":
        shapes = {_single.rename("unet", key, state).removeprefix(prefix): tuple(t.shape) for key, t in state.items()}
    else:
        rows = {k: [state[p] for p in o.parameters] for k, o in _single_dit.originals(kind, state).items()}
        shapes = {key: (sum(len(t) for t in parts), *parts[0].shape[1:]) for key, parts in rows.items()}
    (part,) = look({prefix + key: shape for key, shape in shapes.items()}, "x").parts
    assert part.naming is Naming.ORIGINAL and part.kind is not Kind.VAE
    path = Path("x")
    index = {
        prefix + key: TensorInfo(
            prefix + key, "F16", shape, (Source(path, 0, shape[0]),), 2 * torch.Size(shape).numel()
        )
        for key, shape in shapes.items()
    }
    found = renamed(part, index)
    assert {key: tuple(info.shape) for key, info in found.items()} == {key: tuple(t.shape) for key, t in state.items()}
    places = dict[str, tuple[str, list[tuple[int, int]]]]()
    for key, info in sorted(found.items()):
        row = info.nbytes // max(1, info.shape[0])
        spans = [(source.offset // row, source.offset // row + source.rows) for source in info.sources]
        places[key] = info.name, spans
    if kind != "sd":  # what the other program, which writes such files, stacks and swaps
        assert places == written(kind, state, prefix)
    return [f"{key} {name} {spans}" for key, (name, spans) in places.items()]


def written(kind: str, state: dict[str, torch.Tensor], prefix: str) -> dict[str, tuple[str, list[tuple[int, int]]]]:
    """The tensor of each parameter, and its rows there."""
    places = {}
    for name, original in _single_dit.originals(kind, state).items():
        first = 0
        for parameter in original.parameters:
            last = first + len(state[parameter])
            half = (first + last) // 2
            spans = [(half, last), (first, half)] if original.swapped else [(first, last)]
            places[parameter], first = (prefix + name, spans), last
    return places


def test_opening_a_file_of_flux_takes_less_than_20_mb(tmp_path: Path) -> None:
    """A header of 780 tensors, whose names are converted; the 6.8 GB after it are holes."""
    state = flux()
    writer = gguf.GGUFWriter(tmp_path / "flux.gguf", "flux")
    for name, original in _single_dit.originals("flux", state).items():
        parts = [state[parameter] for parameter in original.parameters]
        rows, width = sum(len(part) for part in parts), parts[0].shape[1:].numel()
        kind = gguf.GGMLQuantizationType.Q4_K if width % 256 == 0 else gguf.GGMLQuantizationType.F32
        block, nbytes = gguf.GGML_QUANT_SIZES[kind]
        shape = (rows,) if parts[0].ndim == 1 else (rows, width)
        writer.add_tensor_info(name, shape, np.dtype(np.float32), rows * width // block * nbytes, raw_dtype=kind)
    size = sum(info.nbytes for tensors in writer.tensors for info in tensors.values())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with (tmp_path / "flux.gguf").open("ab") as file:
        file.truncate(file.tell() + size + 2**16)
    tracemalloc.start()
    try:
        (part,) = find_parts(str(tmp_path / "flux.gguf"), "--diffusion-model", (Kind.FLUX,))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20_000_000
    assert size > 6.6e9 and part.tensors.keys() == state.keys()


def test_t5_by_the_names_of_llama_cpp(tmp_path: Path) -> None:
    """A GGUF of T5 has short names; its values are those of the folder's encoder."""
    folder = make_checkpoint.make("tiny-pixart", tmp_path)
    (file,) = (folder / "text_encoder").glob("*.safetensors")
    short = {
        "shared.": "token_embd.", "encoder.final_layer_norm": "enc.output_norm", "encoder.block": "enc.blk",
        "layer.0.SelfAttention.relative_attention_bias": "attn_rel_b", "layer.0.SelfAttention.": "attn_",
        "layer.0.layer_norm": "attn_norm", "layer.1.layer_norm": "ffn_norm", "layer.1.DenseReluDense.wi_0": "ffn_gate",
        "layer.1.DenseReluDense.wi_1": "ffn_up", "layer.1.DenseReluDense.wo": "ffn_down",
    }  # fmt: skip
    tensors = {}
    for name, tensor in load_file(file).items():
        for long, other in short.items():
            name = name.replace(long, other)
        tensors[name] = tensor
    save_file(tensors, tmp_path / "t5.safetensors")
    (tmp_path / "spiece.model").write_bytes((folder / "tokenizer/spiece.model").read_bytes())
    own = read_family(resolve(str(folder)))
    found = open_family(ModelOptions(model=str(folder), t5xxl=str(tmp_path / "t5.safetensors")))
    assert found.checkpoint.tokenizer("tokenizer") == tmp_path
    assert_same_weights(own, read_family(resolve(str(folder)), ModelOptions(t5xxl=str(tmp_path / "t5.safetensors"))))
