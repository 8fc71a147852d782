"""Layers by tiler's own int8 kernel against fp64 arithmetic of what is quantised, and its bytes however weights are cut."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from tiler.compute import native
from tiler.compute.int8 import quantize_rows
from tiler.compute.layers import convolve, linear, linear_layers, stream_layers
from tiler.compute.stream import Streamer
from tiler.native import library
from tiler.weights.blocks import blocked, unblocked
from tiler.weights.index import read_index
from tiler.weights.layouts import understood
from tiler.weights.store import SCALE, WeightStore, match_index

pytestmark = pytest.mark.skipif(library.library() is None, reason=f"the library is {library.fault()}")
LARGEST = 64  # of a weight: what every instruction set computes with exactly


class Gated(nn.Module):
    """LayerNorm, GEGLU, a layer back, what came in added; and three layers of one input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gelu = nn.LayerNorm(320), nn.GELU()
        self.up, self.down = nn.Linear(320, 1280), nn.Linear(640, 320)
        self.q, self.k, self.v = (nn.Linear(320, 320, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        hidden = linear(self.up, x, norm=self.norm, activation=self.gelu, glu=True)
        x = linear(self.down, hidden, residual=x)
        q, k, v = linear_layers([self.q, self.k, self.v], x, norm=self.norm)
        return q + k * v


class Convolutions(nn.Module):
    """Two joined parts through GroupNorm, SiLU and 3 × 3 with a residual, a stride of 2, and a normed 1 × 1."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.silu = nn.GroupNorm(32, 192), nn.SiLU()
        self.conv, self.down = nn.Conv2d(192, 128, 3, padding=1), nn.Conv2d(128, 128, 3, stride=2, padding=1)
        self.middle, self.point = nn.GroupNorm(32, 128, eps=1e-6), nn.Conv2d(128, 640, 1)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        h = convolve(self.conv, x, skip, norm=self.norm, activation=self.silu, residual=x)
        return convolve(self.point, convolve(self.down, h), norm=self.middle)


def stored(module: nn.Module, path: Path, *, in_blocks: bool) -> nn.Module:
    """Write the module's weights as a packed file has them; returns it with what the file's weights are."""
    tensors: dict[str, Tensor] = {}
    for name, value in module.state_dict().items():
        if value.ndim > 1:
            rows, scale = quantize_rows(value, LARGEST)
            tensors[name], tensors[name + SCALE] = (blocked(rows) if in_blocks else rows), scale
            value.copy_(rows * scale.view(-1, *(1,) * (value.ndim - 1)))
        else:
            tensors[name] = value
    save_file(tensors, path)
    return module


def run(cls: type[nn.Module], path: Path, inputs: list[tuple[Tensor, ...]], **options: int) -> list[Tensor]:
    module = cls().to("meta")
    arena = options.pop("arena_bytes", None)
    with WeightStore(match_index(module, understood(read_index(path)), lambda name: [name]), **options) as store:
        streamer = Streamer(store, arena_bytes=arena)
        stream_layers(module, streamer)
        ops = [streamer.kernel(m.op(), None).name for m in module.modules() if hasattr(m, "streamer")]
        assert set(ops) == {"native-int8"}
        return streamer.run(module, list(inputs))


@pytest.fixture(params=[Gated, Convolutions])
def case(request: pytest.FixtureRequest, tmp_path: Path):
    """A module's class, itself with the weights of its file, the file, and three samples."""
    generator = torch.Generator().manual_seed(3)
    module = request.param()
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5
    shapes = [(1, 77, 320)] if request.param is Gated else [(1, 128, 12, 10), (1, 64, 12, 10)]
    inputs = [tuple(torch.randn(shape, generator=generator) for shape in shapes) for _ in range(3)]
    return request.param, stored(module, tmp_path / "w.safetensors", in_blocks=True), tmp_path / "w.safetensors", inputs


@pytest.fixture(autouse=True)
def every_layer_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiler.compute.layers.SMALL", 2000)


@torch.no_grad()
def test_layers_are_those_of_fp64_within_the_rounding_of_their_inputs(case) -> None:
    cls, module, path, inputs = case
    got, exact = run(cls, path, inputs), module.double()
    for parts, out in zip(inputs, got, strict=True):
        want = exact(*(part.double() for part in parts))
        assert (out - want).norm() < 0.02 * want.norm()


@torch.no_grad()
def test_bytes_do_not_depend_on_how_weights_are_cut_stored_or_shared(case, tmp_path: Path) -> None:
    cls, module, path, inputs = case
    want = run(cls, path, inputs)
    streamed = run(cls, path, inputs, arena_bytes=2**15)
    cut = run(cls, path, inputs, arena_bytes=2**15, piece_elements=2**14)
    alone = [run(cls, path, [parts])[0] for parts in inputs]
    stored(module, tmp_path / "rows.safetensors", in_blocks=False)
    in_rows = run(cls, tmp_path / "rows.safetensors", inputs)
    for others in (streamed, cut, alone, in_rows):
        assert all(torch.equal(a, b) for a, b in zip(want, others, strict=True))


@torch.no_grad()
def test_nan_reaches_the_result(case) -> None:
    cls, _, path, inputs = case
    inputs[1][0].view(-1)[5] = float("nan")
    first, second, third = run(cls, path, inputs)
    assert second.isnan().any() and not first.isnan().any() and not third.isnan().any()


def test_blocks_are_read_back() -> None:
    weight = torch.randint(-127, 128, (48, 20, 3, 3), dtype=torch.int8)
    assert blocked(weight)[1, 4, 3, 7, 2] == weight[16 + 7, 12 + 2, 1, 1]
    assert torch.equal(unblocked(blocked(weight), weight.shape), weight)


def test_a_pixel_has_a_scale_of_its_own_where_the_weight_has_one_tap() -> None:
    x = torch.randn(2, 32, 4, 5, generator=torch.Generator().manual_seed(1))
    norm = nn.GroupNorm(4, 32)
    made = native.quantize_images((x,), 0, norm, silu=False, each_place=True)
    want = F.group_norm(x, 4).permute(0, 2, 3, 1).reshape(-1, 32)
    real = (made.values.float() - made.zero) * made.scale[:, None]
    assert ((real - want).abs() <= 0.5001 * made.scale[:, None]).all()
