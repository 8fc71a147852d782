"""Prompts → embeddings with a streamed T5 or UMT5 encoder, whose modules are transformers' own.

All prompts of a run share one read of the weights, and each is computed by itself: a prompt's embeddings do not depend on what
stands beside it. A token that is masked has no weight in attention (exp of fp32's least number is 0), so padding that a family
masks is never computed; padding that a family looks at is a token like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiler.compute.layers import StreamedLinear
from tiler.errors import ModelError
from tiler.memory.lean_imports import lean_imports
from tiler.models import bounds
from tiler.models.family import Part, Role, read_config
from tiler.models.meta import on_meta, refusing
from tiler.weights.checkpoint import Checkpoint
from tiler.weights.store import PIECE_ELEMENTS

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

GROUP_TOKENS = 1024  # of prompts that share one read of the weights, unless one prompt alone has more
GROUP_HEADS = 16  # whose position bias is written out at once: 17 MB for 512 tokens
_TOKENIZERS = ("tokenizer.json", "spiece.model", "tokenizer.model")
_KINDS = "t5", "umt5"


def read_t5(checkpoint: Checkpoint, name: str, length: int) -> Part:
    """The encoder in the folder `name`, for prompts of up to `length` tokens. Raises ModelError."""
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
        activation_bytes=4 * PIECE_ELEMENTS + _activation_bytes(config, length),
    )


def load_tokenizer(checkpoint: Checkpoint, folder: str) -> PreTrainedTokenizerBase:
    """From tokenizer.json or a sentencepiece model. Raises ModelError."""
    path = checkpoint.tokenizer(folder)
    if not any((path / file).is_file() for file in _TOKENIZERS):
        again = "download the tokenizer again"
        if checkpoint.repository is not None:
            again = f"run: hf download {checkpoint.repository} --include '{folder}/*'"
        raise ModelError(f"{path}: neither tokenizer.json nor spiece.model is here; {again}")
    named = (path / "tokenizer_config.json").is_file()
    kind = checkpoint.config(folder, "tokenizer_config.json").get("tokenizer_class") if named else None
    with lean_imports():
        if str(kind or "T5Tokenizer").startswith("T5"):
            from transformers.models.t5.tokenization_t5 import T5Tokenizer as Tokenizer
        else:
            from transformers.models.llama.tokenization_llama import LlamaTokenizer as Tokenizer
    try:
        return Tokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # the libraries behind raise plain Exception for damaged files
        raise ModelError(
            f"{path}: the tokenizer cannot be read ({(str(error) or type(error).__name__).splitlines()[0]}); download it again"
        ) from error


def encode_t5(
    tokenizer: PreTrainedTokenizerBase,
    encoder: Any,
    texts: Sequence[str],
    length: int,
    warn: Callable[[str], None],
    *,
    keep_pads: bool,
) -> list[Tensor]:
    """The last hidden state of each text, (1, tokens, d_model) fp32, by a streamed `encoder`.

    A text is cut to `length` tokens, its end mark included; `warn` tells of it. With `keep_pads` it is padded to `length`, and
    its padding is looked at, as by a pipeline that gives the encoder no mask; else there is a row for each of its own tokens,
    the same as a mask would give them. Raises ModelError where tokenizer and encoder do not belong together.
    """
    rows = [_tokens(tokenizer, text, length, warn, keep_pads=keep_pads) for text in texts]
    if any(int(ids.max()) >= encoder.config.vocab_size for ids in rows):
        raise ModelError("the tokenizer knows more words than the text encoder; they do not belong together")
    encoded: list[Tensor] = []
    with torch.no_grad():
        for group in _groups(rows):
            encoded += _encode(encoder, group)
    return encoded


def _tokens(tokenizer: Any, text: str, length: int, warn: Callable[[str], None], *, keep_pads: bool) -> Tensor:
    """(1, n) ids."""
    # The tokenizer is not asked to look at megabytes of text just to say that they do not fit.
    short = text[: 40 * length]
    if len(tokenizer(short).input_ids) > length or len(text) > len(short):
        warn(f"the prompt is longer than {length} tokens and was cut: {text[:40]!r}…")
    padded = tokenizer(short, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    ids: Tensor = padded.input_ids
    return ids if keep_pads else ids[padded.attention_mask.bool()][None]


def _groups(rows: list[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours that share one read of the weights."""
    group: list[Tensor] = []
    for ids in rows:
        if group and sum(other.shape[1] for other in group) + ids.shape[1] > GROUP_TOKENS:
            yield group
            group = []
        group.append(ids)
    if group:
        yield group


def _encode(encoder: Any, rows: list[Tensor]) -> list[Tensor]:
    states = [encoder.shared(ids) for ids in rows]
    bias: Tensor | None = None
    for block in encoder.encoder.block:
        attention, feed_forward = block.layer[0], block.layer[-1]
        if attention.SelfAttention.has_relative_attention_bias:  # T5's first block for all, each of UMT5's for itself
            bias = _bias(attention.SelfAttention, max(ids.shape[1] for ids in rows))
        assert bias is not None
        for state, change in zip(states, _attend(attention, states, bias), strict=True):
            state += change
        for state, change in zip(states, _feed(feed_forward, states), strict=True):
            state += change
    return [encoder.encoder.final_layer_norm(state) for state in states]


