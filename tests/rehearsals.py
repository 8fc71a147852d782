"""A plan runs the denoiser and the autoencoder on shapes alone to measure their memory and count their work, a third of
a tiny render's time. Here that is done once a session for equal models and equal code, and not for each of hundreds of
renders."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from tiler.compute.stream import Streamer
from tiler.planning.peaks import DenoiserPeaks, VaePeaks
from tiler.planning.time import Counter

Activations = Callable[[DenoiserPeaks, tuple[int, ...], int, int], int]
CODE = "tiler.compute", "tiler.decoding", "tiler.models", "tiler.native", "tiler.planning"


class Numbers:
    """A number for each different value, so that what is remembered keeps no copies of long keys."""

    def __init__(self) -> None:
        self._known: dict[object, int] = {}

    def of(self, value: object) -> int:
        return self._known.setdefault(value, len(self._known))


class Code:
    """All functions, classes with their methods, and constants of the modules that a plan may run."""

    def __init__(self) -> None:
        self._numbers = Numbers()
        self._kept: dict[int, tuple[object, ...]] = {}  # so that no other values get their ids
        self._classes: dict[int, list[type]] = {}  # of a module
        self._modules: list[str] = []
        self._imported = 0

    def now(self) -> tuple[int, ...]:
        """A number for each module and class: equal as long as no test has replaced a value."""
        return tuple(self._spaces())

    def _spaces(self) -> Iterator[int]:
        if len(sys.modules) != self._imported:
            self._modules = [name for name in sys.modules if name.startswith(CODE)]
            self._imported = len(sys.modules)
        for name in self._modules:
            module = self._space(vars(sys.modules[name]))
            yield module
            if module not in self._classes:
                own = (value for value in self._kept[module] if isinstance(value, type))
                self._classes[module] = [value for value in own if value.__module__.startswith(CODE)]
            for kind in self._classes[module]:
                yield self._space(vars(kind))

    def _space(self, named: Mapping[str, object]) -> int:
        values = tuple(named.values())
        number = self._numbers.of(tuple(map(id, values)))
        self._kept.setdefault(number, values)
        return number


class Remembered:
    """Replaces `DenoiserPeaks.activations`, `real`, and keeps what the autoencoder's peaks and counters of work found.
    A test that replaces a value of the code measures anew."""

    def __init__(self, real: Activations) -> None:
        self.real = real
        self._code, self._numbers = Code(), Numbers()
        self._known: dict[object, int] = {}
        self._of_others: dict[object, dict[Any, Any]] = {}

    def activations(self, peaks: DenoiserPeaks, tiles: tuple[int, ...], height: int, width: int) -> int:
        asked = tiles, height, width
        if asked not in peaks._activations:
            model = self._numbers.of(_model(peaks.family, peaks.module, peaks.streamer))
            key = self._code.now(), model, _inputs(peaks, *asked)
            if key not in self._known:
                self._known[key] = self.real(peaks, *asked)
            peaks._activations[asked] = self._known[key]
        return peaks._activations[asked]

    def of_autoencoder(self, peaks: VaePeaks) -> dict[Any, Any]:
        """What was found of the methods of an equal autoencoder."""
        config = json.dumps(peaks.spec.config, sort_keys=True, default=repr)
        return self._of(config, peaks.spec.tiny, _shapes(peaks.module), _settings(peaks._streamer))

    def of_counter(self, counter: Counter) -> dict[Any, Any]:
        """What was counted of an equal denoiser."""
        return self._of(_model(counter.family, counter.module, counter.streamer))

    def _of(self, *key: object) -> dict[Any, Any]:
        return self._of_others.setdefault((self._code.now(), self._numbers.of(key)), {})


def _model(family: Any, module: Any, streamer: Streamer) -> tuple[object, ...]:
    """What a measurement depends on besides the code and the inputs. Weights do not count."""
    configs = json.dumps([part.config for part in family.parts], sort_keys=True, default=repr)
    return type(family), repr(family.traits), configs, _shapes(module), _settings(streamer)


def _shapes(module: Any) -> tuple[object, ...]:
    return type(module), *((name, tuple(parameter.shape)) for name, parameter in module.named_parameters())


def _settings(streamer: Streamer) -> tuple[object, ...]:
    ranks = tuple(sorted(streamer._ranks.items()))
    machine = torch.get_num_threads(), os.environ.get("TILER_ISA"), os.environ.get("TILER_KERNELS")
    return streamer.policy, streamer.isa, streamer.arena_bytes, streamer._in_place, ranks, machine


def _inputs(peaks: DenoiserPeaks, tiles: tuple[int, ...], height: int, width: int) -> tuple[object, ...]:
    leaves: list[Any] = tree_flatten([tuple(sample) for sample in peaks._examples(tiles, height, width)])[0]
    shapes = tuple((tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves)
    return tiles, height, width, shapes
