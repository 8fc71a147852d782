"""Codecs against the libraries that write the formats, and rows stored in several places."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tiler import Budget, RenderRequest, render
from tiler.errors import ModelError
from tiler.memory.process import read_rss
from tiler.request import Precision
from tiler.weights.blocks import blocked
from tiler.weights.codecs import CHUNK_ELEMENTS, CODECS, Codec
from tiler.weights.index import read_index
from tiler.weights.layouts import understood
from tiler.weights.store import SCALE, Piece, WeightStore, match_index

BLOCKS = [name for name, codec in CODECS.items() if codec.values > 1]


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_decode_as_their_library_does(name: str) -> None:
    kind, codec = gguf.GGMLQuantizationType[name], CODECS[name]
    assert (codec.values, codec.nbytes) == gguf.GGML_QUANT_SIZES[kind]
    rng, row = np.random.default_rng(0), 1024
    rows = 3 + CHUNK_ELEMENTS // row  # more than are decoded at a time
    raw = rng.integers(0, 256, (rows, codec.row_bytes(row)), dtype=np.uint8)
    out = torch.empty(rows, row)
    codec.decode(torch.from_numpy(raw).flatten(), out)
    with np.errstate(invalid="ignore"):  # factors of random bits may be NaN
        expected = gguf.dequantize(raw, kind)
    np.testing.assert_array_equal(out.numpy(), expected)


@pytest.mark.parametrize("name", ["F8_E4M3", "F8_E5M2"])
def test_eight_bit_floats_decode_as_torch_does(name: str) -> None:
    dtype = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}[name]
    raw, out = torch.arange(256, dtype=torch.uint8), torch.empty(16, 16)
    CODECS[name].decode(raw, out)
    torch.testing.assert_close(out.flatten(), raw.view(dtype).float(), rtol=0, atol=0, equal_nan=True)


def test_scaled_rows_are_multiplied(tmp_path: Path) -> None:
    weight = torch.randn(64, 32).to(torch.float8_e4m3fn)
    for scale in (torch.rand(64), torch.rand(64, 1), torch.rand(1), torch.tensor(0.3)):
        save_file({"w": weight, "w" + SCALE: scale}, tmp_path / "w.safetensors")
        with WeightStore(read_index(tmp_path / "w.safetensors")) as store:
            expected = weight.float() * (scale.view(-1, 1) if scale.ndim else scale)
            assert torch.equal(store.load("w"), expected)
            store.keep("w", torch.uint8)  # as stored
            out = torch.empty(64, 32)
            store.fetch(store.pieces("w")[0], out)
            assert torch.equal(out, expected)


def test_a_tensor_may_lie_in_several_places(tmp_path: Path) -> None:
    """Rows 40–99 of one tensor, followed by all 50 rows of a tensor in another file."""
    first, second = torch.randn(120, 48).half(), torch.randn(50, 48).half()
    save_file({"a": first}, tmp_path / "a.safetensors")
    save_file({"b": second}, tmp_path / "b.safetensors")
    a, b = read_index(tmp_path / "a.safetensors")["a"].cut(40, 100), read_index(tmp_path / "b.safetensors")["b"]
    assert (a.shape, a.nbytes) == ((60, 48), 60 * 48 * 2)
    joined = a._replace(name="w", shape=(110, 48), sources=a.sources + b.sources, nbytes=a.nbytes + b.nbytes)
    expected = torch.cat([first[40:100], second]).float()
    with WeightStore({"w": joined, "part": joined.cut(55, 65)}, piece_elements=32 * 48) as store:
        assert torch.equal(store.load("w"), expected)
        assert torch.equal(store.load("part"), expected[55:65])
        assert torch.equal(store.rows("w", [59, 60, 0]), expected[[59, 60, 0]])
        for piece in store.pieces("w"):
            out = torch.empty(piece.last - piece.first, 48)
            store.fetch(piece, out)
            assert torch.equal(out, expected[piece.first : piece.last])
        assert store.bytes_read == joined.nbytes + math.prod(expected.shape) * 2 + 3 * 96 + 960


def test_a_tensor_behind_an_axis_of_length_1_is_read_by_its_rows(tmp_path: Path) -> None:
    """As transformers' tables of positions are stored."""
    table = torch.randn(1, 6, 4)
    save_file({"table": table, "scale": torch.randn(6, 1)}, tmp_path / "x.safetensors")
    index = read_index(tmp_path / "x.safetensors")
    viewed = {"table": index["table"].reshaped((6, 4)), "scale": index["scale"].reshaped((6,))}
    with WeightStore(viewed) as store:
        assert torch.equal(store.rows("table", [5, 0]), table[0, [5, 0]])
        assert store.load("scale").shape == (6,)


