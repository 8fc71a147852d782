"""Lend a module's layers to a streamer and restore them afterwards, so that one meta-device module serves planning,
packing and every phase of a run, one after another."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn

from tiler.compute.layers import stream_layers
from tiler.compute.stream import Streamer


@contextmanager
def lent(module: nn.Module, streamer: Streamer) -> Iterator[None]:
    """Apply `stream_layers` within this context. All changes (classes, parameters, submodules, attributes, hooks) are
    undone at its end, and loaded data is freed. Not reentrant."""
    before = [_State.of(m) for m in module.modules()]
    assert not any("streamer" in state.attributes for state in before), "lent already"
    try:
        stream_layers(module, streamer)
        yield
    finally:
        for state in before:
            state.restore()


class _State(NamedTuple):
    """A module as it was: its class, its attributes, and the entries of its tables (parameters, submodules, hooks)."""

    module: nn.Module
    kind: type[nn.Module]
    attributes: dict[str, Any]
    tables: list[tuple[dict[Any, Any], dict[Any, Any] | None]]  # None for an empty one, as most are

    @classmethod
    def of(cls, module: nn.Module) -> _State:
        attributes = dict(vars(module))
        tables = [(v, dict(v) if v else None) for v in attributes.values() if type(v) in (dict, OrderedDict)]
        return cls(module, type(module), attributes, tables)

    def restore(self) -> None:
        if type(self.module) is not self.kind:
            self.module.__class__ = self.kind
        attributes = vars(self.module)
        attributes.clear()
        attributes.update(self.attributes)
        for table, entries in self.tables:
            if table:
                table.clear()
            if entries:
                table.update(entries)
