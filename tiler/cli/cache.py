"""`tiler cache list` and `tiler cache clean`: the files that tiler keeps on disk to start faster next time."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from tiler.cli import options as o
from tiler.cli.terminal import columns, size
from tiler.errors import UsageError
from tiler.request import settings
from tiler.weights.caches import PROMPTS, Cached, list_cached, remove

app = typer.Typer(
    help="List or remove the files that make the next run faster: int8 weights, encoded prompts, hashes.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
CacheDir = Annotated[
    Path | None,
    typer.Option(
        "--cache-dir",
        metavar="PATH",
        show_default=False,
        help=r"The --cache-dir of your renders. [dim]\[default: ~/.cache/tiler][/dim]",
    ),
]


def _listed(folder: Path | None) -> list[Cached]:
    """The cached files in the folder of --cache-dir, or else in the one that renders use. Raises UsageError."""
    if folder is None:
        said = os.environ.get("TILER_CACHE_DIR") or settings.read_config().get("cache_dir")
        return list_cached(Path(str(said)) if said else None)
    if not folder.is_dir():
        raise UsageError(f"--cache-dir {folder}: no such folder")
    return list_cached(folder)


@app.command("list")
def show(cache_dir: CacheDir = None, json_output: o.Json = False) -> None:
    """Show the cached files: size, last use, the model or file that they were made from, and whether they are stale.

    Encoded prompts are counted by model, because their files do not contain the words.
    """
    found = _listed(cache_dir)
    if json_output:
        o.tell({"files": [asdict(file) | {"path": str(file.path)} for file in found]})
        return
    groups: dict[tuple[str, ...], list[Cached]] = {}
    for file in found:
        alike = file.kind == PROMPTS and not file.stale  # no file says which prompt it holds
        groups.setdefault((file.kind, file.name, "" if alike else str(file.path)), []).append(file)
    for files in groups.values():
        typer.echo(_line(files, columns()))
    sizes: Counter[Path] = Counter()
    for file in found:
        sizes[file.path.parent] += file.size_bytes
    for folder, nbytes in sizes.items():
        typer.echo(f"{size(nbytes):>8}  in {folder}")
    if not found:
        typer.echo("nothing is cached")


def _line(files: list[Cached], width: int) -> str:
    """A line about one file, or about the prompts of one model. Of a long name the end is shown."""
    first, days = files[0], min(file.used_days for file in files)
    used = "today" if days < 1 else f"{days:.0f} day{'s' if round(days) > 1 else ''} ago"
    line = f"{size(sum(file.size_bytes for file in files)):>8}  {used:12} {first.kind:18}"
    name = first.name or ("of unknown models" if first.kind == PROMPTS else first.path.name[:12])
    end = f" ({len(files)})" if first.kind == PROMPTS else ""
    end += f"  stale: {first.stale}" if first.stale else ""
    room = max(12, width - len(line) - len(end))
    return line + (name if len(name) <= room else f"…{name[1 - room :]}") + end


@app.command("clean")
def clean(
    cache_dir: CacheDir = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove all cached files, not only stale ones.")] = False,
    older: Annotated[
        int | None,
        typer.Option(
            "--older-than", metavar="DAYS", min=0, show_default=False, help="Also remove files unused for this long."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be removed.")] = False,
) -> None:
    """Remove stale files: int8 weights of another version of tiler, damaged files, and leftovers of killed runs."""
    found = [
        file
        for file in _listed(cache_dir)
        if everything or file.stale or (older is not None and file.used_days >= older)
    ]
    for file in found:
        typer.echo(f"{file.path}: {size(file.size_bytes)}, {file.stale or file.kind}")
    freed = sum(file.size_bytes for file in found) if dry_run else remove(found)
    typer.echo(f"{'would free' if dry_run else 'freed'} {size(freed)} ({len(found)} files)")
