"""`--from IMG` repeats a picture to the byte, and typed options win over its metadata."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from tiler.cli import queues, render
from tiler.cli.repeat import repeat
from tiler.errors import ModelError
from tiler.jobs.drawing import NOTED
from tiler.output.metadata import Facts, texts
from tiler.planning.resolve import fill
from tiler.request import Region, RenderRequest, Scheduler, ScheduleType
from tiler.request.render import OF_THE_RUN
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


def test_a_picture_is_repeated_to_the_byte_whatever_the_configuration(
    in_process, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = (
        "--width 128 --height 80 --steps 2 --seed 18446744073709551615 --cfg-scale 2 --mask constant --wrap x --dpi 200"
    )
    assert in_process("render", "a boat", "-n", "", *options.split(), "-o", "a.png").code == 0
    env = {"TILER_STEPS": "9", "TILER_TINY_VAE": "x", "TILER_SEED": "4"}
    ran = in_process("render", "--from", "a.png", "-o", "b.png", env=env)
    assert ran.code == 0 and "note: settings that you do not give come from a.png, also over your configur" in ran.err
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    ran = in_process("plan", "--from", "a.png", env={NOTED: "1"})  # as in a queue that has said it once
    assert ran.code == 0 and "come from a.png" not in ran.err
    queues.parser(render.run)(["--from", str(tmp_path / "a.png")])
    assert capfd.readouterr().err == ""


def test_info_leaves_out_what_is_at_its_default(in_process, tmp_path: Path) -> None:
    said = {
        "prompt": "a boat",
        "model": "mini",
        "wrap": "x",
        "guide": False,
        "strength": 0.5,
        "guide_upscale": "latent",
    }
    said |= {
        "scheduler": "auto",
        "mask": "gaussian",
        "guidance_interval": [0.0, 1.0],
        "landscape": False,
        "scratch_dtype": "fp16",
    }
    png(tmp_path / "x.png", tiler=json.dumps(said | {"bleed_mm": 0.0, "precision": "fp32"}))
    shown = [line.split()[0] for line in in_process("info", "x.png").out.splitlines()]
    assert shown == ["made", "PROMPT", "--model", "--wrap", "--no-guide", "--precision"]
    assert in_process("info", "x.png", "--json").json["settings"] == said | {"precision": "fp32"}


def test_info_prints_settings_as_options_take_them(in_process, tmp_path: Path) -> None:
    loras = [
        {"file": "ink", "strength": 0.8, "text_strength": 0.8},
        {"file": "film", "strength": 0.5, "text_strength": 0.3},
    ]
    said = {"num_inference_steps": 7, "guidance_interval": [0.0, 0.75], "landscape": True, "loras": loras}
    png(tmp_path / "x.png", tiler=json.dumps(said | {"model_id": "0"}))
    _, *lines = in_process("info", "x.png").out.splitlines()
    typed = [line.split() for line in lines]
    assert typed == [
        ["--steps", "7"], ["--guidance-interval", "0-0.75"], ["--landscape"], ["--lora", "ink=0.8"],
        ["--lora", "film=0.5:0.3"], ["model_id", "0"],
    ]  # fmt: skip
    words = [word for flag, *value in typed[:-1] for word in (flag, *value) if flag != "--lora"]
    assert in_process("plan", "x", "--model", "mini", "--paper", "A6", "--dpi", 50, *words).code == 0


def test_what_is_typed_wins(tmp_path: Path) -> None:
    said = {"prompt": "a boat", "width": 64, "height": 96, "seed": 7, "model": "mini", "num_inference_steps": 3}
    path = png(tmp_path / "x.png", tiler=json.dumps(said))
    values = repeat(path, frozenset({"seed", "cache_dir"}), DEFAULTS).values
    assert "seed" not in values and "cache_dir" not in values
    assert (values["prompt"], values["num_inference_steps"], values["tiny_vae"]) == ("a boat", 3, None)


def test_a_typed_preset_replaces_what_the_picture_says(in_process, tmp_path: Path) -> None:
    """Also with the model's own steps, where the preset names none; what is typed beside it wins over both."""
    said = {
        "prompt": "a boat", "width": 64, "height": 96, "seed": 7, "model": "mini", "num_inference_steps": 3,
        "strength": 0.2, "guidance_interval": [0.0, 0.3], "layout": "grid", "guidance_scale": 2,
    }  # fmt: skip
    path, asked = png(tmp_path / "x.png", tiler=json.dumps(said)), list[RenderRequest]()
    parse = queues.parser(render.run)
    asked = [parse(["--from", str(path), *words]) for words in (["--preset", "fast"], ["--preset=fast", "--steps=4"])]
    assert [(r.num_inference_steps, r.strength, r.layout, r.guidance_scale) for r in asked] == [
        (None, None, None, 2), (4, None, None, 2)
    ]  # fmt: skip
    assert fill(asked[0]).num_inference_steps == 10
    ran = in_process("plan", "--from", "x.png", "--preset", "fast", "--strength", 0.3)
    noted = "note: --preset takes the place of the picture's --steps, --guidance-interval, --layout\n"
    assert ran.code == 0 and noted in ran.err
    assert "takes the place" not in in_process("plan", "--from", "x.png", env={"TILER_PRESET": "fast"}).err


