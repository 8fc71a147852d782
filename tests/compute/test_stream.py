"""Streamed modules against diffusers' and transformers' own, on the same weights."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from tiler.compute import onednn, winograd
from tiler.compute.arena import Arena
from tiler.compute.choose import KERNELS
from tiler.compute.layers import stream_layers
from tiler.compute.onednn import Geometry
from tiler.compute.stream import Streamer
from tiler.errors import ModelError, NumericalError, StorageError
from tiler.memory.process import read_rss
from tiler.models import family as families
from tiler.models.blocks import Windows
from tiler.models.clip import encode_last, load_tokenizer
from tiler.models.unet import predict_noise
from tiler.native import library
from tiler.run import streamed
from tiler.weights.checkpoint import resolve
from tiler.weights.index import read_index
from tiler.weights.store import WeightStore, match_index


def inputs(
    family: families.Family, batch: int, side: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    side = side or family.native
    latents = torch.randn(batch, family.latent_channels, side, side, generator=generator)
    return (
        latents,
        torch.tensor(481),
        torch.randn(batch, 77, family.part(families.Role.TEXT_ENCODER).config["hidden_size"], generator=generator),
    )


@torch.no_grad()
def run(
    folder: Path,
    x: tuple[torch.Tensor, ...],
    *,
    pieces: int = 2**22,
    arena: int = 2**26,
    resident: torch.dtype | None = None,
    windows: Windows | None = None,
) -> torch.Tensor:
    family = families.read_family(resolve(str(folder)))
    unet = family.part(families.Role.DENOISER).build()
    index = match_index(unet, family.checkpoint.weights("unet"), families.plain_names)
    with WeightStore(index, piece_elements=pieces) as store:
        streamer = Streamer(store, arena_bytes=arena)
        stream_layers(unet, streamer)
        if resident is not None:
            for name, info in index.items():
                if len(info.shape) > 1:
                    store.keep(name, resident)
        latents, timestep, embeds = list(x[0].split(1)), x[1], list(x[2].split(1))
        first = predict_noise(unet, streamer, latents, timestep, embeds, windows=windows)
        # The second pass reads ahead.
        again = predict_noise(unet, streamer, latents, timestep, embeds, windows=windows)
    assert torch.equal(first, again)
    return first


@pytest.mark.parametrize("kind", ["tiny", "tiny-sd2"])
@torch.no_grad()
def test_unet_equals_diffusers(checkpoints: Path, kind: str) -> None:
    family = families.read_family(resolve(str(checkpoints / kind)))
    x = inputs(family, 3)
    reference = UNet2DConditionModel.from_pretrained(
        checkpoints / kind / "unet", variant="fp16", torch_dtype=torch.float32
    )
    want = reference(*x).sample
    got = run(checkpoints / kind, x)
    assert (got - want).norm() / want.norm() <= 1e-5


class Masked:
    """Attention over all tokens, with scores of −∞ between different windows."""

    def __init__(self, side: int, windows: Windows) -> None:
        place = torch.arange(side)
        row, col = ((place - first + windows.size) // windows.size for first in windows[1:])
        number = (row[:, None] * 100 + col).flatten()
        self.mask = torch.where(number[:, None] == number, 0.0, -torch.inf)

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **more):
        q, k, v = (
            layer(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        scores = q @ k.transpose(-1, -2) * attn.scale + self.mask
        return attn.to_out[0]((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("windows", [Windows(4), Windows(4, 1, 3), Windows(3, 2, 0), Windows(8, 5, 5)])
@torch.no_grad()
def test_attention_in_windows_is_attention_masked_between_them(tiny: Path, windows: Windows) -> None:
    """`tiny` has 8×8 latents. Only its first level is masked; a window as large as the tile is plain attention."""
    family = families.read_family(resolve(str(tiny)))
    x = inputs(family, 2)
    reference = UNet2DConditionModel.from_pretrained(tiny / "unet", variant="fp16", torch_dtype=torch.float32)
    plain = run(tiny, x)
    for block in (reference.down_blocks[0], reference.up_blocks[-1]):
        for transformer in block.attentions:
            if windows.size < family.native:
                transformer.transformer_blocks[0].attn1.processor = Masked(family.native, windows)
    want, got = reference(*x).sample, run(tiny, x, windows=windows)
    assert (got - want).norm() / want.norm() <= 1e-5
    assert torch.equal(got, plain) == (windows.size == family.native)


@torch.no_grad()
def test_a_plain_call_of_the_streamed_module_works_too(tiny: Path) -> None:
    """stream_layers works with any module tree: here with diffusers' own forward, which runs units inside it."""
    family = families.read_family(resolve(str(tiny)))
    x = inputs(family, 2)
    unet = family.part(families.Role.DENOISER).build()
    index = match_index(unet, family.checkpoint.weights("unet"), families.plain_names)
    with WeightStore(index) as store:
        stream_layers(unet, Streamer(store, arena_bytes=2**19))
        got = unet(*x).sample
    want = UNet2DConditionModel.from_pretrained(tiny / "unet", variant="fp16", torch_dtype=torch.float32)(*x).sample
    assert (got - want).norm() / want.norm() <= 1e-5


