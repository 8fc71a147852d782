"""Whether a checkpoint's folder has the parts that its pipeline needs, and how the missing ones can be had."""

from __future__ import annotations

from collections.abc import Iterable

from tiler.errors import ModelError
from tiler.weights.checkpoint import Checkpoint


def check_parts(checkpoint: Checkpoint, repository: str, parts: Iterable[str]) -> None:
    """Raises ModelError for the first of these models without a config.json, with the command that fetches it; `repository`
    is where it can be had if the checkpoint does not come from the hub."""
    for part in parts:
        if not (checkpoint.folder / part / "config.json").is_file():
            raise ModelError(
                f"{checkpoint.folder / part}/config.json is missing; {fetch_part(checkpoint, repository, part)}"
            )


def fetch_part(checkpoint: Checkpoint, repository: str, *parts: str) -> str:
    """What to do so that parts are there."""
    place = "" if checkpoint.repository else f" --local-dir {checkpoint.folder}"
    revision = f" --revision {checkpoint.revision}" if checkpoint.revision else ""
    patterns = " ".join(f"--include '{part}/*'" for part in parts)
    return f"run: hf download {checkpoint.repository or repository} {patterns}{revision}{place}"