def test_a_spot_drops_the_layout_of_its_picture(tmp_path: Path) -> None:
    (tmp_path / "mask.png").touch()
    said = {"prompt": "a boat", "repaint": "mask.png", "layout": "jitter", "model": "mini"}
    values = repeat(png(tmp_path / "x.png", tiler=json.dumps(said)), NOTHING, DEFAULTS).values
    assert values["layout"] is None and values["repaint"] == tmp_path / "mask.png"


def test_pictures_of_others_leave_the_rest_as_it_is(tmp_path: Path) -> None:
    found = repeat(png(tmp_path / "x.png", parameters=infotext(Eta="0.5", **{"Clip skip": "2"})), NOTHING, DEFAULTS)
    assert found.values == {
        "prompt": "a boat", "num_inference_steps": 3, "scheduler": Scheduler.EULER, "guidance_scale": 2, "seed": 7,
        "width": 64, "height": 96, "model": "mini", "clip_skip": 2,
    }  # fmt: skip
    assert "not the same one" in found.notes[0] and "Eta" in found.notes[1]


def test_what_automatic1111_says_of_vae_emphasis_and_tiling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(Kind.VAE.variable, str(tmp_path))
    path = png(tmp_path / "x.png", parameters=infotext(VAE="soft.safetensors", Emphasis="No norm", Tiling="True"))
    found = repeat(path, NOTHING, DEFAULTS)
    assert (found.values["emphasis"], found.values["wrap"], "vae" in found.values) == ("no-norm", "xy", False)
    assert "the vae 'soft', which is in none of the vae_dirs: the model's own takes its place" in found.notes[-1]
    (tmp_path / "soft.safetensors").touch()
    assert repeat(path, NOTHING, DEFAULTS).values["vae"] == str(tmp_path / "soft.safetensors")


