"""JPEG in strips, WebP and AVIF in one piece: pixels checked by Pillow, texts by exiftool if it is installed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tiler.errors import BudgetRefused, UsageError
from tiler.output.exif import request_in, xmp_of
from tiler.output.metadata import XMP, infotext, xmp
from tiler.output.picture import check_picture, check_size, write_picture
from tiler.output.profile import srgb_profile
from tiler.output.recipes import read_recipe
from tiler.output.texts import read_texts
from tiler.planning.table import MemoryPlan, Term
from tiler.planning.whole import whole_picture

TEXTS = {
    "parameters": "a boat, ünïcode 🙂\nSteps: 2, Sampler: Euler, Seed: 1",
    "tiler": json.dumps({"prompt": 'a "boat" & <b>it\'s</b>, ünïcode 🙂\n', "seed": 2**64 - 1}, ensure_ascii=False),
    XMP: xmp("trainedAlgorithmicMedia"),
}


def pixels(height: int, width: int) -> np.ndarray:
    """Noise over a gradient: blocks of every kind, many of them beside restart markers."""
    y, x = np.mgrid[0:height, 0:width]
    smooth = np.stack([128 + 90 * np.sin(x / (9 + k)) * np.cos(y / 13) for k in range(3)], axis=-1)
    return (smooth + np.random.default_rng(0).normal(0, 20, smooth.shape)).clip(0, 255).astype(np.uint8)


def scan_and_tables(data: bytes) -> bytes:
    """A JPEG without its APP segments, which contain the texts."""
    at = 2
    while data[at + 1] & 0xF0 == 0xE0:
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return data[at:]


@pytest.mark.parametrize(("height", "width"), [(1, 1), (16, 16), (150, 70), (333, 2100)])
@pytest.mark.parametrize(("quality", "colours"), [(75, "4:2:0"), (95, "4:4:4")])
@pytest.mark.parametrize("step", [7, 64])
def test_a_jpeg_is_to_the_byte_what_libjpeg_makes_of_the_whole(
    tmp_path: Path, height: int, width: int, quality: int, colours: str, step: int
) -> None:
    picture = pixels(height, width)
    wide = np.pad(picture, ((0, 0), (0, 5), (0, 0)))  # what is beyond the picture is cut off
    strips = (wide[first : first + step] for first in range(0, height, step))
    write_picture(tmp_path / "x.jpg", strips, width, height, TEXTS, 150, force=False, quality=quality)
    want = BytesIO()
    options: dict[str, Any] = {"quality": quality, "subsampling": colours, "restart_marker_rows": 1}
    Image.fromarray(picture).save(want, "JPEG", **options)
    assert scan_and_tables((tmp_path / "x.jpg").read_bytes()) == scan_and_tables(want.getvalue())
    image = Image.open(tmp_path / "x.jpg")
    assert image.info["dpi"] == (150, 150)
    assert image.info["icc_profile"] == srgb_profile()
    assert image.size == (width, height)


@pytest.mark.parametrize("suffix", ["jpg", "webp", "avif", "tif"])
def test_pixels_and_texts_survive(tmp_path: Path, suffix: str) -> None:
    picture, path = np.repeat(np.repeat(pixels(8, 10), 8, 0), 8, 1), tmp_path / f"x.{suffix}"
    write_picture(path, [picture[:20], picture[20:]], 80, 64, TEXTS, force=False, quality=95)
    with Image.open(path) as image:
        assert np.abs(np.asarray(image.convert("RGB"), int) - picture).mean() < 4
        assert image.info["icc_profile"]
        assert b"trainedAlgorithmicMedia" in image.info["xmp"]
    assert read_texts(path) == {key: TEXTS[key] for key in ("parameters", "tiler")}
    assert read_recipe(read_texts(path)).settings == json.loads(TEXTS["tiler"])


@pytest.mark.parametrize("suffix", ["jpg", "webp", "avif"])
def test_a_picture_without_texts_says_nothing(tmp_path: Path, suffix: str) -> None:
    write_picture(tmp_path / f"x.{suffix}", [pixels(16, 16)], 16, 16, {}, force=False)
    assert read_texts(tmp_path / f"x.{suffix}") == {}


def test_texts_that_are_too_long_for_a_segment_cost_themselves_alone(tmp_path: Path) -> None:
    long = TEXTS | {"parameters": "boat " * 20_000, "tiler": json.dumps({"prompt": "boat " * 20_000})}
    write_picture(tmp_path / "x.jpg", [pixels(16, 16)], 16, 16, long, force=False)
    found = read_texts(tmp_path / "x.jpg")
    assert found.keys() == {"parameters"} and found["parameters"].startswith("boat boat")
    assert b"trainedAlgorithmicMedia" in Image.open(tmp_path / "x.jpg").info["xmp"]


def test_the_request_is_found_where_another_program_has_rewritten_the_packet() -> None:
    packet = xmp_of(TEXTS)
    assert request_in(packet) == TEXTS["tiler"]
    assert request_in(b'<rdf:Description rdf:about=""><tiler:request>{&quot;a&quot;: 1}</tiler:request>') == '{"a": 1}'
    assert request_in(b"<rdf:Description/>") is None


@pytest.mark.parametrize(("name", "side"), [("x.jpeg", 65_501), ("x.webp", 16_384), ("x.avif", 32_769)])
def test_sides_that_no_reader_takes(name: str, side: int) -> None:
    check_size(Path(name), None, 8, side - 1)
    with pytest.raises(UsageError, match=f"a side above {side - 1:,} pixels; write a .png"):
        check_size(Path(name), None, 8, side)


def test_a_whole_picture_that_memory_does_not_hold_is_refused_in_one_line(in_process, tiny: Path) -> None:
    ran = in_process("render", "x", "--model", tiny, "--size", 4096, "-o", "x.avif", "--max-ram", "700MB")
    assert ran.code == 4, ran.err
    assert "the phase 'write'" in ran.err and "write a .png, .jpg or .tif" in ran.err.splitlines()[-1]


@pytest.mark.parametrize("suffix", ["webp", "avif"])
def test_the_largest_side_that_is_named_fits_and_no_larger_one(suffix: str) -> None:
    libraries, ceiling = Term(name="libraries", nbytes=300_000_000), 800_000_000

    def check(side: int) -> None:
        whole = whole_picture(Path(f"x.{suffix}"), None, side, side)
        assert whole is not None
        phase = whole.writing(libraries, ceiling)
        MemoryPlan(max_bytes=ceiling, phases=(phase,), smallest_bytes=phase.peak_bytes).check()

    with pytest.raises(BudgetRefused) as refused:
        check(16_000)
    named = re.search(r"(\d+)×\1 pixels", str(refused.value))
    assert named is not None
    check(int(named[1]))
    with pytest.raises(BudgetRefused):
        check(int(named[1]) + 8)


def test_a_jpeg_is_repeated_to_the_byte(in_process, tiny: Path, tmp_path: Path) -> None:
    options = ["--size", "64", "--preset", "balanced", "--steps", "1", "--no-guide", "--quality", "70", "--seed", "3"]
    assert in_process("render", 'a "boat"', *options, "--model", tiny, "-o", "a.jpg").code == 0
    ran = in_process("render", "--from", "a.jpg", "--model", tiny, "-o", "b.jpg")
    assert ran.code == 0, ran.err
    assert (tmp_path / "a.jpg").read_bytes() == (tmp_path / "b.jpg").read_bytes()
    assert '"boat"' in in_process("info", "b.jpg").out


@pytest.mark.skipif(shutil.which("exiftool") is None, reason="exiftool is not installed")
@pytest.mark.parametrize("suffix", ["jpg", "webp", "avif", "tif", "png"])
def test_exiftool_reads_what_we_write(tmp_path: Path, suffix: str) -> None:
    write_picture(tmp_path / f"x.{suffix}", [pixels(16, 16)], 16, 16, TEXTS, force=False)
    done = subprocess.run(["exiftool", "-j", tmp_path / f"x.{suffix}"], capture_output=True, check=True)
    (found,) = json.loads(done.stdout)
    key = {"png": "Parameters", "tif": "ImageDescription"}.get(suffix, "UserComment")
    assert found[key] == TEXTS["parameters"]
    assert found["DigitalSourceType"].endswith("trainedAlgorithmicMedia")
    assert "Warning" not in found


@pytest.mark.parametrize("format", ["webp", "avif"])
def test_a_format_that_pillow_lacks_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    monkeypatch.setattr("PIL.features.check", lambda feature: False)
    with pytest.raises(UsageError, match=f"lacks {format}"):
        check_picture(tmp_path / f"x.{format}", force=False)


@pytest.mark.skipif(shutil.which("pngcheck") is None, reason="pngcheck is not installed")
def test_pngcheck_finds_nothing_wrong(tmp_path: Path) -> None:
    write_picture(tmp_path / "x.png", [pixels(40, 30)], 30, 40, TEXTS, 300, force=False)
    done = subprocess.run(["pngcheck", "-v", tmp_path / "x.png"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "No errors detected" in done.stdout and "iCCP" in done.stdout


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_sd_parsers_reads_what_we_write(tmp_path: Path, suffix: str) -> None:
    sd_parsers = pytest.importorskip("sd_parsers")
    fields = {"Steps": 20, "Sampler": "Euler a", "CFG scale": 7.5, "Seed": 2**64 - 1, "Size": "16x16"}
    said = infotext("a (boat:1.2), harbour", "fog", fields | {"Model hash": "0123456789", "Model": "dream"})
    write_picture(tmp_path / f"x.{suffix}", [pixels(16, 16)], 16, 16, {"parameters": said}, force=False)
    found = sd_parsers.ParserManager().parse(tmp_path / f"x.{suffix}")
    assert [p.value for p in found.prompts] == ["a (boat:1.2), harbour"]
    assert [p.value for p in found.negative_prompts] == ["fog"]
    (sampler,), (model,) = found.samplers, found.models
    assert (sampler.name, sampler.parameters["seed"], sampler.parameters["steps"]) == ("Euler a", str(2**64 - 1), "20")
    assert (model.name, model.hash) == ("dream", "0123456789")
