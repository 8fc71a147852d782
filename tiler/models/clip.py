"""Prompts → embeddings with a streamed CLIP text encoder. Only the rows of the token table that occur are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tiler.errors import ModelError
from tiler.memory.lean_imports import lean_imports

if TYPE_CHECKING:
    from transformers.models.clip.modeling_clip import CLIPTextModel
    from transformers.models.clip.tokenization_clip import CLIPTokenizer

    from tiler.models.family import Family


def load_tokenizer(family: Family) -> CLIPTokenizer:
    """From tokenizer.json, or vocab.json and merges.txt. Raises ModelError."""
    with lean_imports():
        from transformers.models.clip.tokenization_clip import CLIPTokenizer

    folder: Path = family.checkpoint.tokenizer("tokenizer")
    if not (
        (folder / "tokenizer.json").is_file()
        or ((folder / "vocab.json").is_file() and (folder / "merges.txt").is_file())
    ):
        raise ModelError(
            f"{folder}: neither tokenizer.json nor vocab.json with merges.txt is here; download the tokenizer again"
        )
    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises plain Exception for damaged files
        raise ModelError(
            f"{folder}: the tokenizer cannot be read ({str(error).splitlines()[0]}); download it again"
        ) from error


def encode_prompts(
    tokenizer: CLIPTokenizer, encoder: CLIPTextModel, prompts: list[str], warn: Callable[[str], None]
) -> Tensor:
    """(n, model_max_length, width) fp32, one row for each prompt: the last hidden state, as StableDiffusionPipeline uses it."""
    length = min(int(tokenizer.model_max_length), int(encoder.config.max_position_embeddings))
    rows: list[Tensor] = []
    for prompt in prompts:
        tokens: Any = tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        # The tokenizer is not asked to look at megabytes of text just to say that they do not fit.
        full = len(tokenizer.tokenize(prompt[: 40 * length])) + 2
        if full > length or len(prompt) > 40 * length:
            warn(f"the prompt is longer than {length} tokens and was cut: {prompt[:40]!r}…")
        if int(tokens.input_ids.max()) >= encoder.config.vocab_size:
            raise ModelError("the tokenizer knows more words than the text encoder; they do not belong together")
        with torch.no_grad():
            rows.append(encoder(tokens.input_ids).last_hidden_state)
    return torch.cat(rows)
