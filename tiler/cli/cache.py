"""`tiler cache list` and `tiler cache clean`: the files that tiler keeps on disk to start faster next time."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from tiler.cli import options as o
from tiler.cli.terminal import columns
from tiler.errors import UsageError
from tiler.memory.budget import format_mb
from tiler.request import settings
from tiler.weights.caches import Cached, list_cached, remove

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
    """Show every cached file: its size, when it was last used, and whether it is stale."""
    found = _listed(cache_dir)
    if json_output:
        o.tell({"files": [asdict(file) | {"path": str(file.path)} for file in found]})
        return
    width = columns()
    for file in found:
        used = "today" if file.used_days < 1 else f"{file.used_days:.0f} days ago"
        stale = f"  stale: {file.stale}" if file.stale else ""
        typer.echo(f"{format_mb(file.size_bytes):>10}  {used:12} {file.kind:16} {file.path.name[:12]}{stale}"[:width])
    sizes: Counter[Path] = Counter()
    for file in found:
        sizes[file.path.parent] += file.size_bytes
    for folder, size in sizes.items():
        typer.echo(f"{format_mb(size):>10}  in {folder}")
    if not found:
        typer.echo("nothing is cached")


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
        typer.echo(f"{file.path}: {format_mb(file.size_bytes)}, {file.stale or file.kind}")
    freed = sum(file.size_bytes for file in found) if dry_run else remove(found)
    typer.echo(f"{'would free' if dry_run else 'freed'} {format_mb(freed)} ({len(found)} files)")
