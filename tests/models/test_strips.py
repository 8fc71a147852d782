"""Convolutions in strips against the same layers on the whole input."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from safetensors.torch import save_file
from torch import Tensor

from tiler.models import strips
from tiler.models.blocks import Resnet
from tiler.models.family import plain_names
from tiler.models.meta import on_meta
from tiler.run import streamed
from tiler.weights.index import read_index


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Strips of 8 rows."""
    monkeypatch.setattr(strips, "STRIP_ELEMENTS", 1)
    with torch.no_grad():
        yield


@pytest.mark.parametrize("height", [8, 32, 36])
@pytest.mark.usefixtures("small")
def test_a_resnet_of_joined_parts_by_strips_is_diffusers_own(height: int) -> None:
    """Groups of 6 channels, one of which crosses the seam at 32; the last strip of 36 rows starts inside the one
    before."""
    torch.manual_seed(1)
    block = ResnetBlock2D(in_channels=48, out_channels=16, temb_channels=24, groups=8).eval()
    for norm in (block.norm1, block.norm2):
        norm.weight.normal_(1, 0.3)
        norm.bias.normal_(0, 0.3)
    hidden, skip, temb = 3 + 2 * seeded(2, 32, height, 12), seeded(2, 16, height, 12, seed=1), seeded(2, 24, seed=2)
    want = block(torch.cat([hidden, skip], dim=1), temb)
    got = Resnet(block, 0)(hidden, temb, skip)
    assert torch.allclose(got, want, atol=2e-5 * float(want.abs().max()))
    alone = Resnet(block, 0)(hidden[1:], temb[1:], skip[1:])
    assert torch.equal(alone, got[1:])


@pytest.mark.parametrize("height", [4, 16, 18])
@pytest.mark.usefixtures("small")
def test_an_enlarged_convolution_by_strips_is_diffusers_own(height: int) -> None:
    torch.manual_seed(1)
    upsampler = Upsample2D(24, use_conv=True, out_channels=24).eval()
    x = seeded(2, 24, height, 10)
    want = upsampler(x)
    assert torch.allclose(strips.Enlarged(upsampler)(x), want, atol=1e-5 * float(want.abs().max()))


@torch.no_grad()
def test_weights_that_are_held_serve_every_strip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide enough for transformed convolutions; the second strip starts inside the first."""
    monkeypatch.setattr(strips, "STRIP_ELEMENTS", 512 * 32 * 32)
    torch.manual_seed(1)
    sizes = {"in_channels": 512, "out_channels": 256, "temb_channels": 64}
    block = ResnetBlock2D(**sizes).eval()
    save_file(block.state_dict(), tmp_path / "model.safetensors")
    inputs = seeded(1, 320, 40, 32), seeded(1, 64, seed=2), seeded(1, 192, 40, 32, seed=1)
    want = block(torch.cat([inputs[0], inputs[2]], dim=1), inputs[1])
    results = []
    for arena in (None, 2**20):
        with on_meta():
            module = ResnetBlock2D(**sizes).eval()
        index = read_index(tmp_path / "model.safetensors")
        with streamed(module, index, plain_names, arena_bytes=arena, transform=True) as streamer:
            results += streamer.run(Resnet(module, 0), [inputs])
    assert torch.allclose(results[0], want, atol=3e-5 * float(want.abs().max()))
    assert torch.equal(*results)


def test_strips_are_of_one_size_and_each_row_is_fresh_once() -> None:
    cut = list(strips.strips(960, 100, 128))
    assert {strip.last - strip.top for strip in cut} == {8}
    assert [row for strip in cut for row in range(strip.fresh, strip.last)] == list(range(100))


def test_sd_never_goes_by_strips(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bytes are those of a norm over the whole tensor, however large a tile is."""
    from tiler.models.built import Models
    from tiler.models.family import Role, read_family
    from tiler.planning.peaks import DenoiserPeaks
    from tiler.request import Precision
    from tiler.weights.checkpoint import resolve

    def fail(*args: object, **more: object) -> Tensor:
        pytest.fail("a strip")

    monkeypatch.setattr(strips, "_convolved", fail)
    family = read_family(resolve(str(tiny)))
    assert family.part(Role.DENOISER)
    assert DenoiserPeaks(Models(family), Precision.FP32).activations((0,), 512, 512) > 10**8
