"""Canvases too large for memory, through the whole program: the same bytes as in memory, and plans for huge ones."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from safetensors.torch import load_file

from tiler import Budget, RenderRequest, events, phases, plan, render
from tiler.errors import StorageError
from tiler.memory.process import read_rss
from tiler.planning import render as planning
from tiler.render_run import RenderRun
from tiler.request import Decode, GuideUpscale, Region, Wrap


def draw(model: Path, folder: Path, *, is_stopped: bool = False, **values: object) -> tuple[bytes, bytes]:
    """The picture and its latents, or None if the render is stopped in the middle of its canvas."""
    folder.mkdir(exist_ok=True)

    def on_event(event: events.Event) -> None:
        if (
            isinstance(event, events.Progress)
            and event.name == "canvas"
            and is_stopped
            and 2 * event.done > event.total
        ):
            raise KeyboardInterrupt

    asked = {
        "prompt": "a boat", "model": str(model), "width": 104, "height": 72, "num_inference_steps": 2, "seed": 11,
        "output": folder / "x.png", "save_latents": folder / "x.safetensors", "force": True, "metadata": False,
    }  # fmt: skip
    render(RenderRequest(**(asked | values)), Budget(read_rss().now + 2_000_000_000), on_event)  # type: ignore[arg-type]
    return (folder / "x.png").read_bytes(), load_file(folder / "x.safetensors")["latents"].numpy().tobytes()


@pytest.mark.parametrize(
    "values",
    [
        {"decode": Decode.FROZEN},
        {"decode": Decode.FROZEN, "wrap": Wrap.XY, "guide_upscale": GuideUpscale.LATENT},
        {"decode": Decode.EXACT, "regions": (Region(prompt="x", rows=(0, 64), cols=(0, 96), seed=2),)},
    ],
)
def test_it_makes_the_bytes_of_a_canvas_in_memory(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, object]
) -> None:
    whole = draw(tiny, tmp_path / "memory", **values)
    monkeypatch.setattr(planning, "IN_MEMORY_BYTES", 0)
    with pytest.raises(KeyboardInterrupt):
        draw(tiny, tmp_path / "files", is_stopped=True, **values)
    job = tmp_path / "files/x.png.tiler"
    assert (job / "canvas/reference").exists() and (job / "canvas/canvas.json").exists()
    assert draw(tiny, tmp_path / "files", **values) == whole
    assert sorted(path.name for path in (tmp_path / "files").iterdir()) == ["x.png", "x.safetensors"]


def test_an_unwritable_place_of_a_canvas_without_a_job_is_one_line(tmp_path: Path) -> None:
    run: Any = SimpleNamespace(
        job=SimpleNamespace(canvas_folder=None), request=SimpleNamespace(scratch_folder=tmp_path / "none")
    )
    with pytest.raises(StorageError, match=r"none: the canvas cannot be stored there .*; choose another --scratch"):
        RenderRun.stored_folder.func(run)


def test_no_colours_are_learnt_for_a_canvas_that_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    told = list[str]()
    monkeypatch.setattr("tiler.previewing.learn_by_decoding", lambda *args: told.append("decoded"))
    monkeypatch.setattr(phases, "_denoise_stored", lambda *args: told.append("stored"))
    run: Any = SimpleNamespace(
        plan=SimpleNamespace(begin=0, stored=True, canvas_samples=1), request=SimpleNamespace(num_inference_steps=3),
        phase=lambda *args: nullcontext(),
    )  # fmt: skip
    phases.denoise_canvas(run, cast(Any, None), None)
    assert told == ["stored"]


def test_a_huge_canvas_is_planned_under_800_mb(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiler.run.free_bytes", lambda folder: 10**14)
    request = RenderRequest(
        prompt="a boat", model=str(tiny), size=40_000, num_inference_steps=2, output=tmp_path / "x.png"
    )
    planned = plan(request, Budget("8GB")).plan.memory
    terms = {phase.name: {term.name: term.nbytes for term in phase.terms} for phase in planned.phases}
    assert terms["canvas"]["canvas"] < 30_000_000 and "latents" not in terms["decode"]
    assert max(sum(t for name, t in phase.items() if "libraries" not in name) for phase in terms.values()) < 450_000_000
