"""Settings that a user gives once: the configuration file, and the folders of models, LoRAs, embeddings and
autoencoders.

On the command line, typed options override those of the file. weights/folders.py finds files in the folders.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping, Sequence
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from tiler.errors import UsageError

_MAX_BYTES = 1_000_000


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
        Kind.MODEL: ("models/Stable-diffusion", "models/diffusers"), Kind.LORA: ("models/Lora",),
        Kind.EMBEDDING: ("embeddings",),
        Kind.VAE: ("models/VAE",), Kind.TEXT_ENCODER: ("models/text_encoder",),
    },
    {
        Kind.MODEL: ("models/checkpoints", "models/diffusion_models", "models/unet", "models/diffusers"),
        Kind.LORA: ("models/loras",), Kind.EMBEDDING: ("models/embeddings",), Kind.VAE: ("models/vae",),
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


def named(kinds: Sequence[Kind], given: Sequence[Path] = ()) -> tuple[Path, ...]:
    """The folders `given`, else those of several kinds that the environment or the configuration file names, each once.
    They need not exist. Raises UsageError."""
    found = given or [folder for kind in kinds for folder in named_folders(kind).value]
    return tuple(dict.fromkeys(Path(os.path.expanduser(folder)) for folder in found))


def folders(kind: Kind, given: Sequence[Path] = ()) -> tuple[Path, ...]:
    """The existing folders in which to look for files of a `kind`, in order of search: those `given`, else those of the
    environment or the configuration file.

    A folder of AUTOMATIC1111, Forge or ComfyUI stands for its sub-folder of that kind. If it is listed in model_dirs,
    it also provides its sub-folders of the other kinds. Raises UsageError if the configuration cannot be read.
    """
    searched = [(folder, True) for folder in named((kind,), given)]
    if kind is not Kind.MODEL and not given:
        searched += [(folder, False) for folder in named((Kind.MODEL,))]
    found: dict[Path, None] = {}
    for folder, is_own in searched:
        root = next((root for root in _ROOTS if any((folder / name).is_dir() for name in root[Kind.MODEL])), None)
        if root is not None:
            found |= dict.fromkeys(folder / name for name in root[kind])
        elif is_own:
            found[folder] = None
    return tuple(folder for folder in found if folder.is_dir())
