"""Encode prompts with a streamed CLIP text encoder. Only the rows of the token table that occur are read. The modules
are transformers' own, built on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from tiler.errors import ModelError, UsageError
from tiler.memory.lean_imports import lean_imports
from tiler.models.chunks import CLIP_TOKENS, MOST_CHUNKS, Piece, emphasised, split_chunks
from tiler.models.meta import on_meta, refusing
from tiler.models.reading import READING, Reading
from tiler.models.samples import Prompt
from tiler.models.tokenizers import open_tokenizer
from tiler.request.prompt import Fragment
from tiler.weights.checkpoint import Checkpoint

if TYPE_CHECKING:
    from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection
    from transformers.models.clip.tokenization_clip import CLIPTokenizer

    from tiler.models.family import Family


def build_clip(
    checkpoint: Checkpoint, part: str, config: dict[str, Any], *, projection: bool = False
) -> CLIPTextModel | CLIPTextModelWithProjection:
    """Build a CLIP text model on the meta device, with real position ids, and with or without the projection of its
    pooled vector. Raises ModelError."""
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
    """The names of a parameter in files, where they may carry the prefix text_model., which transformers 5 dropped from
    its modules."""
    bare = name.removeprefix("text_model.")
    names = [f"text_model.{bare}", bare]
    return names[::-1] if bare.startswith("text_projection.") else names  # that never carried it


def run_clip(encoder: Any, **options: Any) -> object:
    """Run the encoder as for one prompt; ids are real, weights may be on the meta device."""
    return encoder(torch.zeros(1, CLIP_TOKENS, dtype=torch.int64), **options)


def check_tokenizer(folder: Path, fetch: str = "download the tokenizer again") -> None:
    """Raise ModelError if the files of a CLIP tokenizer are missing in `folder`; `fetch` says how to get them."""
    if not (
        (folder / "tokenizer.json").is_file()
        or ((folder / "vocab.json").is_file() and (folder / "merges.txt").is_file())
    ):
        raise ModelError(f"{folder}: neither tokenizer.json nor vocab.json with merges.txt is here; {fetch}")


def load_tokenizer(family: Family, part: str = "tokenizer") -> CLIPTokenizer:
    """Load tokenizer.json, or vocab.json and merges.txt. Raises ModelError."""
    with lean_imports():
        from transformers.models.clip.tokenization_clip import CLIPTokenizer

    folder: Path = family.checkpoint.tokenizer(part)
    check_tokenizer(folder)
    tokenizer: CLIPTokenizer = open_tokenizer(CLIPTokenizer, folder)
    return tokenizer


def encode_last(
    tokenizer: CLIPTokenizer,
    encoder: CLIPTextModel,
    prompts: Sequence[str],
    warn: Callable[[str], None],
    reading: Reading = READING,
) -> list[Prompt]:
    """For each prompt, the states (1, 77·chunks, width) fp32 of the last layer, as StableDiffusionPipeline uses them;
    with a `clip_skip`, the states of an earlier layer after the final norm."""
    layers = int(encoder.config.num_hidden_layers)
    if reading.clip_skip > layers:
        raise UsageError(f"--clip-skip {reading.clip_skip}: this text encoder has {layers} layers; take 1–{layers}")
    found = []
    for prompt in prompts:
        rows = []
        for chunk in read_chunks(tokenizer, encoder.config, prompt, warn, reading):
            made = _run(encoder, chunk, output_hidden_states=reading.clip_skip > 1)
            states: Tensor = made.last_hidden_state
            if reading.clip_skip > 1:
                states = encoder.final_layer_norm(made.hidden_states[-reading.clip_skip])
            rows.append(emphasised(states, chunk.weights, reading.emphasis))
        found.append(Prompt(torch.cat(rows, dim=1)))
    return found


def encode_penultimate(
    tokenizer: CLIPTokenizer,
    encoder: CLIPTextModel | CLIPTextModelWithProjection,
    prompts: Sequence[str],
    warn: Callable[[str], None],
    reading: Reading = READING,
) -> list[Prompt]:
    """For each prompt, the states before the last layer, (1, 77·chunks, width) fp32, and the first chunk's pooled
    vector: projected, (1, projection_dim), if the encoder has that layer, else (1, width)."""
    found = []
    for prompt in prompts:
        rows, vectors = [], []
        for chunk in read_chunks(tokenizer, encoder.config, prompt, warn, reading):
            made = _run(encoder, chunk, output_hidden_states=True)
            vectors.append(made.text_embeds if hasattr(encoder, "text_projection") else made.pooler_output)
            rows.append(emphasised(made.hidden_states[-2], chunk.weights, reading.emphasis))
        found.append(Prompt(torch.cat(rows, dim=1), vectors[0]))
    return found


def lengthened(tokens: Tensor, length: int, empty: Tensor, behind: int = 0) -> Tensor:
    """Pad encodings (1, n, width) with chunks of an empty prompt, (1, 77, width), to `length` rows; the last `behind`
    rows stay at the end."""
    missing = (length - tokens.shape[1]) // empty.shape[1]
    end = tokens.shape[1] - behind
    return torch.cat([tokens[:, :end], *[empty] * missing, tokens[:, end:]], dim=1)


class EncoderInput(NamedTuple):
    """A chunk as the encoder's input: ids (1, 77) int64, the weight of each token, including marks and padding, and the
    vectors (n, width) of embeddings, each with the position of its first row."""

    ids: Tensor
    weights: tuple[float, ...]
    vectors: tuple[tuple[int, Tensor], ...] = ()


def read_chunks(
    tokenizer: CLIPTokenizer, config: Any, prompt: str, warn: Callable[[str], None], reading: Reading = READING
) -> list[EncoderInput]:
    """Tokenise a prompt into chunks with start and end marks and padding; `warn` reports anything that cannot be used.
    `config` is the encoder's. Raises ModelError if tokenizer and encoder do not fit together."""
    length = min(int(tokenizer.model_max_length), int(config.max_position_embeddings))
    room = length - 2
    # The tokenizer does not process megabytes of text just to report that they do not fit.
    short = prompt[: 40 * room * MOST_CHUNKS]
    sections = reading.sections(short, warn)
    tokenise = partial(_ids, tokenizer)

    def pieces_of(fragment: Fragment) -> list[Piece]:
        if reading.embeddings is None:
            return [Piece((i,), fragment.weight) for i in tokenise(fragment.text)]
        return reading.embeddings.pieces(*fragment, int(config.hidden_size), tokenise)

    pieces = [[piece for fragment in section for piece in pieces_of(fragment)] for section in sections]
    comma = _ids(tokenizer, ",")
    chunks = split_chunks(pieces, room, comma[0] if len(comma) == 1 and comma[0] != tokenizer.unk_token_id else None)
    if len(chunks) > MOST_CHUNKS or len(prompt) > len(short):
        warn(f"the prompt is longer than {MOST_CHUNKS} chunks of {room} tokens and was cut for CLIP: {prompt[:40]!r}…")
    found = []
    for chunk in chunks[:MOST_CHUNKS]:
        said = [i for piece in chunk for i in piece.ids]
        weights = [piece.weight for piece in chunk for _ in piece.ids]
        pads = room - len(said)
        ids = [tokenizer.bos_token_id, *said, tokenizer.eos_token_id, *[tokenizer.pad_token_id] * pads]
        if max(ids) >= config.vocab_size:
            raise ModelError("the tokenizer knows more words than the text encoder; they do not belong together")
        starts = accumulate((len(piece.ids) for piece in chunk), initial=1)
        vectors = tuple(
            (start, piece.vectors) for start, piece in zip(starts, chunk, strict=False) if piece.vectors is not None
        )
        found.append(EncoderInput(torch.tensor([ids]), (1.0, *weights, 1.0, *[1.0] * pads), vectors))
    return found


def _ids(tokenizer: CLIPTokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return ids


def _run(encoder: Any, chunk: EncoderInput, **options: Any) -> Any:
    def replace(module: Any, args: Any, rows: Tensor) -> Tensor:
        for start, vectors in chunk.vectors:
            rows[0, start : start + len(vectors)] = vectors
        return rows

    hook = encoder.get_input_embeddings().register_forward_hook(replace) if chunk.vectors else None
    try:
        with torch.no_grad():
            return encoder(chunk.ids, **options)
    finally:
        if hook is not None:
            hook.remove()
