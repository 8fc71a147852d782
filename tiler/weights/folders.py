"""Find weight files in the user's folders by kind and by name: in those of AUTOMATIC1111 and ComfyUI as they are, or in
any.

Only names are looked at; no file is opened.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from tiler.errors import ModelError
from tiler.request.settings import Kind, folders
from tiler.weights.hub import INDEX

WEIGHTS = (".safetensors", ".gguf")
_DEPTH = 8  # levels of sub-folders to search
_MOST = 20_000  # files looked at
# Sub-folders of model folders whose files go with a model and are none.
_OTHERS = frozenset({
    "lora", "loras", "lycoris", "embeddings", "hypernetworks", "controlnet", "esrgan", "realesrgan", "swinir", "gfpgan",
    "codeformer", "upscale_models", "clip_vision", "style_models", "gligen", "ipadapter", "animatediff", "blip",
    "deepbooru", "karlo", "ldsr", "scunet", "photomaker", "vae_approx", "vae-approx", "svm", "torch_deepdanbooru",
})  # fmt: skip


def find(kind: Kind, name: str, given: Sequence[Path] = ()) -> tuple[Path, ...]:
    """All files of a `kind` that are called `name`, in the folders `given`, else in those of the environment or the
    configuration file. Raises UsageError if the configuration cannot be read."""
    return called(name, files(kind, given))


def called(name: str, paths: Iterable[Path]) -> tuple[Path, ...]:
    """Those of `paths` whose stem, file name, or last parts with or without the ending ("sub/dream") are `name`."""
    end = "/" + name.replace(os.sep, "/")
    return tuple(
        path
        for path in paths
        if f"/{path.as_posix()}".endswith(end) or f"/{path.with_name(stem(path)).as_posix()}".endswith(end)
    )


def find_model(name: str, given: Sequence[Path] = ()) -> Path | None:
    """The only model that `find` finds; None if there is none. Raises ModelError if there are several, and
    UsageError."""
    hits = find(Kind.MODEL, name, given)
    if len(hits) > 1:
        raise ModelError(f"{name}: several models have this name; give the path of one:\n" + "\n".join(map(str, hits)))
    return hits[0] if hits else None


def near_names(name: str, given: Sequence[Path] = ()) -> list[str]:
    """Up to three names of models that look like `name`. Raises UsageError."""
    stems = {stem(path).lower(): stem(path) for path in files(Kind.MODEL, given)}
    near = difflib.get_close_matches(name.lower(), stems, n=3, cutoff=0.5)
    near += [known for known in stems if name.lower() in known and known not in near]
    return [stems[known] for known in near[:3]]


def files(kind: Kind, given: Sequence[Path] = ()) -> list[Path]:
    """The files of a `kind` (of models also the folders in diffusers layout, and no NAME.vae.safetensors, which belongs
    to another model; of LoRAs no GGUF files, which hold models), sorted within each folder. Raises UsageError."""
    found = _walk_all((kind,), given)
    if kind is Kind.LORA:
        return [path for path in found if path.suffix.lower() == ".safetensors"]
    return [path for path in found if kind is not Kind.MODEL or not path.stem.lower().endswith(".vae")]


def model_files(given: Sequence[Path] = ()) -> list[Path]:
    """Models, autoencoders and text encoders: weight files, and folders in diffusers layout. Raises UsageError."""
    return _walk_all((Kind.MODEL, Kind.VAE, Kind.TEXT_ENCODER), given)


def stem(path: Path) -> str:
    """The name of a file without the ending of weight files, or of a folder."""
    return path.stem if path.suffix.lower() in WEIGHTS else path.name


def _walk_all(kinds: Sequence[Kind], given: Sequence[Path]) -> list[Path]:
    """Each file once, in the order of the folders. Folders that do not exist are skipped."""
    seen = set[tuple[int, int]]()
    leave_out = _OTHERS if Kind.MODEL in kinds else frozenset()
    roots = dict.fromkeys(folder for kind in kinds for folder in folders(kind, given))
    found = (path for root in roots for path in _walk(root, leave_out, _DEPTH, seen, pipelines=Kind.MODEL in kinds))
    return list(islice(found, _MOST))


def _walk(
    folder: Path, leave_out: frozenset[str], depth: int, seen: set[tuple[int, int]], *, pipelines: bool
) -> Iterator[Path]:
    """The weight files in `folder` and `depth` levels of sub-folders, sorted within each. With `pipelines`, a folder in
    diffusers layout is returned itself, instead of its files. Hidden folders are skipped, and so are those whose
    lower-case name is in `leave_out`. Circular links are followed once, and unreadable entries are skipped."""
    try:
        state = folder.stat()
        if (state.st_dev, state.st_ino) in seen:
            return
        seen.add((state.st_dev, state.st_ino))
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return
    if pipelines and any(entry.name == INDEX for entry in entries):
        yield folder
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        path = folder / entry.name
        try:
            is_folder = entry.is_dir()
        except OSError:
            continue
        if is_folder and depth and entry.name.lower() not in leave_out:
            yield from _walk(path, leave_out, depth - 1, seen, pipelines=pipelines)
        elif not is_folder and path.suffix.lower() in WEIGHTS and path.is_file():
            yield path
