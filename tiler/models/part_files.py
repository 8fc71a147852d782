"""Parts of models in single files of any naming scheme, and in folders with a config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tiler.errors import ModelError
from tiler.models.contents import Content, Contents, Kind, look
from tiler.models.conversions import renamed
from tiler.models.kinds import text_width
from tiler.weights import hub
from tiler.weights.flavours import find_weights, read_json, refuse_pickle
from tiler.weights.gguf import is_gguf, read_gguf
from tiler.weights.index import TensorInfo, merge_indexes, read_file
from tiler.weights.layouts import understood
from tiler.weights.places import expand

Index = dict[str, TensorInfo]
_CONFIGS = "config.json"
_TOKENIZERS = "tokenizer.json", "spiece.model", "tokenizer.model", "vocab.json"


class WeightFile:
    """A weight file: its index, its metadata, and the parts that it contains. Raises ModelError."""

    def __init__(self, path: Path) -> None:
        refuse_pickle(path)
        self.path, self._gguf = path, path.suffix != ".safetensors" and is_gguf(path)
        self.words: Mapping[str, str] = {}  # the texts in its header, of safetensors
        self._behind = 0
        if self._gguf:
            self.index: Index = read_gguf(path).tensors
        else:
            tensors, self.words, self._behind = read_file(path)
            self.index = understood(tensors)
        self.contents: Contents = look({name: info.shape for name, info in self.index.items()}, str(path))

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user might not expect of the file."""
        behind = f"{self.path.name}: {self._behind} bytes behind its last tensor are not read"
        return (behind,) if self._behind else ()

    def parts(self, *kinds: Kind) -> list[FoundPart]:
        """Its parts of these kinds."""
        return [FoundPart.of_file(self, part) for part in self.contents.find(*kinds)]


class FoundPart(NamedTuple):
    """A part: its parameters under diffusers' or transformers' names, the path of its file or folder, its config if it
    came from a folder, and a folder with its tokenizer if one is beside it."""

    kind: Kind
    tensors: Index
    path: Path
    config: dict[str, Any] | None = None
    tokenizer: Path | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: info.shape for name, info in self.tensors.items()}

    @property
    def width(self) -> int | None:
        """Of a text encoder's states."""
        if self.config is not None:
            return self.config.get("hidden_size", self.config.get("d_model"))
        return text_width(self.shapes)

    @classmethod
    def of_file(cls, file: WeightFile, part: Content) -> FoundPart:
        return cls(part.kind, renamed(part, file.index), file.path, tokenizer=_tokenizer_beside(file.path.parent))


def find_parts(given: str, flag: str, kinds: Sequence[Kind]) -> list[FoundPart]:
    """The parts of these `kinds` at the path or hub id `given` with `flag`; at least one. Raises ModelError,
    OfflineError, StorageError."""
    path = expand(given)
    if path.is_dir():
        found = [_in_folder(path, flag)]
    elif path.exists():
        file = WeightFile(path)
        found = file.parts(*kinds)
        if not found:
            raise ModelError(f"{path}: this file holds {file.contents.named}; {flag} takes {_or(kinds)}")
    elif hub.is_hub_id(given):
        found = [_in_folder(hub.single_from_hub(given), flag)]
    else:
        raise ModelError(f"{given}: no such file or folder; {flag} takes {_or(kinds)}")
    if found[0].kind not in kinds:
        raise ModelError(f"{path}: this is {found[0].kind}; {flag} takes {_or(kinds)}")
    return found


def _or(kinds: Sequence[Kind]) -> str:
    return "a file or folder with " + " or ".join(kinds)


def _in_folder(folder: Path, flag: str) -> FoundPart:
    """A single model with its config, or the part of a complete checkpoint's folder that the flag names."""
    if not (folder / _CONFIGS).is_file():
        names = ", ".join(sorted(path.name for path in folder.iterdir())[:6])
        raise ModelError(
            f"{folder}: no config.json here ({names or 'empty'}); {flag} takes a folder with one, or a file"
        )
    config = read_json(folder / _CONFIGS)
    kind = _kind_of(config)
    if kind is None:
        named = config.get("_class_name") or config.get("model_type")
        raise ModelError(f"{folder}/config.json: {named!r} is no part that {flag} takes")
    index = understood(merge_indexes(list(find_weights(folder, None).files)))
    beside = folder.parent / folder.name.replace("text_encoder", "tokenizer")
    tokenizer = beside if beside != folder and beside.is_dir() else _tokenizer_beside(folder)
    return FoundPart(kind, index, folder, config, tokenizer)


def _kind_of(config: Mapping[str, Any]) -> Kind | None:
    cls, model = str(config.get("_class_name", "")), str(config.get("model_type", ""))
    known = {"AutoencoderKL": Kind.VAE, "AutoencoderTiny": Kind.TINY_VAE}
    if model.startswith("clip"):
        return Kind.CLIP
    return Kind.T5 if model in ("t5", "umt5") else known.get(cls)


def _tokenizer_beside(folder: Path) -> Path | None:
    """The folder itself, if it contains a tokenizer's files."""
    return folder if any((folder / name).is_file() for name in _TOKENIZERS) else None
