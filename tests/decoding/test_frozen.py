"""The decoder that works row by row against diffusers' AutoencoderKL: exact if its statistics are, and never with
seams."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from tiler.compute.layers import stream_layers
from tiler.compute.stream import Streamer
from tiler.decoding import frozen
from tiler.decoding import method as method
from tiler.decoding import tiny as tiny_decoder
from tiler.decoding.method import ScratchSpace
from tiler.decoding.pictures import to_tensor, to_uint8
from tiler.decoding.rows import REACH, decoder_stages, flow
from tiler.decoding.scratch import Scratch
from tiler.models import family as families
from tiler.request import Decode, ScratchDtype, Wrap
from tiler.run import streamed
from tiler.weights.checkpoint import resolve


def smooth_latents(height: int, width: int) -> torch.Tensor:
    coarse = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")


@pytest.mark.parametrize("size", [(32, 32), (31, 27), (8, 45), (1, 1), (2, 3)])
@torch.no_grad()
def test_small_pictures_decode_as_diffusers_does(
    tiny: Path, reference: AutoencoderKL, tmp_path: Path, size: tuple[int, int]
) -> None:
    """Up to 64×64 latents, the held statistics are the picture's own, and the streamed decode is the whole-image
    decode."""
    latents = smooth_latents(*size)
    family = families.read_family(resolve(str(tiny)))
    vae = families.build_vae(family.autoencoder)
    with streamed(vae, family.autoencoder.weights, families.vae_names) as streamer:
        disk = Scratch(tmp_path, torch.float32)
        got = torch.cat(list(frozen.decode(vae, latents, disk, hold=streamer.hold, rows=3)), dim=1)
    want = reference.decode(latents).sample[0]
    assert got.shape == want.shape
    assert (got - want).abs().max() <= 1e-4


@torch.no_grad()
def test_given_true_statistics_a_large_picture_is_exact(tiny: Path, reference: AutoencoderKL, tmp_path: Path) -> None:
    """With statistics of the whole picture instead of a sample, the row pipeline equals diffusers' decoder: no seam, no
    halo."""
    latents = smooth_latents(70, 50)
    family = families.read_family(resolve(str(tiny)))
    vae = families.build_vae(family.autoencoder)
    with streamed(vae, family.autoencoder.weights, families.vae_names) as streamer:
        stages = decoder_stages(vae.decoder, vae.post_quant_conv)
        frozen._measure(stages, latents, Scratch(tmp_path, torch.float32), streamer.hold, lambda where: None)
        got = torch.cat(
            list(frozen._stream(stages, iter(latents.split(4, dim=2)), 70, lambda where: None, lambda share: None)),
            dim=1,
        )
    want = reference.decode(latents).sample[0]
    assert (got - want).abs().max() <= 2e-4


@torch.no_grad()
@pytest.mark.parametrize("kind", [Decode.EXACT, Decode.SAMPLED, Decode.FROZEN])
def test_a_picture_that_wraps_joins_itself(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Decode
) -> None:
    """At the join of two copies, the picture is what it would be if the join were elsewhere."""
    monkeypatch.setattr(method, "TOKENS", 500)  # sampled attends to every third token each way
    monkeypatch.setattr(frozen, "SAMPLE_SIDE", 96)  # frozen measures less than the whole
    height, width = (96, 120) if kind is Decode.FROZEN else (48, 60)
    latents = smooth_latents(height, width)
    family = families.read_family(resolve(str(tiny)))
    vae, streamer = families.build_vae(family.autoencoder), Streamer(None)
    stream_layers(vae, streamer)

    def decode(latents: torch.Tensor, wrap: Wrap) -> torch.Tensor:
        how = method.choose(
            kind,
            vae,
            streamer,
            (height, width),
            ScratchSpace(tmp_path, 10**12, ScratchDtype.FP32),
            encoding=False,
            wrap=wrap,
        )
        own = families.build_vae(family.autoencoder)
        with streamed(own, family.autoencoder.weights, families.vae_names) as loaded:
            strips = method.decode(how, own, loaded, latents, check=lambda _: None, progress=lambda _: None)
            return torch.cat(list(strips), dim=1)

    got = {wrap: decode(latents, wrap) for wrap in (Wrap.NONE, Wrap.XY)}
    down, right = height // 2, width // 2
    moved = {
        wrap: decode(latents.roll((down, right), (2, 3)), wrap).roll((-8 * down, -8 * right), (1, 2)) for wrap in got
    }
    at_join = {}
    for wrap in got:
        difference = (got[wrap] - moved[wrap]).abs()
        at_join[wrap] = max(float(difference[:, :8].mean()), float(difference[:, :, :8].mean()))
    if kind is not Decode.FROZEN:
        assert at_join[Wrap.NONE] > 0.1
        assert at_join[Wrap.XY] <= 1e-5
    else:  # a sample of the moved picture is another sample
        assert at_join[Wrap.XY] < 0.25 * at_join[Wrap.NONE]


@torch.no_grad()
def test_strips_do_not_show(tiny: Path, tmp_path: Path) -> None:
    """Except for fp32's last bits, the picture does not depend on the number of rows pushed at a time."""
    latents = smooth_latents(48, 40)
    family = families.read_family(resolve(str(tiny)))
    vae = families.build_vae(family.autoencoder)
    with streamed(vae, family.autoencoder.weights, families.vae_names) as streamer:
        options = {"scratch": Scratch(tmp_path), "hold": streamer.hold}
        results = [torch.cat(list(frozen.decode(vae, latents, rows=n, **options)), dim=1) for n in (1, 5, 48)]
    assert all((r - results[0]).abs().max() <= 1e-4 for r in results)


