"""The exact decoder against diffusers' AutoencoderKL on the whole image; it leaves nothing on the disk."""

from __future__ import annotations

import copy
import itertools
import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention
from torch import nn

from tiler.compute import onednn, winograd
from tiler.compute.layers import stream_layers
from tiler.compute.native_winograd import NativeWinograd
from tiler.compute.stream import Streamer
from tiler.decoding import attention, exact, frozen, scratch, work
from tiler.decoding import method as method
from tiler.decoding.directions import DECODER
from tiler.decoding.method import ScratchSpace
from tiler.decoding.pictures import to_tensor
from tiler.decoding.scratch import Rows, Scratch
from tiler.decoding.sources import Source
from tiler.decoding.statistics import Pooled
from tiler.errors import NumericalError, StorageError
from tiler.models import family as families
from tiler.request import Decode, ScratchDtype
from tiler.run import streamed
from tiler.weights.checkpoint import resolve


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def decode(
    folder: Path, latents: torch.Tensor, where: Path, dtype: torch.dtype, check=lambda where: None
) -> torch.Tensor:
    family = families.read_family(resolve(str(folder)))
    vae = families.build_vae(family.autoencoder)
    with streamed(vae, family.autoencoder.weights, families.vae_names) as streamer:
        disk = Scratch(where, dtype)
        strips = list(exact.decode(vae, latents, disk, hold=streamer.hold_transformed, check=check))
    assert disk.live_bytes == 0
    return torch.cat(strips, dim=1)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """The PSNR of pictures in [-1, 1]."""
    return -10 * math.log10(float((a - b).square().mean()) / 4)


@pytest.mark.parametrize("size", [(70, 50), (33, 129), (1, 3), (64, 9)])
def test_decoding_equals_diffusers(tiny: Path, reference: AutoencoderKL, tmp_path: Path, size: tuple[int, int]) -> None:
    """The picture has no common scale or statistic: bright at the top, dark at the bottom, more contrast to the
    right."""
    latents = torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(1))
    latents = latents * torch.linspace(0.2, 3, size[1]) + torch.linspace(-3, 3, size[0])[:, None]
    want = reference.decode(latents).sample[0]
    got = decode(tiny, latents, tmp_path, torch.float32)
    assert got.shape == want.shape
    assert (got - want).abs().max() <= 1e-4
    assert psnr(decode(tiny, latents, tmp_path, torch.float16), want) >= 60


