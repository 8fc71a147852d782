"""The one place where errors become lines and exit codes. Knows no option."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import NoReturn

from tiler.cli.terminal import harmless
from tiler.errors import Interrupted, TilerError


def end(error: BaseException) -> NoReturn:
    """Say what happened, and exit with its code."""
    message, code = _explained(error)
    smallest = getattr(error, "smallest_bytes", None)
    _fail(message, code, getattr(error, "__notes__", []), {} if smallest is None else {"smallest_bytes": smallest})


def _explained(error: BaseException) -> tuple[str, int]:
    """What is said of an error, "" where everything was said, and the exit code."""
    from tiler.files import written
    from tiler.memory.limits import is_out_of_memory

    if is_out_of_memory(error):  # also where it is the cause of another error
        return "the system refused an allocation; raise --max-ram or the limit (ulimit -d, -v), or free some memory", 5
    match error:
        case Interrupted():
            names = ", ".join(map(str, written()))
            nothing = "" if getattr(error, "__notes__", []) else "; nothing was written"
            return f"interrupted{f'; written: {names}' if names else nothing}", int(error.code or 1)
        case SystemExit() if isinstance(error.__context__, BrokenPipeError):
            return "", 0  # rich, whose reader is gone
        case SystemExit():
            return "", error.code if isinstance(error.code, int) else 1
        case TilerError():
            return str(error), error.exit_code
        case OSError():
            return f"{error.filename or 'standard output'}: {error.strerror}; check the disk and its free space", 6
    if hasattr(error, "format_message"):  # of an option that does not exist; empty where the help itself was shown
        said = error.format_message().rstrip(".").replace("Value error, ", "")  # pydantic's words
        return f"{said}; see --help" if said else "", 2
    line = (str(error).splitlines() or [""])[0]
    return f"a fault of tiler itself, {type(error).__name__}: {line}; `tiler --debug …` shows where", 1


def _fail(message: str, code: int, notes: Sequence[str], facts: Mapping[str, int]) -> NoReturn:
    with suppress(OSError, ValueError):  # stderr may be gone; the code still tells
        if os.environ.get("TILER_DEBUG"):
            traceback.print_exc()
        lines = [*([f"tiler: {message}"] if message else []), *notes]
        sys.stderr.write("".join(f"{harmless(line)}\n" for line in lines))
        sys.stderr.flush()
    with suppress(OSError, ValueError):
        if message and code and "--json" in sys.argv:  # programs read of errors where they read of results
            print(json.dumps({"schema": 1, "error": message, "exit_code": code, **facts}))
        sys.stdout.flush()
    sys.exit(code)
