"""Several pictures from one command (`--count 4`, `--seed 1,2,3`), and pictures named by a template (`-o
{seed}.png`)."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from tiler.cli import helps, queues, supervise
from tiler.errors import UsageError
from tiler.files import make_own_folder, replace_file, sha256_of
from tiler.jobs import naming
from tiler.jobs.results import Results
from tiler.jobs.rows import Row
from tiler.request import MAX_SEED, RenderRequest
from tiler.request.choices import STDOUT
from tiler.request.options import Panel
from tiler.weights.places import cache_home

_words: ContextVar[tuple[str, ...]] = ContextVar("words", default=())

Seeds = Annotated[
    str | None,
    typer.Option(
        "--seed", "-s", rich_help_panel=Panel.PICTURE, metavar="N[,N…]", show_default=False,
        help="The same seed gives the same picture; -1 draws one at random; 1,2,3 makes three pictures. "
        r"[dim]\[default: random][/dim]",
    ),
]  # fmt: skip
Count = Annotated[
    int,
    typer.Option(
        "--count", rich_help_panel=Panel.PICTURE, metavar="N", min=1, max=queues.MOST, show_default=False,
        help=f"Make N pictures, up to {queues.MOST:,}; with --seed S, their seeds are S, S + 1, and so on. With "
        r"--cluster several are drawn at a time. [dim]\[default: 1][/dim]",
    ),
]  # fmt: skip
OutputDir = Annotated[
    str | None,
    typer.Option(
        "--output-dir", rich_help_panel=Panel.OUTPUT, metavar="PATH", show_default=False,
        help="Folder for --output; names that lead out of it are refused.",
    ),
]  # fmt: skip


class Command(helps.Command):
    """Remembers the words of the command line, for the processes that draw its pictures."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _words.set(tuple(args))
        return super().parse_args(ctx, args)


def place(request: RenderRequest, output_dir: str | None) -> RenderRequest:
    """Fill in the placeholders of a single picture's output, and put it inside the folder. Raises UsageError."""
    if request.output == STDOUT:
        return request
    template = str(request.output or "tiler.png")
    if naming.has_placeholder(template):
        if request.seed is None and naming.has_placeholder(template, "seed"):
            request = replace(request, seed=secrets.randbelow(2**32))
        template = naming.fill(template, index=1, seed=request.seed, prompt=request.prompt)
    elif not output_dir:
        return request
    return replace(request, output=_inside(output_dir, template) if output_dir else Path(template))


def run(
    request: RenderRequest, seeds: Sequence[int | None], count: int, output_dir: str | None, max_ram: str, *,
    threads: int | None, quiet: bool, log_json: bool, json_output: bool, own: Callable[..., None],
) -> NoReturn:  # fmt: skip
    """Render a picture for each seed, or `count` pictures, each in a process of its own: one after another, or on a
    cluster up to three at a time. `own` is the command's function. Raises UsageError before any work if two pictures
    have the same name, and SystemExit with the exit code."""
    if len(seeds) > 1 and count > 1:
        raise UsageError("--count does not go with a list of seeds; give one of them")
    if request.output == STDOUT:
        raise UsageError("standard output (-o -) takes one picture; leave out --count, or name files with -o NAME.png")
    if request.save_latents is not None:
        raise UsageError("--save-latents takes the latents of one picture; leave it out with --count or several seeds")
    template = str(request.output or "tiler.png")
    root = Path(output_dir or ".")
    if output_dir:
        _inside(output_dir, "x")
    elif Path(template).is_absolute() or ".." in Path(template).parts:
        root, template = Path(template).parent, Path(template).name
    if naming.has_placeholder(str(root)):
        raise UsageError(f"--output {template!r}: placeholders work in the file's name, not in its folders ({root})")
    if not naming.has_placeholder(template):
        naming.fill(template, index=1, seed=None, prompt=None)  # an error about braces quotes what the user typed
        named = Path(template)
        template = str(named.with_name(f"{named.stem}-{{index}}{named.suffix}"))
    checker = queues.Checker(root=root, defaults=_words.get(), name=template, parse=queues.parser(own))
    ceiling, results = queues.ceiling(max_ram), _results_of(root, template, force=request.force)
    every, command = _every(seeds, count), _mark_of(_words.get())
    draws = None in every and naming.has_placeholder(template, "seed")
    if draws:
        every = _kept(results, command, len(every)) or [secrets.randbelow(2**32) if s is None else s for s in every]
    rows = queues.check_all(_rows(every, template), checker)
    _forget_changed(results, root)
    if draws and not _kept(results, command, len(every)):
        Results(results, results.name, shared=False).note({"command": command, "seeds": every})
    queues.hand_over(
        supervise.Spec(
            root=str(root), results=str(results), file=template, max_ram_bytes=ceiling, rows=rows,
            silent=quiet or log_json, quiet=quiet, json_output=json_output, forgets=draws or request.force,
            cluster=request.cluster or "", keys=str(request.keys or ""), insecure=request.insecure,
            threads=threads or 0, log_json=log_json,
        )
    )  # fmt: skip


def _every(seeds: Sequence[int | None], count: int) -> list[int | None]:
    """A seed for each picture; None stands for one to be drawn at random."""
    return list(seeds) if len(seeds) > 1 else [None if seeds[0] is None else seeds[0] + n for n in range(count)]


def _results_of(root: Path, template: str, *, force: bool) -> Path:
    """The file that remembers which of these pictures are finished: in the cache, or, if that cannot be used, beside
    them. With --force, only while some of them are not."""
    mark = hashlib.sha256(json.dumps([os.path.abspath(root), template, force]).encode("utf-8", "surrogatepass"))
    folder = cache_home() / "tiler" / "counts"
    try:
        make_own_folder(folder, parents=True)
    except OSError:
        return root / f".tiler-{mark.hexdigest()[:8]}.results.jsonl"
    return folder / f"{mark.hexdigest()[:32]}.jsonl"


def _forget_changed(results: Path, root: Path) -> None:
    """Remove the lines of pictures that are gone, or whose files have been replaced since."""
    try:
        lines = results.read_bytes().splitlines(keepends=True)
    except OSError:
        return
    kept = [line for line in lines if _is_true(line, root)]
    if kept != lines:
        replace_file(results, kept, durable=True)


def _is_true(line: bytes, root: Path) -> bool:
    """Whether a line of results is not about a picture, or about one whose file is unchanged."""
    try:
        said = json.loads(line)
        return "sha256" not in said or sha256_of(root / said["output"]) == said["sha256"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _mark_of(words: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(words).encode("utf-8", "surrogatepass")).hexdigest()


def _kept(results: Path, command: str, count: int) -> list[int | None]:
    """The seeds that an unfinished run of the same command drew; empty if there was none."""
    with suppress(OSError), results.open("rb") as file:
        for line in file:
            with suppress(ValueError, KeyError, TypeError, RecursionError):
                if (said := json.loads(line))["command"] == command and len(said["seeds"]) == count:
                    return [int(seed) % (MAX_SEED + 1) for seed in said["seeds"]]
    return []


def _rows(seeds: Sequence[int | None], template: str) -> Iterator[Row]:
    for index, seed in enumerate(seeds, 1):
        said = -1 if seed is None else seed % (MAX_SEED + 1)
        yield Row(index, None, (f"--seed={said}",), template)


def _inside(output_dir: str, name: str) -> Path:
    root = Path(output_dir)
    if not root.is_dir():
        raise UsageError(f"--output-dir {output_dir} does not exist; create it first")
    path = naming.below(root, name)
    if path.parent != root:
        path.parent.mkdir(parents=True, exist_ok=True)
    return path