def test_bytes_do_not_depend_on_batch_pieces_arena_or_residency(tiny: Path) -> None:
    family = families.read_family(resolve(str(tiny)))
    x = inputs(family, 4)
    want = run(tiny, x)
    alone = torch.cat([run(tiny, (x[0][i : i + 1], x[1], x[2][i : i + 1])) for i in range(4)])
    assert torch.equal(alone, want)
    assert torch.equal(run(tiny, x, resident=torch.float32), want)
    assert torch.equal(run(tiny, x, resident=torch.float16), want)
    # Small arenas take the stacked path, small pieces cut layers in oneDNN's and MKL's hands: the last bit may differ.
    for pieces, arena in ((2**22, 2**18), (2**13, 2**26), (2**13, 2**16)):
        other = run(tiny, x, pieces=pieces, arena=arena)
        assert (other - want).abs().max() <= 2e-6 * want.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("sides", [(32, 32), (32, 40), (45, 53), (4, 256), (6, 301), (1, 2)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("padding", [1, 0])
def test_a_transformed_convolution_is_the_convolution(sides: tuple[int, int], bias: bool, padding: int) -> None:
    generator = torch.Generator().manual_seed(1)
    layer = torch.nn.Conv2d(256, 288, 3, padding=(padding, 1), bias=bias)
    assert winograd.suits(layer.weight.shape, Geometry.of(layer))
    x = torch.randn(1, 256, sides[0] + 2 - 2 * padding, sides[1], generator=generator).to(
        memory_format=torch.channels_last
    )
    taps = layer.weight.detach().permute(2, 3, 1, 0).contiguous()
    whole = winograd.transform(taps, torch.empty(36, 256, 288))
    want = torch.nn.functional.conv2d(
        x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double(), padding=layer.padding
    )[0]
    part = None if layer.bias is None else layer.bias.detach()
    for out in torch.empty(288, *sides), torch.empty(*sides, 288).permute(2, 0, 1):
        winograd.conv2d(x[0], whole, part, out, padding)
        assert (out - want).norm() < 1e-5 * want.norm()


def test_a_transformed_convolution_is_for_large_planes() -> None:
    assert winograd.pays(32, 32) and not winograd.pays(28, 32)
    for other in (
        {"kernel_size": 1},
        {"stride": 2},
        {"groups": 2},
        {"in_channels": 128},
        {"padding": 0},
        {"dilation": 2},
    ):
        layer = torch.nn.Conv2d(**{"in_channels": 256, "out_channels": 256, "kernel_size": 3, "padding": 1} | other)
        assert not winograd.suits(layer.weight.shape, Geometry.of(layer))


@pytest.mark.skipif(not onednn.convolves(), reason="on x86 only")
@torch.no_grad()
def test_a_transformed_weight_goes_when_its_pass_is_over(tmp_path: Path) -> None:
    """38 MB that would otherwise stay beside the autoencoder's attention."""
    save_file({"weight": torch.randn(512, 512, 3, 3).half(), "bias": torch.zeros(512)}, tmp_path / "w.safetensors")
    layer = torch.nn.Conv2d(512, 512, 3, padding=1, device="meta")
    with WeightStore(read_index(tmp_path / "w.safetensors")) as store:
        streamer = Streamer(store)
        stream_layers(layer, streamer)
        with streamer.hold_transformed(layer):
            layer(torch.ones(1, 512, 4, 4))
            held = read_rss().now
        assert read_rss().now < held - 36 * 512 * 512 * 4 + 2**20


@pytest.mark.skipif(not onednn.convolves(), reason="on x86 only")
@torch.no_grad()
@pytest.mark.parametrize("name", ["winograd", "native-winograd", "native-winograd-late"])
def test_a_transformed_weight_may_be_cut_and_shared_without_changing_a_bit(tmp_path: Path, name: str) -> None:
    if name.startswith("native") and library.library() is None:
        pytest.skip(library.fault())
    generator = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(320, 256, 3, 3, generator=generator).half(), torch.randn(320, generator=generator)
    save_file({"0.weight": weight, "0.bias": bias}, tmp_path / "w.safetensors")
    samples = [torch.randn(1, 256, 32, 36, generator=generator).to(memory_format=torch.channels_last) for _ in range(3)]
    want = [torch.nn.functional.conv2d(x, weight.float(), bias, padding=1) for x in samples]
    got = []
    for arena, pieces, together in (2**26, 2**22, 3), (2**20, 2**22, 3), (2**22, 2**17, 3), (2**26, 2**22, 1):
        module = torch.nn.Sequential(torch.nn.Conv2d(256, 320, 3, padding=1, device="meta"))
        with WeightStore(read_index(tmp_path / "w.safetensors"), piece_elements=pieces) as store:
            streamer = Streamer(store, arena_bytes=arena, transform=True, prefer=[KERNELS[name]])
            stream_layers(module, streamer)
            assert streamer.kernel(module[0].op(), None).name == name
            results: list[torch.Tensor] = []
            for i in range(0, 3, together):
                results += streamer.run(module, [(x,) for x in samples[i : i + together]])
        got.append(results)
    for result, x in zip(got[0], want, strict=True):
        assert 0 < (result - x).norm() < 1e-5 * x.norm()  # not the same sums: it was transformed
    for results in got[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results, got[0], strict=True))


def test_text_encoder_equals_transformers(tiny: Path, tmp_path: Path) -> None:
    family = families.read_family(resolve(str(tiny)))
    prompts = ["a sailing boat", "", "ünïcode 🙂 \x1b عربي"]
    notes: list[str] = []
    encoder = family.part(families.Role.TEXT_ENCODER).build()
    with streamed(
        encoder, family.checkpoint.weights("text_encoder"), family.part(families.Role.TEXT_ENCODER).aliases
    ) as streamer:
        got = [p.tokens for p in encode_last(load_tokenizer(family), encoder, prompts, notes.append)]
        assert streamer.store is not None
        read = streamer.store.bytes_read
    state = {
        k.removeprefix("text_model."): v for k, v in load_file(tiny / "text_encoder/model.fp16.safetensors").items()
    }
    table = state["embeddings.token_embedding.weight"]
    assert read < sum(v.nbytes for v in state.values()) - table.nbytes // 2, "the whole token table was read"
    reference = CLIPTextModel(encoder.config).eval()
    reference.load_state_dict({k: v.float() for k, v in state.items() if not k.endswith("position_ids")}, strict=False)
    tokens = CLIPTokenizer.from_pretrained(tiny / "tokenizer")(
        prompts, padding="max_length", truncation=True, max_length=77, return_tensors="pt"
    )
    want = reference(tokens.input_ids).last_hidden_state
    assert (torch.cat(got) - want).abs().max() <= 1e-5 * want.abs().max()
    assert not notes


def test_shards_and_old_attention_names_are_found(tiny: Path, tmp_path: Path) -> None:
    """VAEs written by old diffusers call to_q, to_k, to_v and to_out.0 query, key, value and proj_attn."""
    weights = load_file(tiny / "vae/diffusion_pytorch_model.fp16.safetensors")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in weights.items():
        for new, was in old.items():
            name = name.replace(f".{new}.", f".{was}.")
        renamed[name] = tensor.contiguous()
    assert renamed.keys() != weights.keys()
    save_file(renamed, tmp_path / "vae.safetensors")
    vae = families.build_vae(families.read_family(resolve(str(tiny))).autoencoder)
    assert len(match_index(vae, read_index(tmp_path / "vae.safetensors"), families.vae_names)) == len(weights)


def test_missing_and_misshapen_tensors_are_named(tiny: Path, tmp_path: Path) -> None:
    vae = families.build_vae(families.read_family(resolve(str(tiny))).autoencoder)
    stored = read_index(tiny / "vae/diffusion_pytorch_model.fp16.safetensors")
    name = "decoder.conv_in.weight"
    without = {k: v for k, v in stored.items() if k != name}
    with pytest.raises(ModelError, match=f"{name}.*missing"):
        match_index(vae, without, families.vae_names)
    with pytest.raises(ModelError, match=r"shape \[5, 5\]"):
        match_index(vae, stored | {name: stored[name]._replace(shape=(5, 5))}, families.vae_names)
    with pytest.raises(ModelError, match="I32"):
        match_index(vae, stored | {name: stored[name]._replace(dtype="I32")}, families.vae_names)


def test_nan_in_a_weight_is_found_at_first_use(tmp_path: Path) -> None:
    weight = torch.ones(64, 8).half()
    weight[40, 3] = float("nan")
    save_file({"w": weight}, tmp_path / "w.safetensors")
    with WeightStore(read_index(tmp_path / "w.safetensors")) as store, pytest.raises(NumericalError, match="'w'"):
        store.load("w")


def test_short_reads_go_on_and_failed_reads_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(100, 7).half()
    save_file({"w": weight}, tmp_path / "w.safetensors")
    real = os.preadv
    with WeightStore(read_index(tmp_path / "w.safetensors")) as store:
        monkeypatch.setattr(os, "preadv", lambda fd, views, at: real(fd, [views[0][:11]], at))
        assert torch.equal(store.load("w"), weight.float())

        def fail(fd: int, views: object, at: int) -> int:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(StorageError, match="Input/output error"):
            store.load("w")


@torch.no_grad()
def test_halves_of_a_guidance_share_work_and_change_no_bit(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = families.read_family(resolve(str(tiny)))
    (x, t, texts), unet = inputs(family, 2), family.part(families.Role.DENOISER).build()
    index = match_index(unet, family.checkpoint.weights("unet"), families.plain_names)
    tiles, embeds = [x[:1], x[:1].clone(), x[1:], x[1:].clone()], list(texts.split(1)) * 2
    shared = [tiles[0], tiles[0], tiles[2], tiles[2]]
    calls: list[str] = []
    with WeightStore(index) as store:
        streamer = Streamer(store)
        stream_layers(unet, streamer)
        levels = [block for block in unet.down_blocks if hasattr(block, "attentions")]
        block = levels[0].attentions[0].transformer_blocks[0]
        for where, module in (
            ("first", unet.conv_in),
            ("itself", block.attn1.to_q),
            ("text", block.attn2.to_q),
        ):
            module.register_forward_hook(lambda _, args, out, where=where: calls.extend([where] * len(args[0])))
        want = predict_noise(unet, streamer, tiles, t, embeds)
        assert len(calls) == 3 * 4
        calls.clear()
        assert torch.equal(predict_noise(unet, streamer, shared, t, embeds), want)
        # Self-attention comes before the prompt is seen.
        assert [calls.count(where) for where in ("first", "itself", "text")] == [2, 2, 4]
        monkeypatch.setattr("tiler.compute.stream.GROUP_ELEMENTS", 1)
        assert torch.equal(predict_noise(unet, streamer, tiles, t, embeds), want)  # one by one instead of together


def test_a_piece_larger_than_the_arena_leaves_nothing_to_give_back() -> None:
    arena = Arena(3 * mmap.PAGESIZE)
    assert len(arena.take(5 * mmap.PAGESIZE, short=True)) == 3 * mmap.PAGESIZE
    arena.take(4 * mmap.PAGESIZE, short=True)
    assert len(arena.take(mmap.PAGESIZE, short=True)) == mmap.PAGESIZE
