"""`tiler resume`: continue interrupted renders."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from tiler.cli import options as o
from tiler.cli import render
from tiler.errors import DamagedJob, JobError, StorageError, UsageError
from tiler.jobs import manifest as manifests
from tiler.jobs.checked import common_code
from tiler.jobs.folder import folder_of, newest_facts
from tiler.jobs.layout import LOCK, MANIFEST, SUFFIX
from tiler.jobs.lock import is_held
from tiler.jobs.manifest import Manifest


class Found(NamedTuple):
    """A job folder on disk."""

    folder: Path
    manifest: Manifest

    @property
    def output(self) -> Path:
        return Path(self.manifest.said["output"] or _picture_beside(self.folder))

    def facts(self) -> dict[str, Any]:
        where, age = newest_facts(self.folder, self.manifest)
        return {
            "output": str(self.output), "folder": str(self.folder), "at": where or "the beginning", "saved": age,
            "width": self.manifest.picture["width"], "height": self.manifest.picture["height"],
            "running": is_held(self.folder / LOCK),
            "bytes": sum(f.stat().st_blocks * 512 for f in self.folder.rglob("*") if f.is_file()),
        }  # fmt: skip


def command(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="PATH", show_default=False,
            help=r"A picture, its job's folder, or a folder with several jobs. [dim]\[default: this folder][/dim]",
        ),
    ] = None,
    list_jobs: Annotated[bool, typer.Option("--list", help="List interrupted renders and their progress.")] = False,
    scratch: Annotated[
        Path | None, typer.Option("--scratch", metavar="PATH", help="Another folder for the decoder's scratch files.")
    ] = None,
    max_ram: Annotated[
        str | None, typer.Option("--max-ram", "--budget", metavar="SIZE", help="Another ceiling than the job's.")
    ] = None,
    threads: o.Threads = None,
    nice: o.Nice = 0,
    report: o.Report = None,
    on_done: o.OnDone = None,
    quiet: o.Quiet = False,
    log_json: o.LogJson = False,
    json_output: o.Json = False,
) -> None:  # fmt: skip
    """Continue interrupted renders from where they were saved. Giving the original command again does the same."""
    folders = [folder for path in paths or [Path()] for folder in find(path)]
    if list_jobs:
        _list(folders, json_output=json_output)
        return
    jobs = [_read(folder) for folder in folders]
    if not jobs:
        raise UsageError(
            f"nothing to resume in {Path.cwd()}; give a PATH: a picture, its job's folder, or a folder of jobs"
        )
    if len(jobs) > 1:
        if report is not None:
            raise UsageError("--report covers one picture; name one of the jobs")
        given = {
            "--scratch": scratch,
            "--max-ram": max_ram,
            "--threads": threads,
            "--nice": nice or None,
            "--on-done": on_done,
        }
        options = [word for flag, value in given.items() if value is not None for word in (flag, str(value))]
        flags = {"--quiet": quiet, "--log-json": log_json, "--json": json_output}
        raise SystemExit(_one_after_another(jobs, [*options, *(flag for flag, is_set in flags.items() if is_set)]))
    (job,) = jobs
    asked = replace(job.manifest.request(), output=job.output, seed=job.manifest.seed)
    request = asked if scratch is None else replace(asked, scratch=scratch)
    render.run(
        request, max_ram=max_ram or str(job.manifest.max_ram_bytes), threads=threads, nice=nice, report=report,
        on_done=on_done,
        quiet=quiet, log_json=log_json, json_output=json_output,
    )  # fmt: skip


def find(path: Path) -> list[Path]:
    """The folders of the jobs that `path` names. Raises UsageError."""
    own = folder_of(path)
    for folder in (path, own):
        if (folder / MANIFEST).exists():
            return [folder]
    if path.is_dir():
        return [file.parent for file in sorted(path.glob(f"*{SUFFIX}/{MANIFEST}"))]
    raise UsageError(f"{path}: nothing to resume; start with `tiler render … -o {path}`")


def _read(folder: Path) -> Found:
    manifest = manifests.read(folder / MANIFEST)
    if not isinstance(manifest.said.get("output"), str | None):
        raise DamagedJob(f"{folder / MANIFEST}: the job is damaged; remove {folder}")
    return Found(folder, manifest)


def _one_after_another(jobs: list[Found], options: list[str]) -> int:
    """Continue each picture in a process of its own; one that fails does not stop the others. The options apply to
    all."""
    codes = set[int]()
    for job in jobs:
        typer.echo(f"{job.output}:", err=True)
        code = subprocess.run(
            [sys.executable, "-m", "tiler", "resume", str(job.folder), *options], check=False
        ).returncode
        if code in (130, 143, -2, -15):
            return 130 if code in (130, -2) else 143
        codes.add(code)
    return common_code(codes)


def _picture_beside(folder: Path) -> Path:
    """The picture of a job's folder, unless its name was shortened or --job-dir moved the folder."""
    return folder.parent / folder.name.removesuffix(SUFFIX)


def _list(folders: list[Path], *, json_output: bool) -> None:
    """Show the jobs in these folders, also those that cannot be read."""
    found, damaged, said = list[dict[str, Any]](), list[dict[str, str]](), list[str]()
    for folder in folders:
        try:
            found.append(_read(folder).facts())
        except (JobError, StorageError) as error:
            picture, is_damaged = str(_picture_beside(folder)), isinstance(error, DamagedJob)
            damaged.append({"output": picture, "folder": str(folder), "problem": str(error)})
            said.append(f"{picture}: {'damaged; give its render command with --restart' if is_damaged else error}")
    if json_output:
        o.tell({"jobs": found, "damaged": damaged})
        return
    if not folders:
        typer.echo("no jobs here")
    for line in said:
        typer.echo(line)
    for job in found:
        age = "running now" if job["running"] else f"saved {job['saved']} ago" if job["saved"] else "nothing saved"
        typer.echo(f"{job['output']}: {job['width']}×{job['height']}, {job['at']}, {age}, {job['bytes'] / 1e6:,.1f} MB")
