"""Prompts → embeddings with a streamed CLIP text encoder. Only the rows of the token table that occur are read.

The modules are transformers' own, built on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tiler.errors import ModelError
from tiler.memory.lean_imports import lean_imports
from tiler.models.meta import on_meta, refusing
from tiler.models.samples import Prompt
from tiler.weights.checkpoint import Checkpoint

if TYPE_CHECKING:
    from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection
    from transformers.models.clip.tokenization_clip import CLIPTokenizer

    from tiler.models.family import Family

TOKENS = 77  # of a prompt, the end marks included


def build_clip(
    checkpoint: Checkpoint, part: str, config: dict[str, Any], *, projection: bool = False
) -> CLIPTextModel | CLIPTextModelWithProjection:
    """A CLIP text model on the meta device, its position ids real; with the layer behind its pooled vector or without.
    Raises ModelError."""
    with lean_imports():
        from transformers.models.clip.configuration_clip import CLIPTextConfig
        from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection
    known = {k: v for k, v in config.items() if k not in ("architectures", "torch_dtype", "dtype", "_name_or_path")}
    with refusing(part, checkpoint):
        text = CLIPTextConfig(**known)
        text._attn_implementation = "sdpa"
        kind = CLIPTextModelWithProjection if projection else CLIPTextModel
        with on_meta():
            return kind(text).eval().requires_grad_(False)


def clip_names(name: str) -> list[str]:
    """Published files carry the prefix text_model., which transformers 5 dropped from its modules."""
    return (
        [f"text_model.{name}", name] if not name.startswith("text_model.") else [name, name.removeprefix("text_model.")]
    )


def run_clip(encoder: Any, **options: Any) -> object:
    """What is asked of the encoder for one prompt; ids are real, weights need not be."""
    return encoder(torch.zeros(1, TOKENS, dtype=torch.int64), **options)


def check_tokenizer(folder: Path, fetch: str = "download the tokenizer again") -> None:
    """Raises ModelError where a CLIP tokenizer's files are not in `folder`; `fetch` says how they can be had."""
    if not (
        (folder / "tokenizer.json").is_file()
        or ((folder / "vocab.json").is_file() and (folder / "merges.txt").is_file())
    ):
        raise ModelError(f"{folder}: neither tokenizer.json nor vocab.json with merges.txt is here; {fetch}")


def load_tokenizer(family: Family, part: str = "tokenizer") -> CLIPTokenizer:
    """From tokenizer.json, or vocab.json and merges.txt. Raises ModelError."""
    with lean_imports():
        from transformers.models.clip.tokenization_clip import CLIPTokenizer

    folder: Path = family.checkpoint.tokenizer(part)
    check_tokenizer(folder)
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
    rows: list[Tensor] = []
    for prompt in prompts:
        ids = _token_ids(tokenizer, encoder.config, prompt, warn)
        with torch.no_grad():
            rows.append(encoder(ids).last_hidden_state)
    return torch.cat(rows)


def encode_penultimate(
    tokenizer: CLIPTokenizer,
    encoder: CLIPTextModel | CLIPTextModelWithProjection,
    prompts: list[str],
    warn: Callable[[str], None],
) -> list[Prompt]:
    """For each prompt the states before the last layer, (1, model_max_length, width) fp32, and the pooled vector: projected,
    (1, projection_dim), where the encoder has that layer, else (1, width)."""
    found: list[Prompt] = []
    for prompt in prompts:
        ids = _token_ids(tokenizer, encoder.config, prompt, warn)
        with torch.no_grad():
            made: Any = encoder(ids, output_hidden_states=True)
        pooled: Tensor = made.text_embeds if hasattr(encoder, "text_projection") else made.pooler_output
        found.append(Prompt(made.hidden_states[-2], pooled))
    return found


def _token_ids(tokenizer: CLIPTokenizer, config: Any, prompt: str, warn: Callable[[str], None]) -> Tensor:
    """(1, model_max_length) int64; `warn` is told of a prompt that is longer. Raises ModelError."""
    length = min(int(tokenizer.model_max_length), int(config.max_position_embeddings))
    tokens: Any = tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    # The tokenizer is not asked to look at megabytes of text just to say that they do not fit.
    full = len(tokenizer.tokenize(prompt[: 40 * length])) + 2
    if full > length or len(prompt) > 40 * length:
        warn(f"the prompt is longer than {length} tokens and was cut for CLIP: {prompt[:40]!r}…")
    if int(tokens.input_ids.max()) >= config.vocab_size:
        raise ModelError("the tokenizer knows more words than the text encoder; they do not belong together")
    ids: Tensor = tokens.input_ids
    return ids