@pytest.mark.parametrize(
    ("said", "scheduler", "spread"),
    [
        ({"Sampler": "Heun"}, Scheduler.HEUN, None),
        ({"Sampler": "Heun", "Schedule type": "Karras"}, Scheduler.HEUN, ScheduleType.KARRAS),
        ({"Sampler": "DPM++ 2M SDE Karras"}, Scheduler.DPMPP_2M_SDE, ScheduleType.KARRAS),
        ({"Sampler": "DPM++ 2M SDE Exponential"}, Scheduler.DPMPP_2M_SDE, ScheduleType.EXPONENTIAL),
        ({"Sampler": "DPM++ 2M Karras"}, Scheduler.DPMPP_2M_KARRAS, None),
        ({"Sampler": "DPM++ 2M", "Schedule type": "Karras"}, Scheduler.DPMPP_2M_KARRAS, None),
        ({"Sampler": "dpmpp_sde"}, Scheduler.DPMPP_SDE, None),
        ({"Sampler": "dpmpp_2m_k"}, Scheduler.DPMPP_2M_KARRAS, None),
        ({"Sampler": "euler_ancestral"}, Scheduler.EULER_A, None),
        ({"Sampler": "uni_pc"}, Scheduler.UNIPC, None),
        ({"Sampler": "heun_k"}, Scheduler.HEUN, ScheduleType.KARRAS),
    ],
)
def test_samplers_by_the_names_of_other_tools(
    tmp_path: Path, said: dict[str, str], scheduler: Scheduler, spread: ScheduleType | None
) -> None:
    values = repeat(png(tmp_path / "x.png", parameters=infotext(**said)), NOTHING, DEFAULTS).values
    assert (values["scheduler"], values.get("schedule_type")) == (scheduler, spread)


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


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"loras": 3}, "its metadata about loras cannot be read: 3; give --lora"),
        ({"regions": [{"prompt": "a"}]}, "its metadata about regions cannot be read"),
        ({"quality": "a"}, "--quality 'a' cannot be read"),
        ({"prompt": 3}, "prompt = 3 cannot be read"),
        ({"guide": 1}, "guide = 1 cannot be read"),
    ],
)
def test_what_a_picture_of_ours_cannot_say_is_one_line(
    in_process, tmp_path: Path, said: dict[str, Any], message: str
) -> None:
    own = {"prompt": "a boat", "width": 64, "height": 96, "seed": 7, "model": "mini"} | said
    ran = in_process("render", "--from", png(tmp_path / "x.png", tiler=json.dumps(own)))
    assert ran.code in (2, 3) and message in ran.err and len(ran.err.strip().splitlines()) == 1, ran.err


def test_a_prompt_may_be_a_number(tmp_path: Path) -> None:
    path = png(tmp_path / "x.png", invokeai_metadata=json.dumps({"positive_prompt": "1984", "steps": 3}))
    values = repeat(path, frozenset(), DEFAULTS).values
    assert (values["prompt"], values["num_inference_steps"]) == ("1984", 3)


def test_damaged_exif_is_none(in_process, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "x.webp", exif=b"Exif\0\0garbagegarbage")
    ran = in_process("info", tmp_path / "x.webp")
    assert ran.code == 3 and "no parameters" in ran.err and len(ran.err.strip().splitlines()) == 1


def test_a_model_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(Kind.MODEL.variable, str(tmp_path))
    (tmp_path / "dream.safetensors").touch()
    path = png(tmp_path / "x.png", parameters=infotext(Model="dream"))
    values: dict[str, Any] = repeat(path, NOTHING, DEFAULTS).values
    assert values["model"] == str(tmp_path / "dream.safetensors")
    with pytest.raises(ModelError, match="Restart"):
        repeat(png(tmp_path / "y.png", parameters=infotext(Sampler="Restart")), NOTHING, DEFAULTS)


