"""Encode prompts with a streamed T5 or UMT5 encoder, whose modules are transformers' own.

All prompts of a run share one read of the weights, and each is computed separately, so its embeddings do not depend on
the other prompts. A masked token has no weight in attention (exp of fp32's smallest number is 0), so padding that a
family masks is not computed; padding that a family attends to is treated like any token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiler.compute.choose import KERNELS
from tiler.compute.layers import StreamedLinear
from tiler.errors import ModelError
from tiler.memory.lean_imports import lean_imports
from tiler.models import bounds
from tiler.models.chunks import emphasised
from tiler.models.family import Part, Role, read_config
from tiler.models.meta import on_meta, refusing
from tiler.models.reading import READING, Reading
from tiler.request import Emphasis
from tiler.request.prompt import Fragment, Sections
from tiler.weights.checkpoint import Checkpoint
from tiler.weights.flavours import read_json
from tiler.weights.store import PIECE_ELEMENTS

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

GROUP_TOKENS = 1024  # of prompts that share one read of the weights, unless one prompt alone has more
CHUNK = 256  # tokens normalised at a time
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
        example=partial(_run, length),
    )


def check_tokenizer(checkpoint: Checkpoint, folder: str, fetch: str) -> Path:
    """The folder of a tokenizer whose files exist. Raises ModelError, which says with `fetch` how to get them."""
    path = checkpoint.tokenizer(folder)
    if not any((path / file).is_file() for file in _TOKENIZERS):
        raise ModelError(f"{path}: neither tokenizer.json nor spiece.model is here; {fetch}")
    return path


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
    try:
        return Tokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # the libraries behind raise plain Exception for damaged files
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if "pip install" in reason:  # what transformers would try next with a file that is no sentencepiece model
            reason = "its files are damaged"
        raise ModelError(f"{path}: the tokenizer cannot be read ({reason}); download it again") from error


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
    """The last hidden state of each text, (1, tokens, d_model) fp32, by a streamed `encoder`, times its tokens'
    weights.

    A text is cut to `length` tokens, its end mark included; `warn` tells of it. With `keep_pads` it is padded to
    `length`, and its padding is looked at, as by a pipeline that gives the encoder no mask; else there is a row for
    each of its own tokens, the same as a mask would give them. `clean` is what a pipeline makes of a text before it is
    tokenised. Raises ModelError where tokenizer and encoder do not belong together.
    """
    read = [_read(tokenizer, text, length, warn, reading, keep_pads=keep_pads, clean=clean) for text in texts]
    if any(int(tokens.ids.max()) >= encoder.config.vocab_size for tokens in read):
        raise ModelError("the tokenizer knows more words than the text encoder; they do not belong together")
    encoded: list[Tensor] = []
    with torch.no_grad():
        for group in _groups([tokens.ids for tokens in read]):
            encoded += _encode(encoder, group)
    # T5's encodings are not brought back to their mean, which is next to 0.
    return [emphasised(states, tokens.weights, Emphasis.NO_NORM) for states, tokens in zip(encoded, read, strict=True)]


class _Tokens(NamedTuple):
    """(1, n) ids and n weights."""

    ids: Tensor
    weights: tuple[float, ...]


def _read(
    tokenizer: Any, text: str, length: int, warn: Callable[[str], None], reading: Reading, *, keep_pads: bool,
    clean: Callable[[str], str],
) -> _Tokens:  # fmt: skip
    """Tokenise the sections of a prompt. A BREAK becomes a space, since T5 has no chunks. Fragments of different
    weights are tokenised separately."""
    # The tokenizer is not asked to look at megabytes of text just to say that they do not fit.
    short = text[: 40 * length]
    fragments = [f for f in _in_a_row(reading.sections(short, warn)) if f.text] or [Fragment("")]
    before, after = _marks(tokenizer)
    if len(fragments) == 1:  # marks and all by the tokenizer itself
        marked = tokenizer(clean(fragments[0].text), verbose=False).input_ids
        weights = [1.0] * len(before) + [fragments[0].weight] * (len(marked) - len(before) - len(after))
    else:
        rows = [tokenizer(clean(f.text), add_special_tokens=False, verbose=False).input_ids for f in fragments]
        marked = [*before, *(i for row in rows for i in row), *after]
        weights = [1.0] * len(before) + [f.weight for f, row in zip(fragments, rows, strict=True) for _ in row]
    if len(marked) > length or len(text) > len(short):
        warn(f"the prompt is longer than {length} tokens and was cut for T5: {text[:40]!r}…")
    ids = [*marked[: length - len(after)], *after] if len(marked) > length else marked
    if keep_pads:
        ids = [*ids, *[tokenizer.pad_token_id] * (length - len(ids))]
    weights = weights[: len(ids)]
    return _Tokens(torch.tensor([ids]), (*weights, *[1.0] * (len(ids) - len(weights))))


def _in_a_row(sections: Sections) -> Iterator[Fragment]:
    """All fragments with a space between sections; adjacent fragments of equal weight are merged."""
    last: Fragment | None = None
    for section in sections:
        for number, (text, weight) in enumerate(section):
            joint = "" if number or last is None else " "
            if last is None or last.weight != weight:
                if last is not None:
                    yield last
                last = Fragment(text, weight)
            else:
                last = Fragment(last.text + joint + text, weight)
    if last is not None:
        yield last


def _marks(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer adds before and after a text."""
    bare, marked = (tokenizer("a", add_special_tokens=added).input_ids for added in (False, True))
    first = next(i for i in range(len(marked)) if marked[i : i + len(bare)] == bare)
    return marked[:first], marked[first + len(bare) :]


