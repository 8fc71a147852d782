"""A render that is stopped in any phase leaves no open file, no thread and no output."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tiler import Budget, RenderRequest, events, render
from tiler.memory.process import read_rss

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc here")


def open_files() -> set[str]:
    """This process's open files, as /proc describes them."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{fd} {os.readlink(f'/proc/self/fd/{fd}')}")
        except OSError:
            continue  # the one that listed them
    return found


class EndedHereError(Exception):
    pass


PHASES = "encode prompts", "guide", "guide picture", "canvas", "decode"
KINDS = events.PhaseStarted, events.Progress, events.PhaseDone


@pytest.mark.parametrize(  # while prompts are encoded there is no progress
    ("phase", "kind"), [each for each in product(PHASES, KINDS) if each != (PHASES[0], events.Progress)]
)
def test_an_end_in_any_phase_leaves_nothing_open(tiny: Path, tmp_path: Path, phase: str, kind: type) -> None:
    def on_event(event: object) -> None:
        if isinstance(event, kind) and getattr(event, "name", None) == phase:
            raise EndedHereError

    request = RenderRequest(
        prompt="x", model=str(tiny), width=96, height=64, num_inference_steps=2, output=tmp_path / "x.png"
    )
    before, threads = open_files(), set(threading.enumerate())
    with pytest.raises(EndedHereError) as ended:
        render(request, Budget(read_rss().now + 2_000_000_000), on_event)
    assert ended.traceback  # it holds all frames, and they hold all that they had
    assert open_files() == before
    assert set(threading.enumerate()) <= threads
    nothing = phase == "encode prompts" or (phase, kind) == ("guide", events.PhaseStarted)
    assert [path.name for path in tmp_path.iterdir()] == ([] if nothing else ["x.png.tiler"])


@pytest.mark.parametrize("tiny_vae", [False, True])
def test_every_model_is_built_once(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_vae: bool) -> None:
    """One build serves planning, packing, the guide, the canvas, and encoding and decoding."""
    from diffusers import AutoencoderTiny

    from tiler.models import built
    from tiler.models import family as families
    from tiler.models.family import Family, Part
    from tiler.weights.checkpoint import Checkpoint

    counts: Counter[str] = Counter()
    read, build_vae = families.read_family, built.build_vae

    def counted(name: str, build: Callable[..., Any], *args: Any) -> Any:
        counts[name] += 1
        return build(*args)

    def counting(part: Part) -> Part:
        return replace(part, build=partial(counted, part.name, part.build))

    def reading(checkpoint: Checkpoint, *options: Any, **more: Any) -> Family:
        family = read(checkpoint, *options, **more)
        return replace(family, parts=tuple(map(counting, family.parts)))

    monkeypatch.setattr(families, "read_family", reading)
    monkeypatch.setattr(built, "build_vae", partial(counted, "tiny vae", build_vae))
    decoder = {}
    if tiny_vae:
        AutoencoderTiny(decoder_block_out_channels=(16,) * 4, encoder_block_out_channels=(16,) * 4).save_pretrained(
            tmp_path / "taesd"
        )
        decoder = {"tiny_vae": str(tmp_path / "taesd"), "decode": "tiny"}
    request = RenderRequest(
        prompt="x", model=str(tiny), size=128, num_inference_steps=1, output=tmp_path / "x.png", precision="int8",
        cache_dir=tmp_path / "cache", guide_upscale="pixel", **decoder,
    )  # fmt: skip
    render(request, Budget(read_rss().now + 2_000_000_000))
    assert counts == {"text_encoder": 1, "unet": 1, "vae": 1} | ({"tiny vae": 1} if tiny_vae else {})
