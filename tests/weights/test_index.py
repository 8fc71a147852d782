"""Every way in which a safetensors file can be bad has its error (tests/README.md, rows 1–13 and 18)."""

from __future__ import annotations

import json
import os
import struct
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from tiler.errors import ModelError
from tiler.memory.process import read_rss
from tiler.weights.index import header_bytes, open_regular, read_file, read_index


def write(path: Path, header: object, body: bytes = b"", *, raw: bytes | None = None) -> Path:
    encoded = json.dumps(header).encode() if raw is None else raw
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + body)
    return path


def entry(dtype: str = "F16", shape: tuple[int, ...] = (2,), start: int = 0, end: int = 4) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def test_reads_what_safetensors_writes(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).view(2, 3).half(), "b": torch.ones(5), "none": torch.empty(0, 3)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    index = read_index(tmp_path / "x.safetensors")
    assert {n: (i.dtype, i.shape, i.nbytes) for n, i in index.items()} == {
        "a": ("F16", (2, 3), 12), "b": ("F32", (5,), 20), "none": ("F32", (0, 3), 0),
    }  # fmt: skip
    data = (tmp_path / "x.safetensors").read_bytes()
    assert data[index["a"].offset :][:12] == tensors["a"].numpy().tobytes()


def test_bytes_behind_the_last_tensor_are_counted_and_not_read(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {"a": entry()}, b"\0" * 7)
    assert read_index(path)["a"].nbytes == 4
    assert read_file(path).behind == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "header too small"),
        (b"abcd", "header too small"),
        (b"\0" * 8, "not valid JSON"),
        (struct.pack("<Q", 2**64 - 1) + b"{}", "not a safetensors file"),
        (struct.pack("<Q", 10**9) + b"{}", "not a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "Git LFS pointer"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "web page"),
        (b"PK\x03\x04 archive/data.pkl", "pickle"),
        (b"\x80\x02}q\x00.........", "pickle"),
        (b"GGUF\x03\0\0\0............", "GGUF"),
    ],
)
def test_what_is_no_safetensors_file(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=message):
        read_index(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("header", "body", "message"),
    [
        ([1, 2], b"", "not a JSON object"),
        ({"a": entry(end=8, shape=(4,))}, b"\0" * 5, "3 bytes short"),
        ({"a": entry(), "b": entry(start=2, end=6)}, b"\0" * 6, "overlaps"),
        ({"a": entry(), "b": entry(start=6, end=10)}, b"\0" * 10, "hole"),
        ({"a": entry(start=-4, end=0)}, b"", "malformed"),
        ({"a": entry(start=4, end=0)}, b"", "malformed"),
        ({"a": entry(shape=(3,))}, b"\0" * 4, "is not 4 bytes"),
        ({"a": entry(dtype="F32")}, b"\0" * 4, "is not 4 bytes"),
        ({"a": entry(shape=(2**62, 2**62))}, b"\0" * 4, "is not 4 bytes"),
        ({"a": entry(shape=(2**63,))}, b"\0" * 4, "malformed"),
        ({"a": entry(shape=(1,) * 1000)}, b"\0" * 4, "malformed"),
        ({"a": entry(shape=(2.0,))}, b"\0" * 4, "malformed"),  # type: ignore[arg-type]
        ({"a": {"dtype": "F16"}}, b"", "malformed"),
        ({"a": [1]}, b"", "malformed"),
    ],
)
def test_crafted_headers(tmp_path: Path, header: object, body: bytes, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read_index(write(tmp_path / "x.safetensors", header, body))


def test_duplicate_names_and_hostile_json(tmp_path: Path) -> None:
    one = json.dumps(entry())
    for raw, message in (
        (f'{{"a": {one}, "a": {one}}}'.encode(), "stands twice"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
    ):
        with pytest.raises(ModelError, match=message):
            read_index(write(tmp_path / "x.safetensors", None, b"\0" * 4, raw=raw))


def test_a_huge_header_length_allocates_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 90_000_000) + b"{}")
    before = read_rss().now
    with pytest.raises(ModelError):
        read_index(path)
    assert read_rss().now - before < 5_000_000


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path, tmp_path / "fifo", tmp_path / "loop", Path("/dev/zero"), tmp_path / "missing"):
        with pytest.raises(ModelError):
            open_regular(path)


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=300))
def test_no_bytes_do_more_than_raise_model_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    path.write_bytes(struct.pack("<Q", max(0, len(data) - 20)) + data)
    with suppress(ModelError):
        read_index(path)


def test_a_header_of_ours_is_read_by_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    start = header_bytes({"__metadata__": {"said": "é"}, "a": entry()})
    assert len(start) % 8 == 0
    path.write_bytes(start + torch.tensor([1.0, 2.0]).half().numpy().tobytes())
    with safe_open(path, "pt") as file:
        assert file.get_tensor("a").tolist() == [1, 2] and file.metadata() == {"said": "é"}
    assert read_file(path).texts == {"said": "é"}
