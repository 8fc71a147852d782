"""The recipes in pictures of every tool, from files written here as those tools write them."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from tiler.errors import ModelError, UsageError
from tiler.output.infotext import parse_infotext
from tiler.output.recipes import read_recipe
from tiler.output.texts import read_texts

A1111 = """a boat, (red:1.2)
on two lines
Negative prompt: fog,
rain
Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 18446744073709551615, Size: 512x768, \
Model hash: 0123456789, Model: dream, Lora hashes: "a: 123, b: 456", Hashes: {"model": "0123456789", "lora:a": "1"}, \
TI: "say \\"hi\\", twice", Version: v1.10"""
WANTED = {
    "prompt": "a boat", "negative_prompt": "fog", "seed": 5, "num_inference_steps": 12, "guidance_scale": 6.5,
    "width": 64, "height": 96, "model": "dream",
}  # fmt: skip
COMFY = {
    "3": {"class_type": "KSampler", "inputs": {
        "seed": 5, "steps": 12, "cfg": 6.5, "sampler_name": "dpmpp_2m", "scheduler": "karras", "denoise": 1.0,
        "model": ["10", 0], "positive": ["20", 0], "negative": ["7", 0], "latent_image": ["5", 0]}},
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sub\\dream"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 96, "batch_size": 1}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": ["30", 0], "clip": ["4", 1]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "fog", "clip": ["4", 1]}},
    "10": {"class_type": "LoraLoader", "inputs": {"lora_name": "x", "model": ["4", 0], "clip": ["4", 1]}},
    "20": {"class_type": "ConditioningCombine", "inputs": {"conditioning_1": ["6", 0]}},
    "30": {"class_type": "PrimitiveString", "inputs": {"value": "a boat"}},
}  # fmt: skip


def png(path: Path, **texts: str) -> Path:
    info = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


def exif(path: Path, comment: bytes) -> Path:
    tags = Image.Exif()
    tags.get_ifd(0x8769)[0x9286] = comment
    Image.new("RGB", (8, 8)).save(path, exif=tags)
    return path


def test_infotext_keeps_quoted_values_json_and_lines() -> None:
    found = parse_infotext(A1111)
    assert found.prompt == "a boat, (red:1.2)\non two lines"
    assert found.negative_prompt == "fog,\nrain"
    assert found.fields["Lora hashes"] == "a: 123, b: 456"
    assert json.loads(found.fields["Hashes"]) == {"model": "0123456789", "lora:a": "1"}
    assert found.fields["TI"] == 'say "hi", twice'
    assert found.fields["Version"] == "v1.10"


def test_only_the_last_line_of_fields_counts() -> None:
    found = parse_infotext("a boat\nSteps: 1, a: b, c: d\nSteps: 2, Sampler: Euler, Seed: 3")
    assert found.prompt == "a boat\nSteps: 1, a: b, c: d"
    assert found.fields == {"Steps": "2", "Sampler": "Euler", "Seed": "3"}
    assert parse_infotext("Steps: 1, two: 2").fields == {}
    assert parse_infotext("a boat").negative_prompt is None
    assert parse_infotext("a\nNegative prompt: \nSteps: 2, Sampler: Euler, Seed: 3").negative_prompt == ""


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
@pytest.mark.parametrize("order", ["be", "le"])
def test_files_of_automatic1111(tmp_path: Path, suffix: str, order: str) -> None:
    path = tmp_path / f"x.{suffix}"
    png(path, parameters=A1111) if suffix == "png" else exif(path, b"UNICODE\0" + A1111.encode(f"utf-16-{order}"))
    recipe = read_recipe(read_texts(path))
    assert recipe.tool == "AUTOMATIC1111"
    assert recipe.settings["seed"] == 2**64 - 1
    assert (recipe.settings["width"], recipe.settings["height"], recipe.settings["model"]) == (512, 768, "dream")


def invoke() -> dict[str, Any]:
    return {"positive_prompt": "a boat", "negative_prompt": "fog", "seed": 5, "steps": 12, "cfg_scale": 6.5,
            "width": 64, "height": 96, "model": {"name": "dream"}, "scheduler": "euler"}  # fmt: skip


SWARM = {"sui_image_params": {"prompt": "a boat", "negativeprompt": "fog", "model": "dream", "seed": 5, "steps": 12,
                              "cfgscale": 6.5, "width": 64, "height": 96}}  # fmt: skip
FOOOCUS = {"prompt": "a boat", "negative_prompt": "fog", "steps": 12, "guidance_scale": 6.5, "seed": "5",
           "resolution": "(64, 96)", "base_model": "dream", "version": "Fooocus v2.5"}  # fmt: skip
SDCPP = (
    'a boat\nNegative prompt: fog\nSteps: 12, CFG scale: 6.5, Seed: 5, Size: 64x96, Model: dream, SDCPP: {"a": [1, 2]}'
)


@pytest.mark.parametrize(
    ("tool", "texts"),
    [
        ("InvokeAI", {"invokeai_metadata": json.dumps(invoke())}),
        ("SwarmUI", {"parameters": json.dumps(SWARM)}),
        ("Fooocus", {"parameters": json.dumps(FOOOCUS)}),
        ("stable-diffusion.cpp", {"parameters": SDCPP}),
        ("ComfyUI", {"prompt": json.dumps(COMFY | {"99": {"class_type": "Note", "inputs": {"x": float("nan")}}})}),
    ],
)
def test_every_field_of_other_tools_arrives(tmp_path: Path, tool: str, texts: dict[str, str]) -> None:
    recipe = read_recipe(read_texts(png(tmp_path / "x.png", **texts)))
    assert (recipe.tool, recipe.lacks) == (tool, "")
    assert {name: recipe.settings.get(name) for name in WANTED} == WANTED


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_stable_diffusion_cpp_writes_into_a_jpegs_comment_and_a_webps_xmp(tmp_path: Path, suffix: str) -> None:
    text = SDCPP.replace("a boat", 'a <boat> & "é"')
    packet = f"<rdf:Description><sdcpp:parameters>{html.escape(text)}</sdcpp:parameters></rdf:Description>"
    said: dict[str, Any] = {"comment": b"parameters\0" + text.encode() + b"\0"}
    Image.new("RGB", (8, 8)).save(
        path := tmp_path / f"x.{suffix}", **said if suffix == "jpg" else {"xmp": packet.encode()}
    )
    recipe = read_recipe(read_texts(path))
    assert (recipe.tool, recipe.lacks) == ("stable-diffusion.cpp", "")
    assert {name: recipe.settings.get(name) for name in WANTED} == WANTED | {"prompt": 'a <boat> & "é"'}
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.jpg", comment=b"taken in May")
    assert read_texts(tmp_path / "plain.jpg") == {}


def test_comfyui_graphs_of_several_samplers_are_shown_and_not_repeated(tmp_path: Path) -> None:
    graph = COMFY | {"9": {"class_type": "SamplerCustom", "inputs": {}}}
    recipe = read_recipe(read_texts(png(tmp_path / "x.png", prompt=json.dumps(graph))))
    assert "SamplerCustom" in recipe.lacks and recipe.others == {"text of node 7": "fog"}


def test_pictures_that_say_nothing_and_files_that_are_none(tmp_path: Path, in_process) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    (tmp_path / "x.txt").write_text("x")
    ran = in_process("info", "x.png")
    assert ran.code == 3 and "no parameters in this picture" in ran.err
    assert in_process("info", "x.txt").code == in_process("info", "none.png").code == 2
    png(tmp_path / "y.png", parameters=A1111)
    assert "dream" in in_process("info", "y.png").out
    png(tmp_path / "z.png", prompt=json.dumps(COMFY))
    shown = [line[:22].strip() for line in in_process("info", "z.png").out.splitlines()]
    assert {"--scheduler", "Schedule type"} < set(shown) and len(set(shown)) == len(shown)
    assert in_process("info", "y.png", "--json").json["settings"]["num_inference_steps"] == 20


def test_a_huge_text_is_not_read(tmp_path: Path, in_process) -> None:
    for packed, size in ((True, 100_000_000), (False, 17_000_000)):
        info = PngImagePlugin.PngInfo()
        info.add_itxt("parameters", "x" * size, zip=packed)
        Image.new("RGB", (8, 8)).save(tmp_path / "x.png", pnginfo=info)
        ran = in_process("info", "x.png")
        assert ran.code == 3 and "x.png: it holds more than 16 MB of text" in ran.err
    with pytest.raises(UsageError, match="no such picture"):
        read_texts(tmp_path / "none.png")
    with pytest.raises(ModelError, match="no parameters"):
        read_recipe({})
