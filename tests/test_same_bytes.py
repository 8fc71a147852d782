"""The check for equal bytes covers everything that changes pixels, and notices differences. It is run separately."""

from __future__ import annotations

from enum import StrEnum
from itertools import pairwise

import pytest
import same_bytes

from tiler.request import Decode, GuideUpscale, Layout, Mask, Precision, Scheduler, Wrap

DEFAULTS = (GuideUpscale.PIXEL, Layout.GRID, Mask.GAUSSIAN, Wrap.NONE)  # not written out


@pytest.mark.parametrize(
    ("option", "choices"),
    [
        ("--scheduler", Scheduler),
        ("--decode", Decode),
        ("--layout", Layout),
        ("--guide-upscale", GuideUpscale),
        ("--wrap", Wrap),
        ("--mask", Mask),
        ("--precision", Precision),
    ],
)
def test_the_cases_name_every_choice(option: str, choices: type[StrEnum]) -> None:
    words = [[*case.render, *(case.decode or [])] for case in same_bytes.cases()]
    named = {value for line in words for name, value in pairwise(line) if name == option}
    assert named >= set(choices) - {*DEFAULTS, "auto"}


def test_every_checkpoint_runs_in_both_precisions_under_both_ceilings() -> None:
    for model in "mini", "tiny", "tiny-sd2":
        for precision in "fp32", "int8":
            lines = [case.line for case in same_bytes.cases(only=precision) if case.model == model]
            assert 0 < sum(same_bytes.TIGHT in line for line in lines) < len(lines)


def test_a_case_passes_only_with_the_recorded_hashes() -> None:
    was = {"latents": "1", "picture": "2"}
    assert same_bytes.difference(was, dict(was)) is None
    assert same_bytes.difference(was, {"latents": "1", "picture": "3"}) == "picture changed"
    assert same_bytes.difference(was, {"latents": "1"}) == "picture changed"
    assert same_bytes.difference(None, was) == "not in the record"
    assert same_bytes.difference(was, "exit code 5: too much memory") == "exit code 5: too much memory"
