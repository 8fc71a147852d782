"""Identify the model in a folder by 1 MB of each weight file, because hashing 2 GB takes long on a small machine."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from tiler.errors import ModelError
from tiler.weights.checkpoint import Checkpoint
from tiler.weights.flavours import find_weights
from tiler.weights.index import open_regular

_SAMPLES, _SAMPLE_BYTES = 256, 4096  # of each file, evenly spaced


def model_id(checkpoint: Checkpoint, parts: Sequence[str]) -> str:
    """32 hexadecimal digits computed from the parts' configs, the scheduler's config, and samples of the weight files.
    Names of folders and files do not count, so a copy has the same id. Raises ModelError."""
    digest = hashlib.sha256()
    if checkpoint.file is not None:
        _add(digest, checkpoint.file, "single")
    for part in parts:
        if part in checkpoint.sources:
            others = sorted({info.path for info in checkpoint.weights(part).values()} - {checkpoint.file})
            if others:
                digest.update(f"{part} {json.dumps(checkpoint.config(part), sort_keys=True)}\n".encode())
            for path in others:
                _add(digest, path, part)
            continue
        files = find_weights(checkpoint.folder / part, checkpoint.variant).files
        if (config := checkpoint.folder / part / "config.json").exists():
            _add(digest, config, f"{part} {len(files)}")
        for path in files:
            _add(digest, path, part)
    scheduler = checkpoint.folder / "scheduler" / "scheduler_config.json"
    if checkpoint.file is None and scheduler.exists():
        _add(digest, scheduler, "scheduler")
    return digest.hexdigest()[:32]


def _add(digest: hashlib._Hash, path: Path, label: str) -> None:
    """Add the size of a file and samples of its bytes to a hash; small files are added completely."""
    fd = open_regular(path)
    try:
        size = os.fstat(fd).st_size
        digest.update(f"{label} {size}\n".encode())
        if size <= _SAMPLES * _SAMPLE_BYTES:
            digest.update(os.pread(fd, size, 0))
            return
        for i in range(_SAMPLES):
            digest.update(os.pread(fd, _SAMPLE_BYTES, i * (size - _SAMPLE_BYTES) // (_SAMPLES - 1)))
    except OSError as error:
        raise ModelError(f"{path}: reading failed ({error.strerror}); check the disk") from error
    finally:
        os.close(fd)
