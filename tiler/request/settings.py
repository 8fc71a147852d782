"""Settings that a user gives once: the configuration file, and the folders of models, LoRAs, embeddings and
autoencoders.

On the command line, typed options override those of the file. The folders are searched when a file is given by its
name.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator, Mapping
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from tiler.errors import UsageError

WEIGHTS = (".safetensors", ".gguf")
_MAX_BYTES = 1_000_000
_DEPTH = 8  # levels of folders to search


class Kind(StrEnum):
    """The kind of files in a folder; its value is the key of such folders in the configuration file."""

    MODEL = "model_dirs"
    LORA = "lora_dirs"
    EMBEDDING = "embedding_dirs"
    VAE = "vae_dirs"
    TEXT_ENCODER = "text_encoder_dirs"

    @property
    def variable(self) -> str:
        """The environment variable that lists folders of this kind, such as TILER_MODEL_DIRS."""
        return f"TILER_{self.upper()}"


# The file locations of AUTOMATIC1111 (and Forge), and of ComfyUI. A folder of models identifies a program's root.
_ROOTS: tuple[Mapping[Kind, tuple[str, ...]], ...] = (
    {
        Kind.MODEL: ("models/Stable-diffusion",), Kind.LORA: ("models/Lora",), Kind.EMBEDDING: ("embeddings",),
        Kind.VAE: ("models/VAE",), Kind.TEXT_ENCODER: ("models/text_encoder",),
    },
    {
        Kind.MODEL: ("models/checkpoints", "models/diffusion_models", "models/unet"), Kind.LORA: ("models/loras",),
        Kind.EMBEDDING: ("models/embeddings",), Kind.VAE: ("models/vae",),
        Kind.TEXT_ENCODER: ("models/text_encoders", "models/clip"),
    },
)  # fmt: skip


class Setting(NamedTuple):
    """A value and its source: the name of an environment variable, the path of the configuration file, or "default"."""

    value: Any
    source: str


def config_path() -> Path | None:
    """$TILER_CONFIG, else tiler/config.toml in $XDG_CONFIG_HOME or ~/.config; None if there is no home folder."""
    if given := os.environ.get("TILER_CONFIG"):
        return Path(given)
    if given := os.environ.get("XDG_CONFIG_HOME"):
        return Path(given) / "tiler/config.toml"
    try:
        return Path.home() / ".config/tiler/config.toml"
    except RuntimeError:
        return None


def read_config() -> dict[str, Any]:
    """The content of the configuration file; empty if there is none. It is cached until the file changes. Raises
    UsageError if the file cannot be read."""
    path = config_path()
    if path is None:
        return {}
    try:
        state = path.stat()
    except OSError:
        return dict(_read(path))  # raises the error that applies
    return dict(_read_once(path, state.st_ino, state.st_mtime_ns, state.st_size))


@lru_cache(maxsize=1)
def _read_once(path: Path, *state: int) -> Mapping[str, Any]:
    return _read(path)


def _read(path: Path) -> Mapping[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        if os.environ.get("TILER_CONFIG"):
            raise UsageError(f"TILER_CONFIG={path}: no such file; `tiler config edit` creates it") from error
        return {}
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    if len(data) > _MAX_BYTES:
        raise UsageError(f"{path}: larger than {_MAX_BYTES} bytes; this is no configuration file")
    try:
        return tomllib.loads(data.decode("utf-8-sig"))
    except (UnicodeDecodeError, RecursionError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path}: not valid TOML ({error}); `tiler config edit` opens it") from error


def named_folders(kind: Kind) -> Setting:
    """The folders that the environment variable or the configuration file lists for `kind`, as written there. Raises
    UsageError."""
    if given := os.environ.get(kind.variable):
        return Setting(tuple(Path(text) for text in given.split(os.pathsep) if text), kind.variable)
    said, path = read_config().get(kind.value), config_path()
    if said is None or path is None:
        return Setting((), "default")
    texts = [said] if isinstance(said, str) else said
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise UsageError(f'{path}: {kind} = {said!r} is not a list of folders; write it like ["~/models"]')
    return Setting(tuple(path.parent / os.path.expanduser(text) for text in texts), str(path))


def folders(kind: Kind) -> tuple[Path, ...]:
    """The existing folders in which to look for files of a `kind`, in order of search.

    A folder of AUTOMATIC1111, Forge or ComfyUI stands for its sub-folder of that kind. If it is listed in model_dirs,
    it also provides its sub-folders of the other kinds. Raises UsageError if the configuration cannot be read.
    """
    named = [(folder, True) for folder in named_folders(kind).value]
    if kind is not Kind.MODEL:
        named += [(folder, False) for folder in named_folders(Kind.MODEL).value]
    found: dict[Path, None] = {}
    for folder, is_own in named:
        folder = Path(os.path.expanduser(folder))
        root = next((root for root in _ROOTS if any((folder / name).is_dir() for name in root[Kind.MODEL])), None)
        if root is not None:
            found |= dict.fromkeys(folder / name for name in root[kind])
        elif is_own:
            found[folder] = None
    return tuple(folder for folder in found if folder.is_dir())


def listed(kind: Kind) -> Iterator[tuple[str, Path]]:
    """The files of a `kind` (and, for models, folders in diffusers layout), each with its name: its path relative to
    the searched folder, without the ending. Sorted within each folder; circular links are followed once. Raises
    UsageError."""
    for folder in folders(kind):
        for path in weight_files(folder, pipelines=kind is Kind.MODEL):
            if _is_vae_of_model(path, kind):
                continue
            name = path.name if path == folder else path.relative_to(folder).as_posix()
            yield next((name.removesuffix(end) for end in WEIGHTS if name.lower().endswith(end)), name), path


def find(kind: Kind, name: str) -> tuple[Path, ...]:
    """All files of a `kind` that match `name`: the stem, the file name, or the last parts of the path ("sub/dream").
    Raises UsageError."""
    name = name.replace(os.sep, "/")
    found = dict.fromkeys(
        path for known, path in listed(kind) if f"/{known}".endswith(f"/{name}") or f"/{path}".endswith(f"/{name}")
    )
    return tuple(found)


def weight_files(folder: Path, *, pipelines: bool, leave_out: frozenset[str] = frozenset()) -> Iterator[Path]:
    """The weight files in `folder` and several levels of sub-folders, sorted within each. With `pipelines`, a folder in
    diffusers layout is returned itself, instead of its files. Hidden folders are skipped, and so are those whose
    lower-case name is in `leave_out`. Circular links are followed once, and unreadable entries are skipped."""
    return _walk(folder, pipelines, leave_out, _DEPTH, set())


def _walk(
    folder: Path, pipelines: bool, leave_out: frozenset[str], depth: int, seen: set[tuple[int, int]]
) -> Iterator[Path]:
    try:
        state = folder.stat()
        if (state.st_dev, state.st_ino) in seen:
            return
        seen.add((state.st_dev, state.st_ino))
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return
    if pipelines and any(entry.name == "model_index.json" for entry in entries):
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
            yield from _walk(path, pipelines, leave_out, depth - 1, seen)
        elif not is_folder and path.suffix.lower() in WEIGHTS and path.is_file():
            yield path


def _is_vae_of_model(path: Path, kind: Kind) -> bool:
    """Whether a file is NAME.vae.safetensors in a model folder, and thus not a model."""
    return kind is Kind.MODEL and path.stem.lower().endswith(".vae")
