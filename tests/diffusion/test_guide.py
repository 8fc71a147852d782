"""The size of the guide, and the enlargement of its latents."""

from __future__ import annotations

import pytest
import torch

from tiler.diffusion.guide import GuideSize, guide_size, upscale


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
