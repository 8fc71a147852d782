"""What tests remember of a model's memory and work is measured anew when anything that decides it is another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.rehearsals import Remembered
from tiler.models.built import Models
from tiler.models.family import read_family
from tiler.planning.peaks import DenoiserPeaks, VaePeaks
from tiler.planning.time import Counter
from tiler.request import Precision
from tiler.run import measure
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


def test_methods_and_work_are_remembered_of_equal_models(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [Models(read_family(resolve(str(checkpoints / kind)))) for kind in ("tiny", "tiny", "tiny-sd2")]
    facts = measure(checkpoints)

    def peaks(of: Models, precision: Precision = Precision.FP32) -> int:
        return id(VaePeaks(of, of.decoder, facts, precision)._rehearsed)

    def work(of: Models) -> int:
        return id(Counter(of).known)

    first, again, other = map(peaks, models)
    assert first == again == other  # both have the same autoencoder
    counted, again, other = map(work, models)
    assert counted == again != other
    assert peaks(models[0], Precision.BF16) != first != counted
    monkeypatch.setattr("tiler.decoding.frozen.BAND", 39)
    assert peaks(models[0]) != first and work(models[0]) != counted
    monkeypatch.undo()
    assert (peaks(models[0]), work(models[0])) == (first, counted)
