"""The memory plan: what it refuses, what more memory gains, and what imports cost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tiler
from tiler.errors import BudgetRefused
from tiler.events import Phase
from tiler.memory.process import read_rss
from tiler.models.built import Models
from tiler.models.family import read_family
from tiler.phases import make_plan
from tiler.planning.resolve import fill
from tiler.planning.table import MemoryPlan, PhasePlan, Term
from tiler.request import RenderRequest
from tiler.weights.checkpoint import resolve


def fresh(code: str) -> str:
    """The output of a new process."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300).stdout


def test_plan_refuses_with_the_table_and_the_smallest_ceiling() -> None:
    phase = PhasePlan(
        name=Phase.CANVAS,
        terms=(Term(name="weights", nbytes=500_000_000), Term(name="activations", nbytes=400_000_000)),
    )
    plan = MemoryPlan(max_bytes=800_000_000, phases=(phase,), smallest_bytes=700_000_001)
    with pytest.raises(BudgetRefused, match="701MB") as caught:
        plan.check()
    message, table = str(caught.value), caught.value.table.splitlines()
    assert "the phase 'canvas' needs 900 MB" in message and "97% of the ceiling of 800 MB" in message
    assert any(line.startswith("canvas") and "900 MB" in line and "weights 500" in line for line in table)
    assert caught.value.exit_code == 4


def test_a_second_plan_of_a_process_is_made_like_the_first(tiny: Path) -> None:
    """Advice names the ceiling that a render has which begins with the other options. Another process may take a little
    more memory, and no plan leaves the last byte."""
    first = tiler.plan(RenderRequest(prompt="x", model=str(tiny), size=128, seed=1), tiler.Budget("4GB"))
    again = first.replan(first.request).memory
    assert again.smallest_bytes == first.plan.memory.smallest_bytes
    assert MemoryPlan(max_bytes=1, phases=again.phases, smallest_bytes=700_900_000).smallest_text == "702MB"


def test_more_memory_means_larger_batches_and_resident_weights(tiny: Path) -> None:
    family = read_family(resolve(str(tiny)))
    request = fill(RenderRequest(prompt="x", size=512, num_inference_steps=4))
    here = read_rss().now
    plans = [make_plan(request, Models(family), here + extra) for extra in (56_000_000, 80_000_000, 2_000_000_000)]
    assert plans[0].batch <= plans[1].batch <= plans[2].batch
    assert plans[2].batch > 1
    kept = [plan.resident["canvas"] for plan in plans]
    assert len(kept[0]) <= len(kept[2])
    assert set(kept[2].values()) == {torch.float32}
    assert all(p.memory.smallest_bytes == pytest.approx(plans[0].memory.smallest_bytes, rel=0.05) for p in plans)


def test_a_plan_knows_what_building_the_model_imports(tiny: Path) -> None:
    """Planning is the first thing that a process does with a model, and imports diffusers."""
    code = f"""
from tiler.memory.process import read_rss, release_code
from tiler.models.built import Models
from tiler.models.family import read_family
from tiler.phases import make_plan
from tiler.planning.resolve import fill
from tiler.request import RenderRequest
from tiler.weights.checkpoint import resolve
request = fill(RenderRequest(prompt="x", size=128))
plan = make_plan(request, Models(read_family(resolve({str(tiny)!r}))), 10**9)
release_code()  # what planning ran
print(plan.memory.phases[0].terms[0].nbytes, read_rss().now)
"""
    libraries, now = map(int, fresh(code).split())
    assert libraries > now
