"""Hashes by which programs and sites identify model files: AutoV2, the first ten hexadecimal digits of a file's sha256,
and the older AutoV1, eight digits of the sha256 over 64 KiB after the first MiB. A sha256 is computed once and
cached."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tiler.errors import ModelError, StorageError
from tiler.files import replace_file
from tiler.weights.index import open_regular
from tiler.weights.places import cache_home

_BLOCK = 2**20  # bytes read at a time
_V1_AT, _V1_BYTES, _V1_DIGITS, V2_DIGITS = 2**20, 2**16, 8, 10


def auto_v2(path: Path, on_hashing: Callable[[], None] = lambda: None) -> str:
    """The file's AutoV2 hash; `on_hashing` is called before the complete file is read. Raises ModelError."""
    if (known := _known(path)) is not None:
        return known[:V2_DIGITS]
    on_hashing()
    before, digest = _state(path), hashlib.sha256()
    fd = open_regular(path)
    try:
        while block := os.read(fd, _BLOCK):
            digest.update(block)
    except OSError as error:
        raise ModelError(f"{path}: reading failed ({error.strerror}); check the disk") from error
    finally:
        os.close(fd)
    with suppress(OSError, StorageError):  # it is computed again then
        place = _place(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        replace_file(place, [json.dumps(before | {"sha256": digest.hexdigest()}).encode()], durable=True)
    return digest.hexdigest()[:V2_DIGITS]


def is_called(path: Path, digest: str, *, compute: bool) -> bool | None:
    """Whether a file has this AutoV1 or AutoV2 hash (or complete sha256); None if the hash would have to be computed
    and `compute` is False. A folder has none. Raises ModelError."""
    if path.is_dir():
        return None
    digest = digest.lower()
    if len(digest) == _V1_DIGITS:
        return _auto_v1(path) == digest
    if not compute and _known(path) is None:
        return None
    return auto_v2(path) == digest[:V2_DIGITS]


def _auto_v1(path: Path) -> str:
    fd = open_regular(path)
    try:
        return hashlib.sha256(os.pread(fd, _V1_BYTES, _V1_AT)).hexdigest()[:_V1_DIGITS]
    except OSError as error:
        raise ModelError(f"{path}: reading failed ({error.strerror}); check the disk") from error
    finally:
        os.close(fd)


def _known(path: Path) -> str | None:
    """The cached sha256 of the file in its present state."""
    try:
        kept: dict[str, Any] = json.loads(_place(path).read_text())
        digest = kept.pop("sha256")
        return digest if kept == _state(path) and isinstance(digest, str) else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _state(path: Path) -> dict[str, Any]:
    """The properties that show whether a file has changed. Raises ModelError."""
    try:
        found = path.stat()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    return {"path": os.path.realpath(path), "bytes": found.st_size, "time": found.st_mtime_ns}


def _place(path: Path) -> Path:
    name = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:32]
    return cache_home() / "tiler" / "hashes" / f"{name}.json"
