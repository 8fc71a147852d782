"""Store the program's own tensors in safetensors files with a checksum that shows whether a file is complete."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tiler.errors import ModelError, StorageError
from tiler.files import replace_file
from tiler.weights.index import TensorInfo, header_bytes, open_regular, read_file, read_into, read_metadata

if TYPE_CHECKING:
    from torch import Tensor

_DIGEST = "sha256"


class Stored(NamedTuple):
    """The content of a file: tensors by name, and texts by name."""

    tensors: dict[str, Tensor]
    facts: dict[str, str]


def write(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
    """Replace `path` atomically. Contiguous tensors are not copied. Raises StorageError."""
    names = {dtype: name for name, dtype in _dtypes().items()}
    held = {name: tensor.contiguous() for name, tensor in tensors.items()}
    header, at = dict[str, object](), 0
    for name, tensor in held.items():
        header[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at := at + tensor.nbytes],
        }
    digest = _digest(header, facts)
    for part in _parts(held):
        digest.update(part)
    whole = {"__metadata__": {**facts, _DIGEST: digest.hexdigest()}, **header}

    def parts() -> Iterator[bytes | memoryview]:
        yield header_bytes(whole)
        yield from _parts(held)

    replace_file(path, parts(), durable=True)


def read(path: Path) -> Stored | None:
    """Read a file that `write` wrote; None if it does not exist or its checksum is wrong. Raises StorageError."""
    import torch

    dtypes = _dtypes()
    if not path.exists():
        return None
    try:
        index, facts, _ = read_file(path)
    except ModelError:
        return None
    said = facts.pop(_DIGEST, "")
    if not all(info.dtype in dtypes for info in index.values()):
        return None
    infos = sorted(index.values(), key=lambda info: info.offset)
    digest, tensors = _digest(_header(infos), facts), {}
    fd = open_regular(path)
    try:
        for info in infos:
            tensor = torch.empty(info.shape, dtype=dtypes[info.dtype])
            if tensor.nbytes and not read_into(fd, _bytes(tensor), info.offset):
                return None
            tensors[info.name] = tensor
    except OSError as error:
        raise StorageError(f"{path}: reading failed ({error.strerror}); check the disk") from error
    finally:
        os.close(fd)
    for part in _parts(tensors):
        digest.update(part)
    return Stored(tensors, facts) if digest.hexdigest() == said else None


def read_facts(path: Path) -> dict[str, str]:
    """The texts of a file; empty if they cannot be read. The tensors are not checked."""
    try:
        return read_metadata(path) if path.exists() else {}
    except (ModelError, OSError):
        return {}


def _dtypes() -> dict[str, Any]:
    """The dtypes of a state, by their names in the safetensors format."""
    import torch

    return {
        "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "I64": torch.int64, "I32": torch.int32,
        "U8": torch.uint8, "BOOL": torch.bool,
    }  # fmt: skip


def _header(infos: list[TensorInfo]) -> dict[str, object]:
    header, at = dict[str, object](), 0
    for info in infos:
        header[info.name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [at, at := at + info.nbytes],
        }
    return header


def _digest(header: Mapping[str, object], facts: Mapping[str, str]) -> hashlib._Hash:
    return hashlib.sha256(json.dumps([header, dict(facts)], sort_keys=True).encode())


def _parts(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    return (_bytes(tensor) for tensor in tensors.values() if tensor.nbytes)


def _bytes(tensor: Tensor) -> memoryview:
    import torch

    data: Any = tensor.flatten().view(torch.uint8).numpy()
    return memoryview(data)
