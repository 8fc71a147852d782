"""What commands that draw several pictures share: they parse rows into requests, check names, and start the process
that draws."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import typer

from tiler.cli import failure, supervise
from tiler.cli import options as o
from tiler.errors import UsageError
from tiler.jobs import naming
from tiler.jobs.checked import Checked
from tiler.jobs.coding import encode
from tiler.jobs.drawing import BESIDE, OWN_BYTES
from tiler.jobs.folder import folder_of
from tiler.jobs.rows import Row
from tiler.memory.budget import Budget, format_mb
from tiler.request import MAX_SEED, RenderRequest
from tiler.request.prompt import cut_tags
from tiler.request.render import OF_THE_MACHINE, OF_THE_WORKERS
from tiler.weights.encoders import has_large_encoder

MOST = 10_000  # pictures of one command


def parse_seeds(text: str | None) -> list[int | None]:
    """ "1,2,3" → [1, 2, 3]; None stands for a random seed. Raises UsageError."""
    seeds: list[int | None] = []
    for part in (text or "-1").split(","):
        try:
            number = int(part)
        except ValueError:
            raise UsageError(f"--seed {text!r} is neither a whole number nor a list like 1,2,3") from None
        if not -1 <= number <= MAX_SEED:
            raise UsageError(f"--seed {number} is out of range: 0–{MAX_SEED}, or -1 for a random one")
        seeds.append(None if number == -1 else number)
    if len(seeds) > MOST:
        raise UsageError(f"--seed names {len(seeds)} seeds; at most {MOST} at a time")
    return seeds


def parser(
    run: Callable[..., None], on_rest: Callable[[dict[str, Any]], object] = lambda rest: None
) -> Callable[[Sequence[str]], RenderRequest]:
    """A function that turns the words of `tiler render`, whose function is `run`, into the request of one picture. It
    raises UsageError. `on_rest` gets the options that belong to no request."""
    found: list[RenderRequest] = []

    def note(request: RenderRequest, **rest: Any) -> None:
        seeds = parse_seeds(rest["seeds"])
        if rest["count"] != 1 or len(seeds) != 1:
            raise UsageError("a row takes one seed; for several pictures, give the row a count and no list of seeds")
        found.append(request if rest["seeds"] is None else replace(request, seed=seeds[0]))
        on_rest(rest)

    note.__signature__ = inspect.signature(run, eval_str=True)  # type: ignore[attr-defined]
    app = typer.Typer(add_completion=False)
    app.command()(o.command_of(RenderRequest, note, leave_out=("seed",), repeats=True, tells=False))
    command = typer.main.get_command(app)

    def parse(words: Sequence[str]) -> RenderRequest:
        try:
            command.main([*words], prog_name="tiler render", standalone_mode=False)
        except Exception as error:
            if hasattr(error, "format_message"):  # click's
                raise UsageError(failure.usage_of(error)) from error
            raise
        return found.pop()

    return parse


@dataclass(frozen=True, kw_only=True)
class Checker:
    """Checks rows. `defaults` are words of `tiler render` that come before each row's, `parse` turns words into a
    request, and `name` is the name template, below `root`, for rows without one."""

    root: Path
    defaults: Sequence[str]
    parse: Callable[[Sequence[str]], RenderRequest]
    name: str

    def ask(self, row: Row) -> RenderRequest:
        """The request of a row. Raises UsageError if the row cannot be drawn."""
        if row.problem is not None:
            raise UsageError(row.problem)
        return self.parse(self._words(row))

    def output_of(self, row: Row, asked: RenderRequest) -> Path:
        """The path of a row's picture, always below the root. Raises UsageError."""
        template = self.name if row.output is None else row.output
        return naming.below(self.root, naming.fill(template, index=row.index, seed=asked.seed, prompt=asked.prompt))

    def check(self, row: Row) -> Checked:
        """Everything that a queue must know about the row. Raises UsageError if the row cannot be drawn."""
        asked = self.ask(row)
        output = self.output_of(row, asked)
        return Checked(
            row=row.index,
            words=self._words(row),
            output=str(output.relative_to(self.root)),
            job=str(folder_of(output, asked.job_dir)),
            digest=_digest(asked, output.relative_to(self.root)),
            denoiser=_digest(asked, None),
            notes=list(row.notes),
            wants_encoder=has_large_encoder(asked),
        )

    def take(self, row: Row) -> Checked:
        """Like `check`, but an error becomes the row's problem."""
        try:
            return self.check(row)
        except UsageError as error:
            return Checked(row=row.index, notes=list(row.notes), problem=str(error))

    def _words(self, row: Row) -> list[str]:
        """The words after `tiler render`. If an option is given twice, the last one counts; the prompt comes after
        `--`."""
        words = list(self.defaults)
        at = words.index("--") if "--" in words else len(words)
        prompt = words[at:] if row.prompt is None else ["--", row.prompt]
        return [*words[:at], *row.words, "--count=1", "--output-dir=", *prompt]


def _digest(asked: RenderRequest, output: Path | None) -> int:
    """64 bits that identify a picture: everything that decides it, and its place. Without a place, they identify the
    model and everything else that decides how a cluster's workers open it."""
    said = encode(asked)
    names = OF_THE_WORKERS if output is None else [name for name in said if name not in OF_THE_MACHINE]
    told: list[Any] = [str(output), {name: said.get(name) for name in names}]
    if output is None:
        told += [cut_tags(text or "")[1] for text in (asked.prompt, asked.canvas_prompt)]
    text = json.dumps(told, sort_keys=True)
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def budget_of(max_ram: str | int) -> Budget:
    """The budget of a picture's process. In a queue, the queue's own process takes its part of the ceiling."""
    return Budget(max_ram, beside_bytes=int(os.environ.get(BESIDE, 0)))


def ceiling(max_ram: str) -> int:
    """The ceiling for all processes of a queue together, in bytes. Raises UsageError if nothing would be left for a
    picture."""
    most = Budget(max_ram).max_bytes
    if most <= OWN_BYTES:
        raise UsageError(f"--max-ram {max_ram}: the queue's own process takes {format_mb(OWN_BYTES)} of it; raise it")
    return most


def check_all(rows: Iterable[Row], checker: Checker, where: str = "", noun: str = "picture") -> int:
    """Check all rows before any work begins. Return the descriptor of a nameless file that holds them, a JSON object
    each. Messages begin with `where` and call a row `noun`. Raises UsageError."""
    taken: dict[str, int] = {}
    with tempfile.TemporaryFile() as file:
        for row in rows:
            try:
                checked = checker.check(row)
            except UsageError as error:
                raise UsageError(f"{where}{noun} {row.index}: {error}") from error
            if taken.setdefault(checked.output, row.index) != row.index:
                first, output = taken[checked.output], checker.root / checked.output
                raise UsageError(f"{where}{noun}s {first} and {row.index} have the same output, {output}")
            file.write(json.dumps(checked._asdict()).encode() + b"\n")
        file.flush()
        return os.dup(file.fileno())


def hand_over(spec: supervise.Spec) -> NoReturn:
    """Replace this process by the queue's, which frees the memory of the code that read the options."""
    if spec.rows >= 0:
        os.set_inheritable(spec.rows, True)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, supervise.command_line(spec))
