"""Quantised models that are damaged, of another kind, or lack tensors that they promise: one line, the right exit code,
and nothing written."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import make_checkpoint
import pytest
import torch
from checkpoints import _single_dit
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.weights.test_layouts import described

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint.make("tiny-pixart", tmp_path_factory.mktemp("quantised"))


def as_gguf(tensors: Tensors, path: Path) -> bytearray:
    """Write a file with matrices in 8-bit blocks and the other tensors in fp32."""
    writer = gguf.GGUFWriter(path, "pixart")
    for name, tensor in tensors.items():
        fits = tensor.ndim == 2 and tensor.shape[1] % 32 == 0
        kind = gguf.GGMLQuantizationType.Q8_0 if fits else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return bytearray(path.read_bytes())


@pytest.fixture(scope="module")
def whole(model: Path) -> bytearray:
    file = _single_dit.write_transformer(model, model.parent / "dit.safetensors", "pixart")
    return as_gguf(load_file(file), model.parent / "dit.gguf")


def typed(data: bytearray, number: int) -> bytearray:
    """Give the first matrix another type."""
    name = b"blocks.0.attn.proj.weight"
    struct.pack_into("<I", data, data.index(name) + len(name) + 4 + 2 * 8, number)
    return data


def counted(data: bytearray) -> bytearray:
    struct.pack_into("<Q", data, 8, 10**9)
    return data


GGUF: dict[str, tuple[Callable[[bytearray], bytearray], str]] = {
    "cut in the header": (lambda data: data[:900], "does not end within the file (a cut download?); download it again"),
    "cut in the weights": (lambda data: data[:-5000], "ends behind the file's end"),
    "of an unknown type": (lambda data: typed(data, 99), "is stored as type 99, which tiler does not read"),
    "of a type not read": (lambda data: typed(data, 29), "is stored as IQ1_M, which tiler does not read"),
    "with a thousand million tensors": (counted, "1000000000 tensors, more than"),
}


def refused(ran: Any, code: int, says: str) -> None:
    assert ran.code == code, ran.err
    assert says in ran.err and len(ran.err.strip().splitlines()) == 1, ran.err


@pytest.mark.parametrize("case", GGUF)
def test_a_bad_gguf_file(in_process: Any, case: str, model: Path, whole: bytearray, tmp_path: Path) -> None:
    change, says = GGUF[case]
    (tmp_path / "x.gguf").write_bytes(change(bytearray(whole)))
    refused(in_process("render", "x", "--model", model, "--diffusion-model", "x.gguf", "-o", "x.png"), 3, says)
    assert [file.name for file in tmp_path.iterdir()] == ["x.gguf"]


def test_a_gguf_file_of_another_model(in_process: Any, tiny: Path, whole: bytearray, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(whole)
    says = "this is a transformer of PixArt, "
    refused(in_process("render", "x", "--model", tiny, "--diffusion-model", "x.gguf", "-o", "x.png"), 3, says)
    names = "token_embd.weight", "blk.0.attn_q.weight", "blk.0.ffn_gate.weight", "output.weight"
    as_gguf({name: torch.zeros(32, 32) for name in names}, tmp_path / "x.gguf")
    says = "this is no model that tiler knows (token_embd.weight"
    refused(in_process("render", "x", "--model", tiny, "--diffusion-model", "x.gguf", "-o", "x.png"), 3, says)
    assert [file.name for file in tmp_path.iterdir()] == ["x.gguf"]


NAME = "transformer_blocks.0.attn1.to_k"


def without_scales(tensors: Tensors) -> Tensors:
    eight = tensors[f"{NAME}.weight"].to(torch.float8_e4m3fn)
    return tensors | {f"{NAME}.weight": eight, "scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}


def odd_blocks(tensors: Tensors) -> Tensors:
    """288 values per row, in blocks of 64 as bitsandbytes makes them, and of 63."""
    count = tensors[f"{NAME}.weight"].numel()
    state = {"quant_type": "nf4", "blocksize": 63, "dtype": "float16", "shape": list(tensors[f"{NAME}.weight"].shape)}
    return tensors | {
        f"{NAME}.weight": torch.zeros(count // 2, 1, dtype=torch.uint8), f"{NAME}.weight.quant_map": torch.zeros(16),
        f"{NAME}.weight.absmax": torch.zeros(-(-count // 63)),
        f"{NAME}.weight.quant_state.bitsandbytes__nf4": described(json.dumps(state)),
    }  # fmt: skip


FOLDERS: dict[str, tuple[Callable[[Tensors], Tensors], dict[str, Any], str]] = {
    "fp8 without the scales that it promises": (without_scales, {}, f"'{NAME}.weight' has no scale; download it again"),
    "a map of absent tensors": (
        lambda tensors: tensors,
        {"transformer_blocks.77.ff": {"weights": "qint8", "activations": "none"}},
        "'transformer_blocks.77.ff' is to be quantised, and the weight files have no such weight",
    ),
    "a map of plain tensors": (
        lambda tensors: tensors, {NAME: {"weights": "qint8", "activations": "none"}}, f"'{NAME}' is to be qint8"
    ),
    "nf4 in blocks of odd size": (odd_blocks, {}, "are no whole blocks of 63"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_a_bad_folder(in_process: Any, case: str, model: Path, tmp_path: Path) -> None:
    change, layers, says = FOLDERS[case]
    shutil.copytree(model, tmp_path / "m")
    (file,) = (tmp_path / "m/transformer").glob("*.safetensors")
    save_file(change(load_file(file)), file)
    if layers:
        (file.parent / "quanto_qmap.json").write_text(json.dumps(layers))
    refused(in_process("render", "x", "--model", "m", "-o", "x.png"), 3, says)
    assert [file.name for file in tmp_path.iterdir()] == ["m"]
