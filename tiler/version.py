"""The versions of tiler and of what it computes with."""

from __future__ import annotations

from importlib import metadata

VERSION = "0.1.0"  # read by the build as well; the distribution's name is not the package's


def versions(*others: str) -> dict[str, str]:
    """The versions of tiler and of other installed distributions, by name."""
    return {"tiler": VERSION} | {name: metadata.version(name) for name in others}
