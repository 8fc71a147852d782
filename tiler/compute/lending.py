"""A module lends its layers to a streamer, and gets them back as they were: one meta-device module serves planning, packing
and every phase of a run, one after another."""

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
    """`stream_layers` for as long as the block lasts. Whatever changes meanwhile (classes, parameters, submodules, attributes,
    hooks) is undone at its end, and what was loaded is freed. One block at a time."""
    modules = list(module.modules())
    assert not any("streamer" in vars(m) for m in modules), "lent already"
    before = [(m, type(m), dict(vars(m)), _tables(m)) for m in modules]
    try:
        stream_layers(module, streamer)
        yield
    finally:
        for m, kind, attributes, tables in before:
            m.__class__ = kind
            for now, then in ((vars(m), attributes), *tables):
                now.clear()
                now.update(then)


def _tables(module: nn.Module) -> list[tuple[dict[Any, Any], dict[Any, Any]]]:
    """The parameters, submodules, hooks and other tables of a module, and a copy of each. transformers hooks a module that is
    asked for its hidden states, and marks it as hooked: one without the other would double them."""
    return [(table, dict(table)) for table in vars(module).values() if type(table) in (dict, OrderedDict)]
