"""What a user is told where the packages of the extra `cluster` are missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tiler.errors import UsageError


@contextmanager
def explained() -> Iterator[None]:
    """Imports that the extra brings. Raises UsageError where it is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UsageError(
            f"--cluster, tiler worker and tiler cluster need packages that are not installed ({error.name}): "
            "pip install -e '.[cluster]' in tiler's folder"
        ) from error
