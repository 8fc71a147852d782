"""Advice for plans that do not fit: only options that gain something are named."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tiler.errors import BudgetRefused, ModelError
from tiler.planning.advice import advise
from tiler.planning.resolve import fill
from tiler.planning.table import MemoryPlan, PhasePlan, Term
from tiler.request import Decode, Precision, RenderRequest, ResolvedRequest


def memory(peak_mb: int) -> MemoryPlan:
    phase = PhasePlan(name="decode", terms=(Term(name="activations", nbytes=peak_mb * 10**6),))
    return MemoryPlan(max_bytes=500 * 10**6, phases=(phase,), smallest_bytes=peak_mb * 10**6 - 500_000)


def told(peaks: dict[str, int], **values: Any) -> str:
    """Advice for a plan of 900 MB, when the named options take so many MB and all others take 900."""

    def replan(request: ResolvedRequest) -> MemoryPlan:
        if request.precision is Precision.INT8:
            raise ModelError("no int8 of this model")
        way = "frozen" if request.decode is Decode.FROZEN else "small" if request.width == 1024 else "other"
        return memory(peaks.get(way, 900))

    plan: Any = SimpleNamespace(memory=memory(900), precision=Precision.FP32)
    return advise(fill(RenderRequest(prompt="x", **values)), plan, replan)


@pytest.mark.parametrize(
    ("peaks", "text"),
    [
        ({}, ""),
        ({"frozen": 890}, ""),
        ({"frozen": 700}, "; with --decode frozen 700MB is enough"),
        ({"frozen": 700, "small": 600}, "; with -W 1024 -H 1024 600MB is enough"),
        ({"frozen": 600, "small": 700}, "; with --decode frozen 600MB is enough"),
        ({"frozen": 400}, "; it would fit with --decode frozen"),
        ({"frozen": 400, "small": 300}, "; it would fit with --decode frozen or with -W 1024 -H 1024"),
        ({"frozen": 700, "small": 300}, "; it would fit with -W 1024 -H 1024"),
    ],
)
def test_only_what_gains_something_is_told(peaks: dict[str, int], text: str) -> None:
    assert told(peaks) == text


def test_what_was_asked_for_is_no_advice() -> None:
    assert "--decode" not in told({"frozen": 400}, decode=Decode.FROZEN)
    assert told({"small": 300}, paper="A4") == ""


def test_a_refusal_says_it(in_process: Any, tiny: Path) -> None:
    with pytest.raises(BudgetRefused, match=r"works is 900MB; it would fit with x$"):
        memory(900).check(advice="; it would fit with x")
    ran = in_process("plan", "x", "--model", tiny, "--size", 128, "--max-ram", "100MB")
    assert ran.code == 4 and "the smallest --max-ram that works is" in ran.err
    assert len(ran.err.strip().splitlines()[-1].split("MB;")) >= 2 and "would fit with" not in ran.err
