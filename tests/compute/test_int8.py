"""Products of 8-bit integers against 64-bit ones, and files of packed weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tiler.compute import cpu, int8
from tiler.compute.layers import stream_layers
from tiler.compute.shapes import MetaMeter
from tiler.compute.stream import Streamer
from tiler.errors import ModelError, StorageError
from tiler.models import family as families
from tiler.models.built import Models
from tiler.models.unet import int8_weights, predict_noise
from tiler.native import library
from tiler.packing import order_of_use, packed_names, packed_weights
from tiler.request import Precision
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


@needs_int8
@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_is_the_sum_of_integer_products(bias: bool) -> None:
    torch.manual_seed(1)
    layer = nn.Linear(96, 160, bias=bias)
    weight, scale = int8.quantize_rows(layer.weight)
    x = int8.quantize_tokens(torch.randn(2, 37, 96) * torch.logspace(-3, 3, 37).view(-1, 1))
    sums = (x.values.long() - x.zero) @ weight.long().T
    want = sums.double() * scale.double() * x.scale.double() + (layer.bias.double() if bias else 0)
    got = torch.empty(2, 37, 160)
    for first, last in ((0, 96), (96, 160)):  # in two pieces
        packed = int8.pack(first, weight[first:last], scale[first:last])
        int8.linear(x, packed, layer.bias[first:last] if bias else None, got[..., first:last])
    got = got.flatten(0, 1)
    assert (got - want).norm() < 1e-6 * want.norm()


@needs_int8
@torch.no_grad()
@pytest.mark.parametrize("shift", [-9.0, 0.0, 9.0])
@pytest.mark.parametrize(("stride", "kernel"), [(1, 3), (2, 3), (2, 1)])
def test_a_convolution_is_the_sum_of_integer_products(
    stride: int, kernel: int, shift: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The zeros of the padding stay exact even if no value is near zero. Windows are taken in several bands of rows."""
    torch.manual_seed(2)
    monkeypatch.setattr(int8, "WINDOWS_BYTES", 3000)
    monkeypatch.setattr(int8, "CHUNK", 2000)
    layer = nn.Conv2d(48, 64, kernel, stride=stride, padding=kernel // 2)
    weight, scale = int8.quantize_rows(layer.weight)
    image = torch.randn(48, 19, 21) + shift
    x = int8.quantize_image(image, kernel // 2)
    inside = int8.quantize_image(image).restored().permute(2, 0, 1) / x.scale  # not padded: whole numbers
    sums = torch.nn.functional.conv2d(inside.double().round(), weight.double(), None, stride, kernel // 2)
    assert sums.abs().max() < 2**31
    want = sums * scale.view(-1, 1, 1) * x.scale + layer.bias.view(-1, 1, 1)
    got = torch.empty(*want.shape[1:], 64)
    int8.conv2d(x, int8.pack(0, weight, scale), layer.bias, got, taps=layer.kernel_size, stride=layer.stride)
    got = got.permute(2, 0, 1)
    assert (got - want).norm() < 1e-6 * want.norm()


@needs_int8
@torch.no_grad()
def test_the_largest_products_do_not_saturate() -> None:
    """Sums of pairs of products have 16 bits on some processors."""
    largest = cpu.int8().largest
    linear, conv = nn.Linear(64, 16, bias=False), nn.Conv2d(64, 16, 3, bias=False)
    ones = torch.ones(16)
    for layer in (linear, conv):
        for sign in (1, -1):
            weight = torch.full(layer.weight.shape, sign * largest, dtype=torch.int8)
            packed = int8.pack(0, weight, ones)
            if layer is linear:
                x = int8.Quantized(torch.full((8, 64), 255, dtype=torch.uint8), torch.ones(8, 1), 0)
                got, count = torch.empty(8, 16), 64
                int8.linear(x, packed, None, got)
            else:
                x = int8.Quantized(torch.full((8, 8, 64), 255, dtype=torch.uint8), torch.tensor(1.0), 0)
                got, count = torch.empty(6, 6, 16), 64 * 9
                int8.conv2d(x, packed, None, got, taps=(3, 3), stride=(1, 1))
            assert (got == sign * largest * 255 * count).all()


def test_quantised_values_are_within_half_a_step() -> None:
    torch.manual_seed(3)
    image, tokens = torch.randn(5, 8, 8).exp() - 0.7, torch.randn(30, 17)
    q = int8.quantize_image(image)
    assert (q.restored().permute(2, 0, 1) - image).abs().max() <= 0.5001 * q.scale
    t = int8.quantize_tokens(tokens)
    assert ((t.restored() - tokens).abs() <= 0.5001 * t.scale).all()
    assert q.values.min() < 2 and q.values.max() > 252  # all steps are used
    weight = torch.randn(6, 40) * torch.logspace(-4, 4, 6).view(-1, 1)
    for largest in (64, 127):
        rows, scale = int8.quantize_rows(weight, largest)
        assert ((rows * scale.view(-1, 1) - weight).abs() <= 0.5001 * scale.view(-1, 1)).all()
        assert rows.abs().max() == largest
    assert not int8.quantize_rows(torch.zeros(2, 3))[0].any()


@needs_int8
def test_nan_stays_nan() -> None:
    layer = nn.Conv2d(8, 8, 3, padding=1)
    weight, out = int8.pack(0, *int8.quantize_rows(layer.weight.detach())), torch.empty(4, 4, 8)
    x = torch.zeros(8, 4, 4)
    x[0, 0, 0] = torch.nan
    int8.conv2d(int8.quantize_image(x, 1), weight, None, out, taps=layer.kernel_size, stride=layer.stride)
    assert out.isnan().all()
    assert int8.quantize_tokens(torch.full((1, 8), torch.nan)).scale.isnan().all()


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
            step = want.flatten(1).abs().amax(1) / cpu.int8().largest
            assert ((packed[name] - want).flatten(1).abs().amax(1) <= 0.5001 * step).all(), name
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
    ("flags", "largest", "products", "dot"),
    [
        (("avx2",), 64, True, False),
        (("avx2", "avx_vnni"), 127, True, True),
        (("avx2", "avx512_vnni"), 127, True, True),
        (("sve",), 127, False, False),
    ],
)
def test_what_int8_means_on_a_processor(
    flags: tuple[str, ...], largest: int, products: bool, dot: bool, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tiler.planning.render import choose_precision

    monkeypatch.setattr(cpu, "flags", lambda: flags)
    assert cpu.int8()[:3] == (largest, products, dot)
    narrow = family_of(tiny)
    wide = replace(narrow, traits=narrow.traits._replace(width=320))
    precision, why = choose_precision(Precision.AUTO, wide, cpu.int8(), bf16=False)
    assert precision is (Precision.INT8 if dot else Precision.FP32)
    assert "bit weights" in why
    precision, why = choose_precision(Precision.AUTO, narrow, cpu.int8(), bf16=False)
    assert precision is Precision.FP32 and "32 channels" in why
    for family in (narrow, wide):
        assert choose_precision(Precision.INT8, family, cpu.int8(), bf16=False) == (Precision.INT8, "as asked")


@needs_int8
def test_planning_counts_int8_weights_as_bytes(tiny: Path) -> None:
    """The peak of a pass on shapes, with every layer a unit of its own: where fp32 holds four bytes, int8 holds one;
    with oneDNN, three for a weight in one piece: as stored, in transit, and reordered for computing."""
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
    least = 1 if library.library() is not None else 3
    assert least <= peaks[1] < least + 0.5


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
