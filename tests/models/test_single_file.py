"""Single files give the same results as the folders they were made from; files that are not a complete Stable Diffusion
are refused by name."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import make_checkpoint
import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.models.rendering import ask, rendered
from tiler.errors import ModelError
from tiler.models.family import read_family
from tiler.models.vocabulary import END, clip_tokenizer
from tiler.weights.checkpoint import resolve
from tiler.weights.index import read_metadata
from tiler.weights.store import WeightStore, match_index

UNET = "model.diffusion_model."


@pytest.fixture(scope="module", params=["tiny-plain", "tiny-plain-sd2", "tiny-plain-sdxl"])
def pair(request, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder, and a file with the same content."""
    from checkpoints._single import write_single

    folder = make_checkpoint.make(request.param, tmp_path_factory.mktemp("single"))
    for name, pad in (("tokenizer", "!" if request.param.endswith("sd2") else END), ("tokenizer_2", "!")):
        for file in clip_tokenizer(pad).iterdir() if (folder / name).is_dir() else ():
            shutil.copy(file, folder / name)
    return folder, write_single(folder, folder.parent / "model.safetensors")


def test_parameters_are_those_that_diffusers_reads(pair: tuple[Path, Path]) -> None:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    folder, file = pair
    kind, options = StableDiffusionXLPipeline, {"add_watermarker": False}
    if not (folder / "text_encoder_2").is_dir():
        kind, options = StableDiffusionPipeline, dict.fromkeys(("safety_checker", "feature_extractor"))
    pipe = kind.from_single_file(str(file), config=str(folder), local_files_only=True, **options)
    family = read_family(resolve(str(file)))
    for part in family.parts:
        expected = getattr(pipe, part.name).state_dict()
        matched = match_index(part.build(), family.checkpoint.weights(part.name), part.aliases)
        with WeightStore(matched) as store:
            for name in matched:
                known = name if name in expected else f"text_model.{name}"
                loaded = store.load(name)
                assert torch.equal(loaded, expected[known].float().view_as(loaded)), name


