"""The readers of foreign files under hypothesis: inputs that are nearly right, and arbitrary bytes."""

from __future__ import annotations

from pathlib import Path

import fuzz
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SEEDS = fuzz.seeds()
TOKENS = [
    b'"',
    b"{",
    b"[",
    b"]]",
    b"\n",
    b"-1",
    b"1e999",
    b"null",
    b"NaN",
    b"9" * 40,
    b"\\u0000",
    b"\\ud800",
    b"\xff",
    b"--",
]


@pytest.mark.parametrize("name", fuzz.READERS)
def test_a_whole_input_is_read(name: str, tmp_path: Path) -> None:
    fuzz.READERS[name](SEEDS[name], tmp_path)


@pytest.mark.parametrize("name", fuzz.READERS)
@settings(max_examples=60, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_the_bytes_are_a_reader_raises_no_other_error(name: str, tmp_path: Path, data: st.DataObject) -> None:
    whole = SEEDS[name]
    at = data.draw(st.integers(0, len(whole)))
    gone, come = data.draw(st.integers(0, 16)), data.draw(st.binary(max_size=16) | st.sampled_from(TOKENS))
    fuzz.take(fuzz.READERS[name], whole[:at] + come + whole[at + gone :], tmp_path)
