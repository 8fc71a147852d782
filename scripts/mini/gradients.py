"""Losses of a batch and their gradients. On CUDA they are recorded once for each shape of a batch and then replayed:
to launch three thousand small kernels takes longer than to run them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from examples import Batch
from torch import Tensor, nn

_WARM = 3  # calls before recording, in which libraries choose their algorithms


@dataclass(frozen=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    batch: Batch  # what it reads
    losses: Tensor  # what it writes
    gradients: list[Tensor | None]  # likewise, of each parameter


class Gradients:
    """`losses` of a batch gives (total, ...), whose first is differentiated by `parameters`."""

    def __init__(self, losses: Callable[[Batch], Tensor], parameters: Sequence[nn.Parameter]) -> None:
        self._losses, self._parameters = losses, list(parameters)
        self._recordings: dict[tuple[int, ...], _Recording] = {}
        self._pool: Any = None  # the memory of all recordings, which never run side by side

    def __call__(self, batch: Batch) -> Tensor:
        """Losses; the parameters have their gradients until the next call."""
        if batch.latents.device.type != "cuda":
            return self._compute(batch)
        shape = tuple(batch.latents.shape)
        if shape not in self._recordings:
            self._recordings[shape] = self._record(batch)
        recording = self._recordings[shape]
        for kept, given in zip(recording.batch.tensors(), batch.tensors(), strict=True):
            kept.copy_(given)
        recording.graph.replay()
        for parameter, gradient in zip(self._parameters, recording.gradients, strict=True):
            parameter.grad = gradient
        return recording.losses.clone()

    def _compute(self, batch: Batch) -> Tensor:
        for parameter in self._parameters:
            parameter.grad = None
        losses = self._losses(batch)
        losses[0].backward()
        return losses.detach()

    def _record(self, batch: Batch) -> _Recording:
        side = torch.cuda.Stream()  # a stream that is being recorded must not have been used by others
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM):
                self._compute(batch)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            losses = self._compute(batch)
        self._pool = graph.pool()
        return _Recording(graph, batch, losses, [p.grad for p in self._parameters])
