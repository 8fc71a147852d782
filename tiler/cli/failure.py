"""Turns errors into a line and an exit code, for all commands. Knows no options."""

from __future__ import annotations

import json
import os
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NoReturn

from tiler.cli.terminal import harmless
from tiler.errors import Interrupted, TilerError
from tiler.jobs.drawing import BESIDE

_WHY = {
    "int_parsing": "not a whole number", "float_parsing": "not a number",
    "greater_than_equal": "must be at least {ge}", "less_than_equal": "must be at most {le}",
}  # fmt: skip
"""Words for pydantic's errors, by their types."""
_ELSEWHERE = {
    "--prompt": 'the prompt needs no option: tiler render "a boat"',
    "-p": 'the prompt needs no option: tiler render "a boat"',
    "--sampler": "--scheduler names the sampler", "--sampler-name": "--scheduler names the sampler",
    "--cfg": "--cfg-scale is classifier-free guidance", "--negative": "--negative-prompt, or -n, says what not to draw",
    "--ckpt": "--model names the model, also a single file", "--init-img": "--guide takes a picture to start from",
    "--denoising-strength": "--strength is the share of the schedule that is denoised again",
    "--batch-size": "--count makes several pictures", "--batch-count": "--count makes several pictures",
    "--n-iter": "--count makes several pictures", "--tiling": "--wrap xy makes a picture without seams",
    "--enable-hr": "pictures larger than the model's own size have a guide of that size already",
    "--hires-fix": "pictures larger than the model's own size have a guide of that size already",
    "--lowvram": "--max-ram sets the memory ceiling", "--medvram": "--max-ram sets the memory ceiling",
}  # fmt: skip
"""What options of AUTOMATIC1111 and stable-diffusion.cpp are called here."""


def end(error: BaseException) -> NoReturn:
    """Print what happened, and exit with the error's code."""
    message, code = _explained(error)
    if isinstance(error, Interrupted):  # the process of a queue says for all pictures what becomes of them
        _fail("" if BESIDE in os.environ else message, code, (), {})
    notes, smallest = getattr(error, "__notes__", []), getattr(error, "smallest_bytes", None)
    facts = {**getattr(error, "facts", {})} | ({"notes": notes} if notes else {})
    facts |= {} if smallest is None else {"smallest_bytes": smallest}
    _fail(message, code, notes, facts, getattr(error, "table", ""))


def _explained(error: BaseException) -> tuple[str, int]:
    """The message for an error ("" if it has been printed already) and the exit code."""
    from tiler.files import written
    from tiler.memory.limits import is_out_of_memory

    if is_out_of_memory(error):  # also if it caused another error
        return "the system refused an allocation; raise --max-ram or the limit (ulimit -d, -v), or free some memory", 5
    match error:
        case Interrupted():
            names = ", ".join(map(str, written()))
            told = [f"written: {names}"] * bool(names) + getattr(error, "__notes__", [])
            return "; ".join(["interrupted", *(told or ["nothing was written"])]), int(error.code or 1)
        case SystemExit() if isinstance(error.__context__, BrokenPipeError):
            return "", 0  # rich exits so when the reader of its pipe is gone
        case SystemExit():
            return "", error.code if isinstance(error.code, int) else 1
        case TilerError():
            return str(error), error.exit_code
        case OSError():
            return f"{error.filename or 'standard output'}: {error.strerror}; check the disk and its free space", 6
    if hasattr(error, "format_message"):  # click's usage errors; empty if the help was shown instead
        said = usage_of(error)
        return f"{said}{' See' if said.endswith('?') else '; see'} --help" if said else "", 2
    line = (str(error).splitlines() or [""])[0]
    return f"this is a bug in tiler: {type(error).__name__}: {line}; `tiler --debug …` shows where it happened", 1


def usage_of(error: Any) -> str:
    """What a usage error of click says, without a full stop."""
    why, names = why_invalid(error), getattr(getattr(error, "param", None), "opts", ())
    if why and (option := next((name for name in names if name.startswith("--")), "")):
        said = error.__cause__.errors()[0]["input"]
        if option == "--size" and (sides := re.fullmatch(r"(\d+)[x×](\d+)", str(said))) is not None:
            return f"--size {said}: it sets both sides; give -W {sides[1]} -H {sides[2]}"
        return f"{option} {said}: " + ("this command takes one seed" if option == "--seed" and "," in said else why)
    text: str = error.format_message()
    name = str(getattr(error, "option_name", ""))
    params = getattr(getattr(getattr(error, "ctx", None), "command", None), "params", ())
    if (hint := _ELSEWHERE.get(name.replace("_", "-"))) is not None:
        options = {option for param in params for option in param.opts}
        if (named := re.match("--[a-z-]+", hint)) is None or named[0] in options:
            return f"No such option: {name}; {hint}"
    text = text.rstrip(".").replace("Value error, ", "")  # pydantic's prefix
    if "unexpected extra argument" in text and any(param.name == "prompt" for param in params):
        return f"{text}; put a prompt of several words in quotes"
    return text


def why_invalid(error: BaseException) -> str:
    """Why a value is no number, or out of range; "" for other usage errors."""
    cause: Any = error.__cause__
    found = cause.errors()[0] if hasattr(cause, "errors") else {}
    return _WHY.get(found.get("type", ""), "").format(**found.get("ctx", {}))


def _fail(message: str, code: int, notes: Sequence[str], facts: Mapping[str, Any], table: str = "") -> NoReturn:
    as_json = "--json" in sys.argv  # programs read errors from where they read results
    with suppress(OSError, ValueError):  # stderr may be closed; the exit code remains
        if os.environ.get("TILER_DEBUG"):
            traceback.print_exc()
        lines = [table, f"tiler: {message}" if message else "", *notes]
        if not (as_json and BESIDE in os.environ):  # else the process of a queue reads the error and tells it
            sys.stderr.write("".join(f"{harmless(line)}\n" for line in lines if line))
        sys.stderr.flush()
    with suppress(OSError, ValueError):
        if message and code and as_json:
            print(json.dumps({"schema": 1, "error": message, "exit_code": code, **facts}))
        sys.stdout.flush()
    sys.exit(code)
