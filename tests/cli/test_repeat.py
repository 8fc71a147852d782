"""`--from IMG`: a picture is repeated to the byte, and what is typed wins over what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from tiler.cli.repeat import repeat
from tiler.errors import ModelError
from tiler.request import RenderRequest, Scheduler
from tiler.request.settings import Kind

NOTHING: frozenset[str] = frozenset()
DEFAULTS = {name: getattr(RenderRequest(), name) for name in RenderRequest.__dataclass_fields__}


def png(path: Path, **texts: str) -> Path:
    info = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    Image.new("RGB", (40, 24)).save(path, pnginfo=info)
    return path


def infotext(**changes: str) -> str:
    fields = {
        "Steps": "3",
        "Sampler": "Euler",
        "CFG scale": "2",
        "Seed": "7",
        "Size": "64x96",
        "Model": "mini",
    } | changes
    return "a boat\n" + ", ".join(f"{key}: {value}" for key, value in fields.items())


def test_a_picture_is_repeated_to_the_byte_whatever_the_configuration(tiler, tmp_path: Path) -> None:
    options = (
        "--width 128 --height 80 --steps 2 --seed 18446744073709551615 --cfg-scale 2 --mask constant --wrap x --dpi 200"
    )
    assert tiler("render", "a boat", "-n", "", *options.split(), "-o", "a.png").code == 0
    assert (
        tiler(
            "render",
            "--from",
            "a.png",
            "-o",
            "b.png",
            env={"TILER_STEPS": "9", "TILER_TINY_VAE": "x", "TILER_SEED": "4"},
        ).code
        == 0
    )
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_what_is_typed_wins(tmp_path: Path) -> None:
    said = {"prompt": "a boat", "width": 64, "height": 96, "seed": 7, "model": "mini", "num_inference_steps": 3}
    path = png(tmp_path / "x.png", tiler=json.dumps(said))
    values = repeat(path, frozenset({"seed", "cache_dir"}), DEFAULTS).values
    assert "seed" not in values and "cache_dir" not in values
    assert (values["prompt"], values["num_inference_steps"], values["tiny_vae"]) == ("a boat", 3, None)


def test_pictures_of_others_leave_the_rest_as_it_is(tmp_path: Path) -> None:
    found = repeat(png(tmp_path / "x.png", parameters=infotext(Eta="0.5", **{"Clip skip": "2"})), NOTHING, DEFAULTS)
    assert found.values == {
        "prompt": "a boat", "num_inference_steps": 3, "scheduler": Scheduler.EULER, "guidance_scale": 2, "seed": 7,
        "width": 64, "height": 96, "model": "mini", "clip_skip": 2,
    }  # fmt: skip
    assert "not the same one" in found.notes[0] and "Eta" in found.notes[1]


def test_a_picture_of_two_passes_has_its_own_size(tmp_path: Path) -> None:
    values = repeat(png(tmp_path / "x.png", parameters=infotext(**{"Hires upscale": "2"})), NOTHING, DEFAULTS).values
    assert (values["width"], values["height"]) == (40, 24)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"parameters": infotext(Sampler="Restart")}, "sampler 'Restart'"),
        ({"parameters": infotext(**{"Schedule type": "Turbo"})}, "schedule type 'Turbo'"),
        ({"parameters": infotext(Model="dream")}, "'dream', which is in none of the model_dirs"),
        ({"tiler": json.dumps({"prompt": "x", "guide_image": "me.jpg"})}, "guide me.jpg"),
        ({"Dream": "a boat -s 20"}, "`Dream`"),
        ({"prompt": json.dumps({"1": {"class_type": "SamplerCustom", "inputs": {}}})}, "SamplerCustom"),
        ({}, "no parameters"),
    ],
)
def test_what_cannot_be_repeated_is_exit_3(in_process, tmp_path: Path, texts: dict[str, str], message: str) -> None:
    png(tmp_path / "x.png", **texts)
    ran = in_process("render", "--from", "x.png")
    assert ran.code == 3, ran.err
    assert message in ran.err and "x.png" in ran.err and "Traceback" not in ran.err


def test_a_model_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(Kind.MODEL.variable, str(tmp_path))
    (tmp_path / "dream.safetensors").touch()
    path = png(tmp_path / "x.png", parameters=infotext(Model="dream"))
    values: dict[str, Any] = repeat(path, NOTHING, DEFAULTS).values
    assert values["model"] == str(tmp_path / "dream.safetensors")
    with pytest.raises(ModelError, match="Restart"):
        repeat(png(tmp_path / "y.png", parameters=infotext(Sampler="Restart")), NOTHING, DEFAULTS)
