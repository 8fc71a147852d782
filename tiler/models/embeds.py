"""Encoded prompts in files: cached for the next render with the same words, or carried to a machine without text
encoders.

A safetensors file holds `tokens.N` and, for families with one, `pooled.N` of each text in fp32, and describes them in
its metadata.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tiler.compute.cpu import computed_by
from tiler.errors import ModelError, StorageError, TilerError, UsageError
from tiler.files import atomic
from tiler.models.family import Family
from tiler.models.reading import ReadAs
from tiler.models.samples import Prompt
from tiler.request import Emphasis
from tiler.request.choices import MAX_CLIP_SKIP
from tiler.weights import packed
from tiler.weights.caches import INT8_VERSION, MODEL
from tiler.weights.index import open_regular, read_index, read_metadata
from tiler.weights.places import cache_home
from tiler.weights.store import WeightStore

CACHE_BYTES = (
    700_000_000  # of a folder with kept prompts; those that were not used for longest go. T5-XXL's are 8 MB each, and
    # a queue encodes those of 64 pictures ahead
)
_VERSION = "2"  # of how prompts are encoded: another one where the same words give other embeddings
_FORMAT = "tiler-prompts"
_TOKENIZER_BYTES = 50_000_000  # a file of a tokenizer that is larger is not looked at beyond them

Text = str | None
"""A prompt; None is a negative prompt that was not given."""


class Encoded(NamedTuple):
    """A prompt's embeddings, and the notes that the user received about it."""

    prompt: Prompt
    notes: tuple[str, ...] = ()


def kind_of(family: Family) -> str:
    """A description of a family's encoded prompts: its name, and the sizes of the longest tokens and of the pooled
    vector. Also shown to people."""
    (sample,) = family.example([0], (family.granularity, family.granularity))
    _, length, width = sample.prompt.tokens.shape
    pooled = "" if sample.prompt.pooled is None else f" and a vector of {sample.prompt.pooled.shape[1]}"
    return f"{type(family).__name__}, {length} tokens of width {width}{pooled}"


def write_encoded(
    path: Path,
    texts: Mapping[Text, Encoded],
    facts: Mapping[str, str],
    *,
    replace: bool = True,
    in_cache: bool = False,
) -> None:
    """Write the file atomically, with `facts` in its metadata. Without `replace`, a file that has appeared in the
    meantime is kept; `in_cache`: nobody asked for the file by its name. Raises StorageError."""
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    for number, (prompt, _) in enumerate(texts.values()):
        for name, tensor in (("tokens", prompt.tokens), ("pooled", prompt.pooled)):
            if tensor is not None:
                tensors[f"{name}.{number}"] = tensor.clone(memory_format=torch.contiguous_format)  # none shares memory
    said = {"format": _FORMAT, "version": _VERSION, "texts": json.dumps(list(texts))}
    said["notes"] = json.dumps([encoded.notes for encoded in texts.values()])
    with atomic(path, replace=replace, in_cache=in_cache) as file:
        file.write(save(tensors, metadata=said | dict(facts)))


def read_encoded(path: Path) -> tuple[dict[Text, Encoded], dict[str, str]]:
    """The texts of a file with their embeddings, and its metadata. Raises ModelError for a file of another kind, and
    for a damaged one."""
    index, said = read_index(path), read_metadata(path)
    other = ModelError(f"{path}: holds no encoded prompts of this version; `tiler encode` writes them")
    if said.get("format") != _FORMAT or said.get("version") != _VERSION:
        raise other
    try:
        texts, notes = json.loads(said["texts"]), json.loads(said["notes"])
    except (KeyError, ValueError, RecursionError) as error:
        raise other from error
    if not _are_texts(texts) or not isinstance(notes, list) or len(notes) != len(texts):
        raise other
    if any(info.dtype != "F32" for info in index.values()):
        raise other
    found: dict[Text, Encoded] = {}
    with WeightStore(index) as store:
        for number, (text, told) in enumerate(zip(texts, notes, strict=True)):
            tokens, pooled = f"tokens.{number}", f"pooled.{number}"
            shape = index[tokens].shape if tokens in index else ()
            if len(shape) != 3 or shape[0] != 1 or not _are_texts(told):
                raise other
            prompt = Prompt(store.load(tokens), store.load(pooled) if pooled in index else None)
            found[text] = Encoded(prompt, tuple(note for note in told if note))
    return found, said


def _are_texts(values: Any) -> bool:
    return isinstance(values, list) and all(value is None or isinstance(value, str) for value in values)


class Words(NamedTuple):
    """The content of a file of `tiler encode`: the texts of all steps, and how they were `read_as`. `prompts` and
    `negative_prompts` are the ones that were given to the command, in order."""

    path: Path
    texts: dict[Text, Encoded]
    kind: str
    read_as: ReadAs
    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...]

    def check(self, family: Family) -> None:
        """Raise UsageError if the prompts were encoded for another kind of family."""
        if self.kind != (wanted := kind_of(family)):
            raise UsageError(
                f"{self.path}: these prompts are for {self.kind}; {family.checkpoint.name} is {wanted}; encode them again: "
                f"tiler encode … --model {family.checkpoint.name}"
            )

    def of(self, wanted: Sequence[Text]) -> dict[Text, Encoded]:
        """The embeddings of these texts. Raises UsageError if one is missing."""
        for text in wanted:
            if text not in self.texts:
                known = ", ".join(repr(given[:60]) for given in self.texts if given) or "none"
                raise UsageError(
                    f"{self.path}: the prompt {(text or '')[:60]!r} is not in this file, which holds {known}; add it with "
                    "`tiler encode`"
                )
        return {text: self.texts[text] for text in wanted}


