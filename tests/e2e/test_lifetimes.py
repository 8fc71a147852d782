"""What a whole render leaves behind when it is ended in any of its phases: no open file, no thread, no output."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from tiler import Budget, RenderRequest, events, render
from tiler.memory.process import read_rss

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc here")


def open_files() -> set[str]:
    """What this process has open, by what /proc says of each descriptor."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{fd} {os.readlink(f'/proc/self/fd/{fd}')}")
        except OSError:
            continue  # the one that listed them
    return found


class EndedHereError(Exception):
    pass


@pytest.mark.parametrize("phase", ["encode prompts", "guide", "guide picture", "canvas", "decode"])
@pytest.mark.parametrize("kind", [events.PhaseStarted, events.Progress, events.PhaseDone])
def test_an_end_in_any_phase_leaves_nothing_open(tiny: Path, tmp_path: Path, phase: str, kind: type) -> None:
    def on_event(event: object) -> None:
        if isinstance(event, kind) and getattr(event, "name", None) == phase:
            raise EndedHereError

    request = RenderRequest(
        prompt="x", model=str(tiny), width=136, height=128, num_inference_steps=2, output=tmp_path / "x.png"
    )
    before, threads = open_files(), set(threading.enumerate())
    try:
        render(request, Budget(read_rss().now + 2_000_000_000), on_event)
    except EndedHereError:  # while its traceback holds all frames, and they hold all that they had
        assert open_files() == before
        assert set(threading.enumerate()) <= threads
        kept = ["x.png.latents.safetensors"] if phase == "decode" else []  # the canvas was finished
        assert [path.name for path in tmp_path.iterdir()] == kept
    else:
        assert (phase, kind) == ("encode prompts", events.Progress)  # there is none
