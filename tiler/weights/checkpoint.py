"""Find a checkpoint: the embedded model, a folder in diffusers layout, a single file, or a hub id in huggingface_hub's
own cache. Reads only JSON and safetensors, and refuses pickles. Knows file names, but not the purpose of the parts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tiler.errors import ModelError
from tiler.request.settings import Kind, named
from tiler.weights import hub
from tiler.weights.flavours import (
    MAX_INDEX_BYTES,
    WEIGHTS,
    choose_flavour,
    find_weights,
    flavours,
    names_in,
    read_json,
    refuse_pickle,
)
from tiler.weights.folders import find_model, near_names
from tiler.weights.index import TensorInfo, merge_indexes
from tiler.weights.layouts import check_map, understood
from tiler.weights.places import expand

MINI = "mini"  # the embedded model
QUANTO_MAP = "quanto_qmap.json"  # which modules optimum-quanto quantised, and how


@dataclass(frozen=True, kw_only=True)
class PartSource:
    """A part that is not a folder of the checkpoint: its config, and the location of its parameters in files of any
    kind. `label` tells people where it comes from and why."""

    config: Mapping[str, Any]
    index: Mapping[str, TensorInfo] = field(default_factory=dict)
    label: str = ""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A folder in diffusers layout, or a single `file` in `folder`; after its parts were found, they have `sources`.
    `variant` is the preferred flavour of weight files ("fp16"). `notes` report surprises to the user."""

    name: str
    folder: Path
    variant: str | None
    revision: str | None = None
    repository: str | None = None  # its id on the hub, if it came from there
    notes: tuple[str, ...] = ()
    file: Path | None = None
    sources: Mapping[str, PartSource] = field(default_factory=dict)
    tokenizers: Mapping[str, Path] = field(default_factory=dict)  # folders that stand in for the checkpoint's own
    reads_text: bool = True  # False where nothing is to be encoded: text encoders and tokenizers may be missing

    def with_sources(
        self, sources: Mapping[str, PartSource], tokenizers: Mapping[str, Path], notes: tuple[str, ...]
    ) -> Checkpoint:
        """This checkpoint with sources for its parts, and more notes."""
        sources, tokenizers = {**self.sources, **sources}, {**self.tokenizers, **tokenizers}
        return replace(self, sources=sources, tokenizers=tokenizers, notes=(*self.notes, *notes))

    @property
    def known_as(self) -> str:
        """The model's hub id, or its absolute path, or `mini`; what is not UTF-8 in a path is replaced."""
        if self.repository is not None or self.name == MINI:
            return self.repository or self.name
        return os.fsencode(os.path.abspath(self.file or self.folder)).decode("utf-8", "replace")

    def has(self, part: str) -> bool:
        """Whether the part exists."""
        return part in self.sources or (self.file is None and (self.folder / part).is_dir())

    def has_weights(self, part: str) -> bool:
        """Whether the part's config and weights exist."""
        if part in self.sources:
            return True
        try:
            return self.file is None and (self.folder / part / "config.json").is_file() and bool(self.weights(part))
        except ModelError:
            return False

    def tokenizer(self, part: str) -> Path:
        """The folder with a tokenizer's files."""
        return self.tokenizers.get(part, self.folder / part)

    def config(self, part: str, file: str = "config.json") -> dict[str, Any]:
        """The JSON object of one part ("" is the top level). Raises ModelError."""
        if part in self.sources:
            return dict(self.sources[part].config)
        return read_json(self.folder / part / file)

    def weights(self, part: str) -> dict[str, TensorInfo]:
        """The index of one part's weight files; a quantised weight is one tensor (layouts.py). Raises ModelError."""
        if part in self.sources:
            return dict(self.sources[part].index)
        folder = self.folder / part
        index = understood(merge_indexes(list(find_weights(folder, self.variant, self._fetch(part)).files)))
        if (path := folder / QUANTO_MAP).is_file():
            check_map(path, index, read_json(path, MAX_INDEX_BYTES))
        return index

    def _fetch(self, part: str) -> str:
        if self.repository is None:
            return ""
        pattern = f"{part}/*.safetensors*" if part else "*.safetensors*"
        options = f" --revision {self.revision}" if self.revision else ""
        return f"run: hf download {self.repository} --include '{pattern}'{options}"


def resolve(
    model: str,
    *,
    variant: str | None = None,
    revision: str | None = None,
    model_dirs: Sequence[Path] = (),
    reads_text: bool = True,
) -> Checkpoint:
    """Find the checkpoint for `mini`, a folder, a file, the name of a model in `model_dirs` or else in the user's
    folders, or a hub id. If no prompt has to be encoded, its text encoders may be missing. Raises ModelError,
    UsageError, OfflineError, StorageError."""
    return replace(_resolve(model, variant, revision, model_dirs, reads_text=reads_text), reads_text=reads_text)