def _groups(rows: list[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive prompts that share one read of the weights."""
    group: list[Tensor] = []
    for ids in rows:
        if group and sum(other.shape[1] for other in group) + ids.shape[1] > GROUP_TOKENS:
            yield group
            group = []
        group.append(ids)
    if group:
        yield group


def _encode(encoder: Any, rows: list[Tensor]) -> list[Tensor]:
    """The states of all prompts are one tensor (1, tokens, d_model), of which each prompt has a part: few large blocks,
    which go back to the system when they are freed."""
    ends = list(accumulate(ids.shape[1] for ids in rows))
    prompts = [slice(end - ids.shape[1], end) for end, ids in zip(ends, rows, strict=True)]
    x: Tensor = encoder.shared(torch.cat(rows, dim=1))
    bias: Tensor | None = None
    for block in encoder.encoder.block:
        attention, feed_forward = block.layer[0], block.layer[-1]
        if attention.SelfAttention.has_relative_attention_bias:  # T5's first block for all, each of UMT5's for itself
            bias = _bias(attention.SelfAttention, max(ids.shape[1] for ids in rows))
        assert bias is not None
        x += _attended(attention, x, prompts, bias)
        x += _fed(feed_forward, x, prompts)
    return [_normed(encoder.encoder.final_layer_norm, x[:, prompt]) for prompt in prompts]


def _normed(norm: Any, x: Tensor) -> Tensor:
    """`norm` of (1, n, d_model), applied to some tokens at a time because it makes copies."""
    out = torch.empty_like(x)
    for some, filled in zip(x.split(CHUNK, dim=1), out.split(CHUNK, dim=1), strict=True):
        filled.copy_(norm(some))
    return out


def _attended(layer: Any, x: Tensor, prompts: list[slice], bias: Tensor) -> Tensor:
    """The contribution of self-attention to the states (1, n, d_model)."""
    attention, normed = layer.SelfAttention, _normed(layer.layer_norm, x)
    queries, keys, values = (_linear(part, normed, prompts) for part in (attention.q, attention.k, attention.v))
    del normed
    for prompt in prompts:
        own = (t[:, prompt].unflatten(-1, (attention.n_heads, -1)).transpose(1, 2) for t in (queries, keys, values))
        q, k, v = own
        for first in range(0, attention.n_heads, GROUP_HEADS):
            heads = slice(first, first + GROUP_HEADS)
            mask = _written_out(bias[heads], q.shape[2])
            # In place: no other head looks at these queries. T5 does not scale its scores.
            q[:, heads] = F.scaled_dot_product_attention(q[:, heads], k[:, heads], v[:, heads], mask, scale=1.0)
            del mask
    del q, k, v, keys, values
    return _linear(attention.o, queries, prompts)


def _fed(layer: Any, x: Tensor, prompts: list[slice]) -> Tensor:
    """The contribution of the feed-forward part to the states (1, n, d_model)."""
    dense, normed = layer.DenseReluDense, _normed(layer.layer_norm, x)
    if hasattr(dense, "wi_0"):
        hidden = _linear(dense.wi_0, normed, prompts, dense.act)
        _linear(dense.wi_1, normed, prompts, times=hidden)
    else:
        hidden = _linear(dense.wi, normed, prompts, dense.act)
    del normed
    return _linear(dense.wo, hidden, prompts)


def _linear(
    layer: Any,
    x: Tensor,
    prompts: list[slice],
    act: Callable[[Tensor], Tensor] | None = None,
    times: Tensor | None = None,
) -> Tensor:
    """`layer` of x (1, n, in), activated, by one read of its weight, each prompt's product by itself; multiplied into
    `times` (1, n, out) where that is given."""
    out = x.new_empty(1, x.shape[1], layer.out_features) if times is None else times
    for first, last, product in _products(layer, x):
        for prompt in prompts:
            made = product(x[:, prompt])
            part = out[:, prompt, first:last]
            if times is None:
                part.copy_(made if act is None else act(made))
            else:
                part.mul_(made)
    return out


def _products(layer: Any, x: Tensor) -> Iterator[tuple[int, int, Callable[[Tensor], Tensor]]]:
    """The outputs [first, last) of each piece of a layer's weight, and what makes them of an input."""
    if not isinstance(layer, StreamedLinear):
        yield 0, layer.out_features, layer
        return
    # Pieces of rows as they are: each prompt's product is made by itself, for all prompts at one read.
    for piece in layer.streamer.prepared(layer.op(), KERNELS["fp32"], tuple(x.shape)):
        yield piece.first, piece.last, partial(F.linear, weight=piece.tensors[0])


def _bias(attention: Any, length: int) -> Tensor:
    """(heads, 2·length − 1): what attention adds to the score of a key `n` tokens behind its query, n from 1 − length
    on."""
    if (table := attention.relative_attention_bias.weight).is_meta:
        return table.new_empty(attention.n_heads, 2 * length - 1)
    before = attention.compute_bias(1, length, past_seen_tokens=length - 1)
    after = attention.compute_bias(1, length)
    bias: Tensor = torch.cat([before, after[..., 1:]], dim=-1)[0, :, 0]
    return bias


def _written_out(bias: Tensor, length: int) -> Tensor:
    """(1, heads, length, length) for queries and keys, of `_bias` for as many tokens or more."""
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
    """The names of a parameter in files: some have the token table only under the encoder's name."""
    return [name, "encoder.embed_tokens.weight"] if name == "shared.weight" else [name]
