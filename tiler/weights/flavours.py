"""Choose the weight files of one part. A folder may hold several flavours, each in one file or in shards.

A flavour ("fp16", "bf16", "non_ema"; "" is the plain one) is what diffusers calls a variant, and is part of the file's
name.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiler.errors import ModelError
from tiler.weights.index import open_regular

MAX_CONFIG_BYTES = 1_000_000
MAX_INDEX_BYTES = 20_000_000  # names every tensor of a sharded model
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
WEIGHTS = (".safetensors", *PICKLES)


def refuse_pickle(path: Path) -> None:
    """Raise ModelError for a file with a pickle's ending."""
    if path.suffix in PICKLES:
        raise ModelError(f"{path}: a pickle can run code when it is opened; tiler reads safetensors and GGUF files")


_STEMS = "diffusion_pytorch_model", "model"
_FILE = re.compile(
    rf"({'|'.join(_STEMS)})(?:\.(?P<flavour>\w+))?(?P<shard>-\d+-of-\d+)?(?:\.(?P<old>\w+))?\.safetensors"
)
_INDEX = re.compile(rf"({'|'.join(_STEMS)})(?:\.(?P<old>\w+))?\.safetensors\.index(?:\.(?P<flavour>\w+))?\.json")
COPY = "copy it there, or download the model again"  # what to do about a missing file that no command fetches


@dataclass(frozen=True, kw_only=True)
class PartFiles:
    """The files that one part's weights are read from. `note` reports a surprising choice to the user."""

    flavour: str
    files: tuple[Path, ...]
    note: str | None = None


def read_json(path: Path, most_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """A JSON object from a small regular file. Raises ModelError."""
    fd = open_regular(path)
    try:
        with os.fdopen(fd, "rb") as file:
            raw = file.read(most_bytes + 1)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); copy or download it again") from error
    if len(raw) > most_bytes:
        raise ModelError(f"{path}: larger than {most_bytes} bytes; this is no model config")
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not valid JSON; download it again") from error
    if not isinstance(data, dict):
        raise ModelError(f"{path}: not a JSON object; download it again")
    return data


def flavour_of(name: str) -> str | None:
    """The flavour of a weight file or of an index of shards; None for any other name."""
    found = _FILE.fullmatch(name) or _INDEX.fullmatch(name)
    return None if found is None else found["flavour"] or found["old"] or ""


def flavours(names: Iterable[str]) -> set[str]:
    """The flavours in a part's folder."""
    return {flavour for name in names if (flavour := flavour_of(name)) is not None}


def choose_flavour(names: Iterable[str], variant: str | None) -> str | None:
    """The flavour to read: the requested one, else plain (diffusers does this for a part without it), else fp16; if
    none was requested, fp16 before plain. None if the folder has neither."""
    there = flavours(names)
    order = [variant, "", "fp16"] if variant else ["fp16", ""]
    return next((flavour for flavour in order if flavour in there), None)


def names_in(folder: Path) -> list[str]:
    """The names in a folder, sorted; empty if it cannot be listed."""
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def nothing_to_read(where: str, names: Iterable[str], variant: str | None, fetch: str = "") -> ModelError:
    """The error for a part without readable weights. `where` is its folder; `fetch` says how to get them."""
    names, there = list(names), sorted(flavours(names))
    if there:
        return ModelError(f"{where}: the weights are of variant {', '.join(there)}; give --variant {there[0]}")
    if pickles := [name for name in names if name.endswith(PICKLES)]:
        return ModelError(
            f"{where}/{pickles[0]}: a pickle can run code when it is opened, so tiler reads safetensors only; "
            "convert it elsewhere (diffusers: pipe.save_pretrained(FOLDER, safe_serialization=True))"
        )
    what = f"variant {variant!r} of the weights" if variant else "*.safetensors"
    return ModelError(f"{where}: no {what} here, but {', '.join(names[:6]) or 'nothing'}; {fetch or COPY}")


def find_weights(folder: Path, variant: str | None, fetch: str = "") -> PartFiles:
    """The weight files of the part in `folder`. `fetch` says how to get a missing shard. Raises ModelError."""
    names = names_in(folder)
    flavour = choose_flavour(names, variant)
    if flavour is None:
        raise nothing_to_read(str(folder), names, variant, fetch)
    for stem in _STEMS:
        own = [name for name in names if name.startswith(f"{stem}.") or name.startswith(f"{stem}-")]
        own = [name for name in own if flavour_of(name) == flavour]
        indexes = [name for name in own if name.endswith(".json")]
        whole = [name for name in own if not name.endswith(".json") and not _is_shard(name)]
        if indexes and not (whole and stem == "model"):  # transformers takes a whole file first, diffusers the index
            try:
                return PartFiles(flavour=flavour, files=tuple(_shards(folder, indexes[0], fetch)))
            except ModelError:
                if not whole:
                    raise
        if whole:
            note = (
                f"{folder / whole[0]} is read; the index of shards beside it, {indexes[0]}, is not" if indexes else None
            )
            return PartFiles(flavour=flavour, files=(folder / whole[0],), note=note)
    shards = [name for name in names if flavour_of(name) == flavour]
    raise ModelError(f"{folder}: {shards[0]} is one of several shards, and their index is missing; {fetch or COPY}")


def _is_shard(name: str) -> bool:
    found = _FILE.fullmatch(name)
    return found is not None and found["shard"] is not None


def _shards(folder: Path, index: str, fetch: str) -> list[Path]:
    """The files that an index names. Raises ModelError, also if one of them is missing."""
    shards = read_json(folder / index, MAX_INDEX_BYTES).get("weight_map", {})
    values = list(shards.values()) if isinstance(shards, dict) else []
    if not values or not all(isinstance(f, str) and f not in ("", "..") and Path(f).name == f for f in values):
        raise ModelError(f"{folder / index}: weight_map does not name the shards; download it again")
    files = [folder / name for name in sorted(set(values))]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        more = f" and {len(missing) - 1} more of its shards" if len(missing) > 1 else ""
        raise ModelError(f"{folder / index}: {missing[0]}{more} cannot be found beside it; {fetch or COPY}")
    return files
