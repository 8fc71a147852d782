"""Weights in 8 bits, and files of packed weights."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tiler.compute import cpu
from tiler.compute.int8 import quantize_rows
from tiler.compute.layers import stream_layers
from tiler.compute.shapes import MetaMeter
from tiler.compute.stream import Streamer
from tiler.errors import ModelError, StorageError
from tiler.models import family as families
from tiler.models.built import Models
from tiler.models.unet import int8_weights, predict_noise
from tiler.models.unet import quantised as becomes_int8
from tiler.packing import order_of_use, packed_names, packed_weights
from tiler.run import streamed
from tiler.weights.caches import INT8_VERSION
from tiler.weights.checkpoint import resolve
from tiler.weights.index import TensorInfo, read_index, read_metadata
from tiler.weights.store import WeightStore, match_index

TEXT = "text_encoder."  # before the names of its parameters in a packed file
needs_int8 = pytest.mark.skipif(not cpu.int8().products, reason="this processor has no 8-bit products")


@pytest.fixture(autouse=True)
def no_layer_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise most layers of the tiny checkpoints would be loaded at the start."""
    for module in ("tiler.compute.layers", "tiler.models.unet"):
        monkeypatch.setattr(f"{module}.SMALL", 500)


def quiet(share: float, why: str) -> None:
    pass


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packed")


def family_of(folder: Path) -> families.Family:
    return families.read_family(resolve(str(folder)))


def values(index: dict[str, TensorInfo]) -> dict[str, Tensor]:
    """Every tensor of a packed file in fp32, with its scales applied."""
    with WeightStore(index) as store:
        return {name: store.load(name) for name in index}


def test_quantised_values_are_within_half_a_step() -> None:
    torch.manual_seed(3)
    weight = torch.randn(6, 40) * torch.logspace(-4, 4, 6).view(-1, 1)
    for largest in (64, 127):
        rows, scale = quantize_rows(weight, largest)
        assert ((rows * scale.view(-1, 1) - weight).abs() <= 0.5001 * scale.view(-1, 1)).all()
        assert rows.abs().max() == largest
    assert not quantize_rows(torch.zeros(2, 4))[0].any()


def test_a_narrow_unet_keeps_its_most_sensitive_layers_out_of_int8() -> None:
    sensitive = (
        "up_blocks.1.upsamplers.0.conv.weight",
        "up_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj.weight",
    )
    assert all(becomes_int8(name, (320, 640, 1280)) and not becomes_int8(name, (48, 96, 144)) for name in sensitive)
    assert becomes_int8("up_blocks.1.resnets.0.conv1.weight", (48, 96, 144))


