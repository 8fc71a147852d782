"""The index of a safetensors file, validated before any weights are read.

Format: 8 bytes little-endian header length, JSON header, tensor data (github.com/huggingface/safetensors, "Format").
The checks are stricter than the library's about duplicate names, and more lenient about bytes after the last tensor,
which some published files have: they are never read, and `SafetensorsFile.behind` counts them.
"""

from __future__ import annotations

import json
import math
import os
import stat
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tiler.errors import ModelError

MAX_HEADER_BYTES = 100_000_000
MAX_RANK = 8
DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "U16": 2, "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
}  # fmt: skip


class Source(NamedTuple):
    """`rows` rows of a tensor, contiguous from byte `offset` of `path`. If their values share bytes with those of other
    rows, they are the ones `shift` bits up."""

    path: Path
    offset: int
    rows: int
    shift: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Nested:
    """The tables of a tensor whose values, and whose blocks' factors, are numbers of entries (bitsandbytes): a block is
    `values` of 4 bits each. Its factor is a number itself, or one of `factors` × the factor of `factors_of` blocks +
    `offset`. `start` is the byte of the file where the tensor begins."""

    table: array[float]
    values: int
    start: int
    factors: array[float] | None = None
    factors_of: int = 1
    factors_factors: array[float] | None = None
    offset: float = 0.0


class TensorInfo(NamedTuple):
    """The location and storage of one tensor: `dtype` names its codec (codecs.py), `nbytes` is its size in files.

    Its rows, along the first axis, are in one place or in several; a tensor without axes is one row. A `blocked` tensor
    is stored in the order of blocks.py; its shape becomes the weight's own in `match_index`. `scale` multiplies it: one
    factor, or one for each row. Tensors `beside` it have as many rows, are needed to decode it, and count in `nbytes`;
    `nested` holds data that all rows need (layouts.py). A `transposed` tensor is stored column by column of its shape,
    and is read as a whole. The inputs of a `rotated` one were rotated before it became int8 (rotation.py).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    sources: tuple[Source, ...]
    nbytes: int
    blocked: bool = False
    scale: TensorInfo | None = None
    beside: tuple[TensorInfo, ...] = ()
    nested: Nested | None = None
    transposed: bool = False
    rotated: bool = False

    @property
    def path(self) -> Path:
        """The file of its first row."""
        return self.sources[0].path

    @property
    def offset(self) -> int:
        """The offset of its first row in that file."""
        return self.sources[0].offset

    def bytes_of(self, rows: int) -> int:
        """The bytes of so many rows. If rows are not complete blocks, only certain counts are possible; multiples of 32
        always are."""
        return self.nbytes * rows // max(1, self.shape[0] if self.shape else 1)

    def alone(self) -> TensorInfo:
        """The tensor without the tensors beside it."""
        return self._replace(beside=(), nbytes=self.nbytes - sum(other.nbytes for other in self.beside))

    def places(self, first: int, last: int) -> list[Source]:
        """The locations of rows [first, last), without the tensors beside it."""
        alone, found, start = self.alone(), [], 0
        for source in self.sources:
            begin, end = max(first - start, 0), min(last - start, source.rows)
            if begin < end:
                found.append(source._replace(offset=source.offset + alone.bytes_of(begin), rows=end - begin))
            start += source.rows
        return found

    def reshaped(self, shape: tuple[int, ...]) -> TensorInfo:
        """The same elements as a tensor of `shape`, with axes of length one added or removed."""
        rows, now = (sides[0] if sides else 1 for sides in (shape, self.shape))
        sources = tuple(source._replace(rows=source.rows * rows // max(1, now)) for source in self.sources)
        return self._replace(shape=shape, sources=sources)

    def cut(self, first: int, last: int) -> TensorInfo:
        """Rows [first, last) as a separate tensor."""
        sources, rows, scale = tuple(self.places(first, last)), last - first, self.scale
        return self._replace(
            shape=(rows, *self.shape[1:]),
            sources=sources,
            nbytes=self.bytes_of(rows),
            scale=scale if scale is None or math.prod(scale.shape) == 1 else scale.cut(first, last),
            beside=tuple(other.cut(first, last) for other in self.beside),
        )


def open_regular(path: Path) -> int:
    """A read-only descriptor of a regular file. Never blocks on a FIFO. Raises ModelError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ModelError(f"{path}: not a regular file; a model is a folder with safetensors files")
    return fd


def read_into(fd: int, view: memoryview, at: int) -> bool:
    """Fill `view` from offset `at` of a file. Returns False if the file ends too early. Raises OSError."""
    while len(view):
        done = os.preadv(fd, [view], at)
        if not done:
            return False
        at, view = at + done, view[done:]
    return True


