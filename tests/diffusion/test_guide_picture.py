"""Pictures of all common kinds against Pillow's conversion of the whole image; memory against the kernel's mark."""

from __future__ import annotations

import struct
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from PIL import Image, ImageCms, ImageOps

from tiler.diffusion.guide_picture import GuidePicture
from tiler.errors import UsageError

CANVAS = (64, 64)


def load(path: Path, canvas: tuple[int, int] = CANVAS) -> tuple[np.ndarray, list[str]]:
    notes: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with GuidePicture(path, canvas) as picture:
            pixels = picture.load(notes.append)
            assert pixels.shape == picture.shape
            assert pixels.nbytes == picture.kept_bytes < picture.peak_bytes
    return pixels, notes


def colours(height: int = 40, width: int = 30) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("turn", range(9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
def test_pictures_are_upright(tmp_path: Path, turn: int, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(colours()).save(path, exif=exif, lossless=True)
    with Image.open(path) as picture:
        want = np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    assert np.array_equal(load(path)[0], want)


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0", b"Exif\0\0II*\0", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01", b"nonsense",
        b"Exif\0\0II*\0\x08\0\0\0\x02\0" + struct.pack("<HHII", 0x8769, 4, 1, 2**31) + struct.pack("<HHII", 0x9999, 77, 2**31, 2**31),
    ],
)  # fmt: skip
def test_odd_exif_is_no_fault(tmp_path: Path, exif: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("x.png", "x.jpg"):
        Image.fromarray(colours()).save(tmp_path / name, exif=exif)
        assert load(tmp_path / name)[0].shape == (40, 30, 3)
    assert capfd.readouterr() == ("", "")


def test_the_orientation_is_read_beside_broken_tags(tmp_path: Path) -> None:
    tags = struct.pack("<HHII", 0x010F, 2, 2**31, 2**31) + struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    Image.fromarray(colours()).save(tmp_path / "x.png", exif=b"Exif\0\0II*\0\x08\0\0\0\x02\0" + tags)
    assert np.array_equal(load(tmp_path / "x.png")[0], np.rot90(colours(), -1))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "L", "RGB"])
def test_transparent_parts_lie_on_white(tmp_path: Path, mode: str) -> None:
    path, options = tmp_path / ("x.tif" if mode == "PA" else "x.png"), dict[str, Any]()
    picture = Image.fromarray(colours())
    alpha = Image.fromarray(np.linspace(0, 255, 1200).astype(np.uint8).reshape(40, 30))
    if mode in ("RGBA", "LA"):
        picture = picture.convert(mode)
        picture.putalpha(alpha)
    elif mode == "PA":
        pytest.importorskip("PIL.WebPImagePlugin")
        path = tmp_path / "x.webp"
        picture.putalpha(alpha)
        options = {"lossless": True, "exact": True}
    else:
        picture = picture.quantize(8) if mode == "P" else picture.convert(mode)
        pixel = picture.getpixel((0, 0))
        options = {"transparency": pixel}
    picture.save(path, **options)
    with Image.open(path) as opened:
        rgba = np.asarray(opened.convert("RGBA")).astype(float)
    want = rgba[..., :3] * rgba[..., 3:] / 255 + 255 - rgba[..., 3:]
    pixels, notes = load(path)
    assert abs(pixels - want).max() <= 1
    assert "white" in notes[0]
    Image.fromarray(colours()).convert("RGBA").save(tmp_path / "opaque.png")
    assert load(tmp_path / "opaque.png")[1] == []