def unet_of(index: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    return {name: info for name, info in index.items() if not name.startswith(TEXT)}


@torch.no_grad()
def test_the_text_encoder_is_stored_in_int8_and_computed_in_fp32(tiny: Path, cache: Path) -> None:
    from transformers import CLIPTextModel

    family = family_of(tiny)
    index, encoder = packed_weights(Models(family), cache, quiet), family.part(families.Role.TEXT_ENCODER).build()
    ids = torch.randint(0, encoder.config.vocab_size, (1, 77), generator=torch.Generator().manual_seed(0))
    with streamed(
        encoder, index, packed_names(family.part(families.Role.TEXT_ENCODER)), int8_products=False
    ) as streamer:
        assert len(streamer.store.int8) >= 12 and not streamer.int8_keys
        got = encoder(ids).last_hidden_state
    reference = CLIPTextModel.from_pretrained(tiny / "text_encoder", variant="fp16", torch_dtype=torch.float32).eval()
    plain = reference(ids).last_hidden_state
    stored = values({name: info for name, info in index.items() if name.startswith(TEXT)})
    reference.load_state_dict({name.removeprefix(TEXT): value for name, value in stored.items()})
    assert torch.allclose(got, reference(ids).last_hidden_state, atol=1e-5)
    assert 1e-4 < (got - plain).norm() / plain.norm() < 0.02


def test_a_packed_file_holds_the_weights_in_the_order_of_use(tiny: Path, cache: Path) -> None:
    family = family_of(tiny)
    packed_file = packed_weights(Models(family), cache, quiet)
    index = unet_of(packed_file)
    unet = family.part(families.Role.DENOISER).build()
    quantised = int8_weights(unet)
    source = match_index(unet, family.checkpoint.weights("unet"), families.plain_names)
    assert quantised == {name for name, info in index.items() if info.dtype == "I8"}
    assert set(index) == set(source)
    assert all((index[name].scale is None) is (name not in quantised) for name in index)
    plain, packed = values(source), values(match_index(unet, index, families.plain_names))
    for name, want in plain.items():
        if name in quantised:
            error = (packed[name] - want).flatten(1)
            if cpu.int8().adds_fours:
                assert (error.norm(dim=1) <= 0.03 * want.flatten(1).norm(dim=1)).all(), name
            else:
                step = want.flatten(1).abs().amax(1) / 127
                assert (error.abs().amax(1) <= 0.5001 * step).all(), name
        else:
            assert torch.equal(packed[name], want), name
    in_file = sorted(index.values(), key=lambda i: i.offset)
    assert [info.name for info in in_file] == order_of_use(family, unet)
    parts = [info.name.partition("_")[0] for info in in_file if info.name in quantised]
    assert list(dict.fromkeys(parts)) == ["down", "mid", "up"]  # as a pass goes, not as diffusers registers them


def test_a_packed_file_that_does_not_fit_is_made_again(tiny: Path, tmp_path: Path) -> None:
    told: list[str] = []

    def tell(share: float, why: str) -> None:
        if why not in told:
            told.append(why)

    family = family_of(tiny)
    path = next(iter(packed_weights(Models(family), tmp_path, tell).values())).path
    whole = path.read_bytes()
    assert len(told) == 1
    packed_weights(Models(family), tmp_path, tell)
    assert len(told) == 1  # it was there
    path.write_bytes(whole[:-100])
    packed_weights(Models(family), tmp_path, tell)
    assert "bytes short" in told[1]
    path.write_bytes(whole.replace(f'"version": "{INT8_VERSION}"'.encode(), b'"version": "2"'))
    packed_weights(Models(family), tmp_path, tell)
    assert "another model or version" in told[2]
    assert path.read_bytes() == whole
    assert read_metadata(path)["format"] == "tiler-int8"
    assert list(tmp_path.iterdir()) == [path]


def test_two_models_have_two_packed_files(checkpoints: Path, tmp_path: Path) -> None:
    paths = {
        next(iter(packed_weights(Models(family_of(checkpoints / k)), tmp_path, quiet).values())).path
        for k in ("tiny", "tiny-sd2")
    }
    assert len(paths) == 2


def test_no_place_for_the_packed_file_says_how_much_it_needs(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="--cache-dir"):
        packed_weights(Models(family_of(tiny)), tmp_path / "file", quiet)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1_000_000))
    with pytest.raises(StorageError, match=r"1 MB free, int8 weights need \d+ MB"):
        packed_weights(Models(family_of(tiny)), tmp_path, quiet)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_int8_without_scales_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(3, 3, dtype=torch.int8)}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match="stored as I8"):
        WeightStore(read_index(tmp_path / "x.safetensors"))


@torch.no_grad()
def call(family: families.Family, index: dict[str, TensorInfo], batch: int = 2, **options: Any) -> Tensor:
    unet = family.part(families.Role.DENOISER).build()
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(3, 1, family.latent_channels, family.native, family.native, generator=generator)
    texts = torch.randn(3, 1, 77, family.part(families.Role.TEXT_ENCODER).config["hidden_size"], generator=generator)
    matched = match_index(unet, index, families.plain_names)
    with WeightStore(matched, piece_elements=options.get("pieces", 2**22)) as store:
        streamer = Streamer(store, arena_bytes=options.get("arena"))
        stream_layers(unet, streamer)
        for name in options.get("resident", ()):
            store.keep(name, torch.int8)
        parts = [
            predict_noise(unet, streamer, list(latents[i : i + batch]), torch.tensor(481), list(texts[i : i + batch]))
            for i in range(0, 3, batch)
        ]
    return torch.cat(parts)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["tiny", "tiny-sd2"])
