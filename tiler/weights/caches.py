"""The files that tiler keeps for the next run: int8 weights, encoded prompts, file hashes, CLIP's vocabulary, and which
pictures of a --count are finished. Only files with names of tiler's own are touched, whatever else the folder
contains."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tiler.errors import ModelError, StorageError
from tiler.weights.flavours import names_in
from tiler.weights.index import read_metadata
from tiler.weights.places import cache_home

INT8_VERSION = "6"  # of the rules for int8 weights: which layers, which scales, which order
MODEL = "model"  # the entry in a cached file's metadata that names the model
_HASH = re.compile(r"[0-9a-f]{32}")
_OURS = re.compile(rf"{_HASH.pattern}\.safetensors")
_LINES = 3  # of a file that may name what it is about
_LEFT_OVER_SECONDS = 24 * 3600  # a hidden file that is older was left behind by a run that was killed
DAY = 24 * 3600
PROMPTS, COUNTS = "encoded prompts", "--count"  # kinds of cached files


@dataclass(frozen=True, kw_only=True)
class Cached:
    """A cached file. `used_days`: days since it was last read or written; `stale`: the reason why it is useless, "" if
    it is not; `name`: the model, file or picture that it was made from, "" if it does not say."""

    kind: str
    path: Path
    size_bytes: int
    used_days: float
    stale: str = ""
    name: str = ""


def list_cached(folder: Path | None) -> list[Cached]:
    """All cached files: in `folder`, that of --cache-dir, or in the user's cache folder."""
    home = cache_home() / "tiler"
    packed, prompts = (home / "packed", home / "prompts") if folder is None else (folder, folder / "prompts")
    found = [*_files("int8 weights", packed), *_files(PROMPTS, prompts)]
    if folder is None:
        others = {"hashes": "hashes", "clip": "CLIP's vocabulary", "previews": "preview colours", "counts": COUNTS}
        for name, kind in others.items():
            files = [path for path in sorted((home / name).rglob("*")) if path.is_file()]
            found += [_cached(kind, path, name=_source(path)) for path in files]
    return found


def _files(kind: str, folder: Path) -> Iterator[Cached]:
    for name in names_in(folder):
        path = folder / name
        if not path.is_file() or path.is_symlink():
            continue
        if _OURS.fullmatch(name):
            said, stale = _said(path)
            yield _cached(kind, path, stale, said.get(MODEL, ""))
        elif name.startswith(".") and _OURS.search(name) and time.time() - path.stat().st_mtime > _LEFT_OVER_SECONDS:
            yield _cached(kind, path, "left behind by a run that was killed")


def _said(path: Path) -> tuple[dict[str, str], str]:
    """The metadata of a safetensors file, and why the file is stale."""
    try:
        said = read_metadata(path)
    except ModelError:
        return {}, "damaged"
    # A file named as ours are, of another format, stays.
    old = said.get("format") == "tiler-int8" and said.get("version") != INT8_VERSION
    return said, "of another version of tiler" if old else ""


def _source(path: Path) -> str:
    """The file whose hash is in `path`, the first picture of a --count, or the name of any other file with one."""
    if not _HASH.fullmatch(path.stem):
        return f"{path.parent.name}/{path.name}"
    with suppress(OSError, ValueError, RecursionError), path.open("rb") as file:
        for line in islice(file, _LINES):
            said = json.loads(line)
            for key in ("path", "output") if isinstance(said, dict) else ():
                if isinstance(said.get(key), str):
                    return str(said[key])
    return ""


def _cached(kind: str, path: Path, stale: str = "", name: str = "") -> Cached:
    state = path.stat()
    days = max(0.0, (time.time() - max(state.st_atime, state.st_mtime)) / DAY)
    return Cached(kind=kind, path=path, size_bytes=state.st_size, used_days=days, stale=stale, name=name)


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
