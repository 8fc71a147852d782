"""Single files give what the folders do from which they were made; what is no whole Stable Diffusion is refused by its name."""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tiler.errors import ModelError
from tiler.models.family import read_family
from tiler.models.single_file import UNET
from tiler.models.vocabulary import clip_tokenizer
from tiler.weights.checkpoint import resolve
from tiler.weights.store import WeightStore, match_index


@pytest.fixture(scope="module", params=["tiny-plain", "tiny-plain-sd2"])
def pair(request, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder and the file that holds the same."""
    import make_checkpoint
    from checkpoints._single import write_single

    folder = make_checkpoint.make(request.param, tmp_path_factory.mktemp("single"))
    for file in clip_tokenizer("!" if request.param.endswith("sd2") else "<|endoftext|>").iterdir():
        shutil.copy(file, folder / "tokenizer")
    return folder, write_single(folder, folder.parent / "model.safetensors")


def test_parameters_are_those_that_diffusers_reads(pair: tuple[Path, Path]) -> None:
    from diffusers import StableDiffusionPipeline

    folder, file = pair
    options = dict.fromkeys(("safety_checker", "feature_extractor"))
    pipe = StableDiffusionPipeline.from_single_file(str(file), config=str(folder), local_files_only=True, **options)
    family = read_family(resolve(str(file)))
    for part in family.parts:
        expected = getattr(pipe, part.name).state_dict()
        matched = match_index(part.build(), family.checkpoint.weights(part.name), part.aliases)
        with WeightStore(matched) as store:
            for name in matched:
                known = name if name in expected else f"text_model.{name}"
                loaded = store.load(name)
                assert torch.equal(loaded, expected[known].float().view_as(loaded)), name


def test_the_picture_is_the_folders(tiler, pair: tuple[Path, Path], tmp_path: Path) -> None:
    common = ("--size", 512, "--steps", 1, "--no-guide", "--cfg-scale", 1, "--seed", 3, "--decode", "frozen")
    for name, model in zip("ab", pair, strict=True):
        ran = tiler(
            "render",
            "a cat, É 🙂",
            "--model",
            model,
            *common,
            "-o",
            f"{name}.png",
            "--save-latents",
            f"{name}.safetensors",
        )
        assert ran.code == 0, ran.err
    assert "model.safetensors is Stable Diffusion" in ran.err
    assert Image.open(tmp_path / "a.png").tobytes() == Image.open(tmp_path / "b.png").tobytes()
    assert "Model: model," in Image.open(tmp_path / "b.png").info["parameters"]
    latents = [load_file(tmp_path / f"{name}.safetensors")["latents"] for name in "ab"]
    assert torch.equal(*latents)


def test_a_quantised_file_is_read_as_its_decoded_twin(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """GGUF with 8-bit blocks, and what they mean in fp32: every parameter of every part has equal bits."""
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
        ({"joint_blocks.0.x": (2,)}, "Stable Diffusion 3"),
        ({"lora_unet_down.lora_up.weight": (2, 2)}, "a LoRA"),
        ({f"{UNET}x.attn2.to_k.weight": (2, 768)}, "no autoencoder and no text encoder"),
        ({"decoder.conv_in.weight": (2, 4, 3, 3)}, "no denoiser"),
    ],
)
def test_other_files_are_named(tmp_path: Path, tensors: dict[str, tuple[int, ...]], says: str) -> None:
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=says):
        read_family(resolve(str(tmp_path / "x.safetensors")))


@pytest.mark.parametrize(
    ("channels", "width", "says"), [(9, 768, "inpainting"), (4, 2048, "SDXL"), (4, 1280, "refiner")]
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
