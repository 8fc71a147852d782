"""A plan runs the denoiser on shapes alone to measure its memory, which takes a third of a tiny render's time. Here
that is done once a session for equal models and equal code, and not for each of hundreds of renders."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from tiler.planning.peaks import DenoiserPeaks

Activations = Callable[[DenoiserPeaks, tuple[int, ...], int, int], int]
CODE = "tiler.compute", "tiler.decoding", "tiler.models", "tiler.native", "tiler.planning"


def values_of_code() -> Iterator[object]:
    """All functions, classes with their methods, and constants of the modules that a plan may run."""
    for name in sorted(name for name in sys.modules if name.startswith(CODE)):
        for value in vars(sys.modules[name]).values():
            yield value
            if isinstance(value, type) and value.__module__.startswith(CODE):
                yield from vars(value).values()


class Remembered:
    """Replaces `DenoiserPeaks.activations`, `real`. A test that replaces a value of the code measures anew."""

    def __init__(self, real: Activations) -> None:
        self.real = real
        self._known: dict[object, int] = {}
        self._codes: dict[tuple[int, ...], list[object]] = {}  # keeps the values, so that no other gets their ids

    def activations(self, peaks: DenoiserPeaks, tiles: tuple[int, ...], height: int, width: int) -> int:
        key = self._code(), self._model(peaks), self._inputs(peaks, tiles, height, width)
        if key not in self._known:
            self._known[key] = self.real(peaks, tiles, height, width)
        return self._known[key]

    def _code(self) -> tuple[int, ...]:
        values = list(values_of_code())
        ids = tuple(map(id, values))
        self._codes.setdefault(ids, values)
        return ids

    @staticmethod
    def _model(peaks: DenoiserPeaks) -> tuple[object, ...]:
        """What the measurement depends on besides the code and the inputs. Weights do not count."""
        family, streamer = peaks.family, peaks.streamer
        configs = json.dumps([part.config for part in family.parts], sort_keys=True, default=repr)
        names = tuple((name, tuple(parameter.shape)) for name, parameter in peaks.module.named_parameters())
        settings = streamer.policy, streamer.isa, streamer.arena_bytes, streamer._in_place
        ranks = tuple(sorted(streamer._ranks.items()))
        machine = torch.get_num_threads(), os.environ.get("TILER_ISA"), os.environ.get("TILER_KERNELS")
        return type(family), repr(family.traits), configs, names, settings, ranks, machine

    @staticmethod
    def _inputs(peaks: DenoiserPeaks, tiles: tuple[int, ...], height: int, width: int) -> tuple[object, ...]:
        leaves: list[Any] = tree_flatten([tuple(sample) for sample in peaks._examples(tiles, height, width)])[0]
        shapes = tuple((tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        return tiles, height, width, shapes
