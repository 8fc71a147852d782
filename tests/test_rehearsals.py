"""What tests remember of the denoiser's memory is measured anew when anything that decides it is another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.rehearsals import Remembered
from tiler.models.built import Models
from tiler.models.family import read_family
from tiler.planning.peaks import DenoiserPeaks
from tiler.request import Precision
from tiler.weights.checkpoint import resolve


def test_equal_questions_are_asked_once(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []
    remembered = Remembered(lambda peaks, tiles, *size: asked.append(tiles) or len(asked))

    def answer(kind: str = "tiny", tiles: tuple[int, ...] = (0,), side: int = 8, **options: int) -> int:
        peaks = DenoiserPeaks(Models(read_family(resolve(str(checkpoints / kind)))), Precision.FP32, **options)
        return remembered.activations(peaks, tiles, side, side)

    assert [answer(), answer()] == [1, 1]
    assert [answer("tiny-sd2"), answer(tiles=(0, 0)), answer(side=16)] == [2, 3, 4]
    assert [answer(arena_bytes=10**5), answer(chunks=2), answer()] == [5, 6, 1]
    monkeypatch.setattr("tiler.compute.layers.SMALL", 100)
    assert [answer(), answer()] == [7, 7]
    monkeypatch.setattr("tiler.compute.stream.Streamer.run", lambda *args: [])
    assert answer() == 8
    monkeypatch.undo()
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert answer() == 9
    finally:
        torch.set_num_threads(threads)
    assert answer() == 1
