"""Writers, checked by Pillow; latents, written by safetensors."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tiler.errors import StorageError, UsageError
from tiler.output.latents import LatentsFile
from tiler.output.picture import write_picture
from tiler.output.png import PngWriter
from tiler.request.paper import parse_length, sheet_pixels


def pictures() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 255, 61 * 83).reshape(61, 83, 1)
    return {
        "noise": rng.integers(0, 256, (61, 83, 3), dtype=np.uint8),
        "ramp": np.broadcast_to(ramp, (61, 83, 3)).astype(np.uint8),
        "flat": np.full((61, 83, 3), 200, np.uint8),
        "diagonal": ((np.indices((61, 83)).sum(0) % 256)[..., None] * np.array([1, 2, 3])).astype(np.uint8),
    }


@pytest.mark.parametrize("kind", ["noise", "ramp", "flat", "diagonal"])
@pytest.mark.parametrize("step", [1, 7, 61])
def test_pixels_texts_and_profile_survive(tmp_path: Path, kind: str, step: int) -> None:
    pixels, path = pictures()[kind], tmp_path / "x.png"
    wide = np.pad(pixels, ((0, 3), (0, 5), (0, 0)), mode="edge")  # what is beyond the picture is cut off
    strips = (wide[first : first + step] for first in range(0, 64, step))
    write_picture(path, strips, 83, 61, {"parameters": "a boat, ünïcode 🙂\nSteps: 2", "other": "{}"}, force=False)
    image = Image.open(path)
    assert image.info["parameters"] == "a boat, ünïcode 🙂\nSteps: 2"
    assert image.info["icc_profile"]
    assert np.array_equal(np.asarray(image), pixels)
    Image.open(path).verify()  # checksums


def test_files_are_about_as_small_as_pillows(tmp_path: Path) -> None:
    y, x = np.mgrid[0:256, 0:256]
    smooth = np.stack([128 + 100 * np.sin(x / 40 + k) * np.cos(y / 60) for k in range(3)], axis=-1).astype(np.uint8)
    write_picture(tmp_path / "ours.png", [smooth], 256, 256, {}, force=False)
    Image.fromarray(smooth).save(tmp_path / "pillow.png")
    assert (tmp_path / "ours.png").stat().st_size <= 1.1 * (tmp_path / "pillow.png").stat().st_size


def test_a_failure_leaves_no_file(tmp_path: Path) -> None:
    def rows() -> Iterator[np.ndarray]:
        yield np.zeros((4, 8, 3), np.uint8)
        raise OSError(28, "No space left on device")

    for name in ("x.png", "x.tif"):
        with pytest.raises(StorageError, match="No space left"):
            write_picture(tmp_path / name, rows(), 8, 8, {}, force=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("paper", "dpi", "landscape", "bleed", "want"),
    [
        ("A2", 300, False, "0mm", (4961, 7016)),
        ("a4", 150, True, "0mm", (1754, 1240)),
        ("B1", 100, False, "0mm", (2783, 3937)),
        ("letter", 100, False, "0.125in", (875, 1125)),
        ("60x40cm", 254, False, "3mm", (6060, 4060)),
        ("24x36in", 100, True, "0cm", (3600, 2400)),
    ],
)
def test_sheets_in_pixels(paper: str, dpi: float, landscape: bool, bleed: str, want: tuple[int, int]) -> None:
    assert sheet_pixels(paper, dpi, landscape=landscape, bleed_mm=parse_length(bleed)) == want


@pytest.mark.parametrize(
    ("paper", "bleed"), [("A11", "0mm"), ("postcard", "0mm"), ("0x4cm", "0mm"), ("A4", "3"), ("A4", "9cm")]
)
def test_papers_that_are_none(paper: str, bleed: str) -> None:
    with pytest.raises(UsageError):
        sheet_pixels(paper, 300, bleed_mm=parse_length(bleed))


def test_resolution_is_in_the_file(tmp_path: Path) -> None:
    for name in ("x.png", "x.tiff"):
        write_picture(tmp_path / name, [np.zeros((8, 8, 3), np.uint8)], 8, 8, {}, 300, force=False)
        assert Image.open(tmp_path / name).info["dpi"] == pytest.approx((300, 300), abs=0.01)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (256, 512), (300, 700), (513, 255)])
def test_tiff_is_tiled_and_complete(tmp_path: Path, height: int, width: int) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    strips = (pixels[first : first + 37] for first in range(0, height, 37))
    write_picture(tmp_path / "x.tif", strips, width, height, {"parameters": "ünïcode\nSteps: 2"}, force=False)
    image = Image.open(tmp_path / "x.tif")
    assert np.array_equal(np.asarray(image), pixels)
    assert image.tag_v2[322] == image.tag_v2[323] == 256  # type: ignore[attr-defined]
    assert image.info["icc_profile"]
    assert b"Steps: 2" in (tmp_path / "x.tif").read_bytes()


@pytest.mark.parametrize("bleed_mm", [0.0, 3.0])
def test_a_pdf_is_the_picture_with_its_boxes(tmp_path: Path, bleed_mm: float) -> None:
    from pypdf import PdfReader

    pixels, dpi = pictures()["noise"], 36.0
    strips = (pixels[first : first + 7] for first in range(0, 61, 7))
    write_picture(
        tmp_path / "x.pdf", strips, 83, 61, {"parameters": "ünïcode (1\nSteps: 2"}, dpi, bleed_mm, force=False
    )
    reader = PdfReader(tmp_path / "x.pdf", strict=True)
    (page,) = reader.pages
    assert [float(v) for v in page.mediabox] == pytest.approx([0, 0, 166, 122])
    assert page.bleedbox == page.mediabox
    edge = bleed_mm / 25.4 * 72
    assert [float(v) for v in page.trimbox] == pytest.approx([edge, edge, 166 - edge, 122 - edge], abs=1e-3)
    image = page.images[0].image
    assert image is not None
    assert np.array_equal(np.asarray(image), pixels)
    assert reader.metadata is not None
    assert reader.metadata.subject == "ünïcode (1\nSteps: 2"


def test_memory_does_not_grow_with_the_picture() -> None:
    """13,000 pixels wide, from a synthetic source: the writers hold rows, not 58 MB of pixels."""
    code = """
