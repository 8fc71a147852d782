"""The message for users who lack the packages of the extra `cluster`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tiler.errors import UsageError


@contextmanager
def explained() -> Iterator[None]:
    """Wrap imports of packages that the extra installs. Raises UsageError if it is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UsageError(
            f"--cluster, tiler worker and tiler cluster need packages that are not installed ({error.name}): "
            "pip install -e '.[cluster]' in tiler's folder"
        ) from error
