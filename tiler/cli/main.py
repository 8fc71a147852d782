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
from tiler.errors import Interrupted, TilerError
from tiler.memory.limits import is_out_of_memory

app = typer.Typer(
    name="tiler",
    help="Posters from Stable-Diffusion-class models on machines that cannot hold the model. "
    "The process never uses more memory than --max-ram (800 MB by default).",
    epilog='Start with: tiler render "a sailing boat at sunset" --size 2048 -o poster.png',
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
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
    # SIGINT too: typer would make an exit code of it, and lose what was added to it.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop)
    code = 0
    try:
        # Not typer's own way, which turns an interruption into an exit before it can say what was written.
        result = app(standalone_mode=False)
        code = result if isinstance(result, int) else 0
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except BaseException as error:
        code = _failed(error)
    sys.exit(code)


def _stop(number: int, frame: object) -> None:
    raise Interrupted(number)


def _failed(error: BaseException) -> int:
    """Say on stderr, in one line and the notes that others added, what ended the run → the exit code."""
    if os.environ.get("TILER_DEBUG"):
        traceback.print_exc()
    match error:
        case _ if is_out_of_memory(error):  # also where it is the cause of another error
            text, code = (
                "the system refused an allocation; raise --max-ram or the limit (ulimit -d, -v), or free memory",
                5,
            )
        case TilerError():
            text, code = str(error), error.exit_code
        case typer.Exit() | SystemExit():
            asked = getattr(error, "exit_code", getattr(error, "code", None))
            code = asked if isinstance(asked, int) else 1
            text = {130: "interrupted", 143: "stopped by SIGTERM", 129: "stopped by SIGHUP"}.get(code, "")
            if isinstance(error.__context__, BrokenPipeError):
                return 0
        case KeyboardInterrupt() | typer.Abort():
            text, code = "interrupted", 130
        case _ if hasattr(error, "format_message"):  # click's own words for an option that does not exist
            message = error.format_message()  # none where the help itself was shown
            text, code = f"{message}; see --help" if message else "", 2
        case _:
            traceback.print_exception(error)  # with its notes
            return 1
    notes = getattr(error, "__notes__", [])
    if code > 128 and not notes:
        text += "; no picture was written"
    lines = [*([f"tiler: {text}"] if text else []), *notes]
    if lines:
        sys.stderr.write("\n".join(lines) + "\n")
    return int(code)
