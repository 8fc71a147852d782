"""How well the remaining time is known, in the processor's seconds, which other programs do not disturb, or with --wall
in those of a clock.

    python scripts/remaining.py --model mini --size 1024 --steps 4
    python scripts/remaining.py --model path/to/sd15 --size 512 --steps 2 --no-guide --decode frozen
    OMP_NUM_THREADS=1 python scripts/remaining.py --size 512 --steps 20 --batch 1

For each phase: its time, and the error of the remaining time that is shown after a tenth of it and at worst later on,
as shares of the phase's time. At last: what `tiler plan` expected, and what the phases took.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from tiler import Budget, RenderRequest, plan, render
from tiler.events import Event, PhaseDone, PhaseStarted, Progress, Working
from tiler.planning import render as planning
from tiler.request import Decode

AT_ONCE = 0.002  # seconds: tiles of one call


class Phase:
    """What was told of a phase, and when: shares of its work, and seconds."""

    def __init__(self, name: str) -> None:
        self.name, self.told = name, list[tuple[float, float]]()

    def errors(self, end: float) -> list[float]:
        """Of each estimate after a tenth, over the phase's time."""
        first, start = self.told[0]
        errors = []
        for share, now in self.told:
            if first < share < 1 and share - first >= 0.1 * (1 - first):
                left = (now - start) * (1 - share) / (share - first)
                errors.append((left - (end - now)) / (end - start))
        return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mini")
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--decode", type=Decode, default=Decode.AUTO)
    parser.add_argument("--no-guide", action="store_true")
    parser.add_argument("--max-ram", default="800MB")
    parser.add_argument("--batch", type=int, help="at most so many samples for each read of the weights")
    parser.add_argument("--wall", action="store_true", help="for a machine that does nothing else")
    asked = parser.parse_args()
    if not asked.wall:
        torch.set_num_threads(1)  # threads that wait take the processor's time too
    if asked.batch:
        planning.MAX_BATCH = asked.batch
    phase, total, took, began = Phase(""), 1, 0.0, 0.0

    def note(event: Event) -> None:
        nonlocal phase, total, took, began
        now = time.monotonic() if asked.wall else time.process_time()
        if isinstance(event, PhaseStarted):
            phase = Phase(event.name)
            total, began = event.total, now
        elif isinstance(event, Working):
            phase.told = [(event.done / total, now)]
        elif isinstance(event, Progress):
            if len(phase.told) > 1 and now - phase.told[-1][1] < AT_ONCE:
                phase.told.pop()
            phase.told.append((event.done / event.total, now))
        took += now - began if isinstance(event, PhaseDone) else 0
        if isinstance(event, PhaseDone) and len(phase.told) > 2 and (errors := phase.errors(now)):
            seconds, worst = now - phase.told[0][1], max(errors, key=abs)
            print(f"{phase.name:14}{seconds:7.1f} s, after a tenth {errors[0]:+.0%}, at worst {worst:+.0%}", flush=True)

    with tempfile.TemporaryDirectory() as name:
        request = RenderRequest(
            prompt="a quiet sea", model=asked.model, size=asked.size, num_inference_steps=asked.steps, seed=7,
            guide=not asked.no_guide, decode=asked.decode, output=Path(name) / "x.png",
        )  # fmt: skip
        expected = plan(request, Budget(asked.max_ram)).facts()
        batch = render(request, Budget(asked.max_ram), note).report["tile_batch"]
    print(f"{batch} samples a read: expected {expected['expected_seconds']} s, took {took:.1f} s")


if __name__ == "__main__":
    main()
