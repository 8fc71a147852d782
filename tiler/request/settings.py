"""What a user says once: the configuration file and the folders with models, LoRAs, embeddings and autoencoders.

The command line puts the file's options under what is typed; the folders are for whoever looks for a file by its name.
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
_DEPTH = 8  # levels of folders that are looked into


class Kind(StrEnum):
    """What lies in a folder, by the folder's key in the configuration."""

    MODEL = "model_dirs"
    LORA = "lora_dirs"
    EMBEDDING = "embedding_dirs"
    VAE = "vae_dirs"
    TEXT_ENCODER = "text_encoder_dirs"

    @property
    def variable(self) -> str:
        """The environment variable that names such folders: TILER_MODEL_DIRS and the like."""
        return f"TILER_{self.upper()}"


# Where AUTOMATIC1111 (and Forge) and ComfyUI keep their files; any folder of models tells which program's root it is.
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
    """A value, and who said it: a variable of the environment, the configuration file, or nobody ("default")."""

    value: Any
    source: str


def config_path() -> Path | None:
    """$TILER_CONFIG, else tiler/config.toml in $XDG_CONFIG_HOME or ~/.config; None where no home is known."""
    if given := os.environ.get("TILER_CONFIG"):
        return Path(given)
    if given := os.environ.get("XDG_CONFIG_HOME"):
        return Path(given) / "tiler/config.toml"
    try:
        return Path.home() / ".config/tiler/config.toml"
    except RuntimeError:
        return None


def read_config() -> dict[str, Any]:
    """What the configuration file says; nothing where there is none. It is read once, and again where it has changed.
    Raises UsageError for one that cannot be read."""
    path = config_path()
    if path is None:
        return {}
    try:
        state = path.stat()
    except OSError:
        return dict(_read(path))  # which says why
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
            raise UsageError(f"TILER_CONFIG={path}: no such file; `tiler config edit` makes one") from error
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
    """The folders that the environment or the configuration file names for `kind`, as they stand there. Raises
    UsageError."""
    if given := os.environ.get(kind.variable):
        return Setting(tuple(Path(text) for text in given.split(os.pathsep) if text), kind.variable)
    said, path = read_config().get(kind.value), config_path()
    if said is None or path is None:
        return Setting((), "default")
    texts = [said] if isinstance(said, str) else said
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise UsageError(f'{path}: {kind} = {said!r} is no list of folders; write it like ["~/models"]')
    return Setting(tuple(path.parent / os.path.expanduser(text) for text in texts), str(path))


def folders(kind: Kind) -> tuple[Path, ...]:
    """The folders to look for files of a `kind` in, first to last; only those that are there.

    A folder of AUTOMATIC1111, Forge or ComfyUI stands for its own sub-folder of that kind, and one that is named among
    the model_dirs for those of the other kinds too. Raises UsageError for a configuration that cannot be read.
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
    """The files of a `kind`, and folders in diffusers layout among the models, each with its name: the path below its
    folder, without the ending. Sorted within a folder; links that go in circles are followed once. Raises
    UsageError."""
    for folder in folders(kind):
        for path in weight_files(folder, pipelines=kind is Kind.MODEL):
            if _is_vae_of_model(path, kind):
                continue
            name = path.name if path == folder else path.relative_to(folder).as_posix()
            yield next((name.removesuffix(end) for end in WEIGHTS if name.lower().endswith(end)), name), path


def find(kind: Kind, name: str) -> tuple[Path, ...]:
    """Every file of a `kind` that is called `name`: its stem or file name, or a part of its path that ends so
    ("sub/dream"). Raises UsageError."""
    name = name.replace(os.sep, "/")
    found = dict.fromkeys(
        path for known, path in listed(kind) if f"/{known}".endswith(f"/{name}") or f"/{path}".endswith(f"/{name}")
    )
    return tuple(found)


def weight_files(folder: Path, *, pipelines: bool, leave_out: frozenset[str] = frozenset()) -> Iterator[Path]:
    """The weight files in `folder` and some levels below, sorted within each; of `pipelines`, folders in diffusers
    layout, the folder instead of its files. Hidden folders are left out, and those that are called as `leave_out` says
    in lower case; links that go in circles are followed once, and what cannot be read is passed over."""
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
    """NAME.vae.safetensors beside NAME.safetensors is no model."""
    return kind is Kind.MODEL and path.stem.lower().endswith(".vae")