def write_words(path: Path, words: Words, *, replace: bool) -> None:
    """Raises StorageError."""
    asked = {"prompts": json.dumps(words.prompts), "negative_prompts": json.dumps(words.negative_prompts)}
    facts = {"kind": words.kind, "read_as": _spell(words.read_as)}
    write_encoded(path, words.texts, facts | asked, replace=replace)


def _spell(read_as: ReadAs) -> str:
    said = [read_as.emphasis, read_as.clip_skip, dict(sorted(read_as.embeddings.items()))]
    return json.dumps([*said, read_as.loras] if read_as.loras else said)


def _parse(text: str) -> ReadAs:
    """Raises ValueError."""
    match json.loads(text):
        case [str(emphasis), int(clip_skip), dict(embeddings), *loras] if 0 < clip_skip <= MAX_CLIP_SKIP:
            used = {name: str(digest) for name, digest in embeddings.items()}
            marks = loras[0] if loras else []
            if _are_texts(marks):
                return ReadAs(Emphasis(emphasis), clip_skip, used, tuple(marks))
    raise ValueError(text)


def read_words(path: Path) -> Words:
    """Read a file of `tiler encode`. Raises UsageError."""
    if not path.is_file():
        raise UsageError(f"{path}: no such file; `tiler encode PROMPT -o FILE.safetensors` writes one")
    try:
        texts, said = read_encoded(path)
        prompts, negative_prompts = (json.loads(said[name]) for name in ("prompts", "negative_prompts"))
        kind, read_as = said["kind"], _parse(said["read_as"])
    except ModelError as error:
        raise UsageError(str(error)) from error
    except (KeyError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: does not say which prompts it holds; write it again with `tiler encode`") from error
    if not (_are_texts(prompts) and _are_texts(negative_prompts)):
        raise UsageError(f"{path}: does not say which prompts it holds; write it again with `tiler encode`")
    return Words(path, texts, kind, read_as, tuple(prompts), tuple(negative_prompts))


def prompts_folder(cache: Path | None) -> Path:
    """The folder of cached prompts: inside --cache-dir, or in the user's cache folder."""
    return cache_home() / "tiler" / "prompts" if cache is None else cache / "prompts"


class PromptCache:
    """Encoded prompts in `folder`, one file each; no file contains its text, and each names its model.

    A file's name is a hash of everything that determines the embeddings: the text, the encoders' weights and configs,
    their tokenizers, the arithmetic (`int8`: with the weights of packed.py) and who computes it, what the family makes
    of them, and how the text is parsed (`read_as`).
    """

    def __init__(self, folder: Path, family: Family, read_as: ReadAs, *, int8: bool) -> None:
        self.folder, self._family, self._read_as, self._int8 = folder, family, read_as, int8

    @cached_property
    def _mark(self) -> bytes:
        """A hash of everything except the text. Reads 1 MB of each weight file."""
        family, versions = self._family, [metadata.version(name) for name in ("torch", "transformers")]
        digest = hashlib.sha256()
        for fact in (
            _VERSION,
            kind_of(family),
            *family.encoding,
            computed_by(),
            *versions,
            _spell(self._read_as),
        ):
            digest.update(f"{fact}\n".encode())
        for part in family.encoders:
            digest.update(json.dumps([part.name, part.config], sort_keys=True, default=str).encode())
            rules = f"int8 {INT8_VERSION}" if self._int8 else "as stored"
            digest.update(packed.fingerprint(family.checkpoint.weights(part.name), rules).encode())
            _add_folder(digest, family.checkpoint.tokenizer(part.name.replace("text_encoder", "tokenizer")))
        return digest.digest()

    def _path(self, text: Text) -> Path:
        name = hashlib.sha256(self._mark + json.dumps(text).encode()).hexdigest()[:32]
        return self.folder / f"{name}.safetensors"

    def load(self, texts: Sequence[Text]) -> dict[Text, Encoded]:
        """The embeddings of those texts that are in the cache. A damaged file counts as missing."""
        if not self.folder.is_dir():
            return {}
        found = {}
        for text in texts:
            path = self._path(text)
            with suppress(TilerError, OSError):
                if path.is_file():
                    found[text] = read_encoded(path)[0][None]
                    os.utime(path)
        return found

    def save(self, texts: Mapping[Text, Encoded]) -> None:
        """Store these embeddings, and delete the least recently used ones if there are too many. Raises
        StorageError."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{self.folder}: cannot be made ({error.strerror})") from error
        for text, encoded in texts.items():
            facts = {MODEL: self._family.checkpoint.known_as}
            write_encoded(self._path(text), {None: encoded}, facts, in_cache=True)
        prune(self.folder, CACHE_BYTES)


def prune(folder: Path, most_bytes: int) -> None:
    """Delete the least recently used files until the rest take at most `most_bytes`."""
    files: list[tuple[float, int, Path]] = []
    for path in folder.glob("*.safetensors"):
        with suppress(OSError):
            files.append(((seen := path.stat()).st_mtime, seen.st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= most_bytes:
            break
        with suppress(OSError):
            path.unlink()
        total -= size


def _add_folder(digest: Any, folder: Path) -> None:
    """Add the names and contents of the files in a folder to a hash; files larger than any tokenizer are left out."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if not path.is_file():
            continue
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        with os.fdopen(open_regular(path), "rb") as file:
            digest.update(file.read(_TOKENIZER_BYTES))
