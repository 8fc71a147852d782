"""--guide-upscale progressive: a picture whose guide is a smaller picture, which is rendered first."""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tiler import models
from tiler.diffusion import guide as guides
from tiler.diffusion.guide import guide_size
from tiler.diffusion.guide_picture import MAX_GUIDE_PIXELS
from tiler.errors import UsageError
from tiler.models.family import read_family
from tiler.models.own_defaults import read_defaults
from tiler.planning.resolve import _ROW, fill
from tiler.planning.tiling import plan_tiling, smaller_picture
from tiler.request import RenderRequest
from tiler.weights.checkpoint import resolve

# Runs `tiler render`; the process gets a signal when a `condition` on a picture's job or its decoder's strips holds.
PROGRAM = """
import os, sys
import tiler.cli.main as main
import tiler.jobs.folder, tiler.pixels
remove, real = tiler.jobs.folder.Job._remove, tiler.pixels.to_uint8
def stop(job=None, width=0):
    if {condition}:
        os.kill(os.getpid(), {number})
def removing(self, *keep, **named):
    stop(job=self)
    return remove(self, *keep, **named)
def to_uint8(strip):
    stop(width=strip.shape[2])
    return real(strip)
tiler.jobs.folder.Job._remove, tiler.pixels.to_uint8 = removing, to_uint8
sys.argv = ["tiler", *{args!r}]
main.main()
"""
SMALLER, LARGER = "width == 104", "width == 176"  # their first strips
BETWEEN = "job is not None and job._inside is not None"  # the smaller picture is there, and its job still too


def words(model: Path, output: str, *more: str) -> list[str]:
    options = "--steps 2 --seed 3 --decode exact --precision fp32 -q"
    return ["render", "a boat", "--model", str(model), "-o", output, *options.split(), *more]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


LARGE = ("--size", "176")  # 2.75 times the guide


@pytest.fixture(scope="module")
def wholes() -> list[bytes]:
    """The picture of an undisturbed render, made once."""
    return []


def whole(in_process: Any, tiny: Path, folder: Path, wholes: list[bytes]) -> bytes:
    if not wholes:
        assert in_process(*words(tiny, "whole.png", "--guide-upscale", "progressive", *LARGE)).code == 0
        wholes.append((folder / "whole.png").read_bytes())
        (folder / "whole.png").unlink()
    return wholes[0]


def test_it_equals_a_chain_of_renders_and_can_be_repeated(in_process: Any, tiny: Path, tmp_path: Path) -> None:
    assert in_process(*words(tiny, "small.png", "--size", "104")).code == 0
    assert in_process(*words(tiny, "chain.png", *LARGE, "--guide", "small.png")).code == 0
    assert in_process(*words(tiny, "x.png", "--guide-upscale", "progressive", *LARGE)).code == 0
    assert (pixels(tmp_path / "x.png") == pixels(tmp_path / "chain.png")).all()
    assert re.search("--guide-upscale +progressive", in_process("info", "x.png").out)
    assert in_process("render", "--from", "x.png", "--model", tiny, "-o", "again.png", "-q").code == 0
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "x.png").read_bytes()


@pytest.mark.parametrize(
    ("number", "condition"), [(signal.SIGINT, SMALLER), (signal.SIGKILL, BETWEEN), (signal.SIGKILL, LARGER)]
)
def test_an_interrupted_render_continues(
    in_process: Any, tiny: Path, tmp_path: Path, wholes: list[bytes], number: int, condition: str
) -> None:
    same = whole(in_process, tiny, tmp_path, wholes)
    args = words(tiny, str(tmp_path / "x.png"), "--guide-upscale", "progressive", *LARGE)
    program = PROGRAM.format(number=int(number), args=args, condition=condition)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == (130 if number == signal.SIGINT else -9), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["x.png.tiler"]
    told = done.stderr.splitlines()[-1] if number == signal.SIGINT else ""
    assert not told or (told.count("the job is saved") == 1 and " of a smaller picture in " in told), told
    (listed,) = json.loads(in_process("resume", "--list", "--json").out)["jobs"]
    assert listed["at"].startswith("pass ") == (condition != BETWEEN), listed
    assert listed["at"].endswith(" of a smaller picture") == (condition != LARGER), listed
    again = in_process("resume", "x.png", "-q")
    assert again.code == 0, again.err
    assert (tmp_path / "x.png").read_bytes() == same
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


def test_starting_over_leaves_nothing_of_the_smaller_picture(in_process: Any, tiny: Path, tmp_path: Path) -> None:
    args = words(tiny, str(tmp_path / "x.png"), *LARGE)
    program = PROGRAM.format(
        number=int(signal.SIGKILL), args=[*args, "--guide-upscale", "progressive"], condition=SMALLER
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, timeout=300, check=False)
    assert (tmp_path / "x.png.tiler" / "smaller.png.tiler").is_dir()
    assert '--guide-upscale was "progressive" and is now "pixel"' in in_process(*args).err
    assert in_process(*args, "--restart").code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


