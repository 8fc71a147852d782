"""The `tiler` program: all commands together."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from tiler.cli import (
    batch,
    cache,
    cluster,
    config,
    decode,
    doctor,
    encode,
    failure,
    helps,
    info,
    layers,
    models,
    plan,
    quantize,
    render,
    resume,
    several,
    view,
    worker,
)
from tiler.cli import options as o
from tiler.cli.terminal import prepare_signals, prepare_streams, silence
from tiler.version import VERSION


class _ReaderGone(Exception):
    """Stdout is a pipe whose reader has gone (`tiler plan | head -1`)."""


class _Commands(helps.Group):
    """A group that survives a broken pipe: typer would turn it into an exit code, and the interpreter would
    complain."""

    def make_context(self, *args: Any, **options: Any) -> Any:  # prints help texts
        with _reader():
            return super().make_context(*args, **options)

    def invoke(self, ctx: Any) -> Any:
        with _reader():
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result


@contextmanager
def _reader() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError as error:
        raise _ReaderGone from error


app = typer.Typer(
    name="tiler",
    cls=_Commands,
    help="Render posters with diffusion models on machines that cannot hold the model. "
    "The process stays under --max-ram (800 MB by default), or stops.",
    epilog='Start with: tiler render "misty mountains in indigo blue" -o poster.png',
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("render", cls=several.Command)(render.command)
app.command("batch", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(batch.command)
app.command("resume")(resume.command)
app.command("plan")(plan.command)
app.command("encode")(encode.command)
app.command("decode")(decode.command)
app.command("quantize")(quantize.command)
app.command("worker")(worker.command)
app.command("info")(info.command)
app.command("view")(o.in_environment(view.command))
app.command("doctor")(doctor.command)
app.command("models")(o.in_environment(models.command))
app.add_typer(cache.app, name="cache")
app.add_typer(config.app)
app.add_typer(cluster.app)
helps.join_lines(app)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"tiler {VERSION}")
        raise typer.Exit


@app.callback()
def _main(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    if debug:
        os.environ["TILER_DEBUG"] = "1"
    layers.load(context)


def main() -> None:
    """Entry point. Exit codes: 0 ok, 1 bug, or a batch whose rows failed for different reasons, 2 usage, 3 model, 4
    refused by the plan, 5 ceiling reached, 6 I/O, 7 NaN, 8 locked, 9 offline, 10 job damaged or another picture's, 11
    cluster, 129, 130 and 143 interrupted."""
    prepare_streams()
    prepare_signals()
    code: Any = 0
    try:
        try:
            code = app(prog_name="tiler", standalone_mode=False)
        finally:
            sys.stdout.flush()
    except (_ReaderGone, BrokenPipeError):
        silence(sys.stdout)
        sys.exit(0)
    except BaseException as error:
        failure.end(error)
    sys.exit(code if isinstance(code, int) else 0)
