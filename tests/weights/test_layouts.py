"""Weights quantised by other programs: read as those programs read them, and refused if something is missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from tiler.compute.int8 import quantize_rows
from tiler.errors import ModelError
from tiler.weights.checkpoint import Checkpoint
from tiler.weights.grouped import FOUR_BITS
from tiler.weights.index import TensorInfo, read_index
from tiler.weights.layouts import understood
from tiler.weights.packed import write_packed
from tiler.weights.store import Piece, WeightStore, match_index

Tensors = dict[str, Tensor]


def network() -> nn.Sequential:
    """Rows of 256 values, which quanto groups by 128; of 96, which it groups by 96; and a convolution, which it does
    not group."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 96), nn.Linear(96, 64, bias=False), nn.Conv2d(8, 16, 3))


def stored(tensors: Tensors, folder: Path, metadata: dict[str, str] | None = None) -> dict[str, TensorInfo]:
    """The index of a file with `tensors`, as a part is read."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "x.safetensors", metadata)
    return understood(read_index(folder / "x.safetensors"))


def matched(index: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    with torch.device("meta"):
        empty = network()
    return match_index(empty, index, lambda name: [name])


def check(index: dict[str, TensorInfo], wanted: Tensors, **close: Any) -> None:
    """Compare the weight read as a whole, piece by piece, in arbitrary rows, and from its stored form in memory."""
    for kept in (False, True):
        with WeightStore(index) as store:
            for name, want in wanted.items():
                torch.testing.assert_close(store.load(name), want, **close)
                if kept:
                    store.keep(name, torch.uint8)
                for first, last in {
                    (0, len(want)),
                    (0, 8),
                    (3, len(want) - 2),
                    (len(want) // 2 - 1, len(want) // 2 + 2),
                }:
                    out = torch.empty(last - first, *want.shape[1:])
                    store.fetch(Piece(name, first, last), out)
                    torch.testing.assert_close(out, want[first:last], **close)


@pytest.mark.parametrize("kind", ["qint8", "qfloat8", "qint4"])
def test_what_optimum_quanto_wrote_is_what_it_reads(quanto: Any, kind: str, tmp_path: Path) -> None:
    model = network()
    quanto.quantize(model, weights=getattr(quanto, kind))
    quanto.freeze(model)
    index = matched(stored(model.state_dict(), tmp_path))
    assert not any("_scale" in name or "_data" in name for name in index)
    wanted = {f"{n}.weight": model[n].weight.dequantize() for n in range(3)} | {"0.bias": model[0].bias.detach()}
    check(index, wanted, rtol=0, atol=0)


def of_bitsandbytes(weight: Tensor, *, nested: bool) -> tuple[Tensors, Tensor]:
    """A weight in nf4 as diffusers writes it, with random numbers in place of quantised ones, and its values in float64
    (Dettmers et al. 2023, arXiv:2305.14314, section 3: double quantisation)."""
    rows, width = weight.shape
    codes = torch.randint(0, 16, (rows * width,), dtype=torch.uint8)
    table, blocks = torch.linspace(-1, 1, 16), rows * width // 64
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [rows, width]}
    tensors = {"": (codes[::2] << 4 | codes[1::2])[:, None], ".quant_map": table}
    if nested:
        numbers, kinds, largest = (
            torch.randint(0, 256, (blocks,), dtype=torch.uint8),
            torch.rand(256),
            torch.rand(-(-blocks // 8)),
        )
        state |= {"nested_blocksize": 8, "nested_offset": 0.25, "nested_dtype": "float32"}
        tensors |= {".absmax": numbers, ".nested_quant_map": kinds, ".nested_absmax": largest}
        factors = kinds[numbers.int()].double() * largest.repeat_interleave(8)[:blocks] + 0.25
    else:
        tensors[".absmax"] = torch.rand(blocks)
        factors = tensors[".absmax"].double()
    tensors[".quant_state.bitsandbytes__nf4"] = torch.frombuffer(
        bytearray(json.dumps(state).encode()), dtype=torch.uint8
    )
    meant = (table[codes.int()].double().view(-1, 64) * factors[:, None]).view(rows, width).float()
    return {f"0.weight{ending}": tensor for ending, tensor in tensors.items()}, meant


@pytest.mark.parametrize("nested", [True, False])
def test_four_bits_of_bitsandbytes_are_what_they_mean(nested: bool, tmp_path: Path) -> None:
    tensors, meant = of_bitsandbytes(network()[0].weight, nested=nested)
    index = stored(tensors, tmp_path)
    assert list(index) == ["0.weight"] and index["0.weight"].dtype == FOUR_BITS
    check(index, {"0.weight": meant}, rtol=1e-6, atol=1e-7)


def test_eight_bits_of_bitsandbytes_are_what_they_mean(tmp_path: Path) -> None:
    values, largest = torch.randint(-127, 128, (96, 256), dtype=torch.int8), torch.rand(96)
    index = stored(
        {"0.weight": values, "0.SCB": largest, "0.weight_format": torch.zeros((), dtype=torch.uint8)}, tmp_path
    )
    assert list(index) == ["0.weight"]
    wanted = (values.double() * largest.double()[:, None] / 127).float()
    check(index, {"0.weight": wanted}, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [True, False])
def test_bitsandbytes_reads_the_same_four_bits(kind: str, nested: bool, tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(96, 256)
    packed, state = functional.quantize_4bit(weight, quant_type=kind, compress_statistics=nested)
    packed.copy_(torch.randint(0, 256, packed.shape, dtype=torch.uint8))
    tensors = {"0.weight": packed} | {f"0.weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    check(stored(tensors, tmp_path), {"0.weight": functional.dequantize_4bit(packed, state)}, rtol=0, atol=0)


def test_bitsandbytes_reads_the_same_eight_bits(tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    values, largest = torch.randint(-127, 128, (96, 256), dtype=torch.int8), torch.rand(96)
    meant = functional.int8_vectorwise_dequant(values, largest)
    check(stored({"0.weight": values, "0.SCB": largest}, tmp_path), {"0.weight": meant}, rtol=0, atol=0)


FP8 = torch.ones(96, 256).to(torch.float8_e4m3fn)
LAYERS = json.dumps({"format_version": "1.0", "layers": {"model.0": {"format": "float8_e4m3fn"}}})


def described(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("beside", "metadata"),
    [
        (
            {"model.0.weight_scale": torch.tensor(0.5), "model.0.input_scale": torch.tensor(9.0)},
            {"_quantization_metadata": LAYERS},
        ),
        (
            {
                "model.0.weight_scale": torch.tensor(0.5),
                "model.0.comfy_quant": described('{"format": "float8_e4m3fn"}'),
            },
            None,
        ),
        ({"model.0.scale_weight": torch.tensor([0.5]), "scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}, None),
        ({"model.0.scale_weight": torch.full((96, 1), 0.5), "model.0.scale_input": torch.tensor(9.0)}, None),
    ],
)
def test_fp8_is_scaled_in_every_spelling(beside: Tensors, metadata: dict[str, str] | None, tmp_path: Path) -> None:
    index = stored({"model.0.weight": FP8} | beside, tmp_path, metadata)
    assert list(index) == ["model.0.weight"]
    with WeightStore(index) as store:
        assert torch.equal(store.load("model.0.weight"), torch.full((96, 256), 0.5))


def lacking(tensors: Tensors, *endings: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(endings)}


def restated(tensors: Tensors, **values: object) -> Tensors:
    name = next(name for name in tensors if "quant_state" in name)
    said = json.loads(tensors[name].numpy().tobytes()) | values
    return tensors | {name: described(json.dumps(said))}


NF4, _ = of_bitsandbytes(torch.empty(96, 256), nested=True)
INT4 = {
    "0.weight._data._data": torch.zeros(96, 128, dtype=torch.uint8),
    "0.weight._scale": torch.ones(192, 1),
    "0.weight._shift": torch.ones(192, 1),
}
BAD: dict[str, tuple[Tensors, dict[str, str] | None, str]] = {
    "promised by the header": (
        {"model.0.weight": FP8},
        {"_quantization_metadata": LAYERS},
        "has no scale; download it again",
    ),
    "promised by a marker": (
        {"0.weight": FP8, "scaled_fp8": FP8[0, :2].clone()},
        None,
        "has no scale; download it again",
    ),
    "promised by a tensor": (
        {"0.weight": FP8, "0.comfy_quant": described('{"format": "float8_e4m3fn"}')},
        None,
        "has no scale; download it again",
    ),
    "a factor too many": ({"0.weight": FP8, "0.scale_weight": torch.ones(95)}, None, "not a factor for each row"),
    "nvfp4": (
        {"0.weight": FP8.view(torch.uint8), "0.comfy_quant": described('{"format": "nvfp4"}')},
        None,
        "is of nvfp4, which",
    ),
    "nvfp4 by its names": ({"0.weight_scale_2": torch.ones(1)}, None, "is of NVFP4, which tiler does not read"),
    "mxfp8": (
        {"0.weight": FP8},
        {"_quantization_metadata": LAYERS.replace("float8_e4m3fn", "mxfp8")},
        "is of mxfp8, which",
    ),
    "int8 of ComfyUI": (
        {
            "0.weight": torch.ones(96, 256, dtype=torch.int8),
            "0.comfy_quant": described('{"format": "int8_tensorwise"}'),
        },
        None,
        "is of int8_tensorwise, which",
    ),
    "SVDQuant": ({"0.qweight": torch.ones(9, 9, dtype=torch.int8), "0.wscales": torch.ones(9)}, None, "SVDQuant"),
    "torchao": ({"0._weight_qdata": torch.ones(9, 9, dtype=torch.int8)}, None, "torchao"),
    "no JSON": ({"0.weight": FP8, "0.comfy_quant": described("{")}, None, "is no JSON object"),
    "no factors of 4 bits": (lacking(INT4, "_shift"), None, "'0.weight._shift' is missing"),
    "qint2": (INT4 | {"0.weight._data._data": torch.zeros(48, 128, dtype=torch.uint8)}, None, "qint2 is not read"),
    "blocks of odd size": (restated(NF4, blocksize=63), None, "no whole blocks of 63"),
    "rows of no whole blocks": (restated(NF4, shape=[256 * 4, 24]), None, "no whole blocks of 64"),
    "more blocks than bytes": (restated(NF4, shape=[192, 256]), None, "does not fit its 12288 bytes"),
    "no shape": (restated(NF4, shape="all"), None, "states no shape"),
    "no table": (lacking(NF4, ".quant_map"), None, "'0.weight.quant_map' is missing"),
    "factors that do not fit": (restated(NF4, nested_blocksize=7), None, "nested factors of '0.weight' do not fit"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_not_read_is_refused(case: str, tmp_path: Path) -> None:
    tensors, metadata, message = BAD[case]
    with pytest.raises(ModelError, match=message) as error:
        stored(tensors, tmp_path, metadata)
    assert "\n" not in str(error.value)


MADE: dict[str, Tensors] = {
    "nf4": NF4,
    "qint4": INT4,
    "qint8": {"0.weight._data": torch.ones(96, 256, dtype=torch.int8), "0.weight._scale": torch.ones(96, 1)},
    "8 bits": {"0.weight": torch.ones(96, 256, dtype=torch.int8), "0.SCB": torch.ones(96)},
    "fp8": {"0.weight": FP8, "0.weight_scale": torch.ones(())},
}
DTYPES = torch.uint8, torch.int8, torch.int64, torch.float16, torch.float32


@pytest.mark.parametrize("kind", MADE)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_companions_that_are_lost_or_changed(kind: str, tmp_path: Path, data: st.DataObject) -> None:
    """The weight is refused if it cannot be read with them; otherwise it can be read."""
    tensors = dict(MADE[kind])
    name = data.draw(st.sampled_from(sorted(tensors)))
    match data.draw(st.sampled_from(["lost", "cut", "flat", "dtype", "noise"])):
        case "lost":
            del tensors[name]
        case "cut":
            tensors[name] = tensors[name].flatten()[: data.draw(st.integers(0, 40))]
        case "flat":
            tensors[name] = tensors[name].flatten()[None]
        case "dtype":
            tensors[name] = tensors[name].float().to(data.draw(st.sampled_from(DTYPES)))
        case "noise":
            raw = data.draw(st.binary(min_size=1, max_size=60))
            tensors[name] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    module = nn.ModuleDict({"0": nn.Linear(256, 96, bias=False, device="meta")})
    with suppress(ModelError):
        index = match_index(module, stored(tensors, tmp_path), lambda parameter: [parameter])
        with WeightStore(index) as store:
            assert store.load("0.weight").shape == (96, 256)


@pytest.mark.parametrize("rows", [95, 64])
def test_groups_that_are_no_rows_are_refused(rows: int, tmp_path: Path) -> None:
    module = nn.ModuleDict({"0": nn.Linear(192 * 128 // rows if rows == 64 else 256, rows, bias=False, device="meta")})
    index = stored(INT4, tmp_path)
    if rows == 64:
        assert match_index(module, index, lambda name: [name])["0.weight"].shape == (64, 384)
    else:
        with pytest.raises(ModelError, match=r"config\.json asks for"):
            match_index(module, index, lambda name: [name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layers: layers | {"9": {"weights": "qint8"}}, "'9' is to be quantised"),
        (lambda layers: layers | {"1": {"weights": "qint8"}}, "'1' is to be qint8, and is stored as F32"),
        (lambda layers: layers | {"0": 8}, "'0' is malformed"),
    ],
)
def test_a_map_must_go_with_the_weights(change: Callable[[Any], Any], message: str, tmp_path: Path) -> None:
    part = tmp_path / "transformer"
    part.mkdir()
    tensors = {"0.weight._data": torch.ones(4, 4, dtype=torch.int8), "0.weight._scale": torch.ones(4, 1)}
    save_file(tensors | {"1.weight": torch.ones(4, 4)}, part / "diffusion_pytorch_model.safetensors")
    layers = {"0": {"weights": "qint8", "activations": "none"}}
    (part / "quanto_qmap.json").write_text(json.dumps(layers))
    checkpoint = Checkpoint(name="x", folder=tmp_path, variant=None)
    assert set(checkpoint.weights("transformer")) == {"0.weight", "1.weight"}
    (part / "quanto_qmap.json").write_text(json.dumps(change(layers)))
    with pytest.raises(ModelError, match=message):
        checkpoint.weights("transformer")


@pytest.mark.parametrize("kind", ["qint8", "qint4"])
def test_what_stays_out_of_the_int8_file_keeps_its_value(quanto: Any, kind: str, tmp_path: Path) -> None:
    """A weight that another program quantised and tiler does not quantise: the file of int8 weights holds its
    values."""
    model = network()
    quanto.quantize(model, weights=getattr(quanto, kind))
    quanto.freeze(model)
    index = matched(stored(model.state_dict(), tmp_path))
    write_packed(
        tmp_path / "p.safetensors",
        "mark",
        list(index),
        index,
        {"1.weight": partial(quantize_rows, largest=64)},
        lambda share: None,
    )
    packed = understood(read_index(tmp_path / "p.safetensors"))
    assert packed["1.weight"].dtype == "I8"
    with WeightStore(packed) as store:
        assert torch.equal(store.load("0.weight"), model[0].weight.dequantize())
        step = model[1].weight.dequantize().abs().amax(1, keepdim=True) / 63
        assert ((store.load("1.weight") - model[1].weight.dequantize()).abs() <= step).all()