def test_standard_output(tiny: Path, in_process: Any, tmp_path: Path, wholes: list[bytes]) -> None:
    same = whole(in_process, tiny, tmp_path, wholes)
    command = [sys.executable, "-m", "tiler", *words(tiny, "-", "--guide-upscale", "progressive", *LARGE)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == same and not list(tmp_path.iterdir())


def test_the_plan_names_the_smaller_pictures_and_counts_their_time(in_process: Any) -> None:
    ran = in_process("plan", "--model", "mini", "--size", 2048, "--json")
    facts, other = (
        ran.json,
        in_process("plan", "--model", "mini", "--size", 2048, "--json", "--guide-upscale", "pixel").json,
    )
    assert facts["smaller"] == ["512×512", "1024×1024"] and facts["guide"] == other["guide"] == "256×256"
    assert not other["smaller"]
    assert facts["denoiser_samples"] > 1.25 * other["denoiser_samples"]
    assert facts["denoiser_calls"] > other["denoiser_calls"]
    for name, preset in facts["presets"].items():
        more = preset["expected_seconds"] / other["presets"][name]["expected_seconds"]
        assert (more > 1.15) == (name != "fast"), name


@pytest.mark.parametrize("canvas", [(256, 256), (96, 300), (1250, 877), (70, 65), (512, 512)])
def test_sides_grow_by_at_most_a_factor_of_two(canvas: tuple[int, int]) -> None:
    sides, guide = [canvas], guide_size(canvas, 32, 8)
    assert guide is not None
    while (smaller := smaller_picture(sides[-1], guide, 1)) is not None:
        assert all(side % 8 == 0 for side in smaller)
        sides.append((smaller[0] // 8, smaller[1] // 8))
    areas = [math.prod(each) for each in sides] + [guide.shown_height * guide.shown_width]
    growths = [math.sqrt(a / b) for a, b in pairwise(areas)]
    assert max(growths) < 2.1 and (len(growths) == 1 or min(growths) > 1.3), growths
    for height, width in sides:  # no picture is stretched
        assert height / width == pytest.approx(canvas[0] / canvas[1], rel=0.05)


@pytest.mark.parametrize("wrap", ["none", "x", "xy"])
@pytest.mark.parametrize("sides", [(2048, 256), (256, 3000), (640, 600), (1000, 352), (3072, 1024)])
def test_whatever_can_be_rendered_has_smaller_pictures_that_can(sides: tuple[int, int], wrap: str) -> None:
    family = read_family(resolve("mini"))
    asked = fill(RenderRequest(prompt="a", width=sides[0], height=sides[1], wrap=wrap, guide_upscale="progressive"))
    count = 0
    while (smaller := plan_tiling(asked, family).smaller) is not None:
        asked, count = replace(asked, height=smaller[0], width=smaller[1]), count + 1
        assert asked.width / asked.height == pytest.approx(sides[0] / sides[1], rel=0.12)
    assert count or wrap == "xy" or min(sides) == 256


def test_the_largest_smaller_picture_can_be_a_guide() -> None:
    for canvas in (1756, 1242), (2048, 512), (1024, 1032), (3999, 1025), (1777, 16_384):
        guide = guide_size(canvas, 32, 8)
        assert guide is not None
        height, width = smaller_picture(canvas, guide, 1) or (0, 0)
        assert 0.95 * MAX_GUIDE_PIXELS < height * width <= MAX_GUIDE_PIXELS


def test_nothing_of_a_smaller_picture_is_cut_off(in_process: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A canvas of other proportions would else be a part of it, and show a seam where it wraps."""
    seen, real = [], guides.crop_to_aspect

    def crop(picture: np.ndarray, height: int, width: int, box: Any, *more: Any) -> Any:
        seen.append((picture.shape[:2], box))
        return real(picture, height, width, box, *more)

    monkeypatch.setattr(guides, "crop_to_aspect", crop)
    sizes = "-W", "176", "-H", "160", "--wrap", "xy", "--guide-upscale", "progressive"
    assert in_process(*words(tiny, "x.png", *sizes)).code == 0
    assert seen[-1] == ((96, 112), (96, 112))


def test_what_turns_it_off() -> None:
    own = read_defaults(Path(models.__file__).with_name("mini"))
    assert own["guide_upscale"] == "progressive"
    for said in ({"preset": "fast"}, {"guide_upscale": "latent"}, {"guide_image": "x.png"}):
        found = fill(RenderRequest(prompt="a", **said), _ROW | own).guide_upscale
        assert found == ("latent" if "guide_upscale" in said else "pixel")
    asked = RenderRequest(prompt="a", preset="fast", guide_upscale="progressive")
    assert fill(asked, _ROW | own).guide_upscale == fill(RenderRequest(prompt="a"), _ROW | own).guide_upscale
    with pytest.raises(UsageError, match="leave it out with --guide"):
        RenderRequest(prompt="a", guide_image="x.png", guide_upscale="progressive")
