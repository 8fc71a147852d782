"""Read the index of a GGUF file within bounds: nothing of the file is mapped, and the sizes that it states are checked.

Format: magic, version, counts of tensors and of keys; the keys; name, sides (fastest first), type and offset of each
tensor; the data, aligned (ggml-org/ggml, docs/gguf.md). ComfyUI-GGUF flattens tensors whose rows are not complete
blocks, and stores their shape in `comfy.gguf.orig_shape.NAME` (city96/ComfyUI-GGUF, tools/convert.py).
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tiler.errors import ModelError
from tiler.weights.index import MAX_RANK, Source, TensorInfo, open_regular

MAGIC = b"GGUF"
MAX_TENSORS, MAX_KEYS, MAX_NAME_BYTES, MAX_HEADER_BYTES = 100_000, 100_000, 65_536, 64_000_000
_SHAPES = "comfy.gguf.orig_shape."
# By the number that a tensor's type has in files; those that tiler does not read are named in the message that refuses
# them.
_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip
# Of the types that tiler reads, how many values a block has, and how many bytes (ggml-org/ggml, ggml-common.h).
BLOCKS: Mapping[str, tuple[int, int]] = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q8_0": (32, 34), "Q4_0": (32, 18), "Q4_1": (32, 20),
    "Q5_0": (32, 22), "Q5_1": (32, 24), "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176),
    "Q6_K": (256, 210), "IQ4_NL": (32, 18), "IQ4_XS": (256, 136),
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


class GgufFile(NamedTuple):
    """The tensors by name, and the keys whose values are single numbers, short texts or the shapes of tensors."""

    tensors: dict[str, TensorInfo]
    keys: dict[str, Any]


def is_gguf(path: Path) -> bool:
    """Whether the file starts with GGUF's magic number. Raises ModelError."""
    fd = open_regular(path)
    try:
        return os.pread(fd, 4, 0) == MAGIC
    finally:
        os.close(fd)


def read_gguf(path: Path) -> GgufFile:
    """The index and the keys of one file. Raises ModelError for every way the file can be bad."""
    fd = open_regular(path)
    try:
        with os.fdopen(os.dup(fd), "rb", buffering=2**16) as file:
            return _Reader(path, file.read, os.fstat(fd).st_size).index()
    finally:
        os.close(fd)


class _Reader:
    def __init__(self, path: Path, read: Callable[[int], bytes], size: int) -> None:
        self.path, self.read, self.size, self.at = path, read, size, 0

    def index(self) -> GgufFile:
        if self.take(4) != MAGIC:
            raise ModelError(f"{self.path}: not a GGUF file; download it again")
        version = self.number("I")
        if version not in (2, 3):
            what = "big-endian" if version in (2 << 24, 3 << 24) else f"of version {version}"
            raise ModelError(
                f"{self.path}: this GGUF file is {what}; tiler reads 2 and 3, little-endian: convert it again"
            )
        tensors, keys = self.count("Q", MAX_TENSORS, "tensors"), self.count("Q", MAX_KEYS, "keys")
        values = dict(self.key() for _ in range(keys))
        entries = [self.entry() for _ in range(tensors)]
        alignment = values.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 2**16:
            raise ModelError(
                f"{self.path}: general.alignment = {alignment!r} is no alignment; the file is damaged, download it again"
            )
        start = -(-self.at // alignment) * alignment
        found: dict[str, TensorInfo] = {}
        for name, shape, dtype, offset in entries:
            if name in found:
                raise ModelError(
                    f"{self.path}: the name {name!r} stands twice in the header; the file is damaged, download it again"
                )
            found[name] = self.place(name, self.true_shape(name, shape, values), dtype, start + offset)
        return GgufFile(found, values)

    def take(self, nbytes: int) -> bytes:
        self.at += nbytes
        if self.at > min(self.size, MAX_HEADER_BYTES):
            raise ModelError(
                f"{self.path}: the header does not end within the file (a cut download?); download it again"
            )
        return self.read(nbytes)

    def number(self, kind: str) -> Any:
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(kind)))[0]

    def count(self, kind: str, most: int, what: str) -> int:
        number = int(self.number(kind))
        if number > most:
            raise ModelError(f"{self.path}: {number} {what}, more than {most}; the file is damaged, download it again")
        return number

    def text(self) -> str:
        return self.take(self.count("Q", MAX_NAME_BYTES, "bytes in a text")).decode("utf-8", "replace")

    def key(self) -> tuple[str, Any]:
        name = self.text()
        return name, self.value(self.number("I"), nested=False)

    def value(self, kind: int, *, nested: bool) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            # A tokenizer's vocabulary is thousands of texts inside an array; a single one may be a long licence.
            length = int(self.number("Q"))
            raw = self.take(length)
            return "" if nested or length > MAX_NAME_BYTES else raw.decode("utf-8", "replace")
        if kind != _ARRAY or nested:
            raise ModelError(
                f"{self.path}: a key's value is of unknown type {kind}; the file is damaged, download it again"
            )
        of, length = self.number("I"), int(self.number("Q"))
        if of in _SCALARS:
            raw = self.take(length * struct.calcsize(_SCALARS[of]))
            return list(struct.unpack(f"<{length}{_SCALARS[of]}", raw)) if length <= MAX_RANK else None
        for _ in range(length):
            self.value(of, nested=True)
        return None

    def entry(self) -> tuple[str, tuple[int, ...], str, int]:
        name = self.text()
        sides = [int(self.number("Q")) for _ in range(self.count("I", MAX_RANK, "axes of a tensor"))]
        number, offset = self.number("I"), int(self.number("Q"))
        dtype = _TYPES.get(number, f"type {number}")
        if dtype not in BLOCKS:
            raise ModelError(
                f"{self.path}: tensor {name!r} is stored as {dtype}, which tiler does not read; use Q8_0 or Q4_K"
            )
        return name, tuple(reversed(sides)), dtype, offset

    def true_shape(self, name: str, shape: tuple[int, ...], values: dict[str, Any]) -> tuple[int, ...]:
        said = values.get(_SHAPES + name)
        if said is None:
            return shape
        if not isinstance(said, list) or min(said, default=0) < 1 or math.prod(said) != math.prod(shape):
            raise ModelError(
                f"{self.path}: tensor {name!r} has shape {list(shape)}, {_SHAPES}… says {said}; the file is damaged, download it again"
            )
        return tuple(int(side) for side in said)

    def place(self, name: str, shape: tuple[int, ...], dtype: str, offset: int) -> TensorInfo:
        (values, block), elements = BLOCKS[dtype], math.prod(shape)
        if not elements:
            raise ModelError(
                f"{self.path}: tensor {name!r} has shape {list(shape)}; the file is damaged, download it again"
            )
        nbytes = elements // values * block
        if elements % values:
            raise ModelError(
                f"{self.path}: tensor {name!r} is {list(shape)} of {dtype}, which is no whole number of blocks; the file is damaged, "
                "download it again"
            )
        if offset + nbytes > self.size:
            raise ModelError(
                f"{self.path}: tensor {name!r} ends behind the file's end (a cut download?); download it again"
            )
        return TensorInfo(name, dtype, shape, (Source(self.path, offset, shape[0] if shape else 1),), nbytes)