def reversed_bytes(file: Path) -> None:
    """Rewrite a file of fp16 with the bytes of each value reversed, under a dtype of its own."""
    data = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    for name, entry in header.items():
        if name != "__metadata__" and entry["dtype"] == "F16":
            begin, end = (start + offset for offset in entry["data_offsets"])
            data[begin:end] = np.frombuffer(bytes(data[begin:end]), np.uint16).byteswap().tobytes()
            entry["dtype"] = "MIRRORED"
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data[start:]))


def test_a_codec_is_one_line(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A storage format that tiler does not know, registered by a test: quantiser, plan and render accept it
    unchanged."""

    def blocks(raw: torch.Tensor) -> torch.Tensor:
        return raw.flip(1).contiguous().view(torch.float16).float()

    monkeypatch.setitem(CODECS, "MIRRORED", Codec(name="MIRRORED", nbytes=2, blocks=blocks))  # type: ignore[index]
    shutil.copytree(tiny, tmp_path / "mirrored")
    for file in (tmp_path / "mirrored").glob("*/*.safetensors"):
        reversed_bytes(file)
    found = []
    for number, model in enumerate((tiny, tmp_path / "mirrored")):
        for precision in (Precision.FP32, Precision.INT8):
            out = tmp_path / f"{number}-{precision}.safetensors"
            request = RenderRequest(
                prompt="a boat", model=str(model), size=64, num_inference_steps=1, guide=False, seed=1,
                precision=precision,
                output=out.with_suffix(".png"), save_latents=out, cache_dir=tmp_path / "cache",
            )  # fmt: skip
            render(request, Budget(read_rss().now + 500_000_000))
            found.append(load_file(out)["latents"])
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize(
    ("scale", "factors"), [("w.weight_scale", (64, 1)), ("w.scale_weight", ()), ("w.scale_weight", (1,))]
)
def test_scaled_eight_bit_floats_are_found_by_every_spelling(
    tmp_path: Path, scale: str, factors: tuple[int, ...]
) -> None:
    weight, factor = torch.randn(64, 32).to(torch.float8_e4m3fn), torch.rand(factors) + 0.5
    module = torch.nn.ModuleDict({"w": torch.nn.Linear(32, 64, bias=False, device="meta")})
    tensors = {"w.weight": weight, "scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}
    save_file(tensors | {scale: factor}, tmp_path / "x.safetensors")
    with WeightStore(
        match_index(module, understood(read_index(tmp_path / "x.safetensors")), lambda name: [name])
    ) as store:
        assert torch.equal(store.load("w.weight"), weight.float() * (factor if factor.ndim < 2 else factor.view(64, 1)))
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match="has no scale"):
        match_index(module, understood(read_index(tmp_path / "x.safetensors")), lambda name: [name])


def test_parts_of_blocks_are_read_by_rows(tmp_path: Path) -> None:
    """Rows of a packed weight from the middle of one block to the middle of another: heads of 72."""
    weight, scale = torch.randint(-127, 128, (144, 32), dtype=torch.int8), torch.rand(144)
    save_file({"w": blocked(weight), "w" + SCALE: scale}, tmp_path / "x.safetensors")
    module = torch.nn.Module()
    module.register_parameter("w", torch.nn.Parameter(torch.empty(144, 32, device="meta"), requires_grad=False))
    index = match_index(module, understood(read_index(tmp_path / "x.safetensors")), lambda name: [name])
    assert index["w"].blocked
    for kept in (False, True):
        with WeightStore(index) as store:
            if kept:
                store.keep("w", torch.int8)
            for first, last in ((0, 72), (72, 144), (8, 24), (16, 48), (0, 144)):
                out, whole = torch.empty(last - first, 32), weight[first:last]
                store.fetch(Piece("w", first, last), out)
                assert torch.equal(out, whole.float() * scale[first:last, None])
                out8 = torch.empty(last - first, 32, dtype=torch.int8)
                store.fetch(Piece("w", first, last), out8)
                assert torch.equal(out8, whole)
