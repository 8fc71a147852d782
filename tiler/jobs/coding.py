"""Convert requests to JSON and back, according to the types of their fields. No field is mentioned by name."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from tiler.request.choices import STDOUT


def encode(value: Any) -> Any:
    """Convert a value to one that JSON can hold. Paths become absolute, since a job may be continued from another
    folder."""
    if isinstance(value, StrEnum):
        return value.value
    if value == STDOUT:
        return str(value)
    if isinstance(value, Path):
        return str(value.expanduser().absolute())
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, tuple | list):
        return [encode(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    return value


def decode(kind: Any, value: Any) -> Any:
    """The inverse of `encode` for a value of type `kind`. Raises TypeError or ValueError if the value does not fit the
    type."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return decode(next(arg for arg in args if arg is not type(None)), value)
    if origin is tuple:
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        return tuple(decode(k, item) for k, item in zip(kinds, value, strict=True))
    if isinstance(kind, type):
        if is_dataclass(kind):
            hints = get_type_hints(kind)
            return kind(**{name: decode(hints[name], item) for name, item in value.items()})
        if issubclass(kind, tuple):  # named
            hints = get_type_hints(kind)
            return kind(*(decode(hint, item) for hint, item in zip(hints.values(), value, strict=True)))
        if issubclass(kind, StrEnum | Path):
            return kind(value)
    return value
