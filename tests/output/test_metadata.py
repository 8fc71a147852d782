"""Texts in pictures: readable by other tools, without facts about this machine, and equal from run to run."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from tiler.output.infotext import parse_infotext
from tiler.output.metadata import Facts, file_name, infotext, texts
from tiler.output.picture import write_picture
from tiler.output.profile import srgb_profile
from tiler.planning.resolve import fill
from tiler.request import RenderRequest, ResolvedRequest
from tiler.weights.checkpoint import resolve
from tiler.weights.identity import model_id

FACTS = Facts(
    model="/home/ann/models/dream",
    model_id="0" * 32,
    revision=None,
    scheduler="DPM++ 2M Karras",
    precision="fp32",
    decode_precision="fp32",
    kernels="tiler v3, torch avx2",
    embeddings={},
    loras={},
    clip_skip=True,
    begin=3,
)


SD_CLI = Path.home() / ".cache/tiler/sdcpp/sd-cli"
PARTS = ("unet", "vae", "text_encoder")


def request(**values: Any) -> ResolvedRequest:
    return fill(RenderRequest(prompt="a boat", output=Path("/home/ann/out.png"), width=64, height=64, seed=5, **values))


def test_no_path_of_this_machine_is_in_the_texts() -> None:
    places = {
        "model": "/home/ann/models/dream",
        "guide_image": Path("/home/ann/private/me.jpg"),
        "scratch": Path("/home/ann/s"),
        "save_latents": Path("/home/ann/z.safetensors"),
        "cache_dir": Path("/home/ann/c"),
        "vae": "/home/ann/models/soft.safetensors",
        "t5xxl": "/home/ann/t5.gguf",
        "model_dirs": (Path("/home/ann/models"),),
    }
    made = texts(request(**places), FACTS)
    assert "ann" not in str(made) and "/" not in made["parameters"]
    said = json.loads(made["tiler"])
    assert (said["model"], said["guide_image"], said["model_id"]) == ("dream", "me.jpg", "0" * 32)
    assert "peak_rss_bytes" not in said


@pytest.mark.parametrize(
    ("place", "name"),
    [("org/name", "org/name"), ("mini", "mini"), ("./models/x", "x"), ("~/x/", "x"), ("C:\\Users\\ann\\x", "x"),
     ("/a/b", "b"), ("../x", "x"), (Path("pictures/me.png"), "me.png")],
)  # fmt: skip
def test_names_of_places(place: str | Path, name: str) -> None:
    assert file_name(place) == name


def test_a_folder_that_looks_like_a_hub_id_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ann/x").mkdir(parents=True)
    assert file_name("ann/x") == "x"


def test_bytes_that_are_no_utf8_can_be_written(tmp_path: Path) -> None:
    made = texts(request(guide_image=Path("caf\udce9.png")), FACTS)
    assert json.loads(made["tiler"])["guide_image"] == "caf?.png"
    for suffix in ("png", "tif", "pdf"):
        raw = {"parameters": "\udce9 raw", "tiler": "\ud800"}  # a caller's own
        for given in (made, raw):
            path = tmp_path / f"x.{suffix}"
            write_picture(path, [np.zeros((8, 8, 3), np.uint8)], 8, 8, given, force=True)
            assert path.stat().st_size > 100


def test_infotext_is_automatic1111s() -> None:
    want = 'a boat\nNegative prompt: fog\nSteps: 2, Model: "a, b"'
    assert infotext("a boat", "fog", {"Steps": 2, "Model": "a, b"}) == want
    last = texts(request(), FACTS)["parameters"].splitlines()[-1]
    assert last.startswith(
        "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 5, Size: 64x64, Model: dream"
    )


def test_the_hash_of_a_model_is_told_where_it_is_one_file() -> None:
    made = texts(request(), replace(FACTS, model_hash="0123456789"))
    assert "Size: 64x64, Model hash: 0123456789, Model: dream" in made["parameters"]
    assert json.loads(made["tiler"])["model_hash"] == "0123456789"
    assert "hash" not in texts(request(), FACTS)["parameters"]


@pytest.mark.parametrize("suffix", ["png", "tif", "pdf"])
def test_two_runs_give_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    made = texts(request(), FACTS)
    for name in ("a", "b"):
        write_picture(tmp_path / f"{name}.{suffix}", [np.zeros((8, 8, 3), np.uint8)], 8, 8, made, force=False)
        time.sleep(1.1)  # littleCMS and TIFF write whole seconds
    assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()


def test_the_profile_is_srgb() -> None:
    import io

    profile = ImageCms.ImageCmsProfile(io.BytesIO(srgb_profile()))
    transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), "RGB", "RGB")
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    there = np.asarray(ImageCms.applyTransform(Image.fromarray(pixels), transform))
    assert abs(there.astype(int) - pixels).max() <= 1


def test_a_models_id_follows_its_weights_and_not_its_place(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "elsewhere")
    want = model_id(resolve(str(tiny)), PARTS)
    assert model_id(resolve(str(tmp_path / "elsewhere")), PARTS) == want
    for change in ("unet", "vae", "text_encoder"):
        path = next((tmp_path / "elsewhere" / change).glob("*.safetensors"))
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(data)
        assert model_id(resolve(str(tmp_path / "elsewhere")), PARTS) != want
        data[-3] ^= 1
        path.write_bytes(data)
    config = tmp_path / "elsewhere/unet/config.json"
    config.write_text(config.read_text() + " ")
    assert model_id(resolve(str(tmp_path / "elsewhere")), PARTS) != want


def test_a_tiff_is_classic_and_a_page_above_five_metres_has_its_unit(tmp_path: Path) -> None:
    from pypdf import PdfReader

    write_picture(tmp_path / "x.tif", [np.zeros((8, 8, 3), np.uint8)], 8, 8, {}, force=False)
    assert (tmp_path / "x.tif").read_bytes()[2:4] in (b"*\0", b"\0*")
    for dpi, unit in ((1.0, 1), (0.25, 2), (0.1, 4)):
        path = tmp_path / "x.pdf"
        write_picture(path, [np.zeros((8, 600 // 8, 3), np.uint8)] * 10, 75, 80, {}, dpi, force=True)
        (page,) = PdfReader(path, strict=True).pages
        assert page.user_unit == unit
        assert float(page.mediabox.height) * unit == pytest.approx(80 / dpi * 72)
        assert max(float(page.mediabox.height), float(page.mediabox.width)) <= 14400


@pytest.mark.parametrize(("guide", "wanted"), [(None, "/trainedAlgo"), (Path("me.jpg"), "/compositeWithTrainedAlgo")])
def test_pictures_say_in_xmp_that_they_are_generated(tmp_path: Path, guide: Path | None, wanted: str) -> None:
    import tifffile

    made = texts(request(guide_image=guide), FACTS)
    assert "RNG: CPU" in made["parameters"]
    for suffix in ("png", "tif"):
        write_picture(tmp_path / f"x.{suffix}", [np.zeros((8, 8, 3), np.uint8)], 8, 8, made, force=True)
    assert wanted in Image.open(tmp_path / "x.png").text["XML:com.adobe.xmp"]
    with tifffile.TiffFile(tmp_path / "x.tif") as tiff:
        assert wanted.encode() in tiff.pages[0].tags[700].value


def test_hashes_of_all_files_are_told_as_civitai_reads_them() -> None:
    facts = replace(
        FACTS, model_hash="0123456789", vae_hash="abcdef0123", loras={"ink, red": "123456789abc"},
        lora_files={"ink, red": "00112233aa"}, embeddings={"mood": "fedcba987654"},
    )  # fmt: skip
    line = texts(request(vae="/home/ann/soft.safetensors", wrap="xy"), facts)["parameters"].splitlines()[-1]
    told = json.loads(line[line.index("Hashes: {") + len("Hashes: ") :])  # Civitai looks for that, and JSON after it
    assert told == {
        "model": "0123456789", "vae": "abcdef0123", "lora:ink, red": "00112233aa", "embed:mood": "fedcba9876",
    }  # fmt: skip
    order = (
        "Steps Sampler Schedule_type CFG_scale Seed Size Model_hash Model VAE_hash VAE Denoising_strength RNG Tiling"
    )
    order += " TI_hashes Lora_hashes Version Hashes"
    places = [line.index(f"{key.replace('_', ' ')}: ") for key in order.split()]
    assert places == sorted(places)
    read = parse_infotext(line.join(["a boat\n", ""])).fields
    assert json.loads(read["Hashes"]) == told and read["VAE"] == "soft"
    assert "Hashes: " not in texts(request(), FACTS)["parameters"]


@pytest.mark.skipif(not SD_CLI.exists(), reason="stable-diffusion.cpp's sd-cli is not in ~/.cache/tiler/sdcpp")
def test_stable_diffusion_cpp_reads_what_we_write(tmp_path: Path) -> None:
    made = texts(request(negative_prompt="fog"), replace(FACTS, model_hash="0123456789"))
    write_picture(tmp_path / "x.png", [np.zeros((64, 64, 3), np.uint8)], 64, 64, made, force=False)
    command = [SD_CLI, "-M", "metadata", "--image", tmp_path / "x.png", "--metadata-format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.dumps(made["parameters"], ensure_ascii=False)[1:-1] in done.stdout
