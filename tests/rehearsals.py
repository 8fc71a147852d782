"""A plan runs the denoiser on shapes alone to measure its memory, which takes a third of a tiny render's time. Here
that is done once a session for equal models and equal code, and not for each of hundreds of renders."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from tiler.planning.peaks import DenoiserPeaks

Activations = Callable[[DenoiserPeaks, tuple[int, ...], int, int], int]
CODE = "tiler.compute", "tiler.decoding", "tiler.models", "tiler.native", "tiler.planning"


class Remembered:
    """Replaces `DenoiserPeaks.activations`, `real`. A test that replaces a value of the code measures anew."""

    def __init__(self, real: Activations) -> None:
        self.real = real
        self._known: dict[object, int] = {}
        self._models: WeakKeyDictionary[DenoiserPeaks, tuple[object, ...]] = WeakKeyDictionary()
        self._classes: dict[tuple[int, ...], tuple[list[object], list[Any]]] = {}
        self._codes: dict[object, list[object]] = {}  # keeps the values, so that no other gets their ids

    def activations(self, peaks: DenoiserPeaks, tiles: tuple[int, ...], height: int, width: int) -> int:
        key = self._code(), self._model(peaks), self._inputs(peaks, tiles, height, width)
        if key not in self._known:
            self._known[key] = self.real(peaks, tiles, height, width)
        return self._known[key]

    def _code(self) -> tuple[object, ...]:
        """Which functions, classes with their methods, and constants the modules hold that a plan may run. Which of
        their values are classes is found once for equal modules, because this is asked thousands of times."""
        modules = [vars(module) for name, module in list(sys.modules.items()) if name.startswith(CODE)]
        values = [value for table in modules for value in table.values()]
        ids = tuple(map(id, values))
        if ids not in self._classes:
            classes = [vars(v) for v in values if isinstance(v, type) and v.__module__.startswith(CODE)]
            self._classes[ids] = values, classes
        methods = [value for table in self._classes[ids][1] for value in table.values()]
        key = ids, tuple(map(id, methods))
        self._codes.setdefault(key, methods)
        return key

    def _model(self, peaks: DenoiserPeaks) -> tuple[object, ...]:
        """What the measurement depends on besides the code and the inputs. Weights do not count."""
        family, streamer = peaks.family, peaks.streamer
        if peaks not in self._models:
            configs = json.dumps([part.config for part in family.parts], sort_keys=True, default=repr)
            shapes = tuple((name, tuple(parameter.shape)) for name, parameter in peaks.module.named_parameters())
            self._models[peaks] = configs, shapes
        settings = streamer.policy, streamer.isa, streamer.arena_bytes, streamer._in_place
        ranks = tuple(sorted(streamer._ranks.items()))
        machine = torch.get_num_threads(), os.environ.get("TILER_ISA"), os.environ.get("TILER_KERNELS")
        return type(family), repr(family.traits), self._models[peaks], settings, ranks, machine

    @staticmethod
    def _inputs(peaks: DenoiserPeaks, tiles: tuple[int, ...], height: int, width: int) -> tuple[object, ...]:
        leaves: list[Any] = tree_flatten([tuple(sample) for sample in peaks._examples(tiles, height, width)])[0]
        shapes = tuple((tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        return tiles, height, width, shapes
