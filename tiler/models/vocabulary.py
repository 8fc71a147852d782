"""CLIP's vocabulary, for checkpoints without a tokenizer: written once into the cache, as the files that a tokenizer
reads."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from tiler.errors import StorageError
from tiler.files import atomic
from tiler.weights.places import cache_home

_MERGES = Path(__file__).parent / "clip_vocabulary" / "merges.txt.gz"
START, END = "<|startoftext|>", "<|endoftext|>"
_SIZES = {"merges.txt": 524619, "vocab.json": 961143}  # bytes: making them takes 0.2 s and 40 MB


def clip_tokenizer(pad: str = END) -> Path:
    """A folder with vocab.json, merges.txt and tokenizer_config.json of a CLIPTokenizer that pads with `pad`. Raises
    StorageError."""
    folder = cache_home() / "tiler" / "clip" / ("end" if pad == END else f"{ord(pad[0]):x}")
    config = json.dumps(_config(pad))
    sizes = _SIZES | {"tokenizer_config.json": len(config.encode())}
    if all((path := folder / name).is_file() and path.stat().st_size == size for name, size in sizes.items()):
        return folder
    merges = gzip.decompress(_MERGES.read_bytes()).decode()
    files = {
        "merges.txt": "#version: 0.2\n" + merges,
        "tokenizer_config.json": config,
        "vocab.json": json.dumps(_vocabulary(merges), ensure_ascii=False),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            with atomic(folder / name, in_cache=True) as file:
                file.write(text.encode())
    except OSError as error:
        raise StorageError(
            f"{folder}: cannot be written ({error.strerror}); set XDG_CACHE_HOME to another folder"
        ) from error
    return folder


def _vocabulary(merges: str) -> dict[str, int]:
    """The vocabulary in the order of token ids: single bytes, bytes that end a word, results of merges, and both
    marks."""
    from tokenizers import pre_tokenizers

    # CLIP's bytes stand in the order of GPT-2's table: those that print, then the others, which have letters from
    # U+0100 on.
    letters = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda letter: (ord(letter) > 255, ord(letter)))
    made = ["".join(line.split()) for line in merges.splitlines()]
    return {piece: number for number, piece in enumerate([*letters, *(x + "</w>" for x in letters), *made, START, END])}


def _config(pad: str) -> dict[str, object]:
    return {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True,
        "bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad,
    }  # fmt: skip
