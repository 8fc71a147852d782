"""Convolutions of enlarged images as four smaller ones, or transformed: against fp64, with any cut of their weights,
and as planned."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers.models.upsampling import Upsample2D
from safetensors.torch import save_file
from torch import Tensor

from tiler.compute.int8 import quantize_rows
from tiler.compute.layers import stream_layers
from tiler.compute.shapes import MetaMeter
from tiler.compute.stream import Streamer
from tiler.decoding.rows import Up
from tiler.models.blocks import Upsampler
from tiler.native import library
from tiler.weights.blocks import blocked
from tiler.weights.index import read_index
from tiler.weights.layouts import understood
from tiler.weights.store import SCALE, WeightStore, match_index

ERRORS = {"int8": 4e-3, "bf16": 4e-3, "fp32": 2e-6, "transformed": 4e-7}  # of what int8 weights stand for
KERNELS = {"fp32": None, "transformed": "native-winograd-enlarged"}  # of the others: native-enlarged-bf16
WEIGHT = "conv.weight"
pytestmark = pytest.mark.skipif(library.library() is None, reason=f"the library is {library.fault()}")


@pytest.fixture(params=ERRORS)
def precision(request: pytest.FixtureRequest) -> str:
    if request.param not in KERNELS and not library.has_bf16():
        pytest.skip("no bf16 here")
    return str(request.param)


@pytest.fixture(autouse=True)
def every_layer_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiler.compute.layers.SMALL", 500)
    monkeypatch.setattr("tiler.compute.native_winograd.NATIVE_WINOGRAD_CHANNELS", 64)


@pytest.fixture
def upsampler(precision: str, tmp_path: Path) -> Upsample2D:
    """diffusers' own, with the weights of its file."""
    torch.manual_seed(2)
    module = Upsample2D(64, use_conv=True).requires_grad_(False)
    tensors = {name: value.clone() for name, value in module.state_dict().items()}
    if precision == "int8":
        rows, scale = quantize_rows(module.conv.weight.data, 64)
        tensors |= {WEIGHT: blocked(rows), WEIGHT + SCALE: scale}
        module.conv.weight.copy_(rows * scale.view(-1, 1, 1, 1))
    save_file(tensors, tmp_path / "w.safetensors")
    return module


def images() -> list[tuple[Tensor]]:
    torch.manual_seed(4)
    return [(torch.randn(1, 64, 17, 21) + 0.5,) for _ in range(3)]


def run(
    path: Path, precision: str, inputs: list[tuple[Tensor]], arena: int | None = None, **options: int
) -> list[Tensor]:
    module = Upsample2D(64, use_conv=True).to("meta")
    keys = frozenset({WEIGHT} if precision == "bf16" else ())
    with WeightStore(match_index(module, understood(read_index(path)), lambda name: [name]), **options) as store:
        streamer = Streamer(store, arena_bytes=arena, bf16_keys=keys, transform=precision == "transformed")
        stream_layers(module, streamer)
        upsampler = Upsampler(module)
        kernel, wanted = streamer.kernel(upsampler.conv.op(), None).name, KERNELS.get(precision, "native-enlarged-bf16")
        assert kernel == wanted or (wanted is None and "enlarged" not in kernel)
        assert not module.conv.enlarges  # the module itself is as it was
        return streamer.run(upsampler, list(inputs))


@torch.no_grad()
def test_results_are_those_of_fp64(upsampler: Upsample2D, precision: str, tmp_path: Path) -> None:
    path, exact = tmp_path / "w.safetensors", upsampler.double()
    got = run(path, precision, images())
    for (x,), out in zip(images(), got, strict=True):
        want = exact(x.double())
        assert out.shape == want.shape
        assert (out - want).norm() < ERRORS[precision] * want.norm()
    for options in ({"arena": 2**12}, {"arena": 2**12, "piece_elements": 32 * 64 * 9}):
        assert all(torch.equal(a, b) for a, b in zip(got, run(path, precision, images(), **options), strict=True))
    assert all(torch.equal(a, run(path, precision, [x])[0]) for a, x in zip(got, images(), strict=True))


@torch.no_grad()
def test_nan_reaches_the_result(upsampler: Upsample2D, precision: str, tmp_path: Path) -> None:
    inputs = images()
    inputs[1][0][0, 3, 2, 2] = float("nan")
    first, second, third = run(tmp_path / "w.safetensors", precision, inputs)
    assert second.isnan().any() and not first.isnan().any() and not third.isnan().any()


@torch.no_grad()
def test_rows_of_an_enlarged_image_do_not_depend_on_how_they_come(tmp_path: Path) -> None:
    torch.manual_seed(3)
    module = Upsample2D(64, use_conv=True).requires_grad_(False)
    save_file(dict(module.state_dict()), tmp_path / "w.safetensors")
    x = torch.randn(1, 64, 23, 33).to(memory_format=torch.channels_last)
    want = module.double()(x.double())
    streamed = Upsample2D(64, use_conv=True).to("meta")
    with WeightStore(match_index(streamed, read_index(tmp_path / "w.safetensors"), lambda name: [name])) as store:
        streamer = Streamer(store)
        stream_layers(streamed, streamer)
        results = []
        for cuts in ([0, 23], [0, 1, 2, 3, 9, 22, 23], [0, 4, 16, 23]):
            stage = Up(streamed.conv)
            with streamer.hold_transformed(streamed):
                assert stage.conv.takes_small and stage.conv.together == 4
                parts = [stage.push(x[:, :, a:b], b == 23) for a, b in pairwise(cuts)]
            results.append(torch.cat([part for part in parts if part is not None], dim=2))
    assert results[0].shape == want.shape
    assert (results[0] - want).norm() < ERRORS["transformed"] * want.norm()
    assert all(torch.equal(results[0], result) for result in results[1:])


@torch.no_grad()
@pytest.mark.parametrize("precision", ["int8", "bf16"])
def test_what_is_held_is_planned(precision: str) -> None:
    """Sixteen weights of an input and an output instead of nine."""
    if not library.has_bf16():
        pytest.skip("no bf16 here")
    module = Upsample2D(512, use_conv=True).to("meta")
    keys = frozenset({WEIGHT})
    streamer = Streamer(None, **{f"{precision}_keys": keys})
    stream_layers(module, streamer)
    with MetaMeter() as meter:
        streamer.run(Upsampler(module), [(torch.empty(1, 512, 1, 1, device="meta"),)])
    held = 2 * 16 * 512 * 512
    assert held < meter.peak_bytes < 1.75 * held  # beside them, the nine as they were read


@torch.no_grad()
def test_transformed_weights_are_planned() -> None:
    """Twenty-five of an input and an output instead of nine."""
    module = Upsample2D(512, use_conv=True).to("meta")
    streamer = Streamer(None, transform=True)
    stream_layers(module, streamer)
    with MetaMeter() as meter:
        streamer.run(Upsampler(module), [(torch.empty(1, 512, 16, 16, device="meta"),)])
    held = 4 * 25 * 512 * 512
    assert held < meter.peak_bytes < 1.75 * held
