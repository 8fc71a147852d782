"""Decodes without passes, `frozen` and `tiny`, go on at a row, with the same bits in the same strips."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny

from tiler.compute.layers import stream_layers
from tiler.compute.stream import Streamer
from tiler.decoding import frozen, spool
from tiler.decoding.method import ScratchSpace, choose
from tiler.decoding.spool import Spool
from tiler.models import family as families
from tiler.pixels import decode_pixels
from tiler.request import Decode, Wrap
from tiler.run import streamed
from tiler.weights.checkpoint import resolve


class _Stopped(Exception):
    pass


@pytest.fixture(autouse=True)
def _no_grad(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(spool, "_PART_EVERY", 0.0)
    monkeypatch.setattr(frozen, "SAMPLE_SIDE", 32)  # less than the picture
    monkeypatch.setattr(frozen, "HELD_TOKENS", 256)  # not each of its tokens
    monkeypatch.setattr(frozen, "BAND", 72)
    with torch.no_grad():
        yield


def latents(height: int, width: int) -> torch.Tensor:
    return torch.randn(1, 4, height, width, generator=torch.Generator().manual_seed(1))


def stopped_again_and_again(
    make: object, whole: list[np.ndarray], folder: Path, stops: range
) -> tuple[list[np.ndarray], list[int]]:
    """The strips of a decode that is stopped at the checks `stops`, each run from the start; and how many checks each
    took."""
    checks, taken = 0, []
    for stop in (*stops, -1):
        checks = 0

        def check(where: str, stop: int = stop) -> None:
            nonlocal checks
            checks += 1
            if checks == stop:
                raise _Stopped

        try:
            strips = list(make(check, Spool(folder, "the decoder", "this one")))
            taken.append(checks)
        except _Stopped:
            taken.append(checks)
    return strips, taken


@pytest.mark.parametrize(("width", "wrap"), [(100, Wrap.NONE), (20, Wrap.XY)])
def test_frozen_goes_on_at_a_row(tiny: Path, tmp_path: Path, width: int, wrap: Wrap) -> None:
    """Bands that lie side by side, and margins."""
    family = families.read_family(resolve(str(tiny)))
    z, streamer = latents(150, width), Streamer(None)
    vae = families.build_vae(family.autoencoder)
    stream_layers(vae, streamer)
    space = ScratchSpace(tmp_path, 2**60)
    plan = choose(Decode.FROZEN, vae, streamer, (150, width), space, encoding=False, wrap=wrap)

    def make(check: object, kept: Spool | None) -> list[np.ndarray]:
        real = families.build_vae(family.autoencoder)
        with streamed(real, family.autoencoder.weights, families.vae_names) as opened:
            return list(decode_pixels(plan, real, opened, z, check, lambda share: None, kept))

    whole = make(lambda where: None, None)
    in_all: list[str] = []
    make(in_all.append, None)
    steps = range(len(in_all) // 2, len(in_all), len(in_all) // 3)
    strips, taken = stopped_again_and_again(make, whole, tmp_path / "spool", steps)
    assert [strip.shape for strip in strips] == [strip.shape for strip in whole]
    assert all(np.array_equal(one, other) for one, other in zip(strips, whole, strict=True))
    assert taken[-1] < len(in_all) // 2  # most was there


def test_tiny_goes_on_at_a_row(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        num_encoder_blocks=(1, 1, 1, 1), num_decoder_blocks=(1, 1, 1, 1),
    ).eval()  # fmt: skip
    z, space = latents(200, 16), ScratchSpace(tmp_path, 2**60)
    plan = choose(Decode.TINY, vae.to("meta"), Streamer(None), (200, 16), space, encoding=False)
    torch.manual_seed(0)
    vae = vae.to_empty(device="cpu")
    for parameter in vae.parameters():
        parameter.copy_(torch.randn(parameter.shape) / 8)

    def make(check: object, kept: Spool | None) -> list[np.ndarray]:
        return list(decode_pixels(plan, vae, Streamer(None), z, check, lambda share: None, kept))

    whole = make(lambda where: None, None)
    in_all: list[str] = []
    make(in_all.append, None)
    steps = range(len(in_all) // 3, len(in_all), len(in_all) // 3)
    strips, taken = stopped_again_and_again(make, whole, tmp_path / "spool", steps)
    assert [strip.shape for strip in strips] == [strip.shape for strip in whole]
    assert all(np.array_equal(one, other) for one, other in zip(strips, whole, strict=True))
    assert taken[-1] < len(in_all)
