"""Renders that are stopped anywhere continue with the same bytes; damaged jobs and jobs of other pictures are never
used."""

from __future__ import annotations

import errno
import os
import subprocess
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from tiler import Budget, RenderRequest, events, render
from tiler.decoding import frozen
from tiler.diffusion.stored_files import REFERENCE
from tiler.errors import BudgetExceeded, JobError, JobLocked, NumericalError, StorageError, TilerError
from tiler.files import leftovers, replace_file
from tiler.jobs import folder, manifest, tensors
from tiler.jobs.coding import decode, encode
from tiler.memory.process import read_rss
from tiler.planning.resolve import fill
from tiler.request import Decode, Layout, Mask, Region, Scheduler, Wrap


def ask(folder: Path, output: Path, **values: Any) -> RenderRequest:
    defaults = {"prompt": "a boat", "width": 80, "height": 64, "num_inference_steps": 4, "seed": 5}
    return RenderRequest(**(defaults | {"model": str(folder), "output": output} | values))


def roomy() -> Budget:
    return Budget(read_rss().now + 2_000_000_000)


class Stop:
    """Raises `error` at the `number`th progress of `phase`, and counts the phase's events."""

    def __init__(self, phase: str, number: int, error: BaseException) -> None:
        self.phase, self.number, self.error, self.told = phase, number, error, 0
        self.notes: list[str] = []

    def __call__(self, event: events.Event) -> None:
        if isinstance(event, events.Note):
            self.notes.append(event.text)
        if isinstance(event, events.Progress) and event.name == self.phase:
            self.told += 1
            if self.told == self.number:
                raise self.error


WAYS: list[tuple[dict[str, Any], list[tuple[str, int]]]] = [
    (
        {"scheduler": Scheduler.UNIPC, "layout": Layout.SHIFT},
        [("guide", 3), ("guide picture", 2), ("canvas", 2), ("canvas", 1), ("decode", 5)],
    ),
    (
        {"scheduler": Scheduler.EULER_A, "wrap": Wrap.XY, "guide_upscale": "latent"},
        [("canvas", 3)],
    ),
    (
        {
            "scheduler": Scheduler.DPMPP_2M_KARRAS,
            "guide": False,
            "guidance_interval": (0.0, 0.5),
            "regions": (Region(prompt="r", rows=(0, 64), cols=(0, 72), seed=3),),
        },
        [("canvas", 5)],
    ),
]


@pytest.mark.parametrize(("way", "stops"), WAYS, ids=[way["scheduler"].value for way, _ in WAYS])
def test_stopped_again_and_again_it_gives_the_same_file(
    tiny: Path, tmp_path: Path, way: dict[str, Any], stops: list[tuple[str, int]]
) -> None:
    whole, path = tmp_path / "whole.png", tmp_path / "x.png"
    render(ask(tiny, whole, **way), roomy())
    for phase, number in stops:
        with pytest.raises(BudgetExceeded) as caught:
            render(ask(tiny, path, **way), roomy(), Stop(phase, number, BudgetExceeded("the ceiling was reached")))
        assert "continue with the same command" in caught.value.__notes__[0]
        assert not path.exists()
    last = Stop(stops[-1][0], 0, BudgetExceeded())
    render(ask(tiny, path, **way), roomy(), last)
    assert path.read_bytes() == whole.read_bytes()
    begun = "continuing at pass " if stops[-1][0] == "decode" else "continuing at canvas step "
    assert any(note.startswith(begun) for note in last.notes)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["whole.png", "x.png"]


