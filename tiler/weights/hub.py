"""Checkpoints of the Hugging Face hub in huggingface_hub's own cache. Only the files that are needed are downloaded."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tiler.errors import ModelError, OfflineError, StorageError
from tiler.weights.flavours import (
    choose_flavour,
    find_weights,
    flavour_of,
    flavours,
    names_in,
    nothing_to_read,
    read_json,
)
from tiler.weights.places import give_the_hub_a_home, hub_cache

INDEX = "model_index.json"
DEFAULTS = "tiler.toml"  # what a model says of its own renders
_LARGE_UNUSED = "image_encoder", "safety_checker"
_UNUSED = "feature_extractor", *_LARGE_UNUSED
_WEIGHTLESS = re.compile("Tokenizer|Scheduler|Processor|FeatureExtractor")  # in the name of a part's class
_TEXT = "text_encoder", "tokenizer"  # how the names begin of what encodes prompts
_CONFIGS = ".json", ".txt", ".model"
_SINGLE = "config.json", "diffusion_pytorch_model*.safetensors*", "model*.safetensors*"
_UNWRITABLE = errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT


def parts_of(index: Mapping[str, Any], *, reads_text: bool = True) -> dict[str, bool]:
    """From model_index.json: the folders of the parts that a picture needs, and whether each has weights. Text encoders
    and tokenizers are left out if no prompt has to be encoded."""
    return {
        name: not _WEIGHTLESS.search(value[1])
        for name, value in index.items()
        if isinstance(value, list) and len(value) == 2 and all(isinstance(v, str) and v for v in value)
        if reads_text or not name.startswith(_TEXT)
        if name not in _UNUSED and re.fullmatch(r"[A-Za-z]\w*", name)
    }


def is_hub_id(model: str) -> bool:
    parts = model.split("/")
    return len(parts) == 2 and all(parts) and not model.startswith((".", "~", "/"))


def cached_repository(path: Path, revision: str | None) -> tuple[str, Path] | None:
    """For a folder in huggingface_hub's cache (`models--org--name`, its `snapshots`, or one of these): the hub id, and
    the folder of a snapshot. None for any other folder. Raises ModelError."""
    path = path.resolve()
    base = next((p for p in (path, *path.parents[:2]) if p.name.startswith("models--")), None)
    if base is None or not (base / "snapshots").is_dir():
        return None
    repo, snapshots = base.name.removeprefix("models--").replace("--", "/"), base / "snapshots"
    if path.parent == snapshots:
        return repo, path
    if path not in (base, snapshots):
        return None
    there, ref = names_in(snapshots), base / "refs" / (revision or "main")
    commit = ref.read_text().strip() if ref.is_file() else revision
    if commit in there:
        return repo, snapshots / commit
    if revision is None and len(there) == 1:
        return repo, snapshots / there[0]
    which = "several revisions" if revision is None else f"no revision {revision}"
    raise ModelError(f"{path} holds {which if there else 'no revision'}; give --revision: {', '.join(there) or '?'}")


def fetch_command(repo: str, revision: str | None, files: Iterable[str] = ()) -> str:
    """The command that downloads `files` of a repository. Without `files`: everything that a picture may need, that is
    configs, tokenizers, and the fp16 and plain weights of every part, since it is unknown here which of them exist."""
    if files := list(files):
        what = " ".join(f"'{file}'" for file in files)
    else:
        patterns = INDEX, DEFAULTS, "*/*.json", "*/*.txt", "*/*.model", "*/*model*.safetensors"
        left_out = "*.non_ema*", "*.bf16*", *(f"{part}/*" for part in _LARGE_UNUSED)
        what = " ".join([*(f"--include '{p}'" for p in patterns), *(f"--exclude '{p}'" for p in left_out)])
    return f"hf download {repo} {what}" + (f" --revision {revision}" if revision else "")


def from_hub(model: str, variant: str | None, revision: str | None, *, reads_text: bool = True) -> Path:
    """The folder of a repository in diffusers layout: from the cache if it is complete there, else downloaded. If no
    prompt has to be encoded, text encoders are neither required nor downloaded. Raises ModelError, OfflineError,
    StorageError."""
    cached = _cached(model, revision, INDEX)
    if cached is not None and complete(cached, variant, all_alike=variant is not None, reads_text=reads_text):
        return cached
    state = "is not in the cache" if cached is None else "is in the cache only in part"
    try:
        return _fetch(model, variant, revision, state, reads_text=reads_text)
    except OfflineError:
        if cached is not None and complete(cached, variant, all_alike=False, reads_text=reads_text):
            return cached  # parts of several flavours: as the repository has them, for all that can be known
        raise


def single_from_hub(model: str) -> Path:
    """The folder of a repository with a single model, config.json beside its weights. Raises the same errors as
    `from_hub`."""
    cached = _cached(model, None, "config.json")
    if cached is not None and _readable(cached, None):
        return cached
    state = "is not in the cache" if cached is None else "is in the cache only in part"
    command = f"hf download {model} " + " ".join(f"--include '{pattern}'" for pattern in _SINGLE)
    with _reached(model, command, state):
        return _download(model, None, _SINGLE)


def complete(folder: Path, variant: str | None, *, all_alike: bool, reads_text: bool = True) -> bool:
    """Whether a folder has all files of its parts; with `all_alike`, the weights of each in the requested variant."""
    try:
        parts = parts_of(read_json(folder / INDEX), reads_text=reads_text)
    except ModelError:
        return False
    for part, weighted in parts.items():
        names = names_in(folder / part)
        if not names or (weighted and not _readable(folder / part, variant)):
            return False
        if weighted and all_alike and variant not in flavours(names):
            return False
    return True


def _readable(folder: Path, variant: str | None) -> bool:
    try:
        return (folder / "config.json").exists() and all(f.exists() for f in find_weights(folder, variant).files)
    except ModelError:
        return False


def _cached(model: str, revision: str | None, file: str) -> Path | None:
    """The cache folder of a repository, if `file` is in it. It is looked up by one file, because huggingface_hub does
    not return a folder that lacks any file of the repository's list."""
    give_the_hub_a_home()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(
                model, revision=revision, allow_patterns=[file], local_files_only=True, cache_dir=hub_cache()
            )
        )
    except HFValidationError as error:
        raise ModelError(f"{model}: no such folder, and no hub id either ({error})") from error
    except LocalEntryNotFoundError:
        return None
    return folder if (folder / file).exists() else None


