"""Textual inversion (Gal et al. 2022, arXiv:2208.01618): embeddings in folders, which a prompt names by file stem, as
`embedding:NAME`, or as `<NAME>`.

An embedding is one or more vectors that take the place of tokens in a prompt; a file for a family with two encoders has
vectors for each.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path

from torch import Tensor

from tiler.errors import ModelError, NumericalError, UsageError
from tiler.models.chunks import Piece
from tiler.weights.index import read_index
from tiler.weights.store import WeightStore

MOST_VECTORS = 75  # of an embedding: it stands in one chunk
_UNSAFE = {
    ".pt": "a pickle, which can run code",
    ".bin": "a pickle, which can run code",
    ".png": "a picture",
    ".webp": "a picture",
}
_NAMED = re.compile(r"embedding:([^\s,:()\[\]<>]+)|<([^<>:\s]+)>")


class Embeddings:
    """The embeddings in folders and their subfolders, for text encoders of `widths`. A file is read when a prompt names
    it."""

    def __init__(self, folders: Sequence[Path], widths: Sequence[int]) -> None:
        """Raises UsageError."""
        if missing := [folder for folder in folders if not folder.is_dir()]:
            raise UsageError(f"--embd-dir {missing[0]}: no such folder; check the path")
        self._folders, self._widths = ", ".join(map(str, folders)), tuple(sorted(widths))
        self._files: dict[str, list[Path]] = {}
        for path in (path for folder in folders for path in sorted(folder.rglob("*"))):
            if path.is_file() and path.suffix.lower() in (".safetensors", *_UNSAFE):
                self._files.setdefault(path.stem.lower(), []).append(path)
        self._read: dict[str, dict[int, Tensor]] = {}
        self._ids: dict[str, list[int]] = {}

    @property
    def used(self) -> dict[str, str]:
        """The stems of the embeddings that were used, with the first 12 digits of their files' SHA-256, as in A1111."""
        return {self._files[name][0].stem: _digest(self._files[name][0])[:12] for name in sorted(self._read)}

    def pieces(self, text: str, weight: float, width: int, tokenise: Callable[[str], list[int]]) -> list[Piece]:
        """A fragment's tokens, including its embeddings, for the encoder of `width`. Raises ModelError for an embedding
        that cannot be used, UsageError for a name that two files share."""
        found: list[Piece] = []
        end = 0
        for match in _NAMED.finditer(text):
            explicit, token = match[1], match[2]
            if token is not None and token.lower() not in self._files:
                continue  # no embedding's: text
            found += self._matched(tokenise(text[end : match.start()]), weight, width, tokenise)
            found.append(self._piece(explicit or token, weight, width))
            end = match.end()
        return found + self._matched(tokenise(text[end:]), weight, width, tokenise)

    def _matched(self, ids: list[int], weight: float, width: int, tokenise: Callable[[str], list[int]]) -> list[Piece]:
        """Replace tokens that spell a stem by its embedding; the longest stem wins."""
        for name in self._files.keys() - self._ids.keys():
            self._ids[name] = tokenise(name)
        longest_first = sorted(self._ids.items(), key=lambda item: -len(item[1]))
        found: list[Piece] = []
        at = 0
        while at < len(ids):
            here = next((name for name, own in longest_first if own and ids[at : at + len(own)] == own), None)
            found.append(Piece((ids[at],), weight) if here is None else self._piece(here, weight, width))
            at += 1 if here is None else len(self._ids[here])
        return found

    def _piece(self, name: str, weight: float, width: int) -> Piece:
        key = name.lower()
        if key not in self._files:
            near = get_close_matches(key, self._files, n=3)
            known = (
                f"; near names are {', '.join(self._files[n][0].stem for n in near)}" if near else "; check the name"
            )
            raise ModelError(f"embedding:{name}: no such embedding in {self._folders}{known}")
        if key not in self._read:
            self._read[key] = self._load(name, self._files[key])
        vectors = self._read[key][width]
        return Piece((0,) * len(vectors), weight, vectors)

    def _load(self, name: str, paths: list[Path]) -> dict[int, Tensor]:
        """The vectors (n, width) fp32 by width."""
        if len(paths) > 1:
            raise UsageError(f"the embedding {name} is in two files, {paths[0]} and {paths[1]}; rename one of them")
        (path,) = paths
        if (kind := _UNSAFE.get(path.suffix.lower())) is not None:
            raise ModelError(f"{path}: the embedding is in {kind}; take it as .safetensors")
        index = read_index(path)
        with WeightStore(index) as store:
            tensors = [store.load(key) for key, info in index.items() if len(info.shape) in (1, 2)]
        found = {rows.shape[-1]: rows.view(-1, rows.shape[-1]) for rows in tensors}
        if tuple(sorted(found)) != self._widths:
            here, wanted = (", ".join(map(str, sorted(widths))) or "none" for widths in (found, self._widths))
            raise ModelError(
                f"{path}: this embedding has width {here}, but the model's text encoders take {wanted}; use one for this model"
            )
        for rows in found.values():
            if len(rows) > MOST_VECTORS:
                raise ModelError(f"{path}: {len(rows)} vectors; an embedding has at most {MOST_VECTORS}")
            if not bool(rows.isfinite().all()):
                raise NumericalError(f"{path}: NaN or Inf in the embedding; download it again")
        return found


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
