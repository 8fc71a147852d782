"""The `tiler` program: its commands, and the one place where errors become exit codes."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from importlib import metadata
from typing import Annotated

import typer

from tiler.cli import decode, doctor, plan, quantize, render
from tiler.errors import TilerError
from tiler.memory.limits import is_out_of_memory

app = typer.Typer(
    name="tiler",
    help="Posters from Stable-Diffusion-class models on machines that cannot hold the model. "
    "The process never uses more memory than --max-ram (800 MB by default).",
    epilog='Start with: tiler render "a sailing boat at sunset" --size 2048 -o poster.png',
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("render")(render.command)
app.command("plan")(plan.command)
app.command("decode")(decode.command)
app.command("quantize")(quantize.command)
app.command("doctor")(doctor.command)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"tiler {metadata.version('tiler')}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    if debug:
        os.environ["TILER_DEBUG"] = "1"


def main() -> None:
    """Entry point. Exit codes: 0 ok, 1 bug, 2 usage, 3 model, 4 refused by the plan, 5 ceiling reached, 6 I/O, 7 NaN,
    9 offline, 130 and 143 interrupted."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    try:
        app()
    except KeyboardInterrupt:
        _fail("interrupted; nothing was written", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        if is_out_of_memory(error):  # also where it is the cause of another error
            _fail("the system refused an allocation; raise the limit (ulimit -d, ulimit -v) or free some memory", 5)
        if isinstance(error, TilerError):
            _fail(str(error), error.exit_code)
        raise


def _fail(message: str, code: int) -> None:
    if os.environ.get("TILER_DEBUG"):
        traceback.print_exc()
    first, *rest = message.split("\n")
    sys.stderr.write("\n".join([f"tiler: {first}", *rest]) + "\n")
    sys.exit(code)
