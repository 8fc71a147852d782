"""Read the rows of a queue from TOML, JSON lines, or the lines of AUTOMATIC1111's "Prompts from file or textbox"."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from tiler.errors import StorageError, UsageError
from tiler.request import RenderRequest

MAX_TOML = 16 * 2**20
MAX_LINE = 2**20
MOST = 10_000  # pictures of one row
NAME = "{index:03}-{prompt}.png"  # the output of a row that names none
_OTHER_NAMES = {"sampler": "scheduler", "cfg": "cfg-scale"}
# Keys of rows by AUTOMATIC1111's tags
# (github.com/AUTOMATIC1111/stable-diffusion-webui/wiki/Features#prompts-from-file).
_TAGS = {
    "prompt": "prompt", "negative_prompt": "negative-prompt", "seed": "seed", "steps": "steps", "width": "width",
    "height": "height", "cfg_scale": "cfg-scale", "sampler_name": "scheduler", "sd_model": "model",
    "outpath_samples": "folder", "batch_size": "batch_size", "n_iter": "n_iter", "tiling": "tiling",
}  # fmt: skip
_WITHOUT_EFFECT = frozenset(
    ("restore_faces", "outpath_grids", "prompt_for_display", "styles", "subseed", "subseed_strength",
     "seed_resize_from_h", "seed_resize_from_w", "sampler_index", "do_not_save_samples", "do_not_save_grid")
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One picture: the words that follow `tiler render`, without prompt and output. `problem` says why it cannot be
    drawn."""

    index: int
    prompt: str | None
    words: tuple[str, ...]
    output: str | None  # as given, with placeholders
    notes: tuple[str, ...] = ()
    problem: str | None = None


class Entry(NamedTuple):
    """The rows of one line of a file, and the offset at which the next line starts."""

    rows: tuple[Row, ...]
    end: int


def grows(path: Path) -> bool:
    """Whether a file is read line by line, including lines that are appended while earlier rows are drawn."""
    return path.suffix.lower() != ".toml"


def read_entries(path: Path, at: int = 0, index: int = 0) -> Iterator[Entry]:
    """Read the lines of a file from byte `at` on; `index` rows precede it. An error in a line becomes its row's
    problem. Raises StorageError."""
    parse = {".jsonl": _json_line, ".ndjson": _json_line}.get(path.suffix.lower(), _prompt_line)
    try:
        with path.open("rb") as file:
            file.seek(at)
            while line := file.readline(MAX_LINE + 1):
                too_long = len(line) > MAX_LINE
                while too_long and line and not line.endswith(b"\n"):
                    line = file.readline(MAX_LINE)
                if too_long:
                    rows = [Row(index + 1, None, (), None, problem=f"a line of more than {MAX_LINE >> 20} MB")]
                elif parse is _prompt_line and line.removeprefix(BOM_UTF8).startswith(b"#"):
                    rows = []  # a comment; `--prompt "# …"` and rows in other formats draw such a prompt
                else:
                    rows = list(_line_rows(line, index, parse)) if line.strip() else []
                index += len(rows)
                yield Entry(tuple(rows), file.tell())
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror})") from error


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file, read according to its ending. Raises UsageError for an invalid TOML file; an error in a line
    of another file becomes its row's problem."""
    return (row for entry in read_entries(path) for row in entry.rows) if grows(path) else _toml_rows(path)


def _toml_rows(path: Path) -> Iterator[Row]:
    try:
        if path.stat().st_size > MAX_TOML:
            raise UsageError(f"{path}: larger than {MAX_TOML >> 20} MB; write long queues as .jsonl")
        said = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, RecursionError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path}: not valid TOML ({error})") from error
    defaults, images = said.pop("defaults", {}), said.pop("image", [])
    if said or not isinstance(defaults, dict) or not isinstance(images, list):
        raise UsageError(
            f"{path}: holds [defaults] and [[image]] tables, and nothing else like {next(iter(said), 'these')!r}"
        )
    index = 0
    for image in images:
        if not isinstance(image, dict):
            raise UsageError(f"{path}: row {index + 1} is not an [[image]] table")
        for row in _rows_of({**defaults, **image}, index):
            if row.problem is not None:
                raise UsageError(f"{path}: row {row.index}: {row.problem}")
            index = row.index
            yield row


def _line_rows(line: bytes, index: int, parse: Callable[[str], tuple[dict[str, Any], list[str]]]) -> Iterator[Row]:
    try:
        said, notes = parse(line.decode("utf-8-sig").strip())
    except (ValueError, RecursionError, UsageError) as error:
        yield Row(index + 1, None, (), None, problem=_problem(error))
        return
    for row in _rows_of(said, index):
        yield replace(row, notes=tuple(notes))


