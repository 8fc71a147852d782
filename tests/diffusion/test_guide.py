"""The size of the guide, and the enlargement of its latents and of its picture."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from tiler.diffusion.guide import GuideSize, crop_to_aspect, guide_size, upscale


def test_the_guides_latents_are_enlarged_as_torch_does_and_wrap() -> None:
    latents = torch.randn(1, 4, 8, 12)
    whole, neither = GuideSize(8, 12, 8.0, 12.0), (False, False)
    want = torch.nn.functional.interpolate(latents, size=(20, 30), mode="bicubic")
    assert torch.allclose(upscale(latents, whole, (20, 30), neither), want, atol=1e-5)
    middle = upscale(latents, GuideSize(8, 12, 8.0, 6.0), (20, 16), neither)
    assert torch.allclose(middle, upscale(latents, whole, (20, 32), neither)[..., 8:24], atol=1e-5)
    rolled = upscale(latents.roll((4, 6), (2, 3)), whole, (20, 30), (True, True))
    assert torch.allclose(rolled.roll((-10, -15), (2, 3)), upscale(latents, whole, (20, 30), (True, True)), atol=1e-5)


def test_guide_has_the_native_area_and_shows_the_canvass_aspect() -> None:
    assert guide_size((64, 64), 64, 8) is None
    square = guide_size((256, 256), 64, 8)
    assert square == (64, 64, 64.0, 64.0)
    assert guide_size((40, 100), 64, 8) == (40, 104, 40.0, 100.0)  # never larger than the canvas
    wide = guide_size((128, 256), 64, 8)
    assert wide is not None
    assert wide.height % 8 == wide.width % 8 == 0
    assert wide.shown_width / wide.shown_height == pytest.approx(2)
    assert wide.height >= wide.shown_height > wide.height - 8
    assert wide.width >= wide.shown_width > wide.width - 8


def _sharpened(source: np.ndarray, percent: int) -> Image.Image:
    return Image.fromarray(source).filter(ImageFilter.UnsharpMask(1, percent, threshold=0))


@pytest.mark.parametrize("sharpen", [0, 40])
@pytest.mark.parametrize(("height", "width"), [(300, 500), (31, 17), (97, 97), (1500, 943), (582, 366)])
def test_a_resized_picture_is_pillows_whatever_rows_are_asked_for(height: int, width: int, sharpen: int) -> None:
    source = np.random.default_rng(1).integers(70, 186, (97, 61, 3), dtype=np.uint8)  # nothing is clipped
    factor = min(97 / height, 61 / width)
    top, left = (97 - height * factor) / 2, (61 - width * factor) / 2
    box = left, top, left + width * factor, top + height * factor
    whole = _sharpened(source, sharpen if factor < 1 else 0)
    want = np.asarray(whole.resize((width, height), Image.Resampling.LANCZOS, box=box))
    got = crop_to_aspect(source, height, width, sharpen=sharpen)
    assert got.shape == want.shape
    for rows in (1, 7, height):
        strips = [got[at : at + rows] for at in range(0, height, rows)]
        assert np.abs(np.concatenate(strips).astype(int) - want).max() <= 1


@pytest.mark.parametrize("sharpen", [0, 100])
def test_a_picture_that_wraps_is_resized_as_its_copies_side_by_side(sharpen: int) -> None:
    source = np.random.default_rng(1).integers(0, 256, (40, 24, 3), dtype=np.uint8)
    copies = _sharpened(np.tile(source, (3, 3, 1)), sharpen).resize((3 * 72, 3 * 120), Image.Resampling.LANCZOS)
    got = crop_to_aspect(source, 120, 72, (40, 24), (True, True), margin=(16, 32), sharpen=sharpen)
    assert got.shape == (152, 136, 3)
    assert np.abs(got[0:152].astype(int) - np.asarray(copies)[104:256, 40:176]).max() <= 1


@pytest.mark.parametrize("sharpen", [0, 100])
def test_a_print_is_never_whole_in_memory(sharpen: int) -> None:
    """The pixels of a canvas of 8192×16384 take 400 MB; rows are made on demand."""
    tracemalloc.start()
    try:
        picture = crop_to_aspect(np.zeros((512, 1024, 3), np.uint8), 8192, 16384, sharpen=sharpen)
        for top in range(0, 1024, 64):
            assert picture[top : top + 64].shape == (64, 16384, 3)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("side", [48, 64])
def test_a_picture_that_does_not_become_larger_is_not_sharpened(side: int) -> None:
    source = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    got, plain = (crop_to_aspect(source, side, side, sharpen=n)[0:side] for n in (100, 0))
    assert np.array_equal(got, plain)


@pytest.mark.parametrize("how", ["pixel", "latent", "progressive"])
def test_an_option_sharpens_guides_that_are_enlarged_as_pictures(
    in_process: Any, tiny: Path, tmp_path: Path, how: str
) -> None:
    words = "render", "a", "--model", tiny, "--size", 176, "--steps", 2, "--seed", 3, "--guide-upscale", how, "-q", "-o"
    for name, more in ("plain", ()), ("none", ("--guide-sharpen", 0)), ("sharp", ("--guide-sharpen", 120)):
        assert (ran := in_process(*words, f"{name}.png", *more)).code == 0, ran.err
    plain, none, sharp = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("plain", "none", "sharp"))
    assert np.array_equal(plain, none)
    assert np.array_equal(plain, sharp) == (how == "latent")
    assert json.loads(Image.open(tmp_path / "sharp.png").info["tiler"])["guide_sharpen"] == 120