@pytest.mark.parametrize("width", [1, 511, 512, 513, 1024, 1500, 4096, 30000])
def test_bands_keep_every_column_once_and_see_what_a_convolution_sees(width: int) -> None:
    kept = []
    for band in frozen.bands(width):
        assert band.last - band.first <= frozen.BAND
        kept += range(band.first, band.last)[band.keep]
        assert band.first == 0 or band.keep.start == REACH
        assert band.last == width or band.last - band.first - band.keep.stop == REACH
    assert kept == list(range(width))


@torch.no_grad()
def test_bands_do_not_show(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Except for fp32's last bits, a wide picture equals one made in one piece, in both directions."""
    latents = smooth_latents(30, 150)
    pixels = np.random.default_rng(0).integers(0, 256, (240, 1200, 3), dtype=np.uint8)
    family = families.read_family(resolve(str(tiny)))
    results = {}
    for band in (512, 60):
        monkeypatch.setattr(frozen, "BAND", band)
        vae, shares = families.build_vae(family.autoencoder), [0.0]
        with streamed(vae, family.autoencoder.weights, families.vae_names) as streamer:
            options = {"scratch": Scratch(tmp_path, torch.float32), "hold": streamer.hold, "progress": shares.append}
            picture = torch.cat(list(frozen.decode(vae, latents, **options)), dim=1)
            assert shares == sorted(shares)
            assert shares[-1] == pytest.approx(1)
            results[band] = picture, frozen.encode(vae, pixels, **options)
    assert len(frozen.bands(150)) == 5
    for whole, joined in zip(*results.values(), strict=True):
        assert whole.shape == joined.shape
        assert (whole - joined).abs().max() <= 1e-4


@torch.no_grad()
def test_encoding_equals_diffusers(tiny: Path, reference: AutoencoderKL, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (248, 200, 3), dtype=np.uint8)
    family = families.read_family(resolve(str(tiny)))
    vae = families.build_vae(family.autoencoder)
    with streamed(vae, family.autoencoder.weights, families.vae_names) as streamer:
        got = frozen.encode(vae, pixels, Scratch(tmp_path, torch.float32), hold=streamer.hold)
    want = reference.encode(to_tensor(pixels)).latent_dist.mean
    assert got.shape == want.shape == (1, 4, 31, 25)
    assert (got - want).abs().max() <= 1e-4


@pytest.mark.parametrize("size", [(128, 128), (40, 400), (256, 256), (200, 120), (9, 4000), (4000, 3), (512, 1024)])
def test_a_sample_is_blocks_from_all_over_the_picture(size: tuple[int, int]) -> None:
    taken = frozen.sample(*size)
    assert len(taken[0]) * len(taken[1]) <= 128 * 128
    for length, index in zip(size, taken, strict=True):
        assert bool((index.diff() > 0).all())
        if len(index) < length:
            assert len(index) % frozen.BLOCK == 0
            starts = index[:: frozen.BLOCK]
            assert torch.equal(index, (starts[:, None] + torch.arange(frozen.BLOCK)).flatten())
            assert len(starts) == 1 or (int(starts[0]), int(index[-1])) == (0, length - 1)
    if size[0] * size[1] <= 128 * 128:
        assert tuple(map(len, taken)) == size
    else:
        assert len(taken[0]) * len(taken[1]) >= 0.75 * 128 * 128


def test_pixels_round_as_diffusers_rounds() -> None:
    from diffusers.image_processor import VaeImageProcessor

    strip = torch.linspace(-1.2, 1.2, 3 * 5 * 7).view(3, 5, 7)
    want = VaeImageProcessor().postprocess(strip[None].clone(), output_type="pil")[0]
    assert np.array_equal(to_uint8(strip.clone()), np.asarray(want))


@torch.no_grad()
def test_flow_gives_every_row_once(tiny: Path, tmp_path: Path) -> None:
    family = families.read_family(resolve(str(tiny)))
    vae = families.build_vae(family.autoencoder)
    with streamed(vae, family.autoencoder.weights, families.vae_names) as streamer:
        stages = decoder_stages(vae.decoder, vae.post_quant_conv)
        frozen._measure(stages, smooth_latents(9, 9), Scratch(tmp_path), streamer.hold, lambda where: None)
        for _ in range(2):  # a pipeline that has ended begins anew
            out = list(flow(stages, [smooth_latents(9, 9)[:, :, :4]], False, check=lambda where: None))
            out += list(flow(stages, [smooth_latents(9, 9)[:, :, 4:]], True, check=lambda where: None))
            assert sum(o.shape[2] for o in out) == 72


@pytest.mark.parametrize("size", [(40, 30), (1, 1), (9, 70)])
@torch.no_grad()
def test_a_tiny_autoencoder_decodes_as_diffusers_does(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    vae = AutoencoderTiny(decoder_block_out_channels=(16,) * 4, encoder_block_out_channels=(16,) * 4).eval()
    latents = 3 * torch.randn(1, 4, *size)
    want = vae.decode(latents).sample[0]
    got = torch.cat(list(tiny_decoder.decode(vae, latents, check=lambda where: None)), dim=1)
    assert got.shape == want.shape
    assert (got - want).abs().max() <= 1e-5