def wide_profile() -> bytes:
    """sRGB with its red and green primaries exchanged: a profile with an unmistakable effect."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for at in range(132, 132 + 12 * struct.unpack_from(">I", data, 128)[0], 12):
        data[at : at + 4] = {b"rXYZ": b"gXYZ", b"gXYZ": b"rXYZ"}.get(bytes(data[at : at + 4]), data[at : at + 4])
    return bytes(data)


def test_profiles_become_srgb(tmp_path: Path) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(colours()).save(tmp_path / "s.png", icc_profile=srgb)
    pixels, notes = load(tmp_path / "s.png")
    assert np.array_equal(pixels, colours()) and notes == []
    Image.fromarray(colours()).save(tmp_path / "w.png", icc_profile=wide_profile())
    pixels, notes = load(tmp_path / "w.png")
    assert abs(pixels.astype(int) - colours()[..., [1, 0, 2]]).max() <= 3
    assert "sRGB" in notes[0]
    for bad in (b"none", srgb[:200]):
        Image.fromarray(colours()).save(tmp_path / "b.png", icc_profile=bad)
        pixels, notes = load(tmp_path / "b.png")
        assert np.array_equal(pixels, colours()) and "cannot be used" in notes[0]


@pytest.mark.parametrize("white", [1.0, 255.0, 65535.0])
@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_deep_pictures_keep_their_tones(tmp_path: Path, dtype: Any, white: float) -> None:
    want = np.arange(256, dtype=np.uint8).reshape(16, 16)
    white = 2.0**32 - 1 if dtype is np.int32 and white == 1 else white
    values = want / 255 * white
    stored = values.astype(np.uint32).view(np.int32) if dtype is np.int32 else values.astype(np.float32)
    if dtype is np.float32:
        stored[0, 0] = np.nan
    Image.fromarray(stored).save(tmp_path / "x.tif")
    pixels, notes = load(tmp_path / "x.tif")
    assert abs(pixels.astype(int) - want[..., None]).max() <= 1
    assert "white" in notes[0]


def test_sixteen_bits_are_no_fault(tmp_path: Path) -> None:
    want = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for name in ("x.png", "x.tif"):
        Image.fromarray(want.astype(np.uint16) * 257).save(tmp_path / name)
        assert np.array_equal(load(tmp_path / name)[0], np.repeat(want[..., None], 3, 2))


def test_a_hostile_picture_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (5000, 5000)).save(tmp_path / "huge.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "huge.png").read_bytes()[:200])
    Image.new("RGB", (64, 48)).save(tmp_path / "small.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "small.jpg").read_bytes()[:-40])
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "x.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64))
    Image.new("RGB", (8, 8)).save(tmp_path / "x.eps")
    for name in ("huge.png", "cut.png", "cut.jpg", "text.png", "missing.png", "", "x.heic", "x.eps"):
        with pytest.raises(UsageError) as caught:
            load(tmp_path / name)
        assert len(str(caught.value).splitlines()) == 1
    for error in (struct.error("odd"), ZeroDivisionError(), KeyError(3), RecursionError("deep")):

        def fail(*args: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(Image.Image, "crop", fail)
        with pytest.raises(UsageError, match="cannot be read"):
            load(tmp_path / "small.jpg")


@pytest.mark.parametrize(
    ("mode", "compression"),
    [(mode, None) for mode in ("CMYK", "P", "L", "RGBA", "I;16", "1", "LAB", "YCbCr")] + [("YCbCr", "jpeg")],
)
def test_other_modes_are_read(tmp_path: Path, mode: str, compression: str | None) -> None:
    if (mode, compression) == ("YCbCr", None) and int(PIL.__version__.split(".")[0]) < 13:
        pytest.skip("Pillow reads uncompressed YCbCr since version 13")
    Image.new(mode, (40, 20)).save(tmp_path / "x.tiff", compression=compression)
    assert load(tmp_path / "x.tiff")[0].shape == (20, 40, 3)


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "p.jpg", "x.webp", "x.tif", "a.png"])
def test_much_larger_than_the_canvas_is_held_small(tmp_path: Path, name: str) -> None:
    y, x = np.mgrid[0:2048, 0:2048]
    pixels = np.stack([128 + 100 * np.sin(x / 90 + k) * np.cos(y / 70) for k in range(3)], axis=-1).astype(np.uint8)
    picture = Image.fromarray(pixels)
    if name == "a.png":
        picture.putalpha(128)
    picture.save(tmp_path / name, progressive=name == "p.jpg", compression="tiff_lzw" if name == "x.tif" else None)
    small, _ = load(tmp_path / name, (256, 256))
    assert small.shape == (512, 512, 3)
    with Image.open(tmp_path / name) as opened:
        white = Image.new("RGBA", opened.size, "white")
        want = np.asarray(Image.alpha_composite(white, opened.convert("RGBA")).convert("RGB").reduce(4))
    assert abs(small.astype(int) - want).max() <= 6
    code = f"""
from pathlib import Path
from tiler.diffusion.guide_picture import GuidePicture
from tiler.memory.process import frugal_allocator, read_rss
frugal_allocator()
from PIL import Image
Image.new("RGB", (64, 64)).save("tiny.{name[-3:]}" if {name!r} != "x.webp" else "tiny.webp")
with GuidePicture(Path("tiny.{name[-3:]}" if {name!r} != "x.webp" else "tiny.webp"), (64, 64)) as picture:
    picture.load(print)
with GuidePicture(Path({name!r}), (256, 256)) as picture:
    before = read_rss().now
    kept = picture.load(lambda text: None)
    print(read_rss().peak - before, picture.peak_bytes)
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    rise, planned = map(int, ran.stdout.split())
    assert rise <= planned + 3_000_000
    assert planned <= {"x.jpg": 20_000_000, "p.jpg": 45_000_000, "x.webp": 90_000_000, "x.tif": 50_000_000}.get(
        name, 30_000_000
    )
