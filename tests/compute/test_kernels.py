"""A new kernel takes part through the policy alone; the table names only existing kernels; constants state their
origin."""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import tiler.compute.tuning
import tiler.memory.tuning
from tiler.compute import cpu
from tiler.compute.choose import KERNELS, choose_kernel
from tiler.compute.cpu import Isa
from tiler.compute.kernels import (
    Group,
    Kernel,
    Kind,
    Op,
    Operands,
    Place,
    Policy,
    Prepared,
    Shape,
    Weight,
    read_pieces,
)
from tiler.compute.layers import attend, convolve, stream_layers
from tiler.compute.onednn import Geometry
from tiler.compute.shapes import MetaMeter
from tiler.compute.stream import Streamer
from tiler.compute.tuning import KERNELS_OF
from tiler.memory.tuning import Passport
from tiler.native import library
from tiler.weights.index import read_index
from tiler.weights.store import WeightStore


class FourBits(Kernel):
    """Convolutions of 3 × 3 with norm, activation and residual in one pass; two weights per byte, a scale for each
    output."""

    name = "four-bits"

    def __init__(self) -> None:
        self.fused: list[tuple[int, bool, bool, bool]] = []

    def suits(self, op: Op, shape: Shape | None, policy: Policy) -> bool:
        return op.kind is Kind.CONVOLUTION and op.group.shape[2:] == (3, 3)

    def held_bytes(self, op: Op, shape: Shape | None) -> int:
        return op.group.numel // 2 + 4 * op.group.shape[0]

    def prepare(self, store: WeightStore | None, op: Op, shape: Shape, place: Place) -> Iterator[Prepared]:
        if store is None:
            meta = op.group.weights[0].meta
            yield Prepared(0, len(meta), (meta, meta))
            return
        (weight,) = op.group.weights
        for first, last, read in read_pieces(store, weight, place):
            rows = read.flatten(1)
            scale = rows.abs().amax(1) / 7
            values = ((rows / scale[:, None]).round() + 8).to(torch.uint8)
            yield Prepared(first, last, (values[:, ::2] * 16 + values[:, 1::2], scale))

    def begin(self, op: Op, x: Operands) -> Operands:
        norm, act = op.input.norm, op.input.activation
        self.fused.append((len(x.parts), norm is not None, act is not None, op.epilogue.residual))
        made = torch.cat(x.parts, dim=1)
        made = made if norm is None else norm(made)
        return x._replace(made=made if act is None else act(made))

    def apply(self, op: Op, x: Operands, prepared: Iterable[Prepared]) -> tuple[Tensor, ...]:
        assert op.geometry is not None
        padding, stride, _, _ = op.geometry
        (weight,), made = op.group.weights, x.made
        out = made.new_empty(op.output_shape(made.shape))
        for first, last, (packed, scale), _ in prepared:
            if made.is_meta:
                return (out,)
            values = torch.stack([packed // 16, packed % 16], dim=2).flatten(1).float() - 8
            rows = (values * scale[:, None]).view(-1, *op.group.shape[1:])
            bias = None if weight.bias is None else weight.bias[first:last]
            out[:, first:last] = F.conv2d(made, rows, bias, stride, padding)
        return (out if x.residual is None else out.add_(x.residual),)


class Block(nn.Module):
    """A norm, SiLU, a 3 × 3 convolution, and a residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.act = nn.GroupNorm(8, channels), nn.SiLU()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, *parts: Tensor) -> Tensor:
        return convolve(self.conv, *parts, norm=self.norm, activation=self.act, residual=torch.cat(parts, dim=1))


def four_bit(weight: Tensor) -> Tensor:
    """The weight rounded to 15 steps per output, in fp64."""
    scale = (weight.flatten(1).abs().amax(1) / 7).view(-1, 1, 1, 1).double()
    return (weight.double() / scale).round() * scale


@torch.no_grad()
@pytest.mark.parametrize("samples", [1, 3])
def test_a_new_kernel_is_given_the_whole_operation(tmp_path: Path, samples: int) -> None:
    generator = torch.Generator().manual_seed(1)
    plain = Block(96)
    for parameter in plain.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    save_file(dict(plain.state_dict()), tmp_path / "w.safetensors")
    inputs = [
        tuple(torch.randn(1, channels, 12, 10, generator=generator) for channels in (64, 32)) for _ in range(samples)
    ]
    kernel, block = FourBits(), Block(96).to("meta")
    with WeightStore(read_index(tmp_path / "w.safetensors")) as store:
        streamer = Streamer(store, prefer=[kernel])
        stream_layers(block, streamer)
        got = streamer.run(block, list(inputs))
    assert kernel.fused == [(2, True, True, True)]  # small samples run together
    exact = Block(96).double()
    exact.load_state_dict(plain.state_dict())
    exact.conv.weight.copy_(four_bit(plain.conv.weight))
    for parts, result in zip(inputs, got, strict=True):
        x = torch.cat(parts, dim=1).double()
        want = exact.conv(F.silu(exact.norm(x))) + x
        assert (result - want).norm() < 1e-5 * want.norm()


def test_planning_counts_what_a_kernel_says(tmp_path: Path) -> None:
    peaks = []
    for prefer in ([], [FourBits()]):
        block = Block(512).to("meta")
        streamer = Streamer(None, prefer=prefer)
        stream_layers(block, streamer)
        with MetaMeter() as meter, torch.no_grad():
            streamer.run(block, [(torch.empty(1, 512, 8, 8, device="meta"),)])
        peaks.append(meter.peak_bytes / block.conv.weight.numel())
    assert peaks[0] > 4
    assert 0.5 < peaks[1] < 1


@torch.no_grad()
def test_attention_is_an_operation_without_weights() -> None:
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, 3, tokens, 16, generator=generator) for tokens in (20, 7, 7))
    want = (q.double() @ k.double().transpose(-1, -2) / 4).softmax(-1) @ v.double()
    assert (attend(q, k, v) - want).norm() < 1e-6 * want.norm()


def group(*shapes: tuple[int, ...]) -> Group:
    metas = (torch.empty(shape, device="meta") for shape in shapes)
    return Group(weights=tuple(Weight(name="wxyz"[i], meta=meta) for i, meta in enumerate(metas)))


def convolution(channels: int) -> Op:
    weights = group((channels, channels, 3, 3))
    return Op(kind=Kind.CONVOLUTION, weights=weights, geometry=Geometry((1, 1), (1, 1), (1, 1), 1))


@pytest.mark.parametrize("isa", list(Isa))
def test_every_processor_has_a_kernel_for_everything(isa: Isa) -> None:
    for kind in Kind:
        assert KERNELS_OF[isa][kind][-1] == "fp32"
        assert set(KERNELS_OF[isa][kind]) <= set(KERNELS)
    x86, large, small = isa is not Isa.BASE, (1, 320, 64, 64), (1, 320, 7, 8)
    policy = Policy(winograd=True, one_size=True)
    transformed = "winograd" if library.library() is None else "native-winograd"
    assert (choose_kernel(convolution(320), large, policy, isa).name == transformed) == x86
    assert choose_kernel(convolution(320), small, policy, isa).name != transformed
    late = "native-winograd-late"  # for weights whose transform fills more than an arena
    assert (choose_kernel(convolution(1280), large, policy, isa).name == late) == (
        x86 and library.library() is not None
    )
    assert choose_kernel(convolution(40), (1, 40, 64, 64), policy, isa).name not in (transformed, late)
    chosen = choose_kernel(convolution(320), large, Policy(int8=frozenset({"w"})), isa).name
    assert (chosen == "native-int8") == (x86 and library.library() is not None)


def test_arithmetic_and_shapes_of_an_operation() -> None:
    op = convolution(8)
    assert op.output_shape((2, 8, 5, 6)) == (2, 8, 5, 6)
    assert op.flops((2, 8, 5, 6)) == 2 * (2 * 5 * 6) * 8 * (8 * 9)
    linear = Op(kind=Kind.LINEAR, weights=group((7, 3), (2, 3)))
    assert linear.output_shape((2, 5, 3)) == (2, 5, 9)
    assert linear.flops((2, 5, 3)) == 2 * 10 * 3 * 9


def test_geometry_is_in_the_operators_order() -> None:
    layer = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2)
    assert Geometry.of(layer) == ((1, 1), (2, 2), (1, 1), 2)


@pytest.mark.parametrize("module", [tiler.compute.tuning, tiler.memory.tuning])
def test_every_constant_has_a_passport(module: object) -> None:
    hints = typing.get_type_hints(module, include_extras=True)
    constants = [name for name in vars(module) if name.isupper() and not name.startswith("_")]
    assert constants
    root = Path(__file__).resolve().parents[2]
    for name in constants:
        (passport,) = hints[name].__metadata__
        assert isinstance(passport, Passport) and passport.unit
        script = next(word for word in passport.command.split() if word.endswith(".py"))  # or a test that measures
        assert (root / script).is_file(), passport


@pytest.mark.parametrize(
    ("int8_runs", "bf16_runs", "is_slow", "says"),
    [
        (False, False, False, "no products of bf16"),
        (False, True, False, "has bf16 instructions"),
        (False, False, True, "takes longer for bf16 products"),
        (True, False, False, "int8 products"),
    ],
)
def test_doctor_gives_this_processors_reason(int8_runs: bool, bf16_runs: bool, is_slow: bool, says: str) -> None:
    from tiler.cli.doctor import _compute_dtype

    said = _compute_dtype(int8_runs=int8_runs, bf16_runs=bf16_runs, bf16_is_slow=is_slow)
    assert says in said and said.startswith("int8") == int8_runs


def test_doctor_tells_of_a_torch_for_other_devices(tmp_path: Path, in_process: Callable[..., Any]) -> None:
    from tiler.cli.doctor import _torch_build

    assert _torch_build(tmp_path) == "built for processors"
    (tmp_path / "libtorch_cuda.so").touch()
    assert "built for CUDA" in _torch_build(tmp_path) and "77 MB" in _torch_build(tmp_path)
    assert "built for" in in_process("doctor", "--json").json["torch"]


@pytest.mark.skipif(library.library() is None or library.has_bf16(), reason="needs a library without bf16")
def test_bf16_that_is_slower_than_fp32_is_only_used_if_it_is_forced(
    in_process: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Intel's processors with AMX, whose flags name instructions that the library leaves out."""
    monkeypatch.setattr(cpu, "flags", lambda: ("avx2", "avx512f", "avx512_vnni"))
    refused = in_process("plan", "x", "--precision", "bf16")
    assert refused.code == 2 and "AVX-512 with BF16 instructions" in " ".join(refused.err.split())
    monkeypatch.setattr(cpu, "flags", lambda: ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile"))
    monkeypatch.setattr(library.library(), "isa", "v4")
    assert cpu.bf16_is_slow()
    refused = in_process("plan", "x", "--precision", "bf16")
    said = " ".join(refused.err.split())
    assert refused.code == 2 and "take longer than fp32's" in said and "TILER_ISA=v4-bf16" in said
    assert "TILER_ISA=v4-bf16" in in_process("doctor", "--json").json["--precision bf16"]


def test_measuring_names_the_chosen_kernel_for_every_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    from tiler.compute import measure

    shapes = (
        measure.TableShape(Kind.CONVOLUTION, (64, 64, 3, 3), (1, 64, 8, 8)),
        measure.TableShape(Kind.LINEAR, (64, 64), (1, 16, 64)),
    )
    monkeypatch.setattr(measure, "TABLE_SHAPES", shapes)
    sentences = measure.compare()
    assert len(sentences) == (3 if library.has_bf16() else 2) * len(shapes)
    assert all("is the fastest" in said or "is faster" in said for said in sentences)
    monkeypatch.setattr(measure, "timings", lambda shape: {"fp32": 1.0, "native-fp32": 3.0})
    assert all("fp32 is faster" in said for said in measure.compare() if "convolution" in said and "fp32:" in said)
