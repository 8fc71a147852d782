"""Encode prompts with a streamed T5 or UMT5 encoder, whose modules are transformers' own.

All prompts of a run share one read of the weights, and each is computed separately, so its embeddings do not depend on
the other prompts. A masked token has no weight in attention (exp of fp32's smallest number is 0), so padding that a
family masks is not computed; padding that a family attends to is treated like any token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiler.errors import ModelError
from tiler.memory.lean_imports import lean_imports
from tiler.models import bounds
from tiler.models.chunks import emphasised
from tiler.models.family import Part, Role, read_config
from tiler.models.meta import on_meta, refusing
from tiler.models.reading import READING, Reading
from tiler.models.together import GROUP_TOKENS, groups, linear_together, places, read_ahead
from tiler.models.tokenizers import find_tokenizer, open_tokenizer
from tiler.models.words import check_vocabulary, read_tokens
from tiler.request import Emphasis
from tiler.weights.checkpoint import Checkpoint
from tiler.weights.flavours import read_json
from tiler.weights.store import PIECE_ELEMENTS

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

CHUNK = 256  # tokens normalised at a time
GROUP_HEADS = 16  # heads whose position bias is written out at once: 17 MB for 512 tokens
_TOKENIZERS = ("tokenizer.json", "spiece.model", "tokenizer.model")
_KINDS = "t5", "mt5", "umt5"  # multilingual T5 (mT5) is T5 with another vocabulary


def read_t5(checkpoint: Checkpoint, name: str, length: int) -> Part:
    """Read the encoder in the folder `name`, for prompts of up to `length` tokens. Raises ModelError."""
    config = read_config(checkpoint, name, None, bounds.check_t5)
    if config.get("model_type") not in _KINDS:
        raise ModelError(f"{checkpoint.name}: {name} is {config.get('model_type')!r}; this model needs a T5 encoder")
    return Part(
        name=name,
        role=Role.TEXT_ENCODER,
        config=config,
        build=partial(_build, checkpoint, name, config),
        aliases=_names,
        quantise=lambda parameter: parameter.startswith("encoder.block."),
        # No layer is held: its pieces pass through the arena one by one.
        arena_bytes=4 * PIECE_ELEMENTS,
        example=partial(_run, length),
    )


def check_tokenizer(checkpoint: Checkpoint, folder: str, fetch: str) -> Path:
    """The folder of a tokenizer whose files exist. Raises ModelError, which says with `fetch` how to get them."""
    return find_tokenizer(checkpoint, folder, _TOKENIZERS, fetch)


def load_tokenizer(checkpoint: Checkpoint, folder: str) -> PreTrainedTokenizerBase:
    """Load tokenizer.json or a sentencepiece model. Raises ModelError."""
    fetch = "download the tokenizer again"
    if checkpoint.repository is not None:
        fetch = f"run: hf download {checkpoint.repository} --include '{folder}/*'"
    path = check_tokenizer(checkpoint, folder, fetch)
    settings = path / "tokenizer_config.json"
    kind = read_json(settings).get("tokenizer_class") if settings.is_file() else None
    with lean_imports():
        if str(kind or "T5Tokenizer").startswith("T5"):
            from transformers.models.t5.tokenization_t5 import T5Tokenizer as Tokenizer
        else:
            from transformers.models.llama.tokenization_llama import LlamaTokenizer as Tokenizer
    tokenizer: PreTrainedTokenizerBase = open_tokenizer(Tokenizer, path)
    return tokenizer


def encode_t5(
    tokenizer: PreTrainedTokenizerBase,
    encoder: Any,
    texts: Sequence[str],
    length: int,
    warn: Callable[[str], None],
    reading: Reading = READING,
    *,
    keep_pads: bool,
    clean: Callable[[str], str] = str,
) -> list[Tensor]:
    """The last hidden state of each text, (1, tokens, d_model) fp32, computed by a streamed `encoder`, times its
    tokens' weights.

    A text is cut to `length` tokens, its end mark included, which `warn` reports. With `keep_pads` it is padded to
    `length`, and the padding is attended to, as in a pipeline that gives the encoder no mask. Otherwise there is one
    row for each of its own tokens, with the values that a mask would give. `clean` is applied to a text before it is
    tokenised, as the family's pipeline does. Raises ModelError if tokenizer and encoder do not belong together.
    """
    read = [read_tokens(tokenizer, text, length, "T5", warn, reading, clean) for text in texts]
    check_vocabulary(read, encoder.config.vocab_size)
    if keep_pads:
        read = [tokens.padded(length, tokenizer.pad_token_id) for tokens in read]
    encoded: list[Tensor] = []
    with torch.no_grad():
        for group in groups([tokens.ids for tokens in read]):
            encoded += _encode(encoder, group)
    # The mean of T5's encodings is close to 0, so it is not restored.
    return [emphasised(states, tokens.weights, Emphasis.NO_NORM) for states, tokens in zip(encoded, read, strict=True)]


def encode_masked(
    tokenizer: PreTrainedTokenizerBase,
    encoder: Any,
    texts: Sequence[str],
    length: int,
    warn: Callable[[str], None],
    reading: Reading = READING,
) -> list[tuple[Tensor, int]]:
    """Encode as `encode_t5`, padded to `length`, and return each encoding with the number of the text's own tokens.
    Padding has states of its own, but no token attends to it."""
    read = [read_tokens(tokenizer, text, length, "T5", warn, reading) for text in texts]
    check_vocabulary(read, encoder.config.vocab_size)
    found = []
    padded = [tokens.padded(length, tokenizer.pad_token_id) for tokens in read]
    owned = [tokens.ids.shape[1] for tokens in read]
    with torch.no_grad():
        for first in range(0, len(texts), most := max(1, GROUP_TOKENS // length)):
            some = slice(first, first + most)
            found += _encode(encoder, [tokens.ids for tokens in padded[some]], owned[some])
    return [
        (emphasised(states, tokens.weights, Emphasis.NO_NORM), own)
        for states, tokens, own in zip(found, padded, owned, strict=True)
    ]


def _encode(encoder: Any, rows: list[Tensor], owned: Sequence[int] | None = None) -> list[Tensor]:
    """Encode all prompts. Their states are one tensor (1, tokens, d_model), of which each prompt has a part: a few
    large blocks, which return to the system when they are freed. `owned`: the number of tokens of each prompt that are
    attended to, if not all."""
    prompts = places(rows)
    keys = prompts if owned is None else [slice(p.start, p.start + own) for p, own in zip(prompts, owned, strict=True)]
    read_ahead([layer for block in encoder.encoder.block for layer in _layers(block)])
    x: Tensor = encoder.shared(torch.cat(rows, dim=1))
    bias: Tensor | None = None
    for block in encoder.encoder.block:
        attention, feed_forward = block.layer[0], block.layer[-1]
        if attention.SelfAttention.has_relative_attention_bias:  # T5's first block for all; in UMT5 each its own
            bias = _bias(attention.SelfAttention, max(ids.shape[1] for ids in rows))
        assert bias is not None
        x += _attended(attention, x, prompts, keys, bias)
        x += _fed(feed_forward, x, prompts)
    return [_normed(encoder.encoder.final_layer_norm, x[:, prompt]) for prompt in prompts]


def _layers(block: Any) -> list[Any]:
    """A block's linear layers in the order in which they are used."""
    attention, dense = block.layer[0].SelfAttention, block.layer[-1].DenseReluDense
    into = (dense.wi_0, dense.wi_1) if hasattr(dense, "wi_0") else (dense.wi,)
    return [attention.q, attention.k, attention.v, attention.o, *into, dense.wo]


