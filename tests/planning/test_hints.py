"""The smaller choices that `tiler plan` names: each is planned, and those that gain nothing are not shown."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tiler.errors import ModelError
from tiler.models.family import Guidance
from tiler.planning.hints import Hint, hints
from tiler.planning.resolve import fill
from tiler.request import Precision, RenderRequest, ResolvedRequest
from tiler.weights.disk import disk_speed


def plan_of(floor_mb: int, precision: Precision = Precision.FP32, width: int = 320) -> Any:
    longest = {"granularity": 8, "patch": 1, "longest": None}
    traits = SimpleNamespace(guidance=Guidance.CFG, few_steps="Turbo", width=width, flow=False, **longest)
    family = SimpleNamespace(
        native=128, traits=traits, granularity=8, scheduler={"_class_name": "EulerDiscreteScheduler"}
    )
    memory = SimpleNamespace(smallest_bytes=floor_mb * 10**6, max_bytes=650 * 10**6, fits=floor_mb <= 650)
    return SimpleNamespace(family=family, memory=memory, precision=precision)


def told(
    floors: dict[str, int], seconds: dict[str, float], reads: float = 0, floor: int = 600, **values: Any
) -> list[str]:
    """Hints for a plan of 600 MB and 1000 s under 650 MB, when options have other floors and times; `reads`: the
    seconds that a disk takes for all reads."""

    def way(request: ResolvedRequest) -> str:
        if request.tile_size is not None:
            return "tile"
        return "few" if request.num_inference_steps == 4 else "int8" if request.precision is Precision.INT8 else ""

    def replan(request: ResolvedRequest) -> Any:
        if way(request) not in floors | seconds:
            raise ModelError("no such thing")
        return plan_of(floors.get(way(request), 600))

    def judge(request: ResolvedRequest, plan: Any, tiling: Any, share: float) -> float:
        return max(seconds.get(way(request), 1000), share * reads)

    asked = fill(RenderRequest(prompt="x", **values))
    found = hints(asked, plan_of(floor), replan, judge)
    assert all(isinstance(hint, Hint) for hint in found)
    return [hint.words for hint in found]


@pytest.mark.parametrize(
    ("floors", "seconds", "reads", "words"),
    [
        ({}, {}, 0, []),
        ({"tile": 599}, {"int8": 990}, 0, []),
        ({"tile": 500}, {}, 0, ["--tile-size 768"]),
        ({}, {"int8": 300, "few": 100}, 0, ["--precision int8", "Turbo, 4 steps"]),
        ({"int8": 700}, {"int8": 300}, 0, []),  # faster, but not under this ceiling
        ({"int8": 640}, {"int8": 300}, 0, ["--precision int8"]),
        ({"tile": 608}, {"tile": 500}, 0, []),  # faster, but it is to save memory
        ({}, {}, 5000, ["4-bit weights (GGUF, tiler quantize)"]),
    ],
)
def test_only_what_gains_something_is_told(
    floors: dict[str, int], seconds: dict[str, float], reads: float, words: list[str]
) -> None:
    assert told(floors, seconds, reads) == words


def test_time_alone_does_not_help_a_plan_that_does_not_fit() -> None:
    assert told({"int8": 600}, {"few": 100}, floor=700) == ["--precision int8"]


def test_what_was_asked_for_is_no_hint() -> None:
    assert "--tile-size 768" not in told({"tile": 500}, {}, tile_size=768)
    assert told({"tile": 500}, {}, size=640) == []  # which is one smaller tile as it is


def test_a_disk_is_measured_by_its_file(tmp_path: Path) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(b"1" * 10_000)
    large.write_bytes(bytes(24 * 2**20))
    assert disk_speed(small) == disk_speed(tmp_path / "none") == math.inf
    assert disk_speed(large) > 1e6


def test_plan_tells_what_bounds_a_pass_and_smaller_tiles_are_smaller(in_process: Any, tiny: Path) -> None:
    asked = "plan", "x", "--model", tiny, "--size", 512, "--precision", "fp32"
    told = in_process(*asked)
    assert told.code == 0 and "one read: " in told.out and "bounds it" in " ".join(told.out.split())
    facts = in_process(*asked, "--json").json
    assert facts["pass"]["bound"] in ("disk", "arithmetic") and facts["pass"]["read_bytes"] >= 0
    assert all({"choice", "smallest_max_ram_bytes", "expected_seconds"} == set(hint) for hint in facts["hints"])
    assert not any("LoRA" in hint["choice"] for hint in facts["hints"])  # none fits a UNet so narrow
    smaller = in_process(*asked, "--tile-size", 256, "--json")
    assert smaller.code == 2 and "--tile-size 256" in smaller.err and smaller.err.count("\n") == 1
