"""Find a checkpoint: the embedded one, a folder in diffusers layout, or a hub id in huggingface_hub's own cache.

Reads JSON and safetensors only; a pickle is refused. Knows file names, not what the parts do.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiler.errors import ModelError, OfflineError
from tiler.weights.index import TensorInfo, merge_indexes, open_regular

MAX_CONFIG_BYTES = 1_000_000
_STEMS = ("diffusion_pytorch_model", "model")
_NEEDED = ["model_index.json", "*/config.json", "scheduler/*.json", "tokenizer/*"]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A folder in diffusers layout. `variant` is the preferred flavour of weight files ("fp16")."""

    name: str
    folder: Path
    variant: str | None
    revision: str | None = None

    def config(self, part: str, file: str = "config.json") -> dict[str, Any]:
        """The JSON object of one part ("" is the top level). Raises ModelError."""
        return read_json(self.folder / part / file)

    def weights(self, part: str) -> dict[str, TensorInfo]:
        """The index of one part's weight files. Raises ModelError."""
        return merge_indexes(weight_files(self.folder / part, self.variant))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a small regular file. Raises ModelError."""
    fd = open_regular(path)
    try:
        raw = os.read(fd, MAX_CONFIG_BYTES + 1)
    finally:
        os.close(fd)
    if len(raw) > MAX_CONFIG_BYTES:
        raise ModelError(f"{path}: larger than {MAX_CONFIG_BYTES} bytes; this is no model config")
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not valid JSON; download it again") from error
    if not isinstance(data, dict):
        raise ModelError(f"{path}: not a JSON object; download it again")
    return data


def weight_files(folder: Path, variant: str | None) -> list[Path]:
    """The safetensors files of a part: the asked variant, else fp16, else plain; one file or the shards of an index."""
    flavours = [f".{variant}"] if variant else [".fp16", ""]
    for flavour in flavours:
        for stem in _STEMS:
            for name in (f"{stem}{flavour}.safetensors.index.json", f"{stem}.safetensors.index{flavour}.json"):
                if (folder / name).exists():
                    shards = read_json(folder / name).get("weight_map", {})
                    files = sorted(set(shards.values())) if isinstance(shards, dict) else []
                    if not files or not all(isinstance(f, str) and Path(f).name == f for f in files):
                        raise ModelError(f"{folder / name}: weight_map does not name the shards; download it again")
                    return [folder / f for f in files]
            if (folder / f"{stem}{flavour}.safetensors").exists():
                return [folder / f"{stem}{flavour}.safetensors"]
    found = sorted(p.name for p in folder.glob("*")) if folder.is_dir() else []
    if pickles := [f for f in found if f.endswith((".bin", ".ckpt", ".pt", ".pth"))]:
        raise ModelError(
            f"{folder / pickles[0]}: a pickle can run code when it is opened, so tiler reads safetensors only; "
            "convert it elsewhere (diffusers: pipe.save_pretrained(FOLDER, safe_serialization=True))"
        )
    what = f"variant {variant!r} of the weights" if variant else "*.safetensors"
    raise ModelError(f"{folder}: no {what} here; found {', '.join(found[:6]) or 'nothing'}")


def resolve(model: str, *, variant: str | None = None, revision: str | None = None) -> Checkpoint:
    """`mini`, a folder, or a hub id → Checkpoint. Raises ModelError, OfflineError."""
    if model == "mini":
        folder = Path(__file__).parents[1] / "models" / "mini"
        return Checkpoint(name="mini", folder=folder, variant=None)
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise ModelError(
                f"{path}: no model_index.json here; --model takes a folder in diffusers layout or a hub id"
            )
        return Checkpoint(name=model, folder=path, variant=variant)
    if path.exists():
        kind = (
            "a pickle; tiler reads safetensors only"
            if path.suffix in (".ckpt", ".pt", ".bin", ".pth")
            else "a single file"
        )
        raise ModelError(f"{path}: this is {kind}; --model takes a folder in diffusers layout or a hub id")
    if not _is_hub_id(model):
        raise ModelError(
            f"{model}: no such folder; --model takes `mini`, a folder in diffusers layout or a hub id like org/name"
        )
    return _from_hub(model, variant, revision)


def resolve_part(model: str) -> Checkpoint:
    """A folder or hub id that holds a single model, config.json beside its weights. Raises ModelError, OfflineError."""
    path = Path(model).expanduser()
    if path.is_dir():
        return Checkpoint(name=model, folder=path, variant=None)
    if path.exists() or not _is_hub_id(model):
        raise ModelError(
            f"{model}: no such folder; --tiny-vae takes a folder with config.json or a hub id like org/name"
        )
    files = ["config.json", "*.safetensors"]
    folder = _snapshot(model, None, files, local_only=True) or _snapshot(model, None, files, local_only=False)
    assert folder is not None  # with the network, _snapshot raises instead
    return Checkpoint(name=model, folder=folder, variant=None, revision=folder.name)


def _is_hub_id(model: str) -> bool:
    parts = model.split("/")
    return len(parts) == 2 and all(parts) and not model.startswith((".", "~", "/"))


def _offline(model: str, revision: str | None, files: list[str], state: str = "is not in the cache") -> str:
    command = f"hf download {model} " + " ".join(f"--include '{p}'" for p in files)
    command += f" --revision {revision}" if revision else ""
    return f"{model} {state} and the hub cannot be reached; where there is a network, run: {command}"


def _snapshot(model: str, revision: str | None, files: list[str], local_only: bool) -> Path | None:
    """huggingface_hub's folder of a repository. With `local_only`, None when nothing of it is in the cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=files, local_files_only=local_only))
    except LocalEntryNotFoundError as error:
        if local_only:
            return None
        raise OfflineError(_offline(model, revision, files)) from error
    except (RepositoryNotFoundError, RevisionNotFoundError, GatedRepoError) as error:
        raise ModelError(
            f"{model}: the hub refuses it ({type(error).__name__}); check the id, the revision and `hf auth login`"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise OfflineError(_offline(model, revision, files)) from error


def _from_hub(model: str, variant: str | None, revision: str | None) -> Checkpoint:
    flavour = f".{variant}" if variant else ".fp16"
    files = [*_NEEDED, *(f"{part}/*{flavour}*.safetensors*" for part in ("unet", "vae", "text_encoder"))]
    for include in (files, [*_NEEDED, *(f"{part}/*.safetensors*" for part in ("unet", "vae", "text_encoder"))]):
        for local_only in (True, False):
            folder = _snapshot(model, revision, include, local_only)
            if folder is None:
                continue
            if _complete(folder, variant):
                return Checkpoint(name=model, folder=folder, variant=variant, revision=folder.name)
            if os.environ.get("HF_HUB_OFFLINE") == "1":
                break
    raise OfflineError(_offline(model, revision, files, "is in the cache only in part"))


def _complete(folder: Path, variant: str | None) -> bool:
    try:
        return all(
            all(f.exists() for f in weight_files(folder / part, variant)) for part in ("unet", "vae", "text_encoder")
        )
    except ModelError:
        return False
