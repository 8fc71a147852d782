"""Denoisers quantised by other programs, beside fp32 twins made from the values that these programs document: the
pictures are equal bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import make_checkpoint
import pytest
import torch
from checkpoints import _single_dit
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.models.rendering import ask, edit, rendered

Tensors = dict[str, Tensor]
Said = dict[str, Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint.make("tiny-sd3", tmp_path_factory.mktemp("quantised"))


def in_blocks(name: str, tensor: Tensor) -> bool:
    return name.startswith("transformer_blocks.") and tensor.ndim == 2 and ".norm" not in name


def with_transformer(model: Path, folder: Path, tensors: Tensors, layers: Said | None = None) -> Path:
    """The checkpoint with other tensors in its transformer, and optimum-quanto's map of `layers`."""
    (folder / "transformer").mkdir(parents=True)
    for entry in model.iterdir():
        if entry.name != "transformer":
            (folder / entry.name).symlink_to(entry)
    (folder / "transformer/config.json").write_text((model / "transformer/config.json").read_text())
    save_file(tensors, folder / "transformer/diffusion_pytorch_model.safetensors")
    if layers is not None:
        (folder / "transformer/quanto_qmap.json").write_text(json.dumps(layers))
    return folder


def transformer_of(model: Path) -> Tensors:
    (file,) = (model / "transformer").glob("*.safetensors")
    return load_file(file)


def by_quanto(quanto: Any, model: Path) -> tuple[Tensors, Tensors, Said]:
    """The tensors that optimum-quanto stores, with another kind in each block, their values, and its map."""
    from diffusers import SD3Transformer2DModel

    module: Any = SD3Transformer2DModel.from_config(json.loads((model / "transformer/config.json").read_text()))
    module.load_state_dict(transformer_of(model))
    for number, kind in enumerate((quanto.qint8, quanto.qfloat8, quanto.qint4)):
        quanto.quantize(module, weights=kind, include=f"transformer_blocks.{number}.*", exclude="*norm*")
    quanto.freeze(module)
    meant = {
        name: (value.dequantize() if isinstance(value, quanto.QTensor) else value).detach().float().contiguous()
        for name, value in (*module.named_parameters(), *module.named_buffers())
        if not name.endswith(("input_scale", "output_scale"))
    }
    stored = {name: value.contiguous() for name, value in module.state_dict().items()}
    return stored, meant, quanto.quantization_map(module)


def by_bitsandbytes(bitsandbytes: Any, model: Path) -> tuple[Tensors, Tensors]:
    """The tensors that bitsandbytes' layers store, as diffusers writes them, and their values: nf4 with nested factors,
    and int8."""
    stored, meant, functional = Tensors(), Tensors(), bitsandbytes.functional
    for name, tensor in transformer_of(model).items():
        if not in_blocks(name, tensor):
            stored[name], meant[name] = tensor, tensor.float()
            continue
        rows, width = tensor.shape
        if ".2." in name:
            layer = bitsandbytes.nn.Linear8bitLt(width, rows, bias=False, has_fp16_weights=False)
        else:
            layer = bitsandbytes.nn.Linear4bit(
                width, rows, bias=False, quant_type="nf4", compress_statistics=".1." in name
            )
        layer.load_state_dict({"weight": tensor.float()})
        layer.to("cpu")
        stored |= {name.removesuffix("weight") + key: value for key, value in layer.state_dict().items()}
        weight = layer.weight
        if ".2." in name:
            meant[name] = functional.int8_vectorwise_dequant(weight.data, weight.SCB)
        else:
            meant[name] = functional.dequantize_4bit(weight.data, weight.quant_state)
    return stored, meant


def picture(model: Path, folder: Path, **values: Any) -> tuple[Tensor, bytes]:
    """Latents and pixels of one step; files go to `folder`."""
    folder.mkdir(exist_ok=True)
    request = ask(model, folder, size=64, num_inference_steps=1, **values)
    latents, _ = rendered(request)
    with Image.open(request.output) as image:
        return latents, image.tobytes()


def assert_alike(one: tuple[Tensor, bytes], other: tuple[Tensor, bytes]) -> None:
    assert one[0].isfinite().all() and torch.equal(one[0], other[0])
    assert one[1] == other[1]


def test_a_folder_of_optimum_quanto_renders_as_its_twin(quanto: Any, model: Path, tmp_path: Path) -> None:
    stored, meant, layers = by_quanto(quanto, model)
    assert {entry["weights"] for entry in layers.values()} == {"qint8", "qfloat8_e4m3fn", "qint4"}
    quantised = with_transformer(model, tmp_path / "quantised", stored, layers)
    twin = with_transformer(model, tmp_path / "twin", meant)
    assert_alike(*(picture(folder, tmp_path / "out") for folder in (quantised, twin)))


def test_a_folder_of_bitsandbytes_renders_as_its_twin(model: Path, tmp_path: Path) -> None:
    stored, meant = by_bitsandbytes(pytest.importorskip("bitsandbytes"), model)
    quantised = with_transformer(model, tmp_path / "quantised", stored)
    said = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    edit(quantised, "transformer", quantization_config=said)  # as diffusers has it
    twin = with_transformer(model, tmp_path / "twin", meant)
    assert_alike(*(picture(folder, tmp_path / "out") for folder in (quantised, twin)))


def original(model: Path, folder: Path) -> Tensors:
    """The transformer with the names of Stability AI's files, in fp32."""
    file = _single_dit.write_transformer(model, folder / "original.safetensors", "sd3", "model.diffusion_model.")
    return {name: tensor.float() for name, tensor in load_file(file).items()}


def test_an_fp8_file_renders_as_its_twin(model: Path, tmp_path: Path) -> None:
    """One block has scales, the others have none."""
    stored, meant = Tensors(), Tensors()
    for name, tensor in original(model, tmp_path).items():
        stored[name] = meant[name] = tensor
        if tensor.ndim == 2 and any(word in name for word in (".mlp.", ".attn.")):
            factor = tensor.abs().max() / 448 if "blocks.0." in name else torch.tensor(1.0)
            stored[name] = (tensor / factor).to(torch.float8_e4m3fn)
            meant[name] = stored[name].float() * factor
            if "blocks.0." in name:
                stored[name.removesuffix("weight") + "scale_weight"] = factor
    save_file(stored, tmp_path / "fp8.safetensors")
    save_file(meant, tmp_path / "twin.safetensors")
    files = (str(tmp_path / name) for name in ("fp8.safetensors", "twin.safetensors"))
    assert_alike(*(picture(model, tmp_path / "out", diffusion_model=file) for file in files))