def test_a_picture_of_ones_own_is_enlarged(in_process, tiny: Path, tmp_path: Path) -> None:
    """`--scale` uses the size of the picture as displayed; with --from, everything but the size comes from the
    picture."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.new("RGB", (50, 34)).save(tmp_path / "phone.jpg", exif=exif)
    ran = in_process("plan", "x", "--model", tiny, "--guide", "phone.jpg", "--scale", "3", "--json")
    assert ran.json["canvas"] == "104×152"  # 102×150 in whole latents
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", infotext(Model="mini"))
    Image.new("RGB", (40, 24)).save(tmp_path / "own.png", pnginfo=info)
    options = "--from", "own.png", "--guide", "own.png", "--scale", "2.5", "--model", tiny, "-o", "x.png"
    ran = in_process("render", *options, "--steps", "1")
    assert ran.code == 0, ran.err
    with Image.open(tmp_path / "x.png") as image:
        assert image.size == (100, 60)
        own = json.loads(image.text["tiler"])  # type: ignore[attr-defined]
    assert (own["width"], own["height"], own["prompt"], own["guide_image"]) == (100, 60, "a boat", "own.png")
    assert "scale" not in own


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--guide", "g.png", "--scale", "2", "--size", "64"), "leave out --size"),
        (("--guide", "g.png", "--scale", "2", "-H", "64"), "leave out --height"),
        (("--guide", "g.png", "--scale", "2", "--paper", "A4"), "leave out --paper"),
        (("--scale", "2"), "--guide IMG"),
        (("--guide", "g.png", "--scale", "0.5"), "--scale 0.5 is out of range: 1–64"),
        (("--guide", "none.png", "--scale", "2"), "none.png: no such file"),
        (("--guide", "g.png", "--scale", "64"), "a side has at most 131,072 pixels"),
    ],
)
def test_scales_that_make_no_size_are_exit_2(
    in_process, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    Image.new("RGB", (2400, 8)).save(tmp_path / "g.png")
    ran = in_process("render", "x", *options)
    assert ran.code == 2, ran.err
    assert message in ran.err


def test_a_model_is_found_by_its_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First by its name, then by a hash that is already known; no other file is hashed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TILER_MODEL_DIRS", str(tmp_path))
    for name in ("a/dream", "b/dream", "night"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.safetensors").write_bytes(name.encode())
    digest = {name: hashlib.sha256(name.encode()).hexdigest()[:10] for name in ("a/dream", "b/dream", "night")}

    def repeated(model: str, hash: str) -> tuple[str, list[str]]:
        picture = png(tmp_path / "x.png", parameters=infotext(Model=model, **{"Model hash": hash}))
        found = repeat(picture, NOTHING, DEFAULTS)
        return found.values["model"], found.notes[1:]

    assert repeated("dream", digest["b/dream"]) == (str(tmp_path / "b/dream.safetensors"), [])
    with pytest.raises(ModelError, match="'renamed', which is in none"):
        repeated("renamed", digest["night"])  # nobody has hashed it yet
    found, notes = repeated("night", digest["a/dream"])
    assert found == str(tmp_path / "night.safetensors")
    assert "is not the file that the picture was made with" in notes[0]
    found, notes = repeated("renamed", digest["night"])
    assert found == str(tmp_path / "night.safetensors")
    assert "is called 'night' here" in notes[0]


def test_a_model_is_found_in_a_model_dir_and_if_that_is_the_model(in_process, tiny: Path, tmp_path: Path) -> None:
    said = {"prompt": "a boat", "width": 64, "height": 64, "seed": 7, "model": tiny.name, "num_inference_steps": 1}
    picture = png(tmp_path / "x.png", tiler=json.dumps(said))
    for folder in (tiny, tiny.parent):
        assert repeat(picture, NOTHING, DEFAULTS, (folder,)).values["model"] == str(tiny.resolve())
    ran = in_process("plan", "--from", picture, "--model-dir", tiny)
    assert ran.code == 0, ran.err
    ran = in_process("plan", "--from", picture, "--model-dir", tmp_path)
    assert ran.code == 3 and f"{tiny.name!r}, which is in none of the model_dirs" in ran.err


def test_a_guide_or_a_mask_that_has_changed_is_said(in_process, tmp_path: Path) -> None:
    guide, changed = tmp_path / "g.png", "the file has changed"
    Image.new("RGB", (64, 64), "white").save(guide)
    ran = in_process(
        "render", "a boat", "--guide", guide, "--repaint", guide, "--steps", 2, "--strength", 0.5, "-o", "x.png"
    )
    assert ran.code == 0, ran.err
    assert not any(changed in note for note in repeat(tmp_path / "x.png", NOTHING, DEFAULTS).notes)
    Image.new("RGB", (64, 64), "red").save(guide)
    notes = [note for note in repeat(tmp_path / "x.png", NOTHING, DEFAULTS).notes if changed in note]
    assert notes == [
        f"{guide} is not the {what} that the picture was made from: {changed}" for what in ("guide", "mask")
    ]


VALUES: dict[str, Any] = {
    "negative_prompt": "fog", "canvas_prompt": "sea", "emphasis": "no-norm", "size": 128, "width": 128, "height": 72,
    "paper": "A4", "landscape": True, "bleed": "3mm", "dpi": 150.0, "wrap": "xy", "seed": 2**64 - 1,
    "preset": "balanced", "num_inference_steps": 7, "guidance_scale": 2.5, "guidance_interval": (0.1, 0.7),
    "strength": 0.3, "clip_skip": 2, "scheduler": "DPM++ 2M SDE", "schedule_type": "karras", "guide": False,
    "guide_upscale": "latent", "layout": "shift", "overlap": 64, "tile_size": 512, "mask": "quartic",
    "attention_window": 16, "guide_sharpen": 60,
    "tile_conditioning": "none", "precision": "fp32", "decode": "frozen",
    "decode_precision": "bf16",     "scratch_dtype": "fp32", "quality": 55,
    "prediction": "v", "variant": "fp16",
    "regions": (Region(prompt="boat", rows=(0, 64), cols=(8, 64), mask="gaussian", seed=3, negative_prompt=""),),
}  # fmt: skip
ELSEWHERE = {
    "model", "revision", "prompt", "guide_image", "scale", "repaint", "loras", "tiny_vae", "diffusion_model", "vae",
    "text_encoder", "clip_l", "clip_g", "t5xxl",
}  # fmt: skip
"""Files, which have tests of their own, and the prompt, which every picture has."""
FACTS = Facts(
    model="mini", model_id="0", revision=None, scheduler="Euler", precision="fp32", decode_precision="fp32",
    kernels="torch", embeddings={}, loras={}, clip_skip=True, begin=1,
)  # fmt: skip
WITH = {"landscape": {"paper": "A4"}, "bleed": {"paper": "A4"}}


def test_every_option_of_a_picture_is_in_the_list_above() -> None:
    offered = {name for name, field in RenderRequest.__dataclass_fields__.items() if "option" in field.metadata}
    assert offered - VALUES.keys() - ELSEWHERE - set(OF_THE_RUN) == set()


@pytest.mark.parametrize("name", VALUES)
def test_every_option_of_a_picture_comes_back(tmp_path: Path, name: str) -> None:
    asked = RenderRequest(prompt="a boat", **WITH.get(name, {}), **{name: VALUES[name]})
    once = fill(asked)
    picture = png(tmp_path / "x.png", **texts(once, FACTS))
    again = fill(RenderRequest(**repeat(picture, NOTHING, DEFAULTS).values))
    chosen = {"precision": "fp32", "decode_precision": FACTS.decode_precision}  # what AUTO was
    for field in RenderRequest.__dataclass_fields__:
        if field not in (
            *OF_THE_RUN,
            "size",
            "preset",
            "scale",
        ):  # the last three: other fields hold what these resolved to
            assert getattr(again, field) == getattr(replace(once, **chosen), field), field


def test_a_model_of_the_hub_is_repeated_at_its_commit(tmp_path: Path) -> None:
    asked = RenderRequest(prompt="a boat", model="org/name", revision="main", variant="fp16")
    told = texts(fill(asked), replace(FACTS, model="org/name", revision="0123abc"))
    picture = png(tmp_path / "x.png", **told)
    values = repeat(picture, NOTHING, DEFAULTS).values
    assert (values["model"], values["revision"], values["variant"]) == ("org/name", "0123abc", "fp16")
    again = texts(fill(RenderRequest(**values)), replace(FACTS, model="org/name", revision="0123abc"))
    assert list(json.loads(again["tiler"]).items()) == list(json.loads(told["tiler"]).items())  # to the byte
    other = repeat(picture, frozenset({"model"}), DEFAULTS).values
    assert "model" not in other and other["revision"] is None and other["variant"] is None


def test_a_pdf_holds_no_settings(in_process, tmp_path: Path) -> None:
    (tmp_path / "print.pdf").write_bytes(b"%PDF-1.7\n")
    ran = in_process("info", "print.pdf")
    assert (ran.code, "PDF files hold no settings that tiler reads" in ran.err) == (2, True), ran.err