@pytest.mark.skipif(not onednn.convolves(), reason="on x86 only")
@pytest.mark.parametrize("size", [(70, 50), (33, 129), (1, 3)])
def test_transformed_convolutions_decode_what_diffusers_does(
    tiny: Path, reference: AutoencoderKL, tmp_path: Path, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a full-size autoencoder: rows come in fours, and upsampling is a pass of its own."""
    monkeypatch.setattr("tiler.compute.layers.SMALL", 100)
    monkeypatch.setattr("tiler.decoding.exact.ALONE", 100)
    latents = torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(1))
    plain, called = decode(tiny, latents, tmp_path, torch.float32), []
    monkeypatch.setattr(winograd, "CHANNELS", 8)
    for channels in ("NATIVE_WINOGRAD_CHANNELS", "NATIVE_WINOGRAD_BF16_CHANNELS"):
        monkeypatch.setattr(f"tiler.compute.native_winograd.{channels}", 8)
    inner = winograd.conv2d
    monkeypatch.setattr(winograd, "conv2d", lambda *a: (called.append(a[0].shape), inner(*a)))
    own = NativeWinograd._convolve
    monkeypatch.setattr(NativeWinograd, "_convolve", lambda *a: (called.append(a[2]), own(*a)))
    got = decode(tiny, latents, tmp_path, torch.float32)
    assert len(called) >= 16 and not torch.equal(got, plain)
    want = reference.decode(latents).sample[0]
    assert got.shape == want.shape
    assert (got - want).abs().max() <= 1e-4


def test_held_statistics_are_far_from_what_exact_gives(
    tiny: Path, reference: AutoencoderKL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen, "SAMPLE_SIDE", 64)
    latents = torch.randn(1, 4, 100, 100, generator=torch.Generator().manual_seed(1))
    latents = latents * torch.linspace(0.2, 3, 100)
    want = reference.decode(latents).sample[0]
    family = families.read_family(resolve(str(tiny)))
    vae = families.build_vae(family.autoencoder)
    with streamed(vae, family.autoencoder.weights, families.vae_names) as streamer:
        held = torch.cat(list(frozen.decode(vae, latents, Scratch(tmp_path), hold=streamer.hold)), dim=1)
    assert psnr(decode(tiny, latents, tmp_path, torch.float16), want) >= psnr(held, want) + 20


def test_encoding_equals_diffusers(tiny: Path, reference: AutoencoderKL, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (488, 376, 3), dtype=np.uint8)
    pixels[:200] //= 4
    family = families.read_family(resolve(str(tiny)))
    vae = families.build_vae(family.autoencoder)
    with streamed(vae, family.autoencoder.weights, families.vae_names) as streamer:
        disk = Scratch(tmp_path, torch.float32)
        got = exact.encode(vae, pixels, disk, hold=streamer.hold_transformed, check=lambda where: None)
    want = reference.encode(to_tensor(pixels)).latent_dist.mean
    assert got.shape == want.shape == (1, 4, 61, 47)
    assert (got - want).abs().max() <= 1e-4


def test_strips_and_chunks_do_not_show(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = torch.randn(1, 4, 41, 38, generator=torch.Generator().manual_seed(2))
    want = decode(tiny, latents, tmp_path, torch.float32)
    monkeypatch.setitem(Source.of.__func__.__kwdefaults__, "strip_bytes", 2**14)
    monkeypatch.setattr(attention, "KEYS", 100)
    monkeypatch.setattr(exact, "QUERIES", 70)
    monkeypatch.setattr(attention, "QUERIES", 70)
    assert (decode(tiny, latents, tmp_path, torch.float32) - want).abs().max() <= 2e-5


def test_pooled_statistics_are_groupnorms() -> None:
    """With a strong gradient, the mean of the strips' variances would be far off."""
    x = torch.randn(1, 8, 50, 30) + torch.linspace(-100, 100, 50)[:, None]
    pooled = Pooled(4)
    for strip in x.split(7, dim=2):
        pooled.add(strip)
    want = nn.GroupNorm(4, 8, affine=False)(x)
    mean, var = (v.float().repeat_interleave(2).view(1, 8, 1, 1) for v in (pooled.mean, pooled.var))
    assert ((x - mean) / (var + 1e-5).sqrt() - want).abs().max() <= 1e-5


class _Spaced:
    """diffusers' processor of an autoencoder's attention, with keys and values of only every `step`-th row and
    column."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, attn: Attention, hidden_states: torch.Tensor, **_: object) -> torch.Tensor:
        normed = attn.group_norm(hidden_states)
        seen = normed[:, :, self.step // 2 :: self.step, self.step // 2 :: self.step].flatten(2).transpose(1, 2)
        queries = attn.to_q(normed.flatten(2).transpose(1, 2))
        mixed = nn.functional.scaled_dot_product_attention(queries, attn.to_k(seen), attn.to_v(seen))
        out = attn.to_out[0](mixed).transpose(1, 2).unflatten(2, hidden_states.shape[2:])
        return (out + hidden_states) / attn.rescale_output_factor


@pytest.mark.parametrize(("size", "step"), [((70, 50), 6), ((33, 129), 7), ((10, 10), 1)])
def test_sampled_attends_to_evenly_spaced_tokens_and_measures_every_pixel(
    tiny: Path, reference: AutoencoderKL, tmp_path: Path, size: tuple[int, int], step: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(method, "TOKENS", 100)
    monkeypatch.setattr("tiler.decoding.scratch.STRIP_BYTES", 2**14)
    generator = torch.Generator().manual_seed(1)
    latents = 3 * torch.randn(1, 4, *size, generator=generator) + torch.linspace(-3, 3, size[0])[:, None]
    pixels = np.random.default_rng(0).integers(0, 256, (8 * size[0], 8 * size[1], 3), dtype=np.uint8)
    want = reference.decode(latents).sample[0], reference.encode(to_tensor(pixels)).latent_dist.mean
    changed = copy.deepcopy(reference)
    for half in changed.decoder, changed.encoder:
        half.mid_block.attentions[0].set_processor(_Spaced(step))
    spaced = changed.decode(latents).sample[0], changed.encode(to_tensor(pixels)).latent_dist.mean
    kind, streamer, got = families.read_family(resolve(str(tiny))).autoencoder, Streamer(None), []
    vae = families.build_vae(kind)
    stream_layers(vae, streamer)
    for encoding in False, True:
        how = method.choose(
            Decode.SAMPLED, vae, streamer, size, ScratchSpace(tmp_path, 10**12, ScratchDtype.FP32), encoding=encoding
        )
        own, quiet = families.build_vae(kind), {"check": lambda where: None, "progress": lambda share: None}
        with streamed(own, kind.weights, families.vae_names) as loaded:
            if encoding:
                got.append(method.encode(how, own, loaded, pixels, **quiet))
            else:
                got.append(torch.cat(list(method.decode(how, own, loaded, latents, **quiet)), dim=1))
    for ours, theirs, whole in zip(got, spaced, want, strict=True):
        assert (ours - theirs).abs().max() <= 1e-4
        assert ((ours - whole).abs().max() <= 1e-4) == (step == 1)


def test_weights_are_read_once(tiny: Path, tmp_path: Path) -> None:
    family = families.read_family(resolve(str(tiny)))
    read = []
    for side in (36, 72):
        vae = families.build_vae(family.autoencoder)
        with streamed(vae, family.autoencoder.weights, families.vae_names) as streamer:
            list(
                exact.decode(
                    vae, torch.randn(1, 4, side, side), Scratch(tmp_path), hold=streamer.hold, check=lambda where: None
                )
            )
            assert streamer.store is not None
            read.append(streamer.store.bytes_read)
    assert read[0] == read[1]


def test_nothing_is_ever_seen_in_the_scratch_folder(tiny: Path, tmp_path: Path) -> None:
    """The files have no name while they are in use, so a killed process leaves none."""
    seen: list[str] = []
    decode(
        tiny, torch.randn(1, 4, 40, 40), tmp_path, torch.float16, check=lambda where: seen.extend(os.listdir(tmp_path))
    )
    assert seen == []


def test_values_beyond_fp16_keep_their_range(tmp_path: Path) -> None:
    x = torch.randn(1, 3, 4, 5) * torch.tensor([1.0, 1e3, 1e6, 1e9]).view(4, 1)
    rows = Rows(Scratch(tmp_path, torch.float16), 3, 5)
    for row in x.split(1, dim=2):
        rows.append(row)
    assert torch.allclose(rows.read(0, 4), x, rtol=2**-10)
    with pytest.raises(NumericalError, match="NaN or Inf"):
        rows.append(torch.full((1, 3, 1, 5), float("nan")))


def chosen(folder: Path, wanted: Decode, side: int, where: Path, free: int = 10**12) -> method.DecodePlan:
    family = families.read_family(resolve(str(folder)))
    vae, streamer = families.build_vae(family.autoencoder), Streamer(None)
    stream_layers(vae, streamer)
    return method.choose(wanted, vae, streamer, (side, side), ScratchSpace(where, free), encoding=False)


def test_auto_takes_exact_while_there_is_room_and_attention_is_cheap(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert chosen(tiny, Decode.AUTO, 40, tmp_path).by_layers
    assert not chosen(tiny, Decode.FROZEN, 40, tmp_path).by_layers
    large = chosen(tiny, Decode.AUTO, 2000, tmp_path)
    assert large.kind is Decode.FROZEN
    assert "attention" in large.why and "wider than 4096" in large.why
    middle = chosen(tiny, Decode.AUTO, 500, tmp_path)
    assert middle.kind is Decode.SAMPLED
    assert "attention" in middle.why
    monkeypatch.setattr(method, "ATTENTION_SHARE", 10)
    needs = {kind: chosen(tiny, kind, 400, tmp_path).scratch_bytes for kind in (Decode.EXACT, Decode.FROZEN)}
    assert needs[Decode.FROZEN] < needs[Decode.EXACT] / 5
    full = chosen(tiny, Decode.AUTO, 400, tmp_path, needs[Decode.FROZEN])
    assert not full.by_layers
    assert "MB free" in full.why
    for kind in (Decode.AUTO, Decode.EXACT, Decode.FROZEN):
        with pytest.raises(StorageError, match="--scratch"):
            chosen(tiny, kind, 400, tmp_path, 1000)
    with pytest.raises(StorageError, match="cannot be used for scratch files"):
        scratch.free_bytes(tmp_path / "missing")


def test_progress_rises_with_the_work(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    how = chosen(tiny, Decode.EXACT, 90, tmp_path)
    family = families.read_family(resolve(str(tiny)))
    vae, shares, wheres = families.build_vae(family.autoencoder), [0.0], []
    with streamed(vae, family.autoencoder.weights, families.vae_names) as streamer:
        list(method.decode(how, vae, streamer, torch.randn(1, 4, 90, 90), check=wheres.append, progress=shares.append))
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert wheres.count("decode.Attend") > 1
    assert shares[-2] > 0.9  # the last strip is pushed, and not yet counted
    # Checks and shares come in pairs: attention moves the bar by its share of the work.
    at = [shares[1 + i] for i, where in enumerate(wheres) if where == "decode.Attend"]
    monkeypatch.setattr(work, "ATTENTION", 0.0)
    stages = DECODER.stages(vae)
    others = work.of_picture(stages, 90, 90)
    monkeypatch.undo()
    share = 1 - others / work.of_picture(stages, 90, 90)
    assert share > 0.05
    assert at[-1] - at[0] > 0.9 * share * (1 - 1 / len(at))


@pytest.mark.parametrize(("kind", "encoding"), [(k, e) for k in (Decode.SAMPLED, Decode.FROZEN) for e in (False, True)])
def test_all_work_is_counted(tiny: Path, tmp_path: Path, kind: Decode, encoding: bool) -> None:
    """Shares begin near 0, rise in small steps and end at 1 by themselves, whatever the way."""
    family = families.read_family(resolve(str(tiny)))
    vae, shares = families.build_vae(family.autoencoder), [0.0]
    with streamed(vae, family.autoencoder.weights, families.vae_names) as streamer:
        space = ScratchSpace(tmp_path, 2**40)
        how = method.choose(kind, vae, streamer, (150, 140), space, encoding=encoding)
        held = {"check": lambda where: None, "progress": shares.append}
        if encoding:
            method.encode(how, vae, streamer, np.zeros((1200, 1120, 3), np.uint8), **held)
        else:
            list(method.decode(how, vae, streamer, torch.randn(1, 4, 150, 140), **held))
            assert shares.pop() == 1
    assert shares == sorted(shares)
    assert max(b - a for a, b in itertools.pairwise(shares)) < 0.1
    assert shares[-1] > 0.95


@pytest.mark.parametrize("kind", [Decode.EXACT, Decode.FROZEN])
def test_rehearsal_knows_the_bytes_on_disk(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Decode
) -> None:
    monkeypatch.setattr(frozen, "BAND", 60)
    how = chosen(tiny, kind, 80, tmp_path)
    family = families.read_family(resolve(str(tiny)))
    vae = families.build_vae(family.autoencoder)
    with streamed(vae, family.autoencoder.weights, families.vae_names) as streamer:
        disk = Scratch(tmp_path)
        by_rows = exact.decode if kind is Decode.EXACT else frozen.decode
        list(by_rows(vae, torch.randn(1, 4, 80, 80), disk, hold=streamer.hold, check=lambda where: None))
    assert disk.peak_bytes == how.scratch_bytes
    assert disk.written_bytes == how.written_bytes


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "nameless_file", lambda folder: os.open("/dev/full", os.O_RDWR))
    with Scratch(tmp_path) as disk, pytest.raises(StorageError, match="No space left"):
        Rows(disk, 3, 5).append(torch.zeros(1, 3, 1, 5))
