"""Find LoRA files on disk by name, and identify them by hash."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from tiler.errors import ModelError, UsageError
from tiler.request.settings import Kind, folders
from tiler.weights.folders import called, files, stem
from tiler.weights.index import open_regular, read_index, read_metadata

SUFFIX = ".safetensors"
_CHUNK = 2**20


def find_lora(name: str, given: Sequence[Path] = ()) -> Path:
    """The file of a LoRA with this name in the folders `given`, else in the user's: its stem or the end of its path,
    exactly or but for upper case, or the `ss_output_name` that its trainer wrote into it. Raises ModelError, and
    UsageError if two files have that name."""
    for folder in given:
        if not folder.is_dir():
            raise UsageError(f"--lora-dir {folder}: no such folder; check the path")
    known = files(Kind.LORA, given)
    hits = list(called(name, known)) or [path for path in known if stem(path).lower() == name.lower()]
    hits = hits or [path for path in known if _name_inside(path) == name]
    if len(hits) > 1:
        raise UsageError(f"the LoRA {name} is in two files, {hits[0]} and {hits[1]}; rename one of them")
    if not hits:
        near = get_close_matches(name, map(stem, known), n=3)
        hint = f"; near names are {', '.join(near)}" if near else "; check the name"
        where = ", ".join(map(str, folders(Kind.LORA, given)))
        raise ModelError(f"no LoRA in {where} is called {name!r}{hint}")
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
