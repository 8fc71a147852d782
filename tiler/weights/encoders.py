"""Find out whether a model has a text encoder of gigabytes, from the names and sizes of files: no file is opened."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tiler.errors import TilerError
from tiler.request import RenderRequest
from tiler.weights.folders import find_model, model_files
from tiler.weights.hub import is_hub_id
from tiler.weights.places import expand, hub_cache

LARGE = 10**9  # bytes: T5-XXL has 9.5 GB in fp16, an encoder of Stable Diffusion 0.2, SDXL's second one 1.4
_SINGLE = 8 * 10**9  # bytes: a single file larger than SDXL's holds a large encoder


def has_large_encoder(request: RenderRequest) -> bool:
    """Whether encoding the prompts of several pictures together justifies a process of its own. It does not for a small
    encoder, whose file costs less to read once more. False if the model cannot be found: other code reports that."""
    if request.prompt_embeds is not None:
        return False
    try:
        given = [text for text in (request.t5xxl, request.text_encoder, request.clip_g) if text is not None]
        if any(_bytes_of(expand(text)) > LARGE for text in given):
            return True
        return _is_large(request.model, request.model_dirs) or (
            request.diffusion_model is not None and request.t5xxl is None and _has_models(request.model_dirs)
        )
    except (TilerError, OSError):
        return False


@cache
def _has_models(folders: tuple[Path, ...]) -> bool:
    return bool(model_files(folders))


@cache
def _is_large(model: str, folders: tuple[Path, ...]) -> bool:
    path = expand(model)
    if not path.exists() and (known := find_model(model, folders)) is not None:
        path = known
    if path.is_file():
        return path.stat().st_size > _SINGLE
    return any(
        _bytes_of(encoder) > LARGE for folder in _folders(path, model) for encoder in folder.glob("text_encoder*")
    )


def _folders(path: Path, model: str) -> Iterator[Path]:
    """The model's own folder, or its snapshots in the hub's cache."""
    if path.is_dir():
        yield path
    elif is_hub_id(model):
        yield from (hub_cache() / f"models--{model.replace('/', '--')}").glob("snapshots/*")


def _bytes_of(path: Path) -> int:
    files = path.glob("*.safetensors") if path.is_dir() else (path,)
    return sum(file.stat().st_size for file in files)
