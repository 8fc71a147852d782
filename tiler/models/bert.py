"""Encode prompts with a streamed BERT encoder, whose modules are transformers' own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tiler.errors import ModelError
from tiler.memory.lean_imports import lean_imports
from tiler.models import bounds
from tiler.models.chunks import emphasised
from tiler.models.family import Part, Role, read_config
from tiler.models.meta import on_meta, refusing
from tiler.models.reading import READING, Reading
from tiler.models.tokenizers import find_tokenizer, open_tokenizer
from tiler.models.words import check_vocabulary, read_tokens
from tiler.request import Emphasis
from tiler.weights.checkpoint import Checkpoint

if TYPE_CHECKING:
    from transformers.models.bert.modeling_bert import BertModel
    from transformers.models.bert.tokenization_bert import BertTokenizer

_TOKENIZERS = ("tokenizer.json", "vocab.txt")


def read_bert(checkpoint: Checkpoint, name: str, length: int) -> Part:
    """Read the encoder in the folder `name`, for prompts of up to `length` tokens. Raises ModelError."""
    config = read_config(checkpoint, name, None, bounds.check_bert)
    if (kind := config.get("model_type")) != "bert":
        raise ModelError(f"{checkpoint.name}: {name} is {kind!r}; this model needs a BERT encoder")
    if config.get("max_position_embeddings", 512) < length:
        raise ModelError(
            f"{checkpoint.folder / name}/config.json: max_position_embeddings = {config['max_position_embeddings']}; "
            f"prompts of this model have {length} tokens; these parts do not belong together"
        )
    return Part(
        name=name, role=Role.TEXT_ENCODER, config=config, build=partial(_build, checkpoint, name, config),
        aliases=_names, example=partial(_run, length),
    )  # fmt: skip


def check_tokenizer(checkpoint: Checkpoint, folder: str, fetch: str) -> Path:
    """The folder of a tokenizer whose files exist. Raises ModelError, which says with `fetch` how to get them."""
    return find_tokenizer(checkpoint, folder, _TOKENIZERS, fetch)


def load_tokenizer(checkpoint: Checkpoint, folder: str) -> BertTokenizer:
    """Load tokenizer.json or vocab.txt. Raises ModelError."""
    path = check_tokenizer(checkpoint, folder, "download the tokenizer again")
    with lean_imports():
        from transformers.models.bert.tokenization_bert import BertTokenizer
    tokenizer: BertTokenizer = open_tokenizer(BertTokenizer, path)
    return tokenizer


def encode_bert(
    tokenizer: BertTokenizer,
    encoder: Any,
    texts: Sequence[str],
    length: int,
    warn: Callable[[str], None],
    reading: Reading = READING,
) -> list[Tensor]:
    """The last hidden states of each text's own tokens, (1, tokens, width) fp32, times their weights. Padding, which no
    token attends to, is left out. A text is cut to `length` tokens, which `warn` reports. Raises ModelError if
    tokenizer and encoder do not belong together."""
    read = [read_tokens(tokenizer, text, length, "BERT", warn, reading) for text in texts]
    check_vocabulary(read, encoder.config.vocab_size)
    with torch.no_grad():
        return [emphasised(encoder(tokens.ids).last_hidden_state, tokens.weights, Emphasis.NO_NORM) for tokens in read]


def _run(length: int, encoder: Any) -> object:
    """Run the encoder as for one prompt; ids are real, weights may be on the meta device."""
    return encoder(torch.zeros(1, length, dtype=torch.int64))


def _build(checkpoint: Checkpoint, name: str, config: dict[str, Any]) -> BertModel:
    """Build transformers' own encoder on the meta device, with real position and type ids, without the pooler."""
    with lean_imports():
        from transformers.models.bert.configuration_bert import BertConfig
        from transformers.models.bert.modeling_bert import BertModel
    left_out = "architectures", "torch_dtype", "dtype", "_name_or_path", "model_type"
    known = {k: v for k, v in config.items() if k not in left_out}
    with refusing(name, checkpoint):
        settings = BertConfig(**known)
        settings._attn_implementation = "sdpa"
        with on_meta():
            model = BertModel(settings, add_pooling_layer=False).eval().requires_grad_(False)
        model.embeddings.token_type_ids = torch.zeros_like(model.embeddings.position_ids)
    return model


def _names(name: str) -> list[str]:
    """The names of a parameter in files: files of complete BERT models have a prefix, and the oldest ones call a norm's
    weight gamma."""
    return [name, f"bert.{name}", *(
        f"{prefix}{name}".replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        for prefix in ("", "bert.")
        if "LayerNorm" in name
    )]  # fmt: skip
