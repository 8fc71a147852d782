"""Find and open the tokenizers of text encoders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tiler.errors import ModelError
from tiler.weights.checkpoint import Checkpoint


def find_tokenizer(checkpoint: Checkpoint, folder: str, files: Sequence[str], fetch: str) -> Path:
    """The folder of a tokenizer with one of these `files`, of which the first two are named if none exists. Raises
    ModelError, which says with `fetch` how to get them."""
    path = checkpoint.tokenizer(folder)
    if not any((path / file).is_file() for file in files):
        raise ModelError(f"{path}: neither {files[0]} nor {files[1]} is here; {fetch}")
    return path


def open_tokenizer(kind: Any, path: Path) -> Any:
    """The tokenizer of transformers' class `kind` in the folder `path`. Raises ModelError."""
    try:
        return kind.from_pretrained(path, local_files_only=True)
    except Exception as error:  # the underlying libraries raise plain Exception for damaged files
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if "pip install" in reason:  # transformers would try this next for a file that is no sentencepiece model
            reason = "its files are damaged"
        raise ModelError(f"{path}: the tokenizer cannot be read ({reason}); download it again") from error