def test_the_picture_is_the_folders(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """Without options for the scheduler, the prediction or the guidance."""
    widths = dict.fromkeys(("encoder_block_out_channels", "decoder_block_out_channels"), (8, 8, 8, 8))
    AutoencoderTiny(**widths).save_pretrained(tiny := tmp_path / "tiny")
    pictures, latents, notes = [], [], list[str]()
    for model in pair:
        request = ask(
            model, tmp_path, prompt="a cat, É 🙂", size=64, num_inference_steps=1, decode="tiny", tiny_vae=str(tiny)
        )
        latents.append(rendered(request, notes)[0])
        with Image.open(request.output) as picture:
            pictures.append(picture.tobytes())
            assert f"Model: {model.stem}," in picture.info["parameters"]
    assert torch.equal(*latents)
    assert pictures[0] == pictures[1]
    assert any(note.startswith("model.safetensors is ") and "which predicts" in note for note in notes)


def test_a_file_is_quantised_as_its_folder(in_process: Any, pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Into a folder with every part: its weights, scheduler and picture are those of the quantised folder."""
    if pair[0].name == "tiny-plain":
        pytest.skip("SD 2.x and SDXL show it, with tensors of several parameters and one that is transposed")
    weights, latents, schedulers = list[dict[str, torch.Tensor]](), [], []
    for name, model in zip(("folder", "file"), pair, strict=True):
        options = "--weights", "fp8", "--text-encoder-weights", "int8", "-q", "-o", name
        ran = in_process("quantize", model, *options)
        assert ran.code == 0, ran.err
        family = read_family(resolve(str(tmp_path / name)))
        weights.append({})
        for part in family.parts:
            index = match_index(part.build(), family.checkpoint.weights(part.name), part.aliases)
            with WeightStore(index) as store:
                weights[-1] |= {f"{part.name}.{parameter}": store.load(parameter) for parameter in index}
        schedulers.append(family.scheduler.get("prediction_type", "epsilon"))
        if pair[0].name.endswith("sd2"):
            request = ask(tmp_path / name, tmp_path, prompt="a cat, É 🙂", size=64, num_inference_steps=1)
            latents.append(rendered(request)[0])
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())
    assert schedulers[0] == schedulers[1]
    assert not latents or torch.equal(*latents)
    made = read_metadata(tmp_path / "file/unet/diffusion_pytorch_model.safetensors")["made"]
    assert made == f"tiler quantize {pair[1]}: unet fp8"
    ran = in_process("quantize", pair[1], "--weights", "int8", "-o", pair[1].parent, "--force")
    assert ran.code == 2 and "is the model's own folder" in ran.err


def test_families_of_file_and_folder_are_alike(pair: tuple[Path, Path]) -> None:
    folder, file = (read_family(resolve(str(path))) for path in pair)
    assert folder.traits == file.traits
    for field in ("beta_start", "beta_end", "beta_schedule", "prediction_type", "timestep_spacing", "steps_offset"):
        assert folder.scheduler.get(field) == file.scheduler.get(field) or field == "prediction_type", field


def test_a_quantised_file_is_read_as_its_decoded_twin(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """GGUF with 8-bit blocks, and its values in fp32: every parameter of every part has equal bits."""
    if pair[0].name != "tiny-plain":
        pytest.skip("one family shows it")
    tensors = load_file(pair[1])
    writer, decoded = gguf.GGUFWriter(tmp_path / "q.gguf", "sd"), {}
    for name, tensor in tensors.items():
        values = tensor.float().numpy()
        fits = name.startswith(UNET) and tensor.ndim == 2 and tensor.shape[1] % 32 == 0
        kind = gguf.GGMLQuantizationType.Q8_0 if fits else gguf.GGMLQuantizationType.F16
        raw = gguf.quantize(values, kind)
        writer.add_tensor(name, raw, raw_dtype=kind)
        decoded[name] = torch.from_numpy(np.ascontiguousarray(gguf.dequantize(raw, kind).reshape(values.shape)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(decoded, tmp_path / "f.safetensors")
    quantised, plain = (read_family(resolve(str(tmp_path / name))) for name in ("q.gguf", "f.safetensors"))
    for part in quantised.parts:
        indexes = [
            match_index(part.build(), family.checkpoint.weights(part.name), part.aliases)
            for family in (quantised, plain)
        ]
        with WeightStore(indexes[0]) as one, WeightStore(indexes[1]) as other:
            assert all(torch.equal(one.load(name), other.load(name)) for name in indexes[0]), part.name


def test_v_is_told_from_epsilon_by_a_bias(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    tensors = load_file(pair[1])
    if (
        f"{UNET}input_blocks.1.1.proj_in.weight" not in tensors
        or tensors[f"{UNET}input_blocks.1.1.proj_in.weight"].ndim != 2
    ):
        pytest.skip("of Stable Diffusion 2 alone")
    for deviation, predicts in ((0.05, "epsilon"), (0.2, "v_prediction")):
        tensors[f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"] = torch.tensor(
            [deviation, -deviation] * 32
        )
        save_file(tensors, tmp_path / "x.safetensors")
        found = read_family(resolve(str(tmp_path / "x.safetensors")))
        assert found.scheduler["prediction_type"] == predicts


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"joint_blocks.0.x": (2,)}, "tensor 'context_embedder.weight' is missing"),
        ({"lora_unet_down.lora_up.weight": (2, 2)}, "a LoRA"),
        ({"control_model.x": (2, 2)}, "a ControlNet"),
        ({"down_blocks.x": (2,), "conv_in.bias": (2,), "controlnet_cond_embedding.x": (2,)}, "a ControlNet"),
        ({"transformer_blocks.x": (2,), "adaln_single.x": (2,), "controlnet_blocks.x": (2,)}, "a ControlNet"),
        ({"emb_params": (2, 2)}, "a textual inversion"),
        ({"decoder.conv_in.weight": (2, 4, 3, 3)}, "no denoiser"),
    ],
)
def test_other_files_are_named(tmp_path: Path, tensors: dict[str, tuple[int, ...]], says: str) -> None:
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=says):
        read_family(resolve(str(tmp_path / "x.safetensors")))


@pytest.mark.parametrize(
    ("channels", "width", "says"), [(9, 768, "inpainting"), (5, 1024, "a depth-to-image model"), (4, 1280, "refiner")]
)
def test_other_kinds_of_unet_are_named(tmp_path: Path, channels: int, width: int, says: str) -> None:
    shapes = {
        f"{UNET}input_blocks.0.0.weight": (2, channels, 3, 3), f"{UNET}x.attn2.to_k.weight": (2, width),
        "first_stage_model.x": (2,), "cond_stage_model.transformer.x": (2,),
    }  # fmt: skip
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=says):
        read_family(resolve(str(tmp_path / "x.safetensors")))


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").write_bytes(b"PK\x03\x04")
    with pytest.raises(ModelError, match="a pickle can run code"):
        resolve(str(tmp_path / "x.ckpt"))


def test_the_shipped_vocabulary_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or again where a file is not whole."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made, decompress = list[bytes](), gzip.decompress

    def counted(data: bytes) -> bytes:
        made.append(data)
        return decompress(data)

    monkeypatch.setattr(gzip, "decompress", counted)
    texts = {path.name: path.read_bytes() for path in clip_tokenizer().iterdir()}
    assert len(json.loads(texts["vocab.json"])) == 49408 and texts["merges.txt"].count(b"\n") == 48895
    (clip_tokenizer() / "vocab.json").write_bytes(b"{}")
    assert {path.name: path.read_bytes() for path in clip_tokenizer().iterdir()} == texts
    assert len(made) == 2
