"""Lend a module's layers to a streamer and restore them afterwards, so that one meta-device module serves planning,
packing and every phase of a run, one after another."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from tiler.compute.layers import stream_layers
from tiler.compute.stream import Streamer


@contextmanager
def lent(module: nn.Module, streamer: Streamer) -> Iterator[None]:
    """Apply `stream_layers` within this context. All changes (classes, parameters, submodules, attributes, hooks) are
    undone at its end, and loaded data is freed. Not reentrant."""
    modules = list(module.modules())
    assert not any("streamer" in vars(m) for m in modules), "lent already"
    before = [(m, type(m), dict(vars(m)), _tables(m)) for m in modules]
    try:
        stream_layers(module, streamer)
        yield
    finally:
        for m, kind, attributes, tables in before:
            m.__class__ = kind
            vars(m).clear()
            vars(m).update(attributes)
            for name, table in tables.items():
                attributes[name].clear()
                attributes[name].update(table)


def _tables(module: nn.Module) -> dict[str, dict[Any, Any]]:
    """The dictionaries of a module: parameters, submodules, hooks."""
    return {name: dict(value) for name, value in vars(module).items() if type(value) in (dict, OrderedDict)}