def _resolve(
    model: str, variant: str | None, revision: str | None, model_dirs: Sequence[Path], *, reads_text: bool
) -> Checkpoint:
    if model == MINI:
        folder = Path(__file__).parents[1] / "models" / "mini"
        return Checkpoint(name=MINI, folder=folder, variant=None)
    path = expand(model)
    if not path.exists() and (known := find_model(model, model_dirs)) is not None:
        path = known
    if path.is_dir():
        if (cached := hub.cached_repository(path, revision)) is not None:
            return _checkpoint(cached[0], cached[1], variant, repository=cached[0])
        return _checkpoint(model, path, variant)
    if path.exists():
        refuse_pickle(path)
        if variant or revision:
            raise ModelError(
                f"{path}: --variant and --revision choose among the files of a folder or a repository; leave them out"
            )
        return Checkpoint(name=model, folder=path.parent, variant=None, file=path)
    if not hub.is_hub_id(model):
        raise ModelError(_not_found(model, model_dirs))
    folder = hub.from_hub(model, variant, revision, reads_text=reads_text)
    return _checkpoint(model, folder, variant, repository=model)


def _not_found(model: str, model_dirs: Sequence[Path]) -> str:
    """Advice about a model that does not exist."""
    folders = named((Kind.MODEL,), model_dirs)
    if "/" in model or not folders:
        hint = "" if folders else "; $TILER_MODEL_DIRS or --model-dir names folders to look in"
        return (
            f"{model}: no such folder or file; a model is `mini`, a folder in diffusers layout, a file, the name of one in "
            f"--model-dir, or a hub id like org/name{hint}"
        )
    near, where = near_names(model, model_dirs), ", ".join(map(str, folders))
    said = f"; did you mean {' or '.join(near)}?" if near else "; `tiler models` lists what is there."
    return (
        f"{model}: no model of this name in {where}{said} To download one: hf download ORG/NAME, then --model ORG/NAME"
    )


def resolve_part(model: str) -> Checkpoint:
    """Find a folder or hub id with a single model, config.json beside its weights. Raises ModelError, OfflineError,
    StorageError."""
    path = expand(model)
    if path.is_dir():
        repository, folder = hub.cached_repository(path, None) or (None, path)
        return Checkpoint(name=repository or model, folder=folder, variant=None, repository=repository)
    if path.exists() or not hub.is_hub_id(model):
        raise ModelError(
            f"{model}: no such folder; --tiny-vae takes a folder with config.json or a hub id like org/name"
        )
    folder = hub.single_from_hub(model)
    return Checkpoint(name=model, folder=folder, variant=None, revision=folder.name, repository=model)


def _checkpoint(name: str, folder: Path, variant: str | None, repository: str | None = None) -> Checkpoint:
    if not (folder / hub.INDEX).is_file():
        if (kind := _addition(folder)) is not None:
            raise ModelError(
                f"{folder}: this is {kind}, which goes with a model; give "
                + (f"it with {_FLAGS[kind]}" if kind in _FLAGS else "the model itself")
            )
        within = [child for child in names_in(folder) if (folder / child / hub.INDEX).is_file()]
        raise ModelError(
            f"{folder}: no {hub.INDEX} here; a model is a folder in diffusers layout, a single file or a hub id"
            + (f"; did you mean {folder / within[0]}?" if within else "")
        )
    return Checkpoint(
        name=name, folder=folder, variant=variant, revision=None if repository is None else folder.name,
        repository=repository, notes=tuple(_notes(name, folder, variant)),
    )  # fmt: skip


_FLAGS = {"a tiny autoencoder": "--tiny-vae", "an autoencoder": "--vae"}


def _addition(folder: Path) -> str | None:
    """The kind of add-on in the folder (LoRA, autoencoder, ControlNet and so on), if it is not a model that makes
    pictures."""
    names = names_in(folder)
    if "adapter_config.json" in names or any("lora" in name.lower() for name in names if name.endswith(WEIGHTS)):
        return "a LoRA"
    try:
        cls = str(read_json(folder / "config.json").get("_class_name")) if "config.json" in names else ""
    except ModelError:
        return None
    named = {"AutoencoderTiny": "a tiny autoencoder", "AutoencoderKL": "an autoencoder"}
    return named.get(cls) or next((f"a {k}" for k in ("ControlNet", "T2IAdapter", "MotionAdapter") if k in cls), None)


def _notes(name: str, folder: Path, variant: str | None) -> list[str]:
    """Notes on the parts with weights. Raises ModelError if none of them has the requested variant."""
    parts = [part for part, weighted in hub.parts_of(read_json(folder / hub.INDEX)).items() if weighted]
    names = {part: here for part in parts if flavours(here := names_in(folder / part))}
    lacking = [part for part, here in names.items() if variant and variant not in flavours(here)]
    if names and len(lacking) == len(names):
        known = sorted({flavour or "plain" for here in names.values() for flavour in flavours(here)})
        raise ModelError(
            f"{name}: no part has weights of variant {variant!r}, only {', '.join(known)}; give another --variant, or none"
        )
    notes, others = [], []
    for part, here in names.items():
        flavour = choose_flavour(here, variant)
        if part in lacking and flavour is not None:
            others.append(f"{part} ({flavour or 'plain'})")
        try:
            note = find_weights(folder / part, variant).note
        except ModelError:
            continue  # told when the part is opened
        notes += [note] if note else []
    if others:
        notes.insert(0, f"{name} has no {variant} weights of {', '.join(others)}: those are read")
    return notes