def _normed(norm: Any, x: Tensor) -> Tensor:
    """`norm` of (1, n, d_model), applied to some tokens at a time because it makes copies."""
    out = torch.empty_like(x)
    for some, filled in zip(x.split(CHUNK, dim=1), out.split(CHUNK, dim=1), strict=True):
        filled.copy_(norm(some))
    return out


def _attended(layer: Any, x: Tensor, prompts: list[slice], looked_at: list[slice], bias: Tensor) -> Tensor:
    """The contribution of self-attention to the states (1, n, d_model)."""
    attention, normed = layer.SelfAttention, _normed(layer.layer_norm, x)
    queries, keys, values = (linear_together(part, normed, prompts) for part in (attention.q, attention.k, attention.v))
    del normed
    for prompt, own in zip(prompts, looked_at, strict=True):
        parts = (queries[:, prompt], keys[:, own], values[:, own])
        q, k, v = (part.unflatten(-1, (attention.n_heads, -1)).transpose(1, 2) for part in parts)
        for first in range(0, attention.n_heads, GROUP_HEADS):
            heads = slice(first, first + GROUP_HEADS)
            mask = _written_out(bias[heads], q.shape[2])[..., : k.shape[2]]
            # In place, because no other head reads these queries. T5 does not scale its scores.
            q[:, heads] = F.scaled_dot_product_attention(q[:, heads], k[:, heads], v[:, heads], mask, scale=1.0)
            del mask
    del q, k, v, keys, values
    return linear_together(attention.o, queries, prompts)


