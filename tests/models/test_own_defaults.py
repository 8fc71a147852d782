"""`tiler.toml` in a model's folder: what it may set, what wins over it, and which commands show it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tiler.errors import ModelError
from tiler.models.own_defaults import read_defaults
from tiler.planning.resolve import fill
from tiler.request import Layout, RenderRequest, Scheduler
from tiler.request.regions import Region


def test_a_model_folder_may_state_its_own_defaults(tmp_path: Path) -> None:
    (tmp_path / "tiler.toml").write_text(
        'guidance_scale = 3\nscheduler = "euler a"\nprompt = "a lake"\nlayout = "jitter"\nguide_sharpen = 50\n'
        "guidance_interval = [0, 0.75]\n"
    )
    said = read_defaults(tmp_path)
    assert said == {
        "guidance_scale": 3, "scheduler": Scheduler.EULER_A, "prompt": "a lake", "layout": Layout.JITTER,
        "guidance_interval": (0, 0.75), "guide_sharpen": 50,
    }  # fmt: skip
    assert isinstance(said["layout"], Layout)
    assert read_defaults(tmp_path / "elsewhere") == {}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("steps = 3", "'steps'"), ("strength = true", "strength"), ("strength = 3", "strength"), ("seed = 1", "'seed'"),
        ('scheduler = "nonsense"', "nonsense"), ("strength =", "not valid TOML"), ('guidance_scale = "7"', "guidance_scale"),
        ("guidance_interval = [0.5]", "not two numbers"), ("guidance_interval = [1, true]", "not two numbers"),
        ("guidance_interval = [0.7, 0.2]", "two rising shares"),
        ("prompt = []", "nor a list of texts"), ('prompt = ["a", "b <lora:x:1>"]', "<lora:x:1>"), ('layout = "rows"', "grid, shift, jitter"), ('prompt = ["a", 1]', "nor a list of texts"),
    ],
)  # fmt: skip
def test_wrong_defaults_are_blamed_on_the_file(tmp_path: Path, text: str, named: str) -> None:
    (tmp_path / "tiler.toml").write_text(text)
    with pytest.raises(ModelError) as caught:
        read_defaults(tmp_path)
    assert named in str(caught.value)
    assert "tiler.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_seed_chooses_among_a_models_prompts() -> None:
    own = {"prompt": ("a lake", "a wood", "a hill")}
    assert [fill(RenderRequest(seed=seed), own_with(own)).prompt for seed in (0, 4, 2, 6)] == [
        "a lake", "a wood", "a hill", "a lake",
    ]  # fmt: skip
    drawn = fill(RenderRequest(), own_with(own))
    assert drawn.prompt == own["prompt"][drawn.seed % 3]
    assert fill(RenderRequest(prompt="fog", seed=1), own_with(own)).prompt == "fog"
    # Regions say what to draw.
    regions = (Region(prompt="fog", rows=(0, 512), cols=(0, 512)),)
    assert fill(RenderRequest(regions=regions, size=512), own_with(own)).prompt is None


def test_a_models_own_layout_gives_way_to_what_it_cannot_go_with() -> None:
    regions = (Region(prompt="fog", rows=(0, 512), cols=(0, 512)),)
    for own, said, layout in (
        (Layout.JITTER, {}, Layout.JITTER), (Layout.JITTER, {"overlap": 64}, Layout.JITTER),
        (Layout.SHIFT, {"overlap": 64}, Layout.GRID), (Layout.JITTER, {"regions": regions}, Layout.GRID),
        (Layout.JITTER, {"layout": "grid"}, Layout.GRID), (Layout.JITTER, {"preset": "fast"}, Layout.SHIFT),
    ):  # fmt: skip
        assert fill(RenderRequest(prompt="x", size=512, **said), own_with({"layout": own})).layout is layout


def own_with(own: dict[str, Any]) -> dict[str, Any]:
    row = fill(RenderRequest(prompt="x"))
    names = "num_inference_steps", "guidance_scale", "guidance_interval", "strength", "scheduler", "layout"
    return {name: getattr(row, name) for name in names} | own


@pytest.fixture
def own(tiny: Path, tmp_path: Path) -> Path:
    """A model with 30 steps and no guidance as its defaults: 30 samples for one tile without a guide."""
    folder = tmp_path / "own"
    shutil.copytree(tiny, folder)
    (folder / "tiler.toml").write_text('num_inference_steps = 30\nguidance_scale = 1\nprompt = ["a lake", "a wood"]\n')
    return folder


def test_it_stands_between_preset_and_family(
    in_process: Any, tiny: Path, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "config.toml"
    config.write_text("")
    monkeypatch.setenv("TILER_CONFIG", str(config))

    def samples(model: Path, *more: object) -> int:
        ran = in_process("plan", "--model", model, "--size", 64, "--json", *more)
        assert ran.code == 0, ran.err
        return int(ran.json["denoiser_samples"])

    assert samples(tiny) == 2 * 20  # the family's row
    assert samples(own) == 30
    assert samples(own, "--preset", "fast") == 10
    config.write_text('preset = "fast"\nsteps = 8\n')
    assert samples(own) == 8
    monkeypatch.setenv("TILER_STEPS", "6")
    assert samples(own) == 6
    assert samples(own, "--steps", 4) == 4
    assert samples(own, "--preset", "quality", "--steps", 4, "--guidance-scale", 2) == 8


def test_a_render_records_what_it_was_filled_with(in_process: Any, own: Path, tiny: Path, tmp_path: Path) -> None:
    ran = in_process("render", "--model", own, "--size", 64, "--steps", 2, "--seed", 5, "-o", "a.png")
    assert ran.code == 0, ran.err
    assert "no prompt was given; this is the model's own: a wood" in ran.err
    told = in_process("info", "a.png", "--json").json
    assert "a wood" in str(told) and "'guidance_scale': 1" in str(told).replace('"', "'")
    nothing = in_process("render", "--model", tiny, "--size", 64, "-o", "b.png")
    assert nothing.code == 2 and nothing.err.count("\n") == 1 and "nothing to draw" in nothing.err
    (own / "tiler.toml").write_text("strength = 7\n")
    bad = in_process("render", "x", "--model", own, "--size", 64, "-o", "b.png")
    assert bad.code == 3 and bad.err.count("\n") == 1 and "tiler.toml" in bad.err


def test_doctor_shows_it(in_process: Any, own: Path, tiny: Path) -> None:
    said = in_process("doctor", "--model", own, "--json").json["its own defaults"]
    assert said == f"--steps 30, --guidance-scale 1, PROMPT one of 2, by the seed ({own / 'tiler.toml'})"
    (own / "tiler.toml").write_text("guidance_interval = [0, 0.75]\n")
    said = in_process("doctor", "--model", own, "--json").json["its own defaults"]
    assert said.startswith("--guidance-interval 0-0.75 (")
    assert "its own defaults" not in in_process("doctor", "--model", tiny, "--json").json
