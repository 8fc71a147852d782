"""Names that a shell can complete: models and LoRAs in the user's folders, and models in the hub's cache. Only file
names are read and no torch is imported, so an answer takes a third of a second."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import typer

from tiler.errors import TilerError
from tiler.request.model import parse_folders
from tiler.request.settings import Kind
from tiler.weights.folders import files, stem
from tiler.weights.places import hub_cache

_HUB = "models--"  # the folder of org/name in the hub's cache is models--org--name


def model_names(context: typer.Context, incomplete: str) -> list[str]:
    """The values of --model that start with `incomplete`: `mini`, the stems of files and folders (paths if two have the
    same stem), and hub ids. Empty if a configuration cannot be read, because a shell has no place for the reason."""
    try:
        return sorted(name for name in dict.fromkeys(_models(context)) if name.startswith(incomplete))
    except (TilerError, OSError):
        return []


def lora_names(incomplete: str) -> list[str]:
    """The values of --lora that start with `incomplete`: the stems of LoRAs in the user's folders (paths if two have
    the same stem)."""
    try:
        return sorted(name for name in _names(files(Kind.LORA)) if name.startswith(incomplete))
    except (TilerError, OSError):
        return []


def _names(paths: Sequence[Path]) -> Iterator[str]:
    stems = [stem(path) for path in paths]
    times = Counter(stems)
    return (stem if times[stem] == 1 else str(path) for stem, path in zip(stems, paths, strict=True))


def _models(context: typer.Context) -> Iterator[str]:
    yield "mini"
    yield from _names(files(Kind.MODEL, parse_folders(context.params.get("model_dirs") or "")))
    for folder in sorted(hub_cache().glob(f"{_HUB}*")):
        yield folder.name.removeprefix(_HUB).replace("--", "/", 1)
