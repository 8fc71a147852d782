"""The meter's shortcut: operations of one shape are run once, and the predictions stay the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tiler.compute import cpu
from tiler.compute.shapes import Memo
from tiler.decoding.method import ScratchSpace
from tiler.models.built import Models
from tiler.models.family import read_family
from tiler.planning.fit import with_resident
from tiler.planning.peaks import ACTIVATIONS, DenoiserPeaks, VaePeaks, in_place_of_activations
from tiler.planning.resolve import fill
from tiler.planning.table import PhasePlan, Term
from tiler.planning.tiling import plan_tiling
from tiler.planning.time import Counter
from tiler.request import Decode, Precision, RenderRequest, Wrap
from tiler.run import measure
from tiler.weights.checkpoint import resolve


@torch.no_grad()
def predicted(models: Models, folder: Path) -> list[object]:
    """The peaks of the denoiser in fp32 and int8, resident and layer by layer, and of the autoencoder; the work of a
    render."""
    found: list[object] = []
    one, five = (0,), (0, 0, 1, 1, 2)
    for precision, arena, batches in (
        (Precision.FP32, None, (one, five)), (Precision.INT8, None, (five,)), (Precision.FP32, 100_000, (five,)),
    ):  # fmt: skip
        peaks = DenoiserPeaks(models, precision, arena_bytes=arena)
        found += [peaks.activations(tiles, 16, 8) for tiles in batches]
    space = ScratchSpace(folder, 10**12)
    vae = VaePeaks(models, models.decoder, measure(folder))
    for wanted in (Decode.EXACT, Decode.FROZEN):
        found += [vae.choose(wanted, (40, 30), space, encoding=encoding, wrap=Wrap.NONE) for encoding in (False, True)]
    request = fill(RenderRequest(prompt="x", size=128, seed=0))
    found.append(Counter(models).count(plan_tiling(request, models.family), None))
    return found


@pytest.mark.parametrize("kind", ["tiny", "tiny-sd2"])
def test_equal_operations_are_metered_once_and_count_each_time(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    for module in ("tiler.compute.layers", "tiler.models.unet"):
        monkeypatch.setattr(f"{module}.SMALL", 500)
    family = read_family(resolve(str(checkpoints / kind)))
    models = Models(family)
    short = predicted(models, tmp_path)
    assert predicted(models, tmp_path) == short  # what is remembered of the first plan
    monkeypatch.setattr(Memo, "run", lambda self, key, work: work())
    assert predicted(Models(family), tmp_path) == short


def test_prompts_that_wait_are_counted(in_process: Any, tiny: Path) -> None:
    """All texts stay in memory from their encoding to the last step, each as long as the longest one."""
    asked = "plan", "--model", tiny, "--size", 128, "--precision", "fp32", "--json"

    def waiting(*words: object) -> dict[str, int]:
        phases = in_process(*asked, *words).json["phases"]
        return {phase["name"]: phase["terms"].get("prompts", 0) for phase in phases}

    one = 77 * 32 * 4  # a chunk of this model
    assert waiting("a boat", "-n", "fog") == {
        "encode prompts": 2 * one, "guide": one, "guide picture": 2 * one, "canvas": one, "decode": 0,
    }  # fmt: skip
    long = waiting("BREAK".join(["a boat"] * 7), "-n", "fog", "--canvas-prompt", "sea")
    chunks = long["encode prompts"] // (3 * one)
    assert chunks >= 7 and long["canvas"] == 2 * chunks * one  # one more is among the activations


def test_a_preview_takes_the_memory_of_a_pass_that_is_over() -> None:
    phase = PhasePlan(name="canvas", terms=(Term(name="canvas", nbytes=5), Term(name=ACTIVATIONS, nbytes=100)))
    assert in_place_of_activations(phase, "preview", 90) == phase
    assert in_place_of_activations(phase, "preview", 130).peak_bytes == phase.peak_bytes + 30


class Marked(DenoiserPeaks):
    """Predictions that say in a term of their own when they count on int8 weights multiplied in place."""

    def __init__(self, *args: Any, in_place: bool = False, **options: Any) -> None:
        super().__init__(*args, in_place=in_place, **options)
        self._in_place = in_place

    def phase(self, *args: Any) -> PhasePlan:
        phase = super().phase(*args)
        if self._in_place:
            phase = replace(phase, terms=(*phase.terms, Term(name="in place", nbytes=1)))
        return phase


@pytest.mark.skipif(not cpu.int8().products, reason="no 8-bit products here")
def test_a_plan_without_room_for_int8_weights_has_all_of_them_resident(
    in_process: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What that saves may not make another choice of weights, which leaves one of them out."""

    def canvas() -> dict[str, int]:
        ran = in_process("plan", "--model", tiny, "--size", 64, "--precision", "int8", "--max-ram", "4GB", "--json")
        terms: dict[str, int] = next(phase["terms"] for phase in ran.json["phases"] if phase["name"] == "canvas")
        return terms

    def leaving_out(phase: PhasePlan, *args: Any) -> Any:
        filled, chosen = with_resident(phase, *args)
        return filled, {} if any(term.name == "in place" for term in phase.terms) else chosen

    for module in ("tiler.models.unet", "tiler.compute.layers"):
        monkeypatch.setattr(f"{module}.SMALL", 500)
    monkeypatch.setattr("tiler.planning.render.DenoiserPeaks", Marked)
    assert "in place" in canvas()
    monkeypatch.setattr("tiler.planning.render.with_resident", leaving_out)
    assert "in place" not in canvas()