def _attend(layer: Any, states: list[Tensor], bias: Tensor) -> list[Tensor]:
    """What self-attention adds to each state (1, n, d_model)."""
    attention = layer.SelfAttention
    normed = [layer.layer_norm(state) for state in states]
    queries, keys, values = (_linear(part, normed) for part in (attention.q, attention.k, attention.v))
    del normed
    for query, key, value in zip(queries, keys, values, strict=True):
        q, k, v = (t.unflatten(-1, (attention.n_heads, -1)).transpose(1, 2) for t in (query, key, value))
        for first in range(0, attention.n_heads, GROUP_HEADS):
            heads = slice(first, first + GROUP_HEADS)
            mask = _written_out(bias[heads], q.shape[2])
            # In place: no other head looks at these queries. T5 does not scale its scores.
            q[:, heads] = F.scaled_dot_product_attention(q[:, heads], k[:, heads], v[:, heads], mask, scale=1.0)
            del mask
    del keys, values
    return _linear(attention.o, queries)


def _feed(layer: Any, states: list[Tensor]) -> list[Tensor]:
    """What the feed-forward part adds to each state (1, n, d_model)."""
    dense = layer.DenseReluDense
    normed = [layer.layer_norm(state) for state in states]
    if hasattr(dense, "wi_0"):
        hidden = _linear(dense.wi_0, normed, dense.act)
        _linear(dense.wi_1, normed, times=hidden)
    else:
        hidden = _linear(dense.wi, normed, dense.act)
    del normed
    return _linear(dense.wo, hidden)


def _linear(
    layer: Any,
    inputs: list[Tensor],
    act: Callable[[Tensor], Tensor] | None = None,
    times: list[Tensor] | None = None,
) -> list[Tensor]:
    """`layer` of each input (1, n, in), activated, by one read of its weight; multiplied into `times` (1, n, out) where that
    is given. What a piece of the weight makes of an input is there only while the next one is fetched."""
    outs = times or [x.new_empty(*x.shape[:-1], layer.out_features) for x in inputs]
    for first, last, product in _products(layer, inputs):
        for x, out in zip(inputs, outs, strict=True):
            made = product(x)
            part = out[..., first:last]
            made = made if act is None else act(made)
            if times is None:
                part.copy_(made)
            else:
                part.mul_(made)
    return outs


def _products(layer: Any, inputs: list[Tensor]) -> Iterator[tuple[int, int, Callable[[Tensor], Tensor]]]:
    """The outputs [first, last) of each piece of a layer's weight, and what makes them of an input."""
    if not isinstance(layer, StreamedLinear):
        yield 0, layer.out_features, layer
        return
    op, shape = layer.op(), tuple(inputs[0].shape)
    kernel = layer.streamer.kernel(op, shape)
    for piece in layer.streamer.prepared(op, kernel, shape):
        assert kernel.name == "fp32", kernel.name  # text encoders are opened without products of integers
        yield piece.first, piece.last, partial(F.linear, weight=piece.tensors[0])


def _bias(attention: Any, length: int) -> Tensor:
    """(heads, 2·length − 1): what attention adds to the score of a key `n` tokens behind its query, n from 1 − length on."""
    before = attention.compute_bias(1, length, past_seen_tokens=length - 1)
    after = attention.compute_bias(1, length)
    bias: Tensor = torch.cat([before, after[..., 1:]], dim=-1)[0, :, 0]
    return bias


def _written_out(bias: Tensor, length: int) -> Tensor:
    """(1, heads, length, length) for queries and keys, of `_bias` for as many tokens or more."""
    middle = bias.shape[-1] // 2
    near = bias[:, middle - length + 1 : middle + length]
    return near.unfold(-1, length, 1).flip(1)[None]


def _activation_bytes(config: Mapping[str, Any], length: int) -> int:
    """The most that a group takes: five times the states, as attention has them (states, normed, queries, keys, values), or the
    states twice and what is between the feed-forward's layers; the bias of a group of heads, with a copy."""
    width, inner = config["d_model"], config["num_heads"] * config["d_kv"]
    tokens = max(GROUP_TOKENS, length)
    bias = 2 * min(GROUP_HEADS, config["num_heads"]) * length**2
    return 4 * (tokens * max(2 * width + 3 * inner, 2 * width + config["d_ff"]) + bias)


def _build(checkpoint: Checkpoint, name: str, config: Mapping[str, Any]) -> nn.Module:
    """transformers' own encoder on the meta device."""
    with lean_imports():
        if config["model_type"] == "t5":
            from transformers.models.t5.configuration_t5 import T5Config as Config
            from transformers.models.t5.modeling_t5 import T5EncoderModel as Encoder
        else:
            from transformers.models.umt5.configuration_umt5 import UMT5Config as Config
            from transformers.models.umt5.modeling_umt5 import UMT5EncoderModel as Encoder
    known = {k: v for k, v in config.items() if k not in ("architectures", "torch_dtype", "dtype", "_name_or_path")}
    with refusing(name, checkpoint), on_meta():
        model = Encoder(Config(**known)).eval().requires_grad_(False)
        model.set_input_embeddings(model.shared)  # the encoder's own table is the same parameter
    return model


def _names(name: str) -> list[str]:
    """Some files hold the table under the encoder's name alone."""
    return [name, "encoder.embed_tokens.weight"] if name == "shared.weight" else [name]
