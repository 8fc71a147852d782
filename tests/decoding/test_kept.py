"""Decodes without passes, `frozen` and `tiny`, and encodes continue at a row, with the same bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny

from tiler.compute.layers import stream_layers
from tiler.compute.stream import Streamer
from tiler.decoding import frozen, held, method, spool
from tiler.decoding.kept import KeptRows
from tiler.decoding.method import ScratchSpace, choose
from tiler.decoding.rows import Stage, decoder_stages
from tiler.decoding.scratch import Scratch
from tiler.decoding.spool import Spool
from tiler.models import family as families
from tiler.pixels import decode_pixels
from tiler.request import Decode, Wrap
from tiler.run import streamed
from tiler.weights.checkpoint import resolve

Made = TypeVar("Made")


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
    make: Callable[[Callable[[str], None], Spool], Made], folder: Path, stops: Iterable[int], what: str = "the decoder"
) -> tuple[Made, list[int]]:
    """The result of a run that is stopped at the checks `stops`, each time from the start, and the number of checks in
    each run."""
    checks, taken = 0, []
    for stop in (*stops, -1):
        checks = 0

        def check(where: str, stop: int = stop) -> None:
            nonlocal checks
            checks += 1
            if checks == stop:
                raise _Stopped

        try:
            made = make(check, Spool(folder, what, "this one"))
            taken.append(checks)
        except _Stopped:
            taken.append(checks)
    return made, taken


@pytest.mark.parametrize(("width", "wrap"), [(100, Wrap.NONE), (20, Wrap.XY)])
def test_frozen_goes_on_at_a_row(tiny: Path, tmp_path: Path, width: int, wrap: Wrap) -> None:
    """With bands side by side, and with margins."""
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
    strips, taken = stopped_again_and_again(make, tmp_path / "spool", steps)
    assert [strip.shape for strip in strips] == [strip.shape for strip in whole]
    assert all(np.array_equal(one, other) for one, other in zip(strips, whole, strict=True))
    assert taken[-1] < len(in_all) // 2  # most was there
    assert spool.where_in(tmp_path / "spool") == f"row {sum(map(len, whole))} of the decoder"


def test_a_line_of_the_journal_does_not_grow_with_the_picture(tmp_path: Path) -> None:
    """Thousands of strips, as in a picture of 100,000 px: their heights are restored, and the last line is short."""
    heights = [5, *[8] * 3000, 3]
    made = Spool(tmp_path, "the decoder", "this one")
    with KeptRows(made, 2) as kept:
        for number, height in enumerate(heights):
            kept.add(np.full((height, 2, 3), number % 251, np.uint8))
    assert len((tmp_path / spool.JOURNAL).read_bytes().splitlines()[-1]) < 500
    with KeptRows(Spool(tmp_path, "the decoder", "this one"), 2) as kept:
        strips = list(kept.strips())
    assert [len(strip) for strip in strips] == heights and kept.count == sum(heights)
    assert all((strip == number % 251).all() for number, strip in enumerate(strips))


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
    strips, taken = stopped_again_and_again(make, tmp_path / "spool", steps)
    assert [strip.shape for strip in strips] == [strip.shape for strip in whole]
    assert all(np.array_equal(one, other) for one, other in zip(strips, whole, strict=True))
    assert taken[-1] < len(in_all)


def test_an_autoencoder_without_attention_remembers_its_norms(tmp_path: Path) -> None:
    """Like mini's: rows are kept, and the norms' statistics are restored to the last bit."""
    family = families.read_family(resolve("mini"))

    def stages() -> list[Stage]:
        vae = families.build_vae(family.autoencoder)
        return decoder_stages(vae.decoder, vae.post_quant_conv)

    def scratch() -> Scratch:
        return Scratch(tmp_path, torch.float16, Spool(tmp_path / "spool", "the decoder", "this one"))

    first, again = stages(), stages()
    for norm in held._norms(first):
        norm.held = torch.rand(norm.norm.num_groups).double(), torch.rand(norm.norm.num_groups).double()
    with scratch() as disk:
        assert not held.recall(first, disk)
        held.remember(first, disk)
    with scratch() as disk:
        assert held.recall(again, disk)
    for norm, other in zip(held._norms(first), held._norms(again), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(norm.held, other.held, strict=True))


class _Watched:
    """A picture that records the first row of each slice that is read."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels, self.shape, self.tops = pixels, pixels.shape, list[int]()

    def __getitem__(self, rows: slice) -> np.ndarray:
        self.tops.append(rows.start)
        return self.pixels[rows]


def test_encoding_goes_on_at_a_row(tiny: Path, tmp_path: Path) -> None:
    """In its band, without measuring again; finished bands and rows are not encoded again."""
    family = families.read_family(resolve(str(tiny)))
    planned, streamer = families.build_vae(family.autoencoder), Streamer(None)
    stream_layers(planned, streamer)
    space = ScratchSpace(tmp_path, 2**60)
    plan = choose(Decode.FROZEN, planned, streamer, (130, 38), space, encoding=True, wrap=Wrap.X)
    y, x = plan.margin_pixels
    noise = np.random.default_rng(0).integers(0, 256, (1040, 304, 3), dtype=np.uint8)
    pixels = _Watched(np.pad(noise, ((y, y), (x, x), (0, 0)), mode="wrap"))

    def make(check: Callable[[str], None], kept: Spool | None) -> torch.Tensor:
        real = families.build_vae(family.autoencoder)
        pixels.tops.clear()
        with streamed(real, family.autoencoder.weights, families.vae_names) as opened:
            options = {"check": check, "progress": lambda share: None, "spool": kept}
            return method.encode(plan, real, opened, pixels, **options)

    in_all: list[str] = []
    whole = make(in_all.append, None)
    assert whole.shape == (1, 4, 130, 38) and len(frozen.bands(38 + 2 * plan.margin[1])) == 2
    steps = 6 * len(in_all) // 10, 35 * len(in_all) // 100  # in the second band
    got, taken = stopped_again_and_again(make, tmp_path / "spool", steps, "the guide's picture")
    assert torch.equal(got, whole)
    assert taken[-1] < len(in_all) // 2
    assert pixels.tops == sorted(pixels.tops) and pixels.tops[0] > 0  # no measurement, one band, and not all of it
    assert spool.where_in(tmp_path / "spool").startswith("band ")
    make(lambda where: pytest.fail("encodes again"), Spool(tmp_path / "spool", "the guide's picture", "this one"))


def test_a_decoder_that_has_begun_is_where_a_job_stands(tmp_path: Path) -> None:
    """Its canvas is complete, though no pass is."""
    assert spool.where_in(tmp_path / "spool") == ""
    spool.Spool(tmp_path / "spool", "the decoder", "frozen")
    assert spool.where_in(tmp_path / "spool") == "the beginning of the decoder"
