"""Hashes of model files against hashlib's."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from tiler.weights import hashes
from tiler.weights.hashes import auto_v2, is_called


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "dream.safetensors"
    path.write_bytes(os.urandom(2**20 + 2**17 + 3))
    return path


def test_a_file_is_hashed_once_until_it_changes(model: Path) -> None:
    told: list[int] = []
    for data in (model.read_bytes(), os.urandom(1000)):
        model.write_bytes(data)
        for _ in range(2):
            assert auto_v2(model, lambda: told.append(0)) == hashlib.sha256(data).hexdigest()[:10]
    assert len(told) == 2


def test_hashes_of_either_kind_tell_a_file(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = model.read_bytes()
    whole, old = hashlib.sha256(data).hexdigest(), hashlib.sha256(data[2**20 :][: 2**16]).hexdigest()[:8]
    assert is_called(model, old, compute=False) is True
    assert is_called(model, whole[:10], compute=False) is None
    assert is_called(model, whole[:10].upper(), compute=True) is True
    assert is_called(model, whole, compute=False) is True  # it is known by now
    assert is_called(model, "0" * 10, compute=False) is False
    assert is_called(model.parent, whole, compute=True) is None


def test_a_damaged_cache_is_made_anew(model: Path, tmp_path: Path) -> None:
    want = auto_v2(model)
    (kept,) = (tmp_path / "cache/tiler/hashes").iterdir()
    for text in ("", "[]", '{"sha256": 3}', "{"):
        kept.write_text(text)
        assert auto_v2(model) == want
    assert hashes._known(model) is not None
