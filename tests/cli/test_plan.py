"""What `tiler plan`, `tiler doctor` and the help print, and when a plan is refused."""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from tiler.cli.terminal import wrapped
from tiler.compute.measure import TABLE_SHAPES
from tiler.native.library import has_bf16


def test_help_names_every_command(in_process) -> None:
    ran = in_process("--help")
    assert ran.code == 0
    for command in ("render", "plan", "decode", "quantize", "doctor"):
        assert command in ran.out


def test_doctor(tiler) -> None:
    facts = tiler("doctor", "--measure", "--json").json
    assert {"ram", "cgroup limit", "cores", "cpu", "compute dtype", "versions", "free disk"} <= facts.keys()
    assert f"{len(os.sched_getaffinity(0))} usable" in facts["cores"]
    assert f"torch {torch.__version__}" in facts["versions"]
    flags = set(Path("/proc/cpuinfo").read_text().split())
    if {"avx2", "fma"} <= flags:
        assert (
            facts["--precision auto"].startswith("fp32")
            and "int8 for models with 192 channels" in facts["--precision auto"]
        )
    for shape in TABLE_SHAPES:
        said = [text for name, text in facts.items() if name.startswith("kernels ") and shape.label in text]
        assert len(said) == (3 if has_bf16() else 2) and all(" ms" in text for text in said)


def test_presets_are_bundles_that_other_options_change(in_process, tiny: Path) -> None:
    common = ("--model", tiny, "--size", 256, "--json")
    quality = in_process("plan", "x", *common).json
    fast = in_process("plan", "x", *common, "--preset", "fast").json
    for work in (*quality["presets"].values(), *fast["presets"].values()):
        del work["expected_seconds"]  # measured anew each time
    assert quality["presets"] == fast["presets"]
    assert quality["denoiser_samples"] == quality["presets"]["quality"]["denoiser_samples"]
    assert fast["denoiser_samples"] == fast["presets"]["fast"]["denoiser_samples"]
    bundle = ("--steps", 10, "--strength", 0.4, "--layout", "shift", "--guidance-interval", "0-0.5")
    assert in_process("plan", "x", *common, *bundle).json["denoiser_samples"] == fast["denoiser_samples"]
    assert fast["denoiser_samples"] * 6 < quality["denoiser_samples"]
    grid = in_process("plan", "x", *common, "--preset", "fast", "--layout", "grid").json
    assert grid["denoiser_samples"] > fast["denoiser_samples"]
    # Tiles with an overlap of their own cannot shift: the preset's layout gives way.
    assert in_process("plan", "x", *common, "--preset", "fast", "--overlap", 16).code == 0


def test_a_ceiling_below_the_floor_is_exit_4(in_process, tiny: Path, tmp_path: Path) -> None:
    for command in ("render", "plan"):
        ran = in_process(command, "x", "--model", tiny, "--size", "128", "--max-ram", "200MB")
        assert ran.code == 4
        assert "smallest --max-ram that works is" in ran.err
        assert "python + libraries" in ran.err + ran.out
        assert "the phase '" in ran.err and "<Phase" not in ran.err + ran.out
    assert ran.out.startswith("does not fit: predicted peak ") and "expected time" not in ran.out
    assert re.match(r".*; smallest ceiling [\d,]+ MB\n", ran.out)
    said = in_process("plan", "x", "--model", tiny, "--size", "128", "--max-ram", "200MB", "--json").json
    without = partial(re.sub, r"[\d,]+MB|[\d,]+ MB", "MB")  # the process has grown between the two
    assert without(said["error"]) in without(ran.err) and (said["exit_code"], said["canvas"]) == (4, "128×128")
    assert said["smallest_bytes"] == said["smallest_max_ram_bytes"] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [("render", "--help"), ("plan", "--help"), ("decode", "--help"), ("plan", "x", "--size", "256"), ("doctor",)],
)
def test_eighty_columns_are_enough(in_process, tiny: Path, words: tuple[str, ...]) -> None:
    extra = ("--model", tiny) if words[:2] == ("plan", "x") else ()
    ran = in_process(*words, *extra, env={"COLUMNS": "80"})
    assert ran.code == 0, ran.err
    whole = words == ("doctor",)  # it names paths, which stay in one piece
    assert all(len(line) <= 80 or (whole and len(line.split()[-1]) > 50) for line in ran.out.splitlines())
    assert (" in .)" in ran.out, "the current folder)" in ran.out) == (False, bool(extra))


def test_long_values_are_wrapped_and_paths_kept_whole() -> None:
    path = "/a" * 45
    lines = wrapped(f"{'key':8}{'word ' * 20}({path})", 8).splitlines()
    assert max(map(len, lines[:-1])) <= 80 and lines[-1] == f"{'':8}({path})"
    assert wrapped(f"{'key':8}{path}", 8) == f"{'key':8}{path}"


def test_what_a_command_does_not_know_is_said_with_what_it_does(in_process) -> None:
    ran = in_process("rendr", "x")
    assert ran.code == 2 and "'render'? See --help" in ran.err
    ran = in_process("plan", "x", "--seed", "1,2")
    assert ran.code == 2 and "--seed 1,2: this command takes one seed; see --help" in ran.err


@pytest.mark.parametrize("prompt", ["a boat <hypernet:inks:0.8>", "a AND b :-1"])
def test_a_prompt_that_cannot_be_drawn_is_exit_2_and_one_line(in_process, tiny: Path, prompt: str) -> None:
    ran = in_process("plan", prompt, "--model", tiny, "--size", "64")
    assert ran.code == 2 and len(ran.err.splitlines()) == 1, ran.err


def test_a_bracket_that_is_not_closed_is_noted_unless_it_is_text(in_process, tiny: Path) -> None:
    for emphasis, noted in (("original", True), ("none", False)):
        ran = in_process("plan", "a (boat", "--model", tiny, "--size", "64", "--emphasis", emphasis)
        assert ("note: the prompt: ( is not closed and weighs all that follows" in ran.err) is noted, ran.err


def test_the_guide_that_was_given_is_named_with_its_size(in_process, tiny: Path, tmp_path: Path) -> None:
    Image.new("RGB", (64, 48)).save(tmp_path / "boat.png")
    for size in (("--scale", "2"), ("-W", "128", "-H", "96")):
        planned = in_process("plan", "x", "--model", tiny, "--guide", "boat.png", *size)
        assert "canvas 128×96, guide boat.png (64×48), " in planned.out
    assert ", guide none, " in in_process("plan", "x", "--model", tiny, "--size", "64").out


def test_one_of_a_thing_is_singular(in_process, tiny: Path) -> None:
    common = ("--model", tiny, "--steps", "1", "--cfg-scale", "1")
    one = in_process("plan", "x", *common, "--size", "64").out
    assert "1 tile\n" in one and "1 sample," in one and "1 read of the weights for 1 sample each" in one
    assert "0 samples" not in in_process("plan", "x", *common, "--size", "128").out
    assert not re.search(r"\b1 (tile|sample|read)s", one)
