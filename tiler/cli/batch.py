"""`tiler batch`: render all pictures of a file."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from tiler.cli import options as o
from tiler.cli import queues, render, supervise
from tiler.errors import UsageError
from tiler.jobs.claims import host
from tiler.jobs.results import file_of
from tiler.jobs.rows import NAME, Row, grows, read_rows
from tiler.request.choices import STDOUT


def command(
    context: typer.Context,
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help=r"jobs.toml with \[\[image]] tables, jobs.jsonl with an object per line, or a text file with a prompt "
            "per line. There, a line that begins with # is a comment; write --prompt '#1 mug' to draw such a prompt.",
        ),
    ],
    output: Annotated[
        str,
        typer.Option(
            "--output", "-o", metavar="NAME", show_default=False,
            help=rf"File name for rows that set none; {{seed}} works too. [dim]\[default: {NAME}][/dim]",
        ),
    ] = NAME,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            "--output-dir", metavar="PATH", show_default=False,
            help=r"Folder for the pictures; it is created if it is missing. [dim]\[default: FILE's folder][/dim]",
        ),
    ] = None,
    max_ram: o.MaxRam = "800MB",
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="Stop at the first row that fails.")] = False,
    share: Annotated[
        bool,
        typer.Option(
            "--share",
            help="Share the rows with other machines that run the same command on the same folder. If a machine is "
            "silent for 15 minutes, another draws its row.",
        ),
    ] = False,
    nice: o.Nice = 10,
    quiet: o.Quiet = False,
) -> None:  # fmt: skip
    """Render all pictures of a file, each in a process of its own, under one memory ceiling.

    All options of `tiler render` are accepted and apply to rows that do not set them; a row's keys are the options'
    long names. A row that fails does not stop the others, but a TOML file is checked as a whole before the first
    picture. The exit code is that of the rows that failed, or 1 if theirs differ. If you give the same command again,
    finished rows are skipped and interrupted ones continue. With --cluster up to three pictures are drawn at a time, as
    many as the ceiling holds: no worker waits for the end of one picture's step, and one is decoded while the next is
    denoised.
    """
    _check_file(file)
    root = output_dir or file.parent
    rest = dict[str, Any]()
    checker = queues.Checker(
        root=root, defaults=(*context.args, *["--quiet"] * quiet), name=output,
        parse=queues.parser(render.run, rest.update),
    )  # fmt: skip
    common = checker.ask(Row(0, None, (), None))
    _check_words(context.args)
    if next(read_rows(file), None) is None:
        raise UsageError(f"{file}: no rows; write a prompt per line, or see `tiler batch --help`")
    if share and common.force:
        raise UsageError("--share takes an existing picture for a finished one; leave out --force")
    ceiling, threads, log_json = queues.ceiling(max_ram), rest["threads"], rest["log_json"]
    if common.preview == STDOUT and (common.cluster or log_json):
        raise UsageError("--preview - goes neither with --cluster nor with --log-json; give --preview a file")
    o.check_preview(common.preview)
    growing = {"file": str(file), "root": str(root), "defaults": list(checker.defaults), "name": output}
    rows = -1 if grows(file) else queues.check_all(read_rows(file), checker, f"{file}: ", "row")
    _make(root)
    o.lower_priority(nice)
    queues.hand_over(
        supervise.Spec(
            root=str(root), results=str(file_of(file, host() if share else "")), file=str(file), max_ram_bytes=ceiling,
            rows=rows, reader=growing if grows(file) else None, shared=share, fail_fast=fail_fast, silent=quiet,
            quiet=quiet, is_batch=True, cluster=common.cluster or "", keys=str(common.keys or ""),
            insecure=common.insecure, threads=threads or 0, log_json=log_json,
        )
    )  # fmt: skip


def _check_file(file: Path) -> None:
    """Raise UsageError unless this is a text file."""
    if file.is_dir():
        raise UsageError(f"{file} is a folder; `tiler batch` takes a file with a picture per row")
    if not file.is_file():
        raise UsageError(f"{file}: no such file; `tiler batch` takes a file with a picture per row")
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with file.open("rb") as opened:
            while read := opened.read(2**20):
                if "\0" in decoder.decode(read):
                    raise UnicodeError
    except UnicodeError:
        raise UsageError(
            f"{file}: not a text file; `tiler batch` takes TOML, JSON lines or a prompt per line, in UTF-8"
        ) from None
    except OSError as error:
        raise UsageError(f"{file}: cannot be read ({error.strerror})") from error


def _check_words(words: Sequence[str]) -> None:
    """Raise UsageError for options of `tiler render` that concern a single picture."""
    typed = {word.partition("=")[0] for word in (words[: words.index("--")] if "--" in words else words)}
    if "--count" in typed:
        raise UsageError("--count does not go with `tiler batch`; give rows a count, like count = 2")
    for option in ("--report", "--save-latents"):
        if option in typed:
            raise UsageError(f"{option} names a file of one picture, and every row would write it; leave it out")


def _make(root: Path) -> None:
    """Create the folder of the pictures if it is missing. Raises UsageError."""
    try:
        root.mkdir(exist_ok=True)
    except FileNotFoundError:
        raise UsageError(f"{root.parent} does not exist; create it first") from None
    except OSError as error:
        raise UsageError(f"--output-dir {root}: cannot be created ({error.strerror})") from error
