"""Names that a shell completes: models and LoRAs in the user's folders, models in the hub's cache. Only names are
looked at, and no torch is imported: an answer takes a third of a second."""

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

_HUB = "models--"  # of a repository's folder: models--org--name


def model_names(context: typer.Context, incomplete: str) -> list[str]:
    """What --model may be and begins so: `mini`, files and folders by their stems (by their paths where two are alike),
    hub ids. Nothing where a configuration cannot be read: a shell has no place for the reason."""
    try:
        return sorted(name for name in dict.fromkeys(_models(context)) if name.startswith(incomplete))
    except (TilerError, OSError):
        return []


def lora_names(incomplete: str) -> list[str]:
    """What --lora may be and begins so: LoRAs in the user's folders, by their stems, by their paths where two are
    alike."""
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
