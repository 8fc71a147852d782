"""`tiler render`: render a picture, or several."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from tiler.cli import options as o
from tiler.cli import queues, several, supervise
from tiler.errors import UsageError
from tiler.files import sha256_of
from tiler.jobs.drawing import BESIDE, NOTED
from tiler.request import RenderRequest
from tiler.request.choices import STDOUT


def run(
    request: RenderRequest,
    *,
    seeds: several.Seeds = None,
    count: several.Count = 1,
    output_dir: several.OutputDir = None,
    max_ram: o.MaxRam = "800MB",
    threads: o.Threads = None,
    nice: o.Nice = 0,
    report: o.Report = None,
    on_done: o.OnDone = None,
    quiet: o.Quiet = False,
    log_json: o.LogJson = False,
    json_output: o.Json = False,
) -> None:
    """Render a picture of any size under a memory ceiling.

    A low-resolution pass makes a guide; the canvas is then denoised tile by tile over it and decoded without tiles. To
    continue after an interruption, give the same command again.
    """
    wanted = [request.seed] if seeds is None else queues.parse_seeds(seeds)
    if count > 1 or len(wanted) > 1:
        if report is not None:
            raise UsageError("--report covers one picture; leave it out with --count or several seeds")
        if request.preview == STDOUT:
            raise UsageError("--preview - shows one picture; leave it out with --count or several seeds")
        several.run(
            request, wanted, count, output_dir, max_ram, threads=threads,
            quiet=quiet, log_json=log_json, json_output=json_output, own=run,
        )  # fmt: skip
    request = several.place(replace(request, seed=wanted[0]), output_dir)
    o.lower_priority(nice)
    output = request.output or Path("tiler.png")
    o.check_stdout(output, json_output=json_output)
    o.check_preview(request.preview, log_json=log_json)
    o.check_report(report, output, request.save_latents, force=request.force)
    code = 1
    try:
        budget = queues.budget_of(max_ram)
        o.prepare_process(threads)
        from tiler.cli.progress import printer_of
        from tiler.pipeline import render

        with printer_of(budget, quiet=quiet, log_json=log_json) as printer:
            result = render(request, budget, printer)
        name = {"output": o.name_of(result.output)}
        if json_output:
            result.report["sha256"] = sha256_of(result.output)
        o.finish(
            result, lambda facts: supervise.sentence(name | facts), report=report, quiet=quiet,
            json_output=json_output,
        )  # fmt: skip
        code = 0
    except BaseException as error:
        code = getattr(error, "exit_code", getattr(error, "code", 1))
        raise
    finally:
        if on_done is not None:
            _tell(on_done, output, code)


def _tell(command: str, output: Path, code: int) -> None:
    """Run the user's command. If it fails, a note says so and the exit code stays. Its output goes to standard error,
    because standard output may carry the picture or JSON."""
    facts = {"TILER_OUTPUT": "-" if output == STDOUT else str(output.absolute()), "TILER_EXIT_CODE": str(code)}
    environment = {name: value for name, value in os.environ.items() if name not in (BESIDE, NOTED)} | facts
    done = subprocess.run(command, shell=True, env=environment, stdin=subprocess.DEVNULL, stdout=2, check=False)
    if done.returncode:
        sys.stderr.write(f"note: --on-done {command!r} ended with {done.returncode}\n")


command = o.command_of(RenderRequest, run, leave_out=("seed",), repeats=True)
