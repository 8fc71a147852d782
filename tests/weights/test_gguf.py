"""GGUF files written by the format's own library, intact and damaged."""

from __future__ import annotations

import struct
from contextlib import suppress
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tiler.errors import ModelError
from tiler.weights.gguf import MAX_TENSORS, is_gguf, read_gguf
from tiler.weights.store import WeightStore

KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_1")


def write(path: Path, tensors: dict[str, tuple[np.ndarray, str]], flat: dict[str, list[int]] | None = None) -> Path:
    """Write a file with `tensors` (values and kind); `flat` are true shapes in the form of ComfyUI-GGUF."""
    writer = gguf.GGUFWriter(path, "flux")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "longer"])
    writer.add_uint32("general.file_type", 7)
    for name, shape in (flat or {}).items():
        writer.add_array(f"comfy.gguf.orig_shape.{name}", shape)
    for name, (values, kind) in tensors.items():
        number = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quantize(values, number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    rng = np.random.default_rng(1)
    tensors = {f"w.{kind}": (rng.standard_normal((70, 64)).astype(np.float32), kind) for kind in KINDS}
    return write(tmp_path / "x.gguf", tensors | {"bias": (rng.standard_normal(5).astype(np.float32), "F32")})


def test_reads_what_the_library_writes(file: Path) -> None:
    assert is_gguf(file)
    tensors, keys = read_gguf(file)
    assert keys["general.architecture"] == "flux"
    assert keys["general.file_type"] == 7
    assert tensors["bias"].shape == (5,)
    expected = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(file).tensors}
    with WeightStore(tensors, piece_elements=32 * 64) as store:
        for name, values in expected.items():
            assert np.array_equal(store.load(name).numpy(), values.reshape(tensors[name].shape)), name
            if name == "bias":
                continue
            for piece in store.pieces(name):
                out = torch.empty(piece.last - piece.first, 64)
                store.fetch(piece, out)
                assert np.array_equal(out.numpy(), values[piece.first : piece.last]), piece


def test_rows_may_begin_inside_blocks(tmp_path: Path) -> None:
    """A convolution's rows of 36 values, stored as ComfyUI-GGUF does: (n / 256, 256), with the true shape in a key."""
    values = np.random.default_rng(2).standard_normal((64, 4, 3, 3)).astype(np.float32)
    path = write(tmp_path / "x.gguf", {"conv": (values.reshape(-1, 256), "Q5_0")}, {"conv": [64, 4, 3, 3]})
    tensors = read_gguf(path).tensors
    assert tensors["conv"].shape == values.shape
    expected = gguf.dequantize(gguf.GGUFReader(path).tensors[0].data, gguf.GGMLQuantizationType.Q5_0).reshape(
        values.shape
    )
    with WeightStore(tensors, piece_elements=32 * 36) as store:
        for piece in store.pieces("conv"):
            out = torch.empty(piece.last - piece.first, 4, 3, 3)
            store.fetch(piece, out)
            assert np.array_equal(out.numpy(), expected[piece.first : piece.last])


def damaged(file: Path, at: int, raw: bytes) -> Path:
    data = bytearray(file.read_bytes())
    data[at : at + len(raw)] = raw
    file.write_bytes(data)
    return file


def test_cut_anywhere_is_told(file: Path) -> None:
    data = file.read_bytes()
    for end in (2, 4, 7, 12, 23, 60, 100, 200, 400, len(data) - 300, len(data) - 33):
        file.write_bytes(data[:end])
        with pytest.raises(ModelError, match=r"x\.gguf: .*download it again"):
            read_gguf(file)


@pytest.mark.parametrize(
    ("at", "raw", "says"),
    [
        (4, struct.pack("<I", 9), "of version 9; tiler reads 2 and 3"),
        (4, struct.pack("<I", 1), "of version 1; tiler reads 2 and 3"),
        (4, struct.pack(">I", 3), "is big-endian"),
        (8, struct.pack("<Q", 10**9), f"1000000000 tensors, more than {MAX_TENSORS}"),
        (16, struct.pack("<Q", 2**63), "keys, more than"),
        (24, struct.pack("<Q", 2**62), "bytes in a text"),
    ],
)
def test_no_stated_size_is_believed(file: Path, at: int, raw: bytes, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        read_gguf(damaged(file, at, raw))


def test_types_that_are_not_read_are_named(file: Path) -> None:
    at = file.read_bytes().index(b"w.Q8_0") + len("w.Q8_0") + 4 + 2 * 8
    for number, name in ((29, "IQ1_M"), (40, "NVFP4"), (77, "type 77")):
        with pytest.raises(ModelError, match=f"'w.Q8_0' is stored as {name}, which tiler does not read"):
            read_gguf(damaged(file, at, struct.pack("<I", number)))


def test_a_tensor_outside_the_file_is_told(file: Path) -> None:
    at = file.read_bytes().index(b"w.Q8_0") + len("w.Q8_0") + 4 + 2 * 8 + 4
    for offset in (2**20, 2**63):
        with pytest.raises(ModelError, match=r"'w\.Q8_0' ends behind the file's end"):
            read_gguf(damaged(file, at, struct.pack("<Q", offset)))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(4, 700), st.binary(min_size=1, max_size=8)), min_size=1, max_size=4))
def test_no_header_does_more_than_raise_model_error(file: Path, changes: list[tuple[int, bytes]]) -> None:
    """Whatever it contains, only bytes inside the file are read."""
    whole = file.read_bytes()
    for at, raw in changes:
        damaged(file, at, raw)
    with suppress(ModelError):
        tensors = read_gguf(file).tensors
        assert all(info.offset + info.nbytes <= len(whole) for info in tensors.values())
    file.write_bytes(whole)
