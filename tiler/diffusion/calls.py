"""The denoiser calls of each step: most solvers make one per step. Heun's makes a second one at the end of every step
except the last, which ends without noise."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Calls:
    """The denoiser calls of a schedule of `steps`, numbered from 0; a solver of `order` 2 makes two a step."""

    steps: int
    order: int = 1

    @property
    def count(self) -> int:
        return self.order * (self.steps - 1) + 1

    def first_of(self, step: int) -> int:
        """The first call of a step; `count` for the step after the last one."""
        return min(self.order * step, self.count)

    def where(self, phase: str, call: int, tiles_done: int, tiles: int) -> str:
        """A saved state in words: "canvas step 12/20, tile 7/25"."""
        step = min(self.step_of(call) + bool(tiles_done), self.steps)
        return f"{phase} step {step}/{self.steps}" + (f", tile {tiles_done}/{tiles}" if tiles_done else "")

    def step_of(self, call: int) -> int:
        """The step that a call belongs to; `steps` for the call after the last one."""
        return self.steps if call >= self.count else call // self.order
