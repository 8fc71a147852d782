"""Find LoRA files on disk by name, and identify them by hash."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from tiler.errors import ModelError, UsageError
from tiler.weights.index import open_regular, read_index, read_metadata

SUFFIX = ".safetensors"
_CHUNK = 2**20


def find_lora(name: str, folders: Sequence[Path]) -> Path:
    """The file of a LoRA with this name: its path in one of `folders`, its stem there or in any subfolder, or the
    `ss_output_name` that its trainer wrote into it. Raises ModelError, and UsageError if two files have that name."""
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(f"--lora-dir {folder}: no such folder; check the path")
        for path in (folder / name, folder / f"{name}{SUFFIX}"):
            if "/" in name and path.is_file():
                return path
    files = sorted(path for folder in folders for path in folder.rglob(f"*{SUFFIX}") if path.is_file())
    hits = [path for path in files if path.stem == name] or [
        path for path in files if path.stem.lower() == name.lower()
    ]
    if not hits:
        hits = [path for path in files if _name_inside(path) == name]
    if len(hits) > 1:
        raise UsageError(f"the LoRA {name} is in two files, {hits[0]} and {hits[1]}; rename one of them")
    if not hits:
        near = get_close_matches(name, [path.stem for path in files], n=3)
        known = f"; near names are {', '.join(near)}" if near else "; check the name"
        raise ModelError(f"no LoRA in {', '.join(map(str, folders))} is called {name!r}{known}")
    return hits[0]


def _name_inside(path: Path) -> str | None:
    try:
        return read_metadata(path).get("ss_output_name")
    except ModelError:
        return None


class Digests(NamedTuple):
    """SHA-256 digests of a LoRA file in hexadecimal: `short`, 12 digits of the digest of its tensors without the
    header, is A1111's AutoV3; `whole` is the digest of the complete file."""

    short: str
    whole: str


def digests_of(path: Path) -> Digests:
    """The digests of a file. Raises ModelError."""
    start = min((info.offset for info in read_index(path).values()), default=0)
    fd = open_regular(path)
    try:
        header = os.pread(fd, start, 0)
        tensors, whole, at = hashlib.sha256(), hashlib.sha256(header), start
        while data := os.pread(fd, _CHUNK, at):
            tensors.update(data)
            whole.update(data)
            at += len(data)
    except OSError as error:
        raise ModelError(f"{path}: reading failed ({error.strerror}); check the disk") from error
    finally:
        os.close(fd)
    return Digests(tensors.hexdigest()[:12], whole.hexdigest())
