"""Textual inversion against transformers' own encoder with a longer token table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTokenizer

from tests.models.rendering import ask, rendered
from tiler.errors import ModelError, NumericalError, UsageError
from tiler.models import family as families
from tiler.models.clip import encode_last, load_tokenizer
from tiler.models.embeddings import Embeddings
from tiler.models.reading import Reading
from tiler.run import streamed
from tiler.weights.checkpoint import resolve

WIDTH = 32  # of the tiny encoder


def vectors(count: int, width: int = WIDTH, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "embeddings"
    (folder / "below").mkdir(parents=True)
    save_file({"emb_params": vectors(3)}, folder / "inks.safetensors")
    save_file({"<sketch>": vectors(1, seed=1)[0]}, folder / "below/sketch.safetensors")
    save_file({"clip_l": vectors(2), "clip_g": vectors(2, 48)}, folder / "both.safetensors")
    save_file({"emb_params": vectors(2) * float("nan")}, folder / "bad.safetensors")
    (folder / "old.pt").write_bytes(b"\x80\x02")
    return folder


@pytest.mark.parametrize(
    "text",
    [
        "a inks boat <sketch>",
        "a embedding:inks boat <sketch>",
        "a INKS boat embedding:sketch",
        "a embedding:Inks boat sketch",
    ],
)
def test_an_embedding_stands_where_it_is_named(tiny: Path, folder: Path, text: str) -> None:
    family = families.read_family(resolve(str(tiny)))
    part = family.part(families.Role.TEXT_ENCODER)
    encoder, embeddings = part.build(), Embeddings([folder], [WIDTH])
    reading = Reading(embeddings=embeddings)
    with streamed(encoder, family.checkpoint.weights(part.name), part.aliases):
        (got,) = encode_last(load_tokenizer(family), encoder, [text], pytest.fail, reading)
        (plain,) = encode_last(load_tokenizer(family), encoder, ["a boat"], pytest.fail, Reading())
        (again,) = encode_last(load_tokenizer(family), encoder, ["a boat"], pytest.fail, reading)
    assert torch.equal(plain.tokens, again.tokens)
    reference = CLIPTextModel.from_pretrained(tiny / "text_encoder", variant="fp16", dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(tiny / "tokenizer")
    table = reference.embeddings.token_embedding
    first = table.weight.shape[0]
    table.weight = torch.nn.Parameter(torch.cat([table.weight, vectors(3), vectors(1, seed=1)]))

    def ids(words: str) -> list[int]:
        return tokenizer(words, add_special_tokens=False).input_ids

    said = [4998, *ids("a"), first, first + 1, first + 2, *ids("boat"), first + 3]
    with torch.no_grad():
        want = reference(torch.tensor([said + [4999] * (77 - len(said))])).last_hidden_state
    assert (got.tokens - want).abs().max() <= 1e-5 * want.abs().max()
    assert list(embeddings.used) == ["inks", "sketch"] and all(len(h) == 12 for h in embeddings.used.values())


def test_what_cannot_be_used_is_told_when_it_is_named(folder: Path) -> None:
    def named(text: str, *widths: int) -> Any:
        return Embeddings([folder], widths).pieces(text, 1.0, widths[0], lambda text: [ord(c) for c in text.lower()])

    assert [len(piece.ids) for piece in named("a both", WIDTH, 48)] == [1, 1, 2]
    assert [piece.ids for piece in named("<x>", WIDTH)] == [(60,), (120,), (62,)]
    for text, error, said in (
        ("embedding:ink", ModelError, "near names are inks"),
        ("both", ModelError, "width 32, 48, but the model's text encoders take 32"),
        ("embedding:old", ModelError, "pickle"),
        ("bad", NumericalError, "NaN"),
    ):
        with pytest.raises(error, match=said):
            named(text, WIDTH)
    save_file({"emb_params": vectors(1)}, folder / "below/inks.safetensors")
    with pytest.raises(UsageError, match="in two files"):
        named("inks", WIDTH)


def test_a_picture_tells_its_embeddings(tiny: Path, folder: Path, tmp_path: Path, in_process: Any) -> None:
    asked = {"size": 64, "num_inference_steps": 1, "prompt": "a boat, inks"}
    plain, _ = rendered(ask(tiny, tmp_path, **asked))
    styled, _ = rendered(ask(tiny, tmp_path, embd_dir=folder, **asked))
    assert not torch.equal(plain, styled)
    assert "TI hashes: inks: " in Image.open(tmp_path / "x.png").text["parameters"].replace('"', "")
    ran = in_process("render", "a boat, old", "--embd-dir", folder, "--model", tiny, "--size", "64", "--steps", "1")
    assert ran.code == 3 and "pickle" in ran.err