def test_the_guides_picture_goes_on_in_its_band(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`frozen` encodes it: what is measured and encoded is not computed again."""
    monkeypatch.setattr(frozen, "BAND", 39)
    measured = Mock(wraps=frozen.remember)
    monkeypatch.setattr(frozen, "remember", measured)
    way = {"width": 320, "num_inference_steps": 2, "decode": Decode.FROZEN}
    whole = Stop("guide picture", 0, BudgetExceeded())
    render(ask(tiny, tmp_path / "whole.png", **way), roomy(), whole)
    assert measured.call_count == 3  # the guide decoded, encoded, and the picture decoded
    with pytest.raises(BudgetExceeded):
        render(ask(tiny, tmp_path / "x.png", **way), roomy(), Stop(whole.phase, whole.told - 1, BudgetExceeded("x")))
    assert measured.call_count == 5
    last = Stop(whole.phase, 0, BudgetExceeded())
    render(ask(tiny, tmp_path / "x.png", **way), roomy(), last)
    assert measured.call_count == 7
    assert any(note.startswith("continuing at band ") for note in last.notes)
    assert (tmp_path / "x.png").read_bytes() == (tmp_path / "whole.png").read_bytes()


def test_progress_of_a_phase_goes_one_way(tiny: Path, tmp_path: Path) -> None:
    """Also if the guide is decoded and encoded in one phase: otherwise the remaining time would be unknown."""
    told: dict[str, list[float]] = {}

    def note(event: events.Event) -> None:
        if isinstance(event, events.Progress):
            told.setdefault(event.name, []).append(event.done / event.total)

    render(ask(tiny, tmp_path / "x.png"), roomy(), note)
    assert set(told) == {"guide", "guide picture", "canvas", "decode"}
    for shares in told.values():
        assert shares == sorted(shares) and len(shares) > 1 and shares[-1] == 1


def test_what_is_done_opens_no_weights(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that was stopped while decoding reads one state and no denoiser."""
    with pytest.raises(BudgetExceeded):
        render(ask(tiny, tmp_path / "x.png", guide=False), roomy(), Stop("decode", 1, BudgetExceeded("x")))
    read: list[str] = []
    real = tensors.read
    monkeypatch.setattr(tensors, "read", lambda path: read.append(path.name) or real(path))
    monkeypatch.setattr("tiler.denoiser.LocalRunner", None)
    result = render(ask(tiny, tmp_path / "x.png", guide=False), roomy())
    assert result.report["denoiser_calls"] == 0 and len(read) == 1


def stopped(model: Path, path: Path, **values: Any) -> Path:
    """The folder of a job that was stopped during its canvas."""
    with pytest.raises(BudgetExceeded):
        render(ask(model, path, **values), roomy(), Stop("canvas", 1, BudgetExceeded("x")))
    return folder.folder_of(path)


def test_a_seed_that_was_drawn_is_the_jobs(tiny: Path, tmp_path: Path) -> None:
    job = stopped(tiny, tmp_path / "x.png", seed=None)
    seed = manifest.read(job / "job.json").seed
    assert render(ask(tiny, tmp_path / "x.png", seed=None), roomy()).report["seed"] == seed


def test_another_request_is_refused_by_its_first_difference(tiny: Path, tmp_path: Path) -> None:
    job = stopped(tiny, tmp_path / "x.png")
    before = {path.name: path.read_bytes() for path in job.iterdir() if path.name != "lock"}
    with pytest.raises(JobError, match=r'prompt was "a boat" and is now "a ship".*--restart') as caught:
        render(ask(tiny, tmp_path / "x.png", prompt="a ship"), roomy())
    assert caught.value.exit_code == 10
    assert {path.name: path.read_bytes() for path in job.iterdir() if path.name != "lock"} == before
    restarted = Stop("guide", 0, BudgetExceeded())
    render(ask(tiny, tmp_path / "x.png", prompt="a ship", restart=True), roomy(), restarted)
    assert restarted.told > 0 and not job.exists()


def test_a_restart_that_is_refused_leaves_the_old_job(in_process: Any, tiny: Path, tmp_path: Path) -> None:
    job = stopped(tiny, tmp_path / "x.png")
    before = {path.name: path.read_bytes() for path in job.iterdir() if path.name != "lock"}
    again = ("render", "a boat", "-o", "x.png", "--restart", "--size", "64")
    for refused, code in (("--model", "nosuch"), 3), (("--model", tiny, "--max-ram", "50MB"), 4):
        assert in_process(*again, *refused).code == code
        assert {path.name: path.read_bytes() for path in job.iterdir() if path.name != "lock"} == before
    continued = Stop("canvas", 0, BudgetExceeded())
    render(ask(tiny, tmp_path / "x.png"), roomy(), continued)
    assert any(note.startswith("continuing at canvas step ") for note in continued.notes)


def made_of(model_id: str = "1", **values: Any) -> manifest.Manifest:
    asked = RenderRequest(**({"prompt": "a boat", "seed": 5, "size": 64} | values))
    return manifest.Manifest(
        said=manifest.said_of(asked),
        picture=manifest.picture_of(fill(asked)),
        model_id=model_id,
        made_by={},
        methods={},
        precision="fp32",
        seed=5,
        begun="",
        max_ram_bytes=1,
    )


def test_options_hold_for_every_job_that_goes_on(
    in_process: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("x", "y"):
        (tmp_path / f"{name}.png.tiler").mkdir()
        manifest.write(tmp_path / f"{name}.png.tiler/job.json", made_of(output=tmp_path / f"{name}.png"))
    commands: list[list[str]] = []

    def record(words: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        commands.append(words[words.index("resume") :])
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr("tiler.cli.resume.subprocess.run", record)
    ran = in_process("resume", tmp_path, "--scratch", tmp_path, "--threads", 1, "-q")
    assert ran.code == 0, ran.err
    options = ["--scratch", str(tmp_path), "--threads", "1", "--quiet"]
    assert commands == [["resume", str(tmp_path / f"{name}.png.tiler"), *options] for name in ("x", "y")]


def test_what_decides_the_picture_is_compared_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guide = tmp_path / "guide.png"
    guide.write_bytes(b"red")
    first = made_of(guide_image=guide)
    same = made_of(guide_image=guide, cache_dir=tmp_path, scratch=tmp_path, output=tmp_path / "y.png", keep_job=True)
    assert list(manifest.differences(first, same)) == []
    for values, named in (
        ({"seed": 6}, "--seed was 5 and is now 6"),
        ({"width": 112}, "--width"),
        ({"mask": Mask.CONSTANT}, "--mask"),
        ({"model_id": "2"}, "the model has changed"),
        ({"negative_prompt": "fog"}, "--negative-prompt"),
    ):
        assert named in next(manifest.differences(first, made_of(**({"guide_image": guide} | values))))
    (tmp_path / "taesd").mkdir()
    monkeypatch.chdir(tmp_path)
    relative, absolute = (made_of(tiny_vae=name, decode="tiny") for name in ("taesd", str(tmp_path / "taesd")))
    assert list(manifest.differences(relative, absolute)) == []  # as `tiler resume` has it
    assert relative.said == absolute.said
    guide.write_bytes(b"blu")
    assert next(manifest.differences(first, made_of(guide_image=guide))).startswith("--guide was")


def test_a_damaged_job_is_no_other_picture(tiny: Path, tmp_path: Path) -> None:
    """After a byte of any file has changed, the other state is used, or the error says what to do."""
    whole = tmp_path / "whole.png"
    render(ask(tiny, whole), roomy())
    job = stopped(tiny, tmp_path / "x.png")
    kept = {path: path.read_bytes() for path in job.iterdir() if path.name != "lock"}
    assert {path.name for path in kept} >= {"job.json", "reference.safetensors"}
    for path, content in kept.items():
        for at in range(3, len(content), len(content) // 7):
            broken = bytearray(content)
            broken[at] ^= 4
            path.write_bytes(bytes(broken))
            if path.name.startswith("state"):
                assert tensors.read(path) is None
            elif path.name == "job.json":
                with pytest.raises(JobError):
                    manifest.read(path)
            else:
                assert tensors.read(path) is None
        path.write_bytes(content[: len(content) // 3])
        other = [slot for slot in kept if slot.name.startswith("state") and slot != path]
        if path.name.startswith("state") and other:
            render(ask(tiny, tmp_path / "x.png", keep_job=True), roomy())
            assert (tmp_path / "x.png").read_bytes() == whole.read_bytes()
            (tmp_path / "x.png").unlink()
        else:
            with pytest.raises(JobError, match="--restart"):
                render(ask(tiny, tmp_path / "x.png"), roomy())
        for each, was in kept.items():
            each.write_bytes(was)


def test_a_damaged_job_hides_no_other_in_the_list(in_process: Any, tmp_path: Path) -> None:
    for name in ("hen.png", "cow.png"):
        (tmp_path / f"{name}.tiler").mkdir()
        manifest.write(tmp_path / f"{name}.tiler/job.json", made_of(output=tmp_path / name))
    (tmp_path / "hen.png.tiler/job.json").write_text("{")
    ran = in_process("resume", "--list")
    assert ran.code == 0 and ran.err == ""
    damaged, whole = ran.out.splitlines()
    assert damaged == "hen.png: damaged; give its render command with --restart"
    assert "cow.png: 64×64, the beginning, nothing saved" in whole
    listed = in_process("resume", "--list", "--json").json
    assert [Path(job["output"]).name for job in listed["jobs"]] == ["cow.png"]
    assert [job["output"] for job in listed["damaged"]] == ["hen.png"]
    assert in_process("resume", "hen.png").code == 10


def test_two_at_once(tiny: Path, tmp_path: Path) -> None:
    refused: list[str] = []

    def second(event: events.Event) -> None:
        if isinstance(event, events.PhaseStarted) and event.name == "canvas":
            with pytest.raises(JobLocked, match=f"process {os.getpid()} ") as caught:
                render(ask(tiny, tmp_path / "x.png"), roomy())
            refused.append(str(caught.value))

    render(ask(tiny, tmp_path / "x.png"), roomy(), second)
    assert len(refused) == 1 and (tmp_path / "x.png").exists()


def test_a_finished_job_that_was_not_tidied_is(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    render(ask(tiny, tmp_path / "x.png", keep_job=True), roomy())
    job, before = folder.folder_of(tmp_path / "x.png"), (tmp_path / "x.png").stat()
    assert job.exists()
    with monkeypatch.context() as killed, suppress(StorageError):  # before a new file gets its name
        for call in ("replace", "unlink"):
            killed.setattr(os, call, Mock(side_effect=OSError))
        replace_file(job / "job.json", [b"{}"], durable=True)
    assert list(leftovers(job))
    told = Stop("decode", 0, BudgetExceeded())
    render(ask(tiny, tmp_path / "x.png"), roomy(), told)
    assert told.told == 0 and (tmp_path / "x.png").stat() == before and not job.exists()


def test_a_job_that_names_no_spool_clears_its_own_folder_alone(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Like jobs of earlier versions: files in the current folder stay."""
    mine = [tmp_path / "census.rows", tmp_path / "journal.jsonl"]
    for path in mine:
        path.write_text("mine")
    monkeypatch.chdir(tmp_path)
    folder = stopped(tiny, tmp_path / "x.png")
    job = folder / "job.json"
    manifest.write(job, replace(manifest.read(job), spool=""))
    render(ask(tiny, tmp_path / "x.png"), roomy())
    assert (tmp_path / "x.png").exists() and all(path.exists() for path in mine)


def test_a_canvas_in_files_stays_where_it_was_begun(tmp_path: Path) -> None:
    """Even if another --scratch moves the spool."""
    one, two, notes = tmp_path / "one", tmp_path / "two", list[events.Event]()
    held = None
    for scratch in (one, two, two):
        scratch.mkdir(exist_ok=True)
        job = folder.Job(RenderRequest(prompt="x", output=tmp_path / "x.png", scratch=scratch), notes.append)
        with suppress(BudgetExceeded), job:
            if held is not None:
                assert job.held_bytes(scratch) >= held.stat().st_size
            job.begin(replace(made_of(), spool=str(job.spool_folder(scratch))))
            assert job.spool is not None and job.spool.parent == scratch
            assert job.canvas_folder is not None and job.canvas_folder.parent == one
            if held is None:
                job.canvas_folder.mkdir()
                held = job.canvas_folder / REFERENCE
                held.write_bytes(bytes(8192))
            raise BudgetExceeded("enough")
    assert held is not None and held.exists() and str(one) in str(notes[0])
    with folder.Job(RenderRequest(prompt="x", output=tmp_path / "x.png", scratch=two, restart=True)) as job:
        assert held.exists()  # until the new job begins
        job.begin(made_of())
        assert not held.parent.exists()


def test_a_job_of_others_empties_no_folder_but_its_own(tmp_path: Path) -> None:
    mine = tmp_path / "mine.spool"
    for name in ("mine.spool/journal.jsonl", "mine.spool/01.rows", "mine.canvas/canvas.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    job = folder.folder_of(tmp_path / "x.png")
    job.mkdir()
    manifest.write(job / "job.json", replace(made_of(), spool=str(mine), canvas=str(tmp_path / "mine.canvas")))
    with folder.Job(RenderRequest(prompt="x", output=tmp_path / "x.png", restart=True)) as begun:
        begun.begin(made_of())
    assert not job.exists() and len(list(mine.iterdir())) == 2 and (tmp_path / "mine.canvas/canvas.json").exists()


def test_restarting_a_damaged_job_clears_its_scratch_files(tmp_path: Path) -> None:
    job = folder.Job(RenderRequest(prompt="x", output=tmp_path / "x.png", scratch=tmp_path / "fast", restart=True))
    job.folder.mkdir()
    (job.folder / "job.json").write_text("{")
    spool = job.spool_folder(tmp_path / "fast")
    for path in (spool / "01.rows", spool.with_name(spool.name.replace(".spool", ".canvas")) / "latents.3"):
        path.parent.mkdir(parents=True)
        path.touch()
    with job:
        job.begin(made_of())
        assert list((tmp_path / "fast").iterdir()) == []


def test_a_numerical_error_in_the_canvas_saves_nothing_new(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> None:
        raise NumericalError("NaN")

    monkeypatch.setattr("tiler.diffusion.runner.check_finite", broken)
    with pytest.raises(NumericalError):
        render(ask(tiny, tmp_path / "x.png"), roomy())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_38_whichever_call_of_the_saving_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """The n-th call fails, for every n: the state is then the new one or an older one, never torn or lost."""
    real = getattr(os, call)
    for number in range(1, 12):
        job = folder.Job(RenderRequest(prompt="x", output=tmp_path / f"{number}.png"))
        count = 0

        def failing(*args: Any, number: int = number) -> Any:
            nonlocal count
            count += 1
            if count == number:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args)

        with job:
            job.begin(made_of())
            monkeypatch.setattr(os, call, failing)
            for value in range(4):
                job.save("canvas", {"latents": torch.full((3,), float(value))}, f"canvas step {value}/4")
                found = job.load("canvas")
                assert found is None or float(found["latents"][0]) in (value, value - 1)
                assert found is not None or value == 0
            monkeypatch.undo()
            assert not list(leftovers(job.folder))
        if count < number:
            break
    assert number > 3


def test_saving_is_due_after_a_minute_or_fifty_times_its_duration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    job = folder.Job(RenderRequest(prompt="x", output=tmp_path / "x.png"))
    job._begun = True
    job.folder.mkdir()
    assert not job.due()
    now += 60
    assert job.due()
    real = tensors.write

    def slow(*args: Any) -> None:
        nonlocal now
        now += 3.0
        real(*args)

    monkeypatch.setattr(tensors, "write", slow)
    job.save("canvas", {"latents": torch.zeros(1)}, "canvas step 1/2")
    now += 149
    assert not job.due()
    now += 2
    assert job.due()


def test_a_request_of_any_fields_survives_json() -> None:
    request = RenderRequest(
        prompt='é \n"x"',
        regions=(Region(prompt="r", rows=(0, 64), cols=(0, 64), mask=Mask.QUARTIC),),
        layout=Layout.GRID,
        guidance_interval=(0.0, 0.5),
        guide_image=Path("/a/b.png"),
        scheduler=Scheduler.UNIPC,
        output=Path("/o.png"),
    )
    assert decode(RenderRequest, encode(request)) == request


def test_names_that_are_too_long_and_folders_of_jobs(tmp_path: Path) -> None:
    long = tmp_path / ("n" * 250 + ".png")
    assert len(folder.folder_of(long).name) < 255
    one, two = (folder.folder_of(tmp_path / name / "x.png", tmp_path / "jobs") for name in "ab")
    assert one != two and one.parent == two.parent == tmp_path / "jobs"


def test_an_unwritable_place_for_jobs(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(TilerError, match="--job-dir") as caught:
        render(ask(tiny, tmp_path / "x.png", job_dir=tmp_path / "file"), roomy())
    assert caught.value.exit_code == 6
