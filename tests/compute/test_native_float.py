"""Layers by tiler's own fp32 and bf16 kernels against fp64, and their bytes however weights are cut."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tiler import Budget, RenderRequest, render
from tiler.compute.choose import KERNELS
from tiler.compute.layers import convolve, linear, linear_layers, stream_layers
from tiler.compute.shapes import MetaMeter
from tiler.compute.stream import Streamer
from tiler.native import library
from tiler.request import Precision
from tiler.weights.index import read_index
from tiler.weights.store import WeightStore, match_index

pytestmark = pytest.mark.skipif(library.library() is None, reason=f"the library is {library.fault()}")


class Gated(nn.Module):
    """LayerNorm, GEGLU, a layer back, what came in added; and three layers of one input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gelu = nn.LayerNorm(96), nn.GELU()
        self.up, self.down = nn.Linear(96, 192), nn.Linear(96, 96)
        self.q, self.k, self.v = (nn.Linear(96, 96, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        hidden = linear(self.up, x, norm=self.norm, activation=self.gelu, glu=True)
        x = linear(self.down, hidden, residual=x)
        q, k, v = linear_layers([self.q, self.k, self.v], x, norm=self.norm)
        return q + k * v


class Convolutions(nn.Module):
    """Two joined parts: through GroupNorm, SiLU and 3 × 3, and through 1 × 1; a stride of 2; rows that bring their own frame."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.silu = nn.GroupNorm(8, 80), nn.SiLU()
        self.conv, self.shortcut = nn.Conv2d(80, 64, 3, padding=1), nn.Conv2d(80, 64, 1)
        self.down, self.rows = nn.Conv2d(64, 48, 3, stride=2, padding=1), nn.Conv2d(48, 32, 3, padding=(0, 1))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        h = convolve(self.conv, x, skip, norm=self.norm, activation=self.silu)
        h = convolve(self.shortcut, x, skip, residual=h)
        return convolve(self.rows, convolve(self.down, h))


def run(
    kernel: str, cls: type[nn.Module], path: Path, inputs: list[tuple[Tensor, ...]], **options: int
) -> list[Tensor]:
    module = cls().to("meta")
    arena = options.pop("arena_bytes", None)
    with WeightStore(match_index(module, read_index(path), lambda name: [name]), **options) as store:
        streamer = Streamer(store, arena_bytes=arena, bf16_keys=frozenset(store.index), prefer=[KERNELS[kernel]])
        stream_layers(module, streamer)
        ops = [streamer.kernel(m.op(), None).name for m in module.modules() if hasattr(m, "streamer")]
        assert set(ops) == {kernel}
        return streamer.run(module, list(inputs))


@pytest.fixture(params=[Gated, Convolutions])
def case(request: pytest.FixtureRequest, tmp_path: Path):
    """A module's class, itself, the file of its weights, and three samples."""
    generator = torch.Generator().manual_seed(3)
    module = request.param()
    for parameter in module.parameters():
        parameter.data = (
            (torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5).half().float()
        )
    save_file({name: value.half() for name, value in module.state_dict().items()}, tmp_path / "w.safetensors")
    shapes = [(1, 77, 96)] if request.param is Gated else [(1, 48, 12, 10), (1, 32, 12, 10)]
    inputs = [tuple(torch.randn(shape, generator=generator) for shape in shapes) for _ in range(3)]
    return request.param, module, tmp_path / "w.safetensors", inputs


@pytest.fixture(params=["native-fp32", "native-bf16"])
def kernel(request: pytest.FixtureRequest) -> str:
    if request.param == "native-bf16" and not library.has_bf16():
        pytest.skip("no bf16 here")
    return str(request.param)


@pytest.fixture(autouse=True)
def every_layer_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiler.compute.layers.SMALL", 500)


@torch.no_grad()
def test_layers_are_those_of_fp64(case, kernel: str) -> None:
    cls, module, path, inputs = case
    got, exact = run(kernel, cls, path, inputs), module.double()
    for parts, out in zip(inputs, got, strict=True):
        want = exact(*(part.double() for part in parts))
        assert (out - want).norm() < (2e-6 if kernel == "native-fp32" else 1e-2) * want.norm()


@torch.no_grad()
def test_bytes_do_not_depend_on_how_weights_are_cut_or_shared(
    case, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cls, _, path, inputs = case
    want = run(kernel, cls, path, inputs)
    streamed = run(kernel, cls, path, inputs, arena_bytes=2**12)
    cut = run(kernel, cls, path, inputs, arena_bytes=2**12, piece_elements=2**11)
    alone = [run(kernel, cls, path, [parts])[0] for parts in inputs]
    monkeypatch.setattr("tiler.compute.native_float._PACKED_ELEMENTS", 2**10)
    for others in (streamed, cut, alone, run(kernel, cls, path, inputs)):
        assert all(torch.equal(a, b) for a, b in zip(want, others, strict=True))


@torch.no_grad()
def test_nan_reaches_the_result(case, kernel: str) -> None:
    cls, _, path, inputs = case
    inputs[1][0].view(-1)[5] = float("nan")
    first, second, third = run(kernel, cls, path, inputs)
    assert second.isnan().any() and not first.isnan().any() and not third.isnan().any()


@pytest.mark.parametrize("name", ["native-fp32", "native-winograd"])
def test_arithmetic_is_counted_without_data(name: str) -> None:
    layer = nn.Conv2d(256, 256, 3, padding=1, device="meta")
    with MetaMeter() as plain:
        F.conv2d(torch.empty(1, 256, 40, 36, device="meta"), layer.weight, padding=1)
    streamer = Streamer(None, transform=True, prefer=[KERNELS[name]])
    stream_layers(layer, streamer)
    assert streamer.kernel(layer.op(), None).name == name
    with MetaMeter() as meter:
        layer(torch.empty(1, 256, 40, 36, device="meta"))
    assert meter.flops == plain.flops > 0


def test_bf16_is_refused_where_nothing_computes_with_it(
    in_process, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiler.run.has_bf16", lambda: False)
    refused = in_process("plan", "x", "-m", tiny, "--size", 64, "--precision", "bf16")
    assert refused.code == 2
    assert "BF16 instructions" in refused.err and "int8, fp32 or auto" in refused.err


@pytest.mark.skipif(not library.has_bf16(), reason="no bf16 here")
def test_a_picture_in_bf16_is_nearly_the_one_in_fp32(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiler.compute.layers.SMALL", 100)
    latents = {}
    for precision in Precision.FP32, Precision.BF16:
        file = tmp_path / f"{precision}.safetensors"
        request = RenderRequest(
            prompt="x", model=str(tiny), size=64, num_inference_steps=2, seed=1, precision=precision, guide=False,
            save_latents=file, output=tmp_path / f"{precision}.png",
        )  # fmt: skip
        with Budget(2_000_000_000) as budget:
            render(request, budget)
        latents[precision] = load_file(file)["latents"]
    apart = (latents[Precision.BF16] - latents[Precision.FP32]).norm() / latents[Precision.FP32].norm()
    assert 1e-5 < apart < 2e-2
