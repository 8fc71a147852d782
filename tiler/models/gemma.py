"""Encode prompts with a streamed Gemma, a language model whose modules are transformers' own.

The states before its last layer are used, so that layer is neither built nor read. All prompts of a run share one read
of the weights. A token attends only to those before it, so padding is never computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
from tiler.weights.store import PIECE_ELEMENTS

if TYPE_CHECKING:
    from transformers.models.gemma.modeling_gemma import GemmaModel
    from transformers.models.gemma.tokenization_gemma import GemmaTokenizer

_TOKENIZERS = ("tokenizer.json", "tokenizer.model")


def read_gemma(checkpoint: Checkpoint, name: str, length: int) -> Part:
    """Read the encoder in the folder `name`, for prompts of up to `length` tokens. Raises ModelError."""
    config = read_config(checkpoint, name, None, bounds.check_gemma)
    if (kind := config.get("model_type")) != "gemma":
        raise ModelError(f"{checkpoint.name}: {name} is {kind!r}; this model needs a Gemma text encoder")
    return Part(
        name=name, role=Role.TEXT_ENCODER, config=config, build=partial(_build, checkpoint, name, config),
        aliases=lambda parameter: [parameter, f"model.{parameter}"],
        quantise=lambda parameter: parameter.startswith("layers."),
        # No layer is held: its pieces pass through the arena one by one.
        arena_bytes=4 * PIECE_ELEMENTS, example=partial(_run, length),
    )  # fmt: skip


def check_tokenizer(checkpoint: Checkpoint, folder: str, fetch: str) -> Path:
    """The folder of a tokenizer whose files exist. Raises ModelError, which says with `fetch` how to get them."""
    return find_tokenizer(checkpoint, folder, _TOKENIZERS, fetch)


def load_tokenizer(checkpoint: Checkpoint, folder: str) -> GemmaTokenizer:
    """Load tokenizer.json or a sentencepiece model. Raises ModelError."""
    path = check_tokenizer(checkpoint, folder, "download the tokenizer again")
    with lean_imports():
        from transformers.models.gemma.tokenization_gemma import GemmaTokenizer
    tokenizer: GemmaTokenizer = open_tokenizer(GemmaTokenizer, path)
    return tokenizer


def encode_gemma(
    tokenizer: GemmaTokenizer,
    encoder: Any,
    texts: Sequence[str],
    length: int,
    warn: Callable[[str], None],
    reading: Reading = READING,
    *,
    clean: Callable[[str], str] = str,
) -> list[Tensor]:
    """The states of each text's own tokens before the last layer, (1, tokens, width) fp32, times their weights. A text
    is cut to `length` tokens, which `warn` reports. `clean` is applied to a text before it is tokenised, as the
    family's pipeline does. Raises ModelError if tokenizer and encoder do not belong together."""
    read = [read_tokens(tokenizer, text, length, "Gemma", warn, reading, clean) for text in texts]
    check_vocabulary(read, encoder.config.vocab_size)
    encoded: list[Tensor] = []
    with torch.no_grad():
        for group in groups([tokens.ids for tokens in read]):
            encoded += _encode(encoder, group)
    return [emphasised(states, tokens.weights, Emphasis.NO_NORM) for states, tokens in zip(encoded, read, strict=True)]


def _encode(encoder: Any, rows: list[Tensor]) -> list[Tensor]:
    """Encode all prompts. Their states are one tensor (1, tokens, width), of which each prompt has a part."""
    prompts = places(rows)
    read_ahead([part for layer in encoder.layers for part in _linear_layers(layer)])
    x: Tensor = encoder.embed_tokens(torch.cat(rows, dim=1)) * math.sqrt(encoder.config.hidden_size)
    turns = None if x.is_meta else _turns(encoder.rotary_emb, max(ids.shape[1] for ids in rows))
    for layer in encoder.layers:
        x += _attended(layer.self_attn, layer.input_layernorm(x), prompts, turns)
        normed, mlp = layer.post_attention_layernorm(x), layer.mlp
        hidden = linear_together(mlp.gate_proj, normed, prompts, mlp.act_fn)
        linear_together(mlp.up_proj, normed, prompts, times=hidden)
        del normed
        x += linear_together(mlp.down_proj, hidden, prompts)
        del hidden
    return [x[:, prompt] for prompt in prompts]


def _linear_layers(layer: Any) -> list[Any]:
    """The linear layers in the order in which they are used."""
    attn, mlp = layer.self_attn, layer.mlp
    return [attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


def _attended(attn: Any, normed: Tensor, prompts: list[slice], turns: tuple[Tensor, Tensor] | None) -> Tensor:
    """Self-attention on normalised states (1, n, width)."""
    queries, keys, values = (linear_together(part, normed, prompts) for part in (attn.q_proj, attn.k_proj, attn.v_proj))
    for prompt in prompts:
        q, k, v = (t[:, prompt].unflatten(-1, (-1, attn.head_dim)).transpose(1, 2) for t in (queries, keys, values))
        if turns is not None:
            q, k = (_turned(part, *turns) for part in (q, k))
        shared = attn.num_key_value_groups
        k, v = (part.repeat_interleave(shared, dim=1) for part in (k, v))
        made = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=attn.scaling)
        queries[:, prompt] = made.transpose(1, 2).flatten(2)
    return linear_together(attn.o_proj, queries, prompts)


def _turns(rotary: Any, length: int) -> tuple[Tensor, Tensor]:
    """The cosines and sines of positions, (length, head) each: those of a head's second half repeat its first's."""
    angles = torch.outer(torch.arange(length).float(), rotary.inv_freq.float()).repeat(1, 2)
    return angles.cos(), angles.sin()


def _turned(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotate x (1, heads, n, head) by the positions of its tokens: value i together with value i + head / 2."""
    first, second = x.chunk(2, dim=-1)
    count = x.shape[2]
    return x * cosines[:count] + torch.cat([-second, first], dim=-1) * sines[:count]


def _run(length: int, encoder: Any) -> object:
    """Run the encoder as `encode_gemma` does for the largest group of prompts; its weights may be on the meta
    device."""
    return _encode(encoder, [torch.zeros(1, length, dtype=torch.int64) for _ in range(max(1, GROUP_TOKENS // length))])


def _build(checkpoint: Checkpoint, name: str, config: dict[str, Any]) -> GemmaModel:
    """Build transformers' own model on the meta device, without its last layer and norm."""
    with lean_imports():
        from transformers.models.gemma.configuration_gemma import GemmaConfig
        from transformers.models.gemma.modeling_gemma import GemmaModel
    left_out = "architectures", "torch_dtype", "dtype", "_name_or_path", "model_type"
    known = {k: v for k, v in config.items() if k not in left_out}
    if known.get("hidden_act") == "gelu":  # in published configs, which mean the tanh form (noted by transformers)
        known["hidden_act"] = "gelu_pytorch_tanh"
    with refusing(name, checkpoint), on_meta():
        model: Any = GemmaModel(GemmaConfig(**known)).eval()
        # A plain table, whose rows are read when they are used; they are scaled in `_encode`.
        model.embed_tokens = nn.Embedding(model.config.vocab_size, model.config.hidden_size)
        model.layers, model.norm = model.layers[:-1], nn.Identity()
    return model.requires_grad_(False)
