"""The user's folders, also without a home: in a container, or under a user id without an account."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from tiler.errors import UsageError


def cache_home() -> Path:
    """The folder for data that can be created again: $XDG_CACHE_HOME, ~/.cache, or, without a home, a folder of this
    user's in the temporary folder."""
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given)
    try:
        return Path.home() / ".cache"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"tiler-{os.getuid()}"


def hub_cache() -> Path:
    """The folder of huggingface_hub's repositories: the library's default if there is a home."""
    given = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    home = os.environ.get("HF_HOME") or str(cache_home() / "huggingface")
    return Path(os.path.expandvars(os.path.expanduser(given or os.path.join(home, "hub"))))


def give_the_hub_a_home() -> None:
    """Set a home for huggingface_hub before it is imported: without one it would create a folder named "~"."""
    try:
        Path.home()
    except RuntimeError:
        os.environ.setdefault("HF_HOME", str(cache_home() / "huggingface"))


def expand(path: str) -> Path:
    """`path` with a leading ~ replaced. Raises UsageError if the home is unknown."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UsageError(f"{path}: the home folder of this user is not known; write the whole path") from error