import tempfile
from pathlib import Path
import numpy as np
from tiler.memory.process import read_rss
from tiler.output.picture import write_picture
import tifffile, PIL.ImageCms
strip = np.broadcast_to(np.arange(13000, dtype=np.uint8)[None, :, None], (64, 13000, 3))
with tempfile.TemporaryDirectory() as folder:
    for suffix in (".png", ".jpg", ".tif", ".pdf"):
        write_picture(Path(folder) / ("y" + suffix), [strip[:, :256]], 256, 64, {}, force=False)
    base, height = read_rss().now, 1500
    for suffix in (".png", ".jpg", ".tif", ".pdf"):
        write_picture(Path(folder) / ("x" + suffix), (strip for _ in range(0, height, 64)), 13000, height, {}, force=False)
print(read_rss().peak - base)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 40_000_000


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_latents_are_read_from_their_file_by_rows(tmp_path: Path, dtype: torch.dtype) -> None:
    want = torch.randn(1, 4, 37, 11).to(dtype)
    path = tmp_path / "z.safetensors"
    save_file({"before": torch.zeros(3, dtype=torch.uint8), "latents": want}, path)
    with LatentsFile(path, lambda rows: rows.mul_(2)) as latents:
        latents.check(4, "a model")
        assert latents.shape == want.shape
        for rows in (slice(0, 5), slice(30, 40), slice(None), slice(7, 7)):
            assert torch.equal(latents[:, :, rows], 2 * want.float()[:, :, rows])
        os.truncate(path, path.stat().st_size - 8)
        with pytest.raises(StorageError, match="shorter"):
            latents[:, :, 30:]
    with pytest.raises(UsageError, match="short"):
        LatentsFile(path)


def test_a_png_does_not_depend_on_how_many_rows_come_at_a_time(tmp_path: Path) -> None:
    """If an interrupted decode continues in the middle of a strip, the file is still the same."""
    pixels = np.random.default_rng(0).integers(0, 255, (40, 3000, 3), np.uint8)
    files = []
    for cuts in ([40], [4] * 10, [3, 1, 6, 2, 2, 26]):
        with (tmp_path / "x.png").open("wb") as file:
            writer = PngWriter(file, 3000, 40, {})
            for part in np.split(pixels, np.cumsum(cuts)[:-1]):
                writer.write(part)
            writer.close()
        files.append((tmp_path / "x.png").read_bytes())
    assert files[0] == files[1] == files[2] and files[0].count(b"IDAT") > 3
    assert np.array_equal(np.asarray(Image.open(tmp_path / "x.png")), pixels)
