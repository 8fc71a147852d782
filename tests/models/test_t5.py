"""Streamed T5 and UMT5 encoders against transformers' resident ones."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tiler.errors import ModelError
from tiler.models import t5
from tiler.models import together as sharing
from tiler.run import streamed
from tiler.weights.checkpoint import Checkpoint
from tiler.weights.store import Piece, WeightStore

TEXTS = ["a boat on a lake at dawn", "", "storm clouds over the harbour, highly detailed, gulls and mist"]
LONG = "a lighthouse on a cliff, waves, dramatic light, " * 20
LENGTH = 40


@pytest.fixture(scope="module", params=["t5", "umt5", "not gated"])
def checkpoint(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    from checkpoints import _t5

    folder = tmp_path_factory.mktemp("t5")
    gated = {"feed_forward_proj": "relu"} if request.param == "not gated" else {}
    kind = {"model_type": "umt5"} if request.param == "umt5" else {}
    _t5.write_encoder(folder / "text_encoder", _t5.config(**gated, **kind), seed=7)
    _t5.write_tokenizer(folder / "tokenizer")
    return Checkpoint(name="tiny", folder=folder, variant=None)


def encode(checkpoint: Checkpoint, texts: list[str], *, keep_pads: bool, warn: Any = pytest.fail) -> list[Tensor]:
    part = t5.read_t5(checkpoint, "text_encoder", LENGTH)
    tokenizer, module = t5.load_tokenizer(checkpoint, "tokenizer"), part.build()
    stored = checkpoint.weights("text_encoder")
    with streamed(module, stored, part.aliases, int8_products=False, arena_bytes=part.arena_bytes):
        return t5.encode_t5(tokenizer, module, texts, LENGTH, warn, keep_pads=keep_pads)


def reference(checkpoint: Checkpoint, text: str, *, masked: bool) -> tuple[Tensor, int]:
    """transformers' hidden states (1, LENGTH, width), and the number of tokens that belong to the text."""
    from transformers import AutoModelForTextEncoding, T5Tokenizer

    model = AutoModelForTextEncoding.from_pretrained(checkpoint.folder / "text_encoder", dtype=torch.float32).eval()
    tokenizer = T5Tokenizer.from_pretrained(checkpoint.folder / "tokenizer")
    tokens = tokenizer(text, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
    with torch.no_grad():
        states = model(tokens.input_ids, tokens.attention_mask if masked else None).last_hidden_state
    return states, int(tokens.attention_mask.sum())


@pytest.mark.parametrize("keep_pads", [False, True], ids=["masked", "padded"])
def test_prompts_are_encoded_as_by_transformers(checkpoint: Checkpoint, keep_pads: bool) -> None:
    told: list[str] = []
    got = encode(checkpoint, [*TEXTS, LONG], keep_pads=keep_pads, warn=told.append)
    for text, states in zip([*TEXTS, LONG], got, strict=True):
        want, own = reference(checkpoint, text, masked=not keep_pads)
        assert states.shape[1] == (LENGTH if keep_pads else own)
        assert torch.allclose(states, want[:, : states.shape[1]], atol=1e-5, rtol=1e-5)
    assert len(told) == 1 and f"longer than {LENGTH} tokens" in told[0] and "a lighthouse" in told[0]


def test_a_prompt_does_not_depend_on_those_beside_it(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    together = encode(checkpoint, TEXTS, keep_pads=False)
    alone = [encode(checkpoint, [text], keep_pads=False)[0] for text in TEXTS]
    monkeypatch.setattr(sharing, "GROUP_TOKENS", 20)
    in_groups = encode(checkpoint, TEXTS, keep_pads=False)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(together, alone, in_groups, strict=True))


def test_all_prompts_share_one_read_and_of_the_table_only_their_rows_are_read(checkpoint: Checkpoint) -> None:
    part, stored = t5.read_t5(checkpoint, "text_encoder", LENGTH), checkpoint.weights("text_encoder")
    tokenizer, read = t5.load_tokenizer(checkpoint, "tokenizer"), []
    for texts in ([TEXTS[0]], TEXTS):
        module = part.build()
        with streamed(module, stored, part.aliases, int8_products=False, arena_bytes=part.arena_bytes) as streamer:
            t5.encode_t5(tokenizer, module, texts, LENGTH, pytest.fail, keep_pads=False)
            assert streamer.store is not None
            read.append(streamer.store.bytes_read)
    table = stored["shared.weight"]
    blocks = sum(info.nbytes for name, info in stored.items() if "embed_tokens" not in name and name != table.name)
    row = table.nbytes // table.shape[0]
    for nbytes, texts in zip(read, ([TEXTS[0]], TEXTS), strict=True):
        assert blocks < nbytes <= blocks + row * sum(len(text) + 1 for text in texts)


def test_the_next_layer_is_read_while_one_is_computed(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the only pass: except for the first, all pieces of linear layers come from the thread that reads ahead."""
    readers: dict[str, list[str]] = {}
    read = WeightStore._read

    def tell(store: WeightStore, piece: Piece, buffer: torch.Tensor) -> torch.Tensor:
        readers.setdefault(piece.name, []).append(threading.current_thread().name)
        return read(store, piece, buffer)

    monkeypatch.setattr(WeightStore, "_read", tell)
    encode(checkpoint, TEXTS, keep_pads=False)
    streamed_ones = [name for name in readers if ".wi" in name or ".wo" in name]  # the others are small, and stay
    ahead = [name.startswith("tiler-read-ahead") for layer in streamed_ones for name in readers[layer]]
    assert len(ahead) >= 6 and ahead.count(False) == 1


def test_it_may_be_split_into_shards_and_hold_its_table_under_the_encoders_name(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    import json

    from safetensors.torch import load_file, save_file

    want = encode(checkpoint, TEXTS, keep_pads=False)
    shutil.copytree(checkpoint.folder, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "text_encoder"
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")
    names, shards = sorted(tensors), ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    where = {name: shards[i % 2] for i, name in enumerate(names)}
    for shard in shards:
        save_file({name: tensors[name] for name in names if where[name] == shard}, folder / shard)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    sharded = Checkpoint(name="shards", folder=tmp_path, variant=None)
    assert all(torch.equal(a, b) for a, b in zip(encode(sharded, TEXTS, keep_pads=False), want, strict=True))
    (folder / shards[1]).unlink()
    with pytest.raises(ModelError, match=shards[1]):
        encode(sharded, TEXTS, keep_pads=False)


def test_what_is_missing_or_foreign_is_named(checkpoint: Checkpoint, tmp_path: Path) -> None:
    import json

    shutil.copytree(checkpoint.folder, tmp_path, dirs_exist_ok=True)
    copy = Checkpoint(name="copy", folder=tmp_path, variant=None, repository="org/copy")
    config = tmp_path / "text_encoder/config.json"
    settings = json.loads(config.read_text())
    for changed, words in (
        ({"model_type": "clip_text_model"}, "needs a T5 encoder"),
        ({"d_model": "wide"}, "d_model"),
        ({"num_heads": 0}, "num_heads"),
    ):
        config.write_text(json.dumps(settings | changed))
        with pytest.raises(ModelError, match=words):
            t5.read_t5(copy, "text_encoder", LENGTH)
    (tmp_path / "tokenizer/spiece.model").write_bytes(b"no model")
    with pytest.raises(ModelError, match="tokenizer cannot be read"):
        t5.load_tokenizer(copy, "tokenizer")
    (tmp_path / "tokenizer/spiece.model").unlink()
    with pytest.raises(ModelError, match=r"spiece\.model is here; run: hf download org/copy --include 'tokenizer/\*'"):
        t5.load_tokenizer(copy, "tokenizer")


@pytest.mark.parametrize("keep_pads", [False, True], ids=["masked", "padded"])
def test_weights_scale_the_encodings_and_syntax_is_no_text(checkpoint: Checkpoint, keep_pads: bool) -> None:
    """Fragments are tokenised separately; BREAK is a space; a text with a single weight is encoded as without it."""
    from transformers import AutoModelForTextEncoding, T5Tokenizer

    tokenizer = T5Tokenizer.from_pretrained(checkpoint.folder / "tokenizer")
    parts = [("a boat", 1.0), ("on a lake", 1.5), ("at dawn, mist", 1.0)]
    rows = [tokenizer(text, add_special_tokens=False).input_ids for text, _ in parts]
    ids = [*(i for row in rows for i in row), tokenizer.eos_token_id]
    weights = [*(w for (_, w), row in zip(parts, rows, strict=True) for _ in row), 1.0]
    pads = LENGTH - len(ids) if keep_pads else 0
    model = AutoModelForTextEncoding.from_pretrained(checkpoint.folder / "text_encoder", dtype=torch.float32).eval()
    with torch.no_grad():
        states = model(torch.tensor([[*ids, *[tokenizer.pad_token_id] * pads]])).last_hidden_state
    want = states * torch.tensor([*weights, *[1.0] * pads])[None, :, None]
    (got,) = encode(checkpoint, ["a boat (on a lake:1.5) at dawn, BREAK mist"], keep_pads=keep_pads)
    assert got.shape == want.shape and (got - want).abs().max() < 1e-5 * want.abs().max()
    plain, same = encode(checkpoint, ["a boat at dawn", "a boat BREAK at dawn"], keep_pads=keep_pads)
    assert torch.equal(plain, same)


def test_a_weighted_text_that_is_too_long_keeps_its_end_mark(checkpoint: Checkpoint) -> None:
    told: list[str] = []
    (got,) = encode(checkpoint, [f"(gulls:1.3) {LONG}"], keep_pads=False, warn=told.append)
    assert got.shape[1] == LENGTH and len(told) == 1
