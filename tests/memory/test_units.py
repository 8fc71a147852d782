"""Amounts of memory as people write them."""

from __future__ import annotations

import pytest

from tiler.errors import UsageError
from tiler.memory.budget import parse_bytes


@pytest.mark.parametrize("text", ["800", "1.5", "999999", " 512 "])
def test_a_small_number_without_a_unit_is_asked_about(text: str) -> None:
    with pytest.raises(UsageError, match=f"did you mean {text.strip()}MB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "nbytes"), [("800MB", 800_000_000), ("800000000", 800_000_000), ("512 kB", 512_000), ("900B", 900)]
)
def test_amounts(text: str, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes
