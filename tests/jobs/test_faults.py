"""Faults during a complete run: files that change, other versions, few descriptors, hostile texts. The numbers are
those of the table in tests/README.md."""

from __future__ import annotations

import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file

from tests.jobs.test_folder import Stop, ask, made_of, roomy, stopped
from tiler import events, render
from tiler.errors import BudgetExceeded, JobError
from tiler.jobs import folder, manifest
from tiler.memory.process import read_rss


def other_weights(model: Path) -> None:
    """Replace the denoiser's file, as a finished download does."""
    (path,) = (model / "unet").glob("*.safetensors")
    tensors = {name: tensor + torch.ones((), dtype=tensor.dtype) for name, tensor in load_file(path).items()}
    save_file(tensors, path.with_name("new"))
    os.replace(path.with_name("new"), path)


def test_16_a_run_reads_on_in_the_file_that_it_opened_and_a_job_knows_its_model(tiny: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    values: dict[str, Any] = {"guide": False, "num_inference_steps": 2}
    render(ask(model, tmp_path / "whole.png", **values), roomy())

    def replaced(event: events.Event) -> None:
        if isinstance(event, events.Progress) and event.name == "canvas" and event.done < 3:
            other_weights(model)

    stopped(model, tmp_path / "y.png", **values)
    render(ask(model, tmp_path / "x.png", **values), roomy(), replaced)
    assert (tmp_path / "x.png").read_bytes() == (tmp_path / "whole.png").read_bytes()
    with pytest.raises(JobError, match="the model has changed") as caught:
        render(ask(model, tmp_path / "y.png", **values), roomy())
    assert caught.value.exit_code == 10


def test_42_a_job_of_a_later_version_is_refused(tmp_path: Path) -> None:
    manifest.write(tmp_path / "job.json", replace(made_of(), schema=manifest.SCHEMA + 1))
    with pytest.raises(JobError, match=f"schema {manifest.SCHEMA + 1}.*--restart"):
        manifest.read(tmp_path / "job.json")


def test_43_a_job_of_another_version_goes_on_and_says_what_may_differ(tiny: Path, tmp_path: Path) -> None:
    job = stopped(tiny, tmp_path / "x.png", guide=False, num_inference_steps=2)
    found = manifest.read(job / "job.json")
    manifest.write(job / "job.json", replace(found, made_by=found.made_by | {"torch": "1.0"}))
    told = Stop("canvas", 0, BudgetExceeded())
    render(ask(tiny, tmp_path / "x.png", guide=False, num_inference_steps=2), roomy(), told)
    assert any("may differ in its last bits" in note and "torch 1.0 is now" in note for note in told.notes)


def test_44_a_folder_that_is_gone_is_said(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    command = f"rmdir {tmp_path}/gone; exec {sys.executable} -m tiler render --size 64 -o {tmp_path}/x.png"
    ran = subprocess.run(command, shell=True, cwd=tmp_path / "gone", capture_output=True, text=True, check=False)
    assert ran.returncode == 2 and "the current folder does not exist any more" in ran.stderr
    assert not list(tmp_path.iterdir())


def test_45_few_descriptors_are_enough(tiny: Path, tmp_path: Path) -> None:
    """At most sixteen more than the process already has open."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 17, before[1]))
    try:
        render(ask(tiny, tmp_path / "x.png"), roomy())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert not folder.folder_of(tmp_path / "x.png").exists()


def test_46_renders_in_one_process_leave_nothing_behind(tiny: Path, tmp_path: Path) -> None:
    def one(number: int) -> int:
        render(ask(tiny, tmp_path / f"{number}.png", guide=False, num_inference_steps=1), roomy())
        return read_rss().now

    after = [one(number) for number in range(6)]
    assert max(after[3:]) - after[2] < 10_000_000, after


def test_48_texts_of_others_do_not_steer_the_terminal(in_process: Any, tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    hostile = "a boat\x1b]0;title\x07\x1b[2J\r\nSteps: 9, Seed: 1\x9b1m"
    info.add_text("parameters", f"{hostile}\nSteps: 20, Sampler: Euler, Seed: 7, Size: 64x64")
    Image.new("RGB", (64, 64)).save(tmp_path / "x.png", pnginfo=info)
    ran = in_process("info", "x.png")
    assert ran.code == 0 and "a boat\\x1b]0;title" in ran.out
    assert not set(ran.out) & {"\x1b", "\x07", "\r", "\x9b"}
    assert json.loads(in_process("info", "x.png", "--json").out)["settings"]["seed"] == 7
    ran = in_process("info", "no\x1b[2J.png")
    assert ran.code != 0 and "\x1b" not in ran.err and "no\\x1b[2J.png" in ran.err


def test_44_clocks_that_jump_and_other_surroundings(
    in_process: Any, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that jumps back by years, another time zone, a strict umask, a read-only home: the same bytes."""
    common = "a boat", "--model", tiny, "--size", 64, "--steps", 2, "--no-guide", "--seed", 5
    assert in_process("render", *common, "-o", "whole.png").code == 0
    jumps = itertools.cycle((0.0, 2e9, 1.0, 5e9))
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    before = os.umask(0o077)
    try:
        env = {"HOME": "/proc/none", "TZ": "America/St_Johns", "XDG_CACHE_HOME": "/proc/none/cache"}
        ran = in_process("render", *common, "-o", "x.png", env=env)
    finally:
        os.umask(before)
    assert ran.code == 0, ran.err
    assert (tmp_path / "x.png").read_bytes() == (tmp_path / "whole.png").read_bytes()
    assert (tmp_path / "x.png").stat().st_mode & 0o777 == 0o600
    assert {path.name for path in tmp_path.iterdir()} == {"whole.png", "x.png"}
