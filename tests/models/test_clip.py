"""CLIP's chunks, weights and layers against loops over transformers' own encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from tiler.errors import UsageError
from tiler.models import family as families
from tiler.models.chunks import MOST_CHUNKS, Piece, emphasised, split_chunks
from tiler.models.clip import encode_last, encode_penultimate, load_tokenizer, read_chunks
from tiler.models.reading import READING, Reading
from tiler.models.samples import Prompt
from tiler.request import Emphasis
from tiler.run import streamed
from tiler.weights.checkpoint import resolve

START, END = 4998, 4999  # in the tiny vocabulary, in which nearly every letter is a token
LONG = "a lighthouse on a cliff above the waves and gulls in the wind over the harbour at dawn as the mate told "


@pytest.fixture(scope="module")
def family(tiny: Path) -> families.Family:
    return families.read_family(resolve(str(tiny)))


@pytest.fixture(scope="module")
def reference(tiny: Path) -> CLIPTextModel:
    model = CLIPTextModel.from_pretrained(tiny / "text_encoder", variant="fp16", torch_dtype=torch.float32)
    return model.eval()


def encode(family: families.Family, how: Any, text: str, reading: Reading = READING, told: Any = pytest.fail) -> Prompt:
    part = family.part(families.Role.TEXT_ENCODER)
    encoder = part.build()
    with streamed(encoder, family.checkpoint.weights(part.name), part.aliases):
        (prompt,) = how(load_tokenizer(family), encoder, [text], told, reading)
    return prompt


def words(tiny: Path, text: str) -> list[int]:
    return CLIPTokenizer.from_pretrained(tiny / "tokenizer")(text, add_special_tokens=False).input_ids


@torch.no_grad()
def loop(model: CLIPTextModel, chunks: list[list[int]], weights: list[list[float]], norm: bool = True) -> Tensor:
    rows = []
    for ids, factors in zip(chunks, weights, strict=True):
        pads = [END] * (75 - len(ids))
        states = model(torch.tensor([[START, *ids, END, *pads]])).last_hidden_state
        weighed = states * torch.tensor([1.0, *factors, 1.0, *[1.0] * len(pads)])[None, :, None]
        rows.append(weighed * (states.mean() / weighed.mean()) if norm else weighed)
    return torch.cat(rows, dim=1)


def near(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= 1e-5 * b.abs().max())


@pytest.mark.parametrize("norm", [True, False])
def test_weights_and_breaks(family: families.Family, reference: CLIPTextModel, tiny: Path, norm: bool) -> None:
    emphasis = Emphasis.ORIGINAL if norm else Emphasis.NO_NORM
    got = encode(family, encode_last, r"a (boat:1.4) \(old\) BREAK [fog], dawn", Reading(emphasis=emphasis)).tokens
    parts = [[("a", 1.0), ("boat", 1.4), ("(old)", 1.0)], [("fog", 1 / 1.1), (", dawn", 1.0)]]
    ids = [[i for text, _ in chunk for i in words(tiny, text)] for chunk in parts]
    weights = [[w for text, w in chunk for _ in words(tiny, text)] for chunk in parts]
    assert near(got, loop(reference, ids, weights, norm))


def test_emphasis_may_be_ignored_or_text(family: families.Family, reference: CLIPTextModel, tiny: Path) -> None:
    text = "a (boat:1.4)"
    ignored = encode(family, encode_last, text, Reading(emphasis=Emphasis.IGNORE)).tokens
    plain = words(tiny, "a boat")
    assert near(ignored, loop(reference, [plain], [[1.0] * len(plain)]))
    literal = words(tiny, text)
    got = encode(family, encode_last, text, Reading(emphasis=Emphasis.NONE)).tokens
    assert near(got, loop(reference, [literal], [[1.0] * len(literal)]))


def test_a_long_prompt_goes_on_in_chunks(family: families.Family, reference: CLIPTextModel, tiny: Path) -> None:
    ids = words(tiny, LONG)
    assert 75 < len(ids) <= 150
    chunks = [ids[:75], ids[75:]]
    want = loop(reference, chunks, [[1.0] * len(chunk) for chunk in chunks])
    assert near(encode(family, encode_last, LONG).tokens, want)


def test_the_pooled_vector_is_the_first_chunks(family: families.Family, reference: CLIPTextModel, tiny: Path) -> None:
    got = encode(family, encode_penultimate, f"{LONG} BREAK (a boat:1.5)")
    with torch.no_grad():
        first = reference(torch.tensor([[START, *words(tiny, LONG)[:75], END]]), output_hidden_states=True)
    assert got.tokens.shape[1] == 3 * 77 and got.pooled is not None
    assert near(got.pooled, first.pooler_output)
    assert near(got.tokens[:, :77], first.hidden_states[-2])


def test_clip_skip_counts_layers_from_the_last(family: families.Family, reference: CLIPTextModel, tiny: Path) -> None:
    ids = words(tiny, "a boat")
    with torch.no_grad():
        states = reference(torch.tensor([[START, *ids, END, *[END] * (75 - len(ids))]]), output_hidden_states=True)
        want = reference.final_layer_norm(states.hidden_states[-2])
    assert near(encode(family, encode_last, "a boat", Reading(clip_skip=2)).tokens, want)
    with pytest.raises(UsageError, match="this text encoder has"):
        encode(family, encode_last, "a boat", Reading(clip_skip=30))


def test_too_many_chunks_are_cut_with_a_note(family: families.Family) -> None:
    told: list[str] = []
    config = family.part(families.Role.TEXT_ENCODER).build().config
    assert len(read_chunks(load_tokenizer(family), config, "x BREAK " * 25, told.append)) == MOST_CHUNKS
    assert len(told) == 1 and "was cut" in told[0]


def sizes(*sections: str, room: int = 10) -> list[str]:
    """The chunks of a text of letters, each a token; letters in brackets stay together."""
    pieces = []
    for section in sections:
        split = section.replace("<", " <").replace(">", "> ").split()
        groups = [[word.strip("<>")] if word.startswith("<") else list(word) for word in split]
        pieces.append([Piece(tuple(map(ord, piece))) for group in groups for piece in group])
    chunks = split_chunks(pieces, room, ord(","))
    return ["".join(chr(i) for piece in chunk for i in piece.ids) for chunk in chunks]


def test_a_chunk_ends_behind_a_comma_that_is_near() -> None:
    assert sizes("abcdefghijkl") == ["abcdefghij", "kl"]
    assert sizes("abcdefg,ijkl") == ["abcdefg,", "ijkl"]
    assert sizes("abcdefghij,l") == ["abcdefghij", ",l"]
    assert sizes("ab," + "x" * 40, room=30) == ["ab," + "x" * 27, "x" * 13]  # too far
    assert sizes("abcdefghij") == ["abcdefghij"]
    assert sizes("") == [""]


def test_breaks_begin_chunks() -> None:
    assert sizes("ab", "cd") == ["ab", "cd"]
    assert sizes("ab", "") == ["ab"]
    assert sizes("", "ab") == ["", "ab"]
    assert sizes("ab", "", "cd") == ["ab", "", "cd"]


def test_an_embedding_moves_whole_into_the_next_chunk() -> None:
    assert sizes("abcdefgh<vvvv>i") == ["abcdefgh", "vvvvi"]
    assert sizes("<vvvv><wwwwww><u>") == ["vvvvwwwwww", "u"]


def test_weights_without_a_mean_are_refused() -> None:
    states = torch.tensor([[[1.0], [1.0]]])
    with pytest.raises(UsageError, match="no-norm"):
        emphasised(states, [1.0, -1.0], Emphasis.ORIGINAL)
    assert emphasised(states, [1.0, -1.0], Emphasis.NO_NORM).flatten().tolist() == [1, -1]