def _fetch(model: str, variant: str | None, revision: str | None, state: str, *, reads_text: bool) -> Path:
    """Download model_index.json, and then the files of the same commit that are `wanted` according to it."""
    from huggingface_hub import HfApi

    with _reached(model, fetch_command(model, revision), state):
        folder = _download(model, revision, [INDEX])
        if not (folder / INDEX).exists():
            raise ModelError(f"{model}: this repository has no {INDEX}; a model is one in diffusers layout")
        files = HfApi().list_repo_files(model, revision=folder.name)
        needed = wanted(model, files, read_json(folder / INDEX), variant, reads_text=reads_text)
        return _download(model, folder.name, needed)


def wanted(
    model: str, files: Iterable[str], index: Mapping[str, Any], variant: str | None, *, reads_text: bool = True
) -> list[str]:
    """Of a repository's files, those that are needed. Raises ModelError for a part whose weights tiler cannot read."""
    folders: dict[str, list[str]] = {}
    for file in files:
        folder, _, name = file.rpartition("/")
        folders.setdefault(folder, []).append(name)
    needed = [INDEX, *(name for name in folders.get("", ()) if name == DEFAULTS)]
    for part, weighted in parts_of(index, reads_text=reads_text).items():
        names = folders.get(part, [])
        flavour = choose_flavour(names, variant) if weighted else None
        if weighted and flavour is None:
            raise nothing_to_read(f"{model}/{part}", names, variant)
        for name in names:
            own = flavour_of(name)
            if name.endswith(_CONFIGS) if own is None else own == flavour:
                needed.append(f"{part}/{name}")
    return needed


def _download(model: str, revision: str | None, patterns: Iterable[str]) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, revision=revision, allow_patterns=list(patterns), cache_dir=hub_cache()))


@contextmanager
def _reached(model: str, command: str, state: str) -> Iterator[None]:
    """Turn huggingface_hub's exceptions into TilerErrors. `command` downloads the missing files elsewhere."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except ModelError:
        raise
    except GatedRepoError as error:
        raise ModelError(
            f"{model}: its owner asks for your consent; give it at https://huggingface.co/{model}, then run `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{model}: the hub has no such model, or only for others; check its name, or run `hf auth login` if it is private"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{model}: the hub has no such revision of it; check --revision") from error
    except Exception as error:  # of whichever HTTP library huggingface_hub uses
        if isinstance(error, OSError) and error.errno in _UNWRITABLE:
            raise StorageError(
                f"{error.filename or hub_cache()}: {model} cannot be stored ({error.strerror}); free some space, or set HF_HOME to another folder"
            ) from error
        raise OfflineError(
            f"{model} {state} and the hub cannot be reached ({_reason(error)}); check the name and the network, "
            f"or run where there is one: {command}"
        ) from error


def _reason(error: BaseException) -> str:
    """Why the hub cannot be reached, from the exception that began it."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    while (before := error.__cause__) is not None:
        if isinstance(error, OfflineModeIsEnabled):
            break
        error = before
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    said = getattr(error, "strerror", None) or (str(error).splitlines() or [""])[0]
    return re.sub(r"^\[Errno -?\d+\] ", "", said)[:80] or type(error).__name__