def read_index(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file by name. Raises ModelError for any defect of the file."""
    return read_file(path).tensors


class SafetensorsFile(NamedTuple):
    """The tensors of a file by name, its metadata texts, and the number of unread bytes `behind` its last tensor."""

    tensors: dict[str, TensorInfo]
    texts: dict[str, str]
    behind: int


def read_file(path: Path) -> SafetensorsFile:
    """The complete content of a safetensors file's header. Raises ModelError for any defect of the file."""
    header, data_start, size = _header(path)
    tensors = _validate(path, header, data_start=data_start, size=size)
    end = max((info.offset + info.nbytes for info in tensors.values()), default=data_start)
    return SafetensorsFile(tensors, _texts(header), size - end)


def header_bytes(header: Mapping[str, object]) -> bytes:
    """The start of a safetensors file with this header: its length, and the header, padded so that the data are aligned
    to 8 bytes."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata texts of a safetensors file. Raises ModelError."""
    return _texts(_header(path)[0])


def _texts(header: Mapping[str, Any]) -> dict[str, str]:
    texts = header.get("__metadata__", {})
    return texts if isinstance(texts, dict) else {}


def _header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The JSON header, the offset of the data, and the file's size."""
    fd = open_regular(path)
    try:
        size = os.fstat(fd).st_size
        start = os.pread(fd, 8, 0)
        if len(start) < 8:
            raise ModelError(f"{path}: not a {_kind(path)} file (header too small: {size} bytes); download it again")
        length = int.from_bytes(start, "little")
        if length > MAX_HEADER_BYTES or length > size - 8:
            raise ModelError(f"{path}: {_sniff(os.pread(fd, 512, 0), length, size, _kind(path))}")
        return _parse(path, os.pread(fd, length, 8)), 8 + length, size
    finally:
        os.close(fd)


def merge_indexes(paths: list[Path]) -> dict[str, TensorInfo]:
    """One index over the shards of a checkpoint. Raises ModelError if two shards contain the same name."""
    merged: dict[str, TensorInfo] = {}
    for path in paths:
        for name, info in read_index(path).items():
            if name in merged:
                raise ModelError(
                    f"{path}: tensor {name!r} is also in {merged[name].path.name}; the shards do not belong together"
                )
            merged[name] = info
    return merged


def _kind(path: Path) -> str:
    """What a file's name says it is. One called .gguf may hold safetensors; if it holds neither, GGUF was meant."""
    return "GGUF" if path.suffix.lower() == ".gguf" else "safetensors"


def _sniff(head: bytes, length: int, size: int, kind: str) -> str:
    text = head.lstrip().lower()
    if head.startswith(b"version https://git-lfs"):
        return "this is a Git LFS pointer, not the file itself; run `git lfs pull` or download it again"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "this is a web page saved under a model's name; download the file again"
    if head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04")):
        return f"this is a pickle checkpoint under a {kind} name; tiler reads safetensors and GGUF only"
    if head.startswith((b"\x89PNG", b"\xff\xd8\xff")) or (head.startswith(b"RIFF") and head[8:12] == b"WEBP"):
        return f"this is a picture, not a {kind} file; --from repeats a picture, --guide starts from one"
    if head.startswith(b"GGUF"):
        return "this is a GGUF file under a safetensors name; rename it to NAME.gguf"
    if kind == "GGUF":
        return f"not a GGUF file ({size} bytes, which do not start with GGUF); download it again"
    return f"not a safetensors file (the header would be {length} bytes, the file has {size}); download it again"


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(set(names)) != len(names):
            twice = next(n for n in names if names.count(n) > 1)
            raise ModelError(
                f"{path}: the name {twice!r} stands twice in the header; the file is damaged, download it again"
            )
        return dict(pairs)

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        what = "the header is not valid JSON" if _kind(path) == "safetensors" else "not a GGUF file"
        raise ModelError(f"{path}: {what}; download the file again") from error
    if not isinstance(header, dict):
        raise ModelError(f"{path}: the header is not a JSON object; download the file again")
    return header


def _validate(path: Path, header: dict[str, Any], *, data_start: int, size: int) -> dict[str, TensorInfo]:
    infos = [_entry(path, name, entry, data_start) for name, entry in header.items() if name != "__metadata__"]
    end = data_start
    for info in sorted(infos, key=lambda i: (i.offset, i.nbytes)):
        if info.offset != end:
            what = "overlaps the tensor before it" if info.offset < end else "leaves a hole before it"
            raise ModelError(f"{path}: tensor {info.name!r} {what}; the file is damaged, download it again")
        end = info.offset + info.nbytes
    if end > size:
        raise ModelError(f"{path}: the file is {end - size} bytes short (a cut download?); download it again")
    return {info.name: info for info in infos}


def _entry(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    bad = ModelError(f"{path}: the entry of tensor {name!r} is malformed; the file is damaged, download it again")
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise bad
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]

    def whole(values: Any) -> bool:
        return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)

    if (
        not isinstance(dtype, str)
        or not whole(shape)
        or not whole(offsets)
        or len(offsets) != 2
        or len(shape) > MAX_RANK
    ):
        raise bad
    begin, end = offsets
    if begin > end:
        raise bad
    if dtype in DTYPE_BYTES and math.prod(shape) * DTYPE_BYTES[dtype] != end - begin:
        raise ModelError(
            f"{path}: tensor {name!r} says {dtype} {shape}, which is not {end - begin} bytes; the file is damaged, download it again"
        )
    source = Source(path, data_start + begin, shape[0] if shape else 1)
    return TensorInfo(name, dtype, tuple(shape), (source,), end - begin)
