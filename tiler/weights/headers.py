"""Names and shapes of the tensors of a file, without further checks, to look into many files quickly."""

from __future__ import annotations

import json
import os
from pathlib import Path

from tiler.errors import ModelError
from tiler.weights.gguf import read_gguf
from tiler.weights.index import MAX_HEADER_BYTES, open_regular


def shapes_of(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes in a safetensors or GGUF file as it states them. Raises ModelError."""
    fd = open_regular(path)
    try:
        head, size = os.pread(fd, 8, 0), os.fstat(fd).st_size
        length = int.from_bytes(head, "little")
        if head[:4] == b"GGUF":
            return {name: info.shape for name, info in read_gguf(path).tensors.items()}
        if len(head) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise ModelError(f"{path}: no safetensors file, or a cut download")
        header = json.loads(os.pread(fd, length, 8))
        return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path}: the header cannot be read; download the file again") from error
    finally:
        os.close(fd)
