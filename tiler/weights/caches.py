"""The files that tiler keeps for the next run: int8 weights, encoded prompts, file hashes, CLIP's vocabulary, and which
pictures of a --count are finished. Only files with names of tiler's own are touched, whatever else the folder
contains."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tiler.errors import ModelError, StorageError
from tiler.weights.flavours import names_in
from tiler.weights.index import read_metadata
from tiler.weights.places import cache_home

INT8_VERSION = "5"  # of the rules for int8 weights: which layers, which scales, which order
_OURS = re.compile(r"[0-9a-f]{32}\.safetensors")
_LEFT_OVER_SECONDS = 24 * 3600  # a hidden file that is older was left behind by a run that was killed
DAY = 24 * 3600


@dataclass(frozen=True, kw_only=True)
class Cached:
    """A cached file. `used_days`: days since it was last read or written; `stale`: the reason why it is useless, "" if
    it is not."""

    kind: str
    path: Path
    size_bytes: int
    used_days: float
    stale: str = ""


def list_cached(folder: Path | None) -> list[Cached]:
    """All cached files: in `folder`, that of --cache-dir, or in the user's cache folder."""
    home = cache_home() / "tiler"
    packed, prompts = (home / "packed", home / "prompts") if folder is None else (folder, folder / "prompts")
    found = [*_files("int8 weights", packed), *_files("encoded prompts", prompts)]
    if folder is None:
        others = {"hashes": "hashes", "clip": "CLIP's vocabulary", "previews": "preview colours", "counts": "--count"}
        for name, kind in others.items():
            found += [_cached(kind, path) for path in sorted((home / name).rglob("*")) if path.is_file()]
    return found


def _files(kind: str, folder: Path) -> Iterator[Cached]:
    for name in names_in(folder):
        path = folder / name
        if not path.is_file() or path.is_symlink():
            continue
        if _OURS.fullmatch(name):
            yield _cached(kind, path, _misfit(path))
        elif name.startswith(".") and _OURS.search(name) and time.time() - path.stat().st_mtime > _LEFT_OVER_SECONDS:
            yield _cached(kind, path, "left behind by a run that was killed")


def _misfit(path: Path) -> str:
    try:
        said = read_metadata(path)
    except ModelError:
        return "damaged"
    if said.get("format") != "tiler-int8":
        return ""  # by its name of ours, by its words not: it stays
    return "" if said.get("version") == INT8_VERSION else "of another version of tiler"


def _cached(kind: str, path: Path, stale: str = "") -> Cached:
    state = path.stat()
    days = max(0.0, (time.time() - max(state.st_atime, state.st_mtime)) / DAY)
    return Cached(kind=kind, path=path, size_bytes=state.st_size, used_days=days, stale=stale)


def remove(files: list[Cached]) -> int:
    """Delete the files, and return the number of bytes freed. Raises StorageError."""
    freed = 0
    for file in files:
        try:
            os.unlink(file.path)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise StorageError(f"{file.path}: cannot be removed ({error.strerror})") from error
        freed += file.size_bytes
    return freed