def _problem(error: Exception) -> str:
    """Why a line cannot be read."""
    match error:
        case json.JSONDecodeError():
            return f"not valid JSON: {error.msg.lower()} at column {error.colno}"
        case UnicodeDecodeError():
            return "not a text in UTF-8"
        case RecursionError():
            return "not valid JSON: nested too deeply"
    return str(error).splitlines()[0]


def _json_line(line: str) -> tuple[dict[str, Any], list[str]]:
    said = json.loads(line)
    if not isinstance(said, dict):
        raise UsageError('a line is a JSON object, like {"prompt": "a fjord"}')
    return said, []


def _prompt_line(line: str) -> tuple[dict[str, Any], list[str]]:
    if not line.lstrip().startswith("--"):
        return {"prompt": line}, []
    said, notes, words = dict[str, Any](), list[str](), shlex.split(line)
    at = 0
    while at < len(words):
        if not words[at].startswith("--"):
            raise UsageError(f"{words[at]!r} does not follow a --tag; write --prompt before it")
        tag, at, values = words[at][2:].replace("-", "_"), at + 1, list[str]()
        while at < len(words) and not words[at].startswith("--") and (not values or "prompt" in tag):
            values.append(words[at])
            at += 1
        if tag in _WITHOUT_EFFECT:
            notes.append(f"--{tag} has no effect here")
        elif tag not in _TAGS:
            raise UsageError(f"unknown tag --{tag}")
        elif tag == "tiling":
            said["wrap"] = "xy" if (values or ["true"])[0].lower() in ("true", "1") else "none"
        elif tag == "outpath_samples":
            said["folder"] = re.split(r"[/\\]", " ".join(values).rstrip("/\\"))[-1]
            notes.append(f"the picture goes into the folder {said['folder']!r}")
        else:
            said[_TAGS[tag]] = " ".join(values)
    try:
        times = int(said.pop("batch_size", 1)) * int(said.pop("n_iter", 1))
    except ValueError:
        raise UsageError("--batch_size and --n_iter take whole numbers") from None
    return said | ({"count": times} if times != 1 else {}), notes


def _rows_of(said: Mapping[str, Any], index: int) -> Iterator[Row]:
    """The rows of one entry: `count` of them with consecutive seeds, or one for each seed of a list."""
    values = {_OTHER_NAMES.get(key, key).replace("_", "-"): value for key, value in said.items()}
    count, prompt, output = values.pop("count", 1), values.pop("prompt", None), values.pop("output", None)
    folder = values.pop("folder", None)
    seeds, problem = values.get("seed"), None
    if not isinstance(count, int) or not 1 <= count <= MOST:
        problem = f"count = {count!r} is out of range: 1–{MOST}"
    elif wrong := next((key for key in ("prompt", "output") if not isinstance(said.get(key), str | None)), None):
        problem = f"{wrong} must be a text, not {said[wrong]!r}"
    elif isinstance(seeds, list) and (count != 1 or not 1 <= len(seeds) <= MOST):
        problem = "count does not go with a list of seeds" if count != 1 else f"seed is a list of 1–{MOST} numbers"
    elif unknown := next((key for key in values if key not in _KEYS), None):
        problem = (
            f"a row cannot say {unknown!r}; give it to tiler batch"
            if unknown in _NOT_OF_ROWS
            else f"unknown key {unknown!r}"
        )
    elif listed := next((key for key in values if isinstance(values[key], list) and key not in _LISTS), None):
        problem = f"{listed} takes one value, not {values[listed]!r}"
    if problem is not None:
        yield Row(index + 1, None, (), None, problem=problem)
        return
    several = seeds if isinstance(seeds, list) else ()
    words = [word for key, value in values.items() if value is not several for word in _words(key, value)]
    for number in range(len(several) or count):
        own = list(words)
        if several:
            own.append(f"--seed={several[number]}")
        elif number and (seed := str(seeds)).isdecimal():
            own.append(f"--seed={int(seed) + number}")
        place = output if folder is None else f"{folder}/{output or NAME}"
        yield Row(index + 1 + number, prompt, tuple(own), place)


def _words(key: str, value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for item in value:
            yield from _words(key, item)
    elif value is True:
        yield f"--{key}"
    elif value is not False and value is not None:
        yield f"--{key}={value}"


# A file of rows may come from another person, so only the command line decides where files are written and who draws.
_NOT_OF_ROWS = frozenset(
    (
        "cluster",
        "cluster-only",
        "keys",
        "insecure",
        "save-latents",
        "preview",
        "force",
        "scratch",
        "cache-dir",
        "job-dir",
    )
)


def _keys(*, many: bool = False) -> frozenset[str]:
    """The long options of `tiler render`; with `many`, those that may be given several times."""
    options = (f.metadata["option"] for f in fields(RenderRequest))
    names = (name for option in options if option.many or not many for name in option.names)
    return frozenset(name[2:] for name in names if name.startswith("--"))


_LISTS = _keys(many=True) | {"seed"}
_KEYS = _keys() - {"output", "restart", "keep-job"} - _NOT_OF_ROWS
