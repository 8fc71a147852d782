"""Requests: what is refused, what fills the gaps, and that every field is an option."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from tiler.errors import UsageError
from tiler.planning.resolve import fill, resolve
from tiler.request import DecodeRequest, Layout, Preset, QuantizeRequest, Region, RenderRequest, Scheduler
from tiler.request.options import Option, Panel


@pytest.mark.parametrize("request_type", [RenderRequest, DecodeRequest, QuantizeRequest])
def test_every_field_is_an_option_with_help_in_a_panel(request_type: type) -> None:
    options: list[Option] = [f.metadata["option"] for f in fields(request_type)]
    assert all(option.help.endswith(".") and option.panel in Panel for option in options)
    names = [name for option in options for name in option.names]
    assert len(names) == len(set(names))
    assert all(name.startswith("-") for name in names)
    assert sum(not option.names for option in options) == 1  # the argument


def test_an_unsaid_field_stays_unsaid() -> None:
    asked = RenderRequest(prompt="a fjord")
    unsaid = (
        "negative_prompt",
        "size",
        "width",
        "seed",
        "preset",
        "num_inference_steps",
        "strength",
        "output",
        "layout",
    )
    assert [getattr(asked, name) for name in unsaid] == [None] * len(unsaid)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"size": 7}, "size"), ({"width": 140_000}, "width"), ({"height": 0}, "height"), ({"num_inference_steps": 0}, "steps"),
        ({"num_inference_steps": 1001}, "steps"), ({"guidance_scale": float("nan")}, "guidance-scale"),
        ({"guidance_scale": -0.1}, "guidance-scale"), ({"strength": 1.01}, "strength"), ({"seed": -2}, "seed"),
        ({"seed": 2**64}, "seed"), ({"overlap": 12}, "overlap"), ({"overlap": -8}, "overlap"), ({"dpi": 0.0}, "dpi"),
        ({"dpi": float("inf")}, "dpi"), ({"guidance_interval": (0.5, 0.5)}, "guidance-interval"), ({"paper": "A77"}, "A77"),
        ({"attention_window": 3}, "attention-window"), ({"paper": "A4", "size": 512}, "--paper"), ({"bleed": "3"}, "'3'"),
        ({"landscape": True}, "--paper"), ({"layout": Layout.SHIFT, "overlap": 64}, "--overlap"),
        ({"layout": Layout.JITTER, "regions": (Region(prompt="r", rows=(0, 512), cols=(0, 512)),)}, "--regions"),
        ({"prompt": "a\0b"}, "NUL"), ({"negative_prompt": "\ud800"}, "surrogate"), ({"tiny_vae": "x"}, "--decode tiny"),
        ({"guide": False, "guide_image": Path("x")}, "--no-guide"),
    ],
)  # fmt: skip
def test_a_value_that_no_model_takes_is_refused_by_name(values: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError) as caught:
        RenderRequest(**({"prompt": "x"} | values))
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_option_wins_over_the_preset_the_preset_over_the_model_the_model_over_the_family() -> None:
    model = {"num_inference_steps": 33, "strength": 0.35, "guidance_scale": 3.0}
    nothing_said = fill(RenderRequest(prompt="x"))
    assert (nothing_said.num_inference_steps, nothing_said.strength, nothing_said.guidance_scale) == (20, 0.5, 7.5)
    of_model = fill(RenderRequest(prompt="x"), _row() | model)
    assert (of_model.num_inference_steps, of_model.strength, of_model.guidance_scale) == (33, 0.35, 3.0)
    preset = fill(RenderRequest(prompt="x", preset=Preset.FAST), _row() | model)
    assert (preset.num_inference_steps, preset.strength, preset.guidance_scale) == (10, 0.4, 3.0)
    option = fill(RenderRequest(prompt="x", preset=Preset.FAST, num_inference_steps=7), _row() | model)
    assert (option.num_inference_steps, option.strength, option.guidance_scale) == (7, 0.4, 3.0)


def _row() -> dict[str, Any]:
    asked = fill(RenderRequest(prompt="x"))
    return {name: getattr(asked, name) for name in ("guidance_interval", "scheduler", "layout")}


def test_tiles_that_cannot_shift_leave_the_layout_of_a_preset_alone() -> None:
    region = Region(prompt="x", rows=(0, 512), cols=(0, 512))
    assert fill(RenderRequest(prompt="x", preset=Preset.FAST)).layout is Layout.SHIFT
    assert fill(RenderRequest(prompt="x", preset=Preset.FAST, overlap=64)).layout is Layout.GRID
    assert fill(RenderRequest(prompt="x", preset=Preset.FAST, regions=(region,))).layout is Layout.GRID


def test_a_sheet_of_paper_becomes_pixels() -> None:
    sheet = fill(RenderRequest(prompt="x", paper="A4", dpi=100, bleed="3mm"))
    assert (sheet.width, sheet.height) == (round(216 / 25.4 * 100), round(303 / 25.4 * 100))
    assert (sheet.dpi, sheet.bleed_mm) == (100, 3)
    assert fill(RenderRequest(prompt="x", paper="A4")).dpi == 300
    mixed = fill(RenderRequest(prompt="x", size=640, width=512))
    assert (mixed.height, mixed.width) == (640, 512)


def test_an_absent_negative_prompt_differs_from_an_empty_one() -> None:
    assert fill(RenderRequest(prompt="x")).negative_prompt is None
    assert fill(RenderRequest(prompt="x", negative_prompt="")).negative_prompt == ""


def test_a_seed_that_was_not_given_is_drawn() -> None:
    assert len({fill(RenderRequest(prompt="x")).seed for _ in range(5)}) > 1


def test_without_a_prompt_there_is_nothing_to_draw(tiny: Path) -> None:
    from tiler.models.family import read_family
    from tiler.weights import checkpoint

    family = read_family(checkpoint.resolve(str(tiny)))
    with pytest.raises(UsageError, match="nothing to draw"):
        resolve(RenderRequest(), family)


def test_plain_words_become_choices_and_paths() -> None:
    asked = RenderRequest(prompt="x", layout="shift", scheduler="euler a", output="a.png", model=Path("m"), seed=-1)  # type: ignore[arg-type]
    assert asked.layout is Layout.SHIFT
    assert asked.scheduler is Scheduler.EULER_A
    assert (asked.output, asked.model, asked.seed) == (Path("a.png"), "m", None)
    assert DecodeRequest(latents="l.safetensors").latents == Path("l.safetensors")  # type: ignore[arg-type]
    assert fill(asked).layout is Layout.SHIFT


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"layout": "spiral"}, "spiral"),
        ({"num_inference_steps": 2.5}, "--steps 2.5"),
        ({"output": Path("a"), "save_latents": Path("a")}, "same file"),
    ],
)
def test_what_cannot_be_meant_is_refused(values: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        RenderRequest(**({"prompt": "x"} | values))


def test_help_names_every_scheduler() -> None:
    (option,) = (f.metadata["option"] for f in fields(RenderRequest) if f.name == "scheduler")
    assert all(scheduler.value in option.help for scheduler in Scheduler)


def test_a_slash_behind_a_name_is_no_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Completion of a folder's name adds one; a folder that exists is taken as it was typed."""
    monkeypatch.chdir(tmp_path)
    said = RenderRequest(prompt="x", model="mini/", decode="tiny", tiny_vae="org/taesd/")
    assert (said.model, said.tiny_vae, QuantizeRequest(model="org/name/").model) == ("mini", "org/taesd", "org/name")
    (tmp_path / "mini").mkdir()
    assert RenderRequest(prompt="x", model="mini/").model == "mini/"
