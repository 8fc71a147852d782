"""Layers computed by tiler's own kernels against fp64 arithmetic; their bytes do not depend on how weights are cut."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from tiler.compute import cpu
from tiler.compute.arena import Arena, Held
from tiler.compute.choose import KERNELS
from tiler.compute.int8 import quantize_rows
from tiler.compute.layers import convolve, linear, linear_layers, stream_layers
from tiler.compute.shapes import MetaMeter
from tiler.compute.stream import Streamer
from tiler.native import library
from tiler.weights.blocks import blocked, unblocked
from tiler.weights.index import read_index
from tiler.weights.layouts import understood
from tiler.weights.store import SCALE, WeightStore, match_index

pytestmark = pytest.mark.skipif(library.library() is None, reason=f"the library is {library.fault()}")
LARGEST = 32 if cpu.int8().adds_fours else 64  # of an int8 weight: what every instruction set computes with exactly
ERRORS = {"native-int8": 3e-2, "native-bf16": 1e-2, "native-fp32": 2e-6}  # of several layers, one after another


class Gated(nn.Module):
    """LayerNorm, GEGLU, a layer back and a residual; then three layers with one input."""

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
    """Two joined parts, through GroupNorm, SiLU and a 3 × 3 convolution with a residual, and through a 1 × 1
    convolution; a stride of 2; a normed 1 × 1 convolution; with `framed`, rows that bring their own frame above and
    below."""

    def __init__(self, *, framed: bool = True) -> None:
        super().__init__()
        self.norm, self.silu = nn.GroupNorm(8, 80), nn.SiLU()
        self.conv, self.shortcut = nn.Conv2d(80, 48, 3, padding=1), nn.Conv2d(80, 48, 1)
        self.down, self.rows = nn.Conv2d(48, 48, 3, stride=2, padding=1), nn.Conv2d(48, 32, 3, padding=(1 - framed, 1))
        self.middle, self.point = nn.GroupNorm(8, 48, eps=1e-6), nn.Conv2d(48, 48, 1)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        h = convolve(self.conv, x, skip, norm=self.norm, activation=self.silu, residual=x)
        h = convolve(self.down, convolve(self.shortcut, x, skip, residual=h))
        return convolve(self.rows, convolve(self.point, h, norm=self.middle))


class One(nn.Module):
    """A single layer."""

    def __init__(self, *, is_linear: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(96, 48) if is_linear else nn.Conv2d(96, 48, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return linear(self.layer, x) if isinstance(self.layer, nn.Linear) else convolve(self.layer, x)


def stored(module: nn.Module, path: Path, kernel: str, *, in_blocks: bool = True) -> nn.Module:
    """Write the module's weights as fp16, or as int8 like a packed file. Return the module with the weights of that
    file."""
    tensors: dict[str, Tensor] = {}
    for name, value in module.state_dict().items():
        if kernel == "native-int8" and value.ndim > 1:
            rows, scale = quantize_rows(value, LARGEST)
            tensors[name], tensors[name + SCALE] = (blocked(rows) if in_blocks else rows), scale
            value.copy_(rows * scale.view(-1, *(1,) * (value.ndim - 1)))
        else:
            tensors[name] = value.half()
            value.copy_(tensors[name])
    save_file(tensors, path)
    return module


def run(
    kernel: str, make: Callable[[], nn.Module], path: Path, inputs: list[tuple[Tensor, ...]], **options: int
) -> list[Tensor]:
    module = make().to("meta")
    arena = options.pop("arena_bytes", None)
    with WeightStore(match_index(module, understood(read_index(path)), lambda name: [name]), **options) as store:
        streamer = Streamer(store, arena_bytes=arena, bf16_keys=frozenset(store.index), prefer=[KERNELS[kernel]])
        stream_layers(module, streamer)
        ops = [streamer.kernel(m.op(), None).name for m in module.modules() if hasattr(m, "streamer")]
        assert set(ops) == {kernel}
        return streamer.run(module, list(inputs))


@pytest.fixture(params=ERRORS)
def kernel(request: pytest.FixtureRequest) -> str:
    if request.param == "native-bf16" and not library.has_bf16():
        pytest.skip("no bf16 here")
    return str(request.param)


@pytest.fixture(params=[Gated, Convolutions])
def case(request: pytest.FixtureRequest, kernel: str, tmp_path: Path):
    """A factory of modules, a module with the weights of its file, the file, and three samples."""
    generator = torch.Generator().manual_seed(3)
    make = Gated if request.param is Gated else partial(Convolutions, framed=kernel != "native-int8")
    module = make().requires_grad_(False)
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5)
    shapes = [(1, 77, 96)] if request.param is Gated else [(1, 48, 12, 10), (1, 32, 12, 10)]
    inputs = [tuple(torch.randn(shape, generator=generator) for shape in shapes) for _ in range(3)]
    return make, stored(module, tmp_path / "w.safetensors", kernel), tmp_path / "w.safetensors", inputs


@pytest.fixture(autouse=True)
def every_layer_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiler.compute.layers.SMALL", 500)


@torch.no_grad()
def test_layers_are_those_of_fp64_within_the_rounding_of_their_inputs(case, kernel: str) -> None:
    make, module, path, inputs = case
    got, exact = run(kernel, make, path, inputs), module.double()
    for parts, out in zip(inputs, got, strict=True):
        want = exact(*(part.double() for part in parts))
        assert (out - want).norm() < ERRORS[kernel] * want.norm()


@torch.no_grad()
def test_bytes_do_not_depend_on_how_weights_are_cut_stored_or_shared(
    case, kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, module, path, inputs = case
    want = run(kernel, make, path, inputs)
    streamed = run(kernel, make, path, inputs, arena_bytes=2**12)
    cut = run(kernel, make, path, inputs, arena_bytes=2**12, piece_elements=2**11)
    alone = [run(kernel, make, path, [parts])[0] for parts in inputs]
    monkeypatch.setattr("tiler.compute.native_float.PACKED_ELEMENTS", 2**10)
    stored(module, tmp_path / "rows.safetensors", kernel, in_blocks=False)
    in_rows = run(kernel, make, tmp_path / "rows.safetensors", inputs)
    for others in (streamed, cut, alone, in_rows):
        assert all(torch.equal(a, b) for a, b in zip(want, others, strict=True))


@torch.no_grad()
def test_nan_reaches_the_result(case, kernel: str) -> None:
    make, _, path, inputs = case
    inputs[1][0].view(-1)[5] = float("nan")
    first, second, third = run(kernel, make, path, inputs)
    assert second.isnan().any() and not first.isnan().any() and not third.isnan().any()


@pytest.mark.parametrize("is_linear", [True, False])
@pytest.mark.parametrize("outlier", [60.0, 1e4])
@torch.no_grad()
def test_an_outlier_costs_half_a_step_of_its_own_token_or_image(
    is_linear: bool, outlier: float, tmp_path: Path
) -> None:
    """Transformers have a few values far larger than all others (Dettmers et al., 2022, LLM.int8(), section 3)."""
    torch.manual_seed(5)
    make, path = partial(One, is_linear=is_linear), tmp_path / "w.safetensors"
    exact = stored(make(), path, "native-int8").double()
    plain = [torch.randn(1, 12, 96) if is_linear else torch.randn(1, 96, 9, 8) for _ in range(2)]
    before = run("native-int8", make, path, [(x,) for x in plain])
    changed = plain[1].clone()
    changed.view(-1)[5 * 96 + 7] = outlier
    first, second = run("native-int8", make, path, [(plain[0],), (changed,)])
    assert torch.equal(first, before[0])
    weight = exact.layer.weight.abs().flatten(1).sum(1)
    wrong = (second - exact(changed.double())).abs()
    if is_linear:
        others = [i for i in range(12) if i != 5]
        assert torch.equal(second[:, others], before[1][:, others])
        assert (wrong[0, 5] <= 0.501 * outlier / 127 * weight + 1e-5 * outlier).all()
    else:
        step = (changed.amax().clamp(min=0) - changed.amin().clamp(max=0)) / 255
        assert (wrong[0].flatten(1).amax(1) <= 0.501 * step * weight + 1e-5 * outlier).all()


@pytest.mark.parametrize("name", ["native-fp32", "native-winograd", "native-winograd-late"])
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


@torch.no_grad()
def test_int8_weights_that_stay_in_memory_are_multiplied_there_and_planned_once(tmp_path: Path) -> None:
    path, make = tmp_path / "w.safetensors", partial(One, is_linear=True)
    name, prefer = "layer.weight", [KERNELS["native-int8"]]
    stored(make(), path, "native-int8")
    module = make().to("meta")
    with WeightStore(match_index(module, understood(read_index(path)), lambda name: [name])) as store:
        streamer = Streamer(store, prefer=prefer)
        stream_layers(module, streamer)
        store.keep(name, torch.int8)
        op = module.layer.op()
        with streamer.hold(module):
            (prepared,) = streamer.prepared(op, prefer[0], (1, 12, 96))
            assert prepared.tensors[0].data_ptr() == store.resident[name].data_ptr()
        place = Held(Arena(2**20), 2**20, lambda: False, stays=True)
        first = place.room(1, torch.int8).data_ptr()
        assert len(list(prefer[0].prepare(store, op, (1, 12, 96), place))) == 1
        assert place.room(1, torch.int8).data_ptr() == first  # it takes none of the arena

    def planned(*, in_place: bool, rank: int = 0) -> int:
        module, ranks = make().to("meta"), {name: rank} if rank else {}
        streamer = Streamer(None, int8_keys=frozenset([name]), prefer=prefer, in_place=in_place, ranks=ranks)
        stream_layers(module, streamer)
        with MetaMeter() as meter:
            streamer.run(module, [(torch.empty(1, 12, 96, device="meta"),)])
        return meter.peak_bytes

    assert planned(in_place=False) - planned(in_place=True) == 48 * 96
    # A low-rank path is held in both cases: values, and a scale and a sum of each row. While it is made, three
    # copies in fp32 take more than the lines and the result of 12 tokens.
    for in_place in (False, True):
        more = planned(in_place=in_place, rank=20) - planned(in_place=in_place)
        assert more == 32 * (48 + 96) + 8 * (32 + 48) + 3 * 4 * 32 * (48 + 96) - 4 * 12 * 48


def test_blocks_are_read_back() -> None:
    weight = torch.randint(-127, 128, (48, 20, 3, 3), dtype=torch.int8)
    assert blocked(weight)[1, 4, 3, 7, 2] == weight[16 + 7, 12 + 2, 1, 1]
    assert torch.equal(unblocked(blocked(weight), weight.shape), weight)