def _fed(layer: Any, x: Tensor, prompts: list[slice]) -> Tensor:
    """The contribution of the feed-forward part to the states (1, n, d_model)."""
    dense, normed = layer.DenseReluDense, _normed(layer.layer_norm, x)
    if hasattr(dense, "wi_0"):
        hidden = linear_together(dense.wi_0, normed, prompts, dense.act)
        linear_together(dense.wi_1, normed, prompts, times=hidden)
    else:
        hidden = linear_together(dense.wi, normed, prompts, dense.act)
    del normed
    return linear_together(dense.wo, hidden, prompts)


def _bias(attention: Any, length: int) -> Tensor:
    """(heads, 2·length − 1): the bias that attention adds to the score of a key `n` tokens behind its query, for n from
    1 − length on."""
    if (table := attention.relative_attention_bias.weight).is_meta:
        return table.new_empty(attention.n_heads, 2 * length - 1)
    before = attention.compute_bias(1, length, past_seen_tokens=length - 1)
    after = attention.compute_bias(1, length)
    bias: Tensor = torch.cat([before, after[..., 1:]], dim=-1)[0, :, 0]
    return bias


def _written_out(bias: Tensor, length: int) -> Tensor:
    """Expand a `_bias` for at least `length` tokens to (1, heads, length, length), one value for each query and key."""
    middle = bias.shape[-1] // 2
    if bias.is_meta:  # flipped: a copy
        return bias.new_empty(1, len(bias), length, length)
    near = bias[:, middle - length + 1 : middle + length]
    return near.unfold(-1, length, 1).flip(1)[None]


def _run(length: int, encoder: Any) -> object:
    """Run the encoder as `encode_t5` does for the largest group of prompts; its weights may be on the meta device."""
    return _encode(encoder, [torch.zeros(1, length, dtype=torch.int64) for _ in range(max(1, GROUP_TOKENS // length))])


def _build(checkpoint: Checkpoint, name: str, config: Mapping[str, Any]) -> nn.Module:
    """Build transformers' own encoder on the meta device."""
    with lean_imports():
        if config["model_type"] != "umt5":
            from transformers.models.t5.configuration_t5 import T5Config as Config
            from transformers.models.t5.modeling_t5 import T5EncoderModel as Encoder
        else:
            from transformers.models.umt5.configuration_umt5 import UMT5Config as Config
            from transformers.models.umt5.modeling_umt5 import UMT5EncoderModel as Encoder
    left_out = "architectures", "torch_dtype", "dtype", "_name_or_path", "model_type"
    known = {k: v for k, v in config.items() if k not in left_out}
    with refusing(name, checkpoint), on_meta():
        model = Encoder(Config(**known)).eval().requires_grad_(False)
        model.set_input_embeddings(model.shared)  # the encoder's own table is the same parameter
    return model


def _names(name: str) -> list[str]:
    """The names of a parameter in files: some have the token table only under the encoder's name."""
    return [name, "encoder.embed_tokens.weight"] if name == "shared.weight" else [name]