def test_a_unet_in_int8_is_near_diffusers(checkpoints: Path, cache: Path, kind: str) -> None:
    family = family_of(checkpoints / kind)
    plain = call(family, family.checkpoint.weights("unet"))
    got = call(family, packed_weights(Models(family), cache, quiet))
    assert 1e-4 < (got - plain).norm() / plain.norm() < 0.05


def test_int8_bytes_do_not_depend_on_batch_pieces_arena_or_residency(tiny: Path, cache: Path) -> None:
    family = family_of(tiny)
    index = packed_weights(Models(family), cache, quiet)
    names = sorted(n for n, info in unet_of(index).items() if info.dtype == "I8")
    want = call(family, index)
    assert torch.equal(call(family, index, batch=1), want)
    assert torch.equal(call(family, index, batch=3), want)
    assert torch.equal(call(family, index, resident=names[::2]), want)
    assert torch.equal(call(family, index, arena=2**17), want)
    assert torch.equal(call(family, index, arena=2**17, pieces=2**15), want)


@torch.no_grad()
def test_without_8_bit_products_the_arithmetic_is_fp32(
    tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import UNet2DConditionModel

    family = family_of(tiny)
    index = packed_weights(Models(family), cache, quiet)
    monkeypatch.setattr(cpu, "flags", lambda: ("asimddp",))
    assert not cpu.int8().products
    got = call(family, index)
    reference = UNet2DConditionModel.from_pretrained(tiny / "unet", variant="fp16", torch_dtype=torch.float32).eval()
    reference.load_state_dict(values(match_index(reference, unet_of(index), families.plain_names)))
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(3, family.latent_channels, family.native, family.native, generator=generator)
    texts = torch.randn(3, 77, family.part(families.Role.TEXT_ENCODER).config["hidden_size"], generator=generator)
    assert torch.allclose(got, reference(latents, torch.tensor(481), texts).sample, atol=1e-4)


@pytest.mark.parametrize(
    ("flags", "adds_fours", "products"),
    [
        (("avx2",), True, True),
        (("avx2", "avx_vnni"), False, True),
        (("avx2", "avx512_vnni"), False, True),
        (("sve",), False, False),
    ],
)
def test_what_int8_means_on_a_processor(
    flags: tuple[str, ...], adds_fours: bool, products: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "flags", lambda: flags)
    monkeypatch.setattr(cpu, "library", lambda: SimpleNamespace(isa="v3" if adds_fours else "v4"))
    assert cpu.int8()[:2] == (adds_fours, products)
    monkeypatch.setattr(cpu, "library", lambda: None)
    assert cpu.int8()[:2] == (False, False)
    assert "fp32 arithmetic" in cpu.int8().why


@needs_int8
def test_planning_counts_int8_weights_as_bytes(tiny: Path) -> None:
    """The peak of a pass on shapes, with every layer a unit of its own: where fp32 holds four bytes, int8 holds one."""
    family = family_of(tiny)
    peaks = []
    for quantised in (False, True):
        unet = family.part(families.Role.DENOISER).build()
        streamer = Streamer(None, int8_keys=int8_weights(unet) if quantised else frozenset())
        stream_layers(unet, streamer)
        largest = max((m for m in unet.modules() if isinstance(m, nn.Conv2d)), key=lambda m: m.weight.numel())
        with MetaMeter() as meter, torch.no_grad():
            largest(torch.empty(1, largest.in_channels, 1, 1, device="meta"))
        peaks.append(meter.peak_bytes / largest.weight.numel())
    assert peaks[0] > 4
    assert 1 <= peaks[1] < 1.5


def test_quantize_says_what_it_wrote(in_process, tiny: Path, tmp_path: Path) -> None:
    done = in_process("quantize", tiny, "--cache-dir", tmp_path / "packed", "--json")
    assert done.code == 0, done.err
    assert Path(done.json["output"]).parent == tmp_path / "packed"
    assert done.json["bytes"] == Path(done.json["output"]).stat().st_size
    again = in_process(
        "render", "x", "-m", tiny, "--size", 64, "--steps", 1, "--precision", "int8", "--cache-dir", "packed"
    )
    assert again.code == 0, again.err
    assert "int8 weights" not in again.err
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) == 1
    bad = in_process("quantize", tmp_path)
    assert bad.code == 3
    assert json.dumps(bad.err).count("\\n") == 1
