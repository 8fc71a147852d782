"""Models on the user's disk, found by name in the folders that were named: those of AUTOMATIC1111 and ComfyUI as they
are, or any.

Only names are looked at; no file is opened.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from tiler.errors import ModelError
from tiler.request.settings import WEIGHTS, weight_files
from tiler.weights.hub import INDEX

_MOST = 20_000  # files looked at
_SUBFOLDERS = "models", "Models"  # of AUTOMATIC1111, Forge, ComfyUI
# Folders whose files go with a model and are none.
_OTHERS = frozenset({
    "lora", "loras", "lycoris", "embeddings", "hypernetworks", "controlnet", "esrgan", "realesrgan", "swinir", "gfpgan",
    "codeformer", "upscale_models", "clip_vision", "style_models", "gligen", "ipadapter", "animatediff", "blip",
    "deepbooru", "karlo", "ldsr", "scunet", "photomaker", "vae_approx", "vae-approx", "svm", "torch_deepdanbooru",
})  # fmt: skip


def model_files(folders: Sequence[Path]) -> list[Path]:
    """Weight files, and folders in diffusers layout, in and below `folders`; each once, sorted by folder."""
    found: dict[Path, None] = {}
    left = _MOST
    for folder in folders:
        for path in weight_files(_root(folder), pipelines=True, leave_out=_OTHERS):
            found.setdefault(path.resolve() if path.is_symlink() and path.is_dir() else path)
            left -= 1
            if left <= 0:
                return list(found)
    return list(found)


def _root(folder: Path) -> Path:
    """Of a program's root the folder of its models."""
    within = (folder / name for name in _SUBFOLDERS)
    return next((path for path in within if path.is_dir()), folder)


def find_model(name: str, folders: Sequence[Path]) -> Path | None:
    """The model called `name` (a stem, a file's name, or a path below one of the folders); None where there is none.
    Raises ModelError where several are, listing them."""
    for folder in folders:
        for base in (folder, _root(folder)):
            for path in (base / name, *(base / f"{name}{ending}" for ending in WEIGHTS)):
                if path.is_file() or (path / INDEX).is_file():
                    return path
    if "/" in name:  # a path or a hub id: no file is called so
        return None
    hits = [path for path in model_files(folders) if name in (path.name, _stem(path))]
    if len(hits) > 1:
        raise ModelError(f"{name}: several models have this name; give the path of one:\n" + "\n".join(map(str, hits)))
    return hits[0] if hits else None


def near_names(name: str, folders: Sequence[Path]) -> list[str]:
    """Up to three names of models in `folders` that look like `name`."""
    stems = {_stem(path).lower(): _stem(path) for path in model_files(folders)}
    near = difflib.get_close_matches(name.lower(), stems, n=3, cutoff=0.5)
    near += [stem for stem in stems if name.lower() in stem and stem not in near]
    return [stems[stem] for stem in near[:3]]


def _stem(path: Path) -> str:
    return path.stem if path.name.endswith(WEIGHTS) else path.name
