"""How weights are moved: Muon for matrices, an average over steps for what is exported, and a clock for the step
size."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from machine import has_bf16
from torch import Tensor, nn


class Clock:
    """Time spent of a run of so many minutes. A run of 0 minutes takes one step."""

    def __init__(self, minutes: float) -> None:
        self._start, self._limit = time.monotonic(), 60 * minutes

    @property
    def spent(self) -> float:
        """Seconds."""
        return time.monotonic() - self._start

    @property
    def left(self) -> float:
        """The share of the run still to come, 1 to 0."""
        return max(0.0, 1 - self.spent / self._limit) if self._limit else 0.0


def step_size(largest: float, steps_done: int, left: float, falling: float) -> float:
    """Rises over the first hundred steps of a run and falls, to a twentieth, over its last share `falling`."""
    return largest * min(1.0, (steps_done + 1) / 100) * max(0.05, min(1.0, left / falling))


class Average:
    """Exponential moving average of parameters, warmed up: decay = min(limit, (1 + n) / (10 + n))."""

    def __init__(self, modules: Sequence[nn.Module], limit: float) -> None:
        self.live = [p for m in modules for p in m.parameters()]
        self.mean = [p.detach().clone() for p in self.live]
        self.updates, self._limit = 0, limit

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self._limit, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.mean, self.live, 1 - decay)

    @torch.no_grad()
    def __enter__(self) -> None:
        """The modules have their averaged weights inside the context."""
        for p, m in zip(self.live, self.mean, strict=True):
            live = p.detach().clone()
            p.copy_(m)
            m.copy_(live)

    def __exit__(self, *error: object) -> None:
        self.__enter__()

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean = [m.to(p.device) for m, p in zip(state["mean"], self.live, strict=True)]
        self.updates = state["updates"]


def orthogonal(x: Tensor) -> Tensor:
    """The nearest matrices of orthogonal rows or columns, roughly, of (n, rows, columns): Newton and Schulz's iteration
    with Jordan's coefficients (kellerjordan.github.io/posts/muon)."""
    if x.shape[1] > x.shape[2]:
        return orthogonal(x.mT).mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    if has_bf16():
        x = x.bfloat16()
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x.float()


class Muon:
    """Momentum made orthogonal (Jordan 2024), with steps as large as AdamW's (Liu et al. 2025, arXiv:2502.16982, 2.2).

    Matrices of equal shape are done together: one by one, 141 of them took a fifth of a step.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters, self.momentum = list(parameters), [torch.zeros_like(p) for p in parameters]
        self._groups: dict[tuple[int, ...], list[int]] = {}
        for i, p in enumerate(parameters):
            self._groups.setdefault(tuple(p.flatten(1).shape), []).append(i)

    @torch.no_grad()
    def step(self, lr: float, weight_decay: float = 0.01, beta: float = 0.95) -> None:
        gradients = [p.grad for p in self.parameters]
        torch._foreach_lerp_(self.momentum, gradients, 1 - beta)
        ahead = torch._foreach_lerp(gradients, self.momentum, beta)
        torch._foreach_mul_(self.parameters, 1 - lr * weight_decay)
        for shape, members in self._groups.items():
            updates = orthogonal(torch.stack([ahead[i].flatten(1) for i in members]))
            for i, update in zip(members, updates, strict=True):
                self.parameters[i].add_(update.view_as(self.parameters[i]), alpha=-lr * 0.2 * max(shape) ** 0.5)

    def state_dict(self) -> dict[str, Any]:
        return {"momentum": self.momentum}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.momentum = [m.to(p.device) for m, p in zip(state["momentum"], self.parameters, strict=True)]
