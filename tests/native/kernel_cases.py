"""Calls of the library's functions with odd sizes, each with its result in fp64, for the tests beside this file."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tiler.native import library
from tiler.native.instructions import SETS, machine_of
from tiler.native.library import Activation, Attention, Image, Kind, Library, Pack, Product, Rows, Type, Winograd

OPERATIONS = {
    Product: "product",
    Rows: "rows",
    Image: "image",
    library.Sums: "sums",
    Attention: "attention",
    Pack: "pack",
    Winograd: "winograd",
    library.Moments: "moments",
    library.Quantise: "quantise",
}  # as in driver.c
DTYPES = {Type.UINT8: torch.uint8, Type.BF16: torch.bfloat16, Type.FP32: torch.float32}
VALUES = {Kind.INT8: 4, Kind.BF16: 2, Kind.FP32: 1}  # of a lane


def running() -> Iterator[Library]:
    """The library for each instruction set of this processor."""
    for isa in SETS if library.library() is not None else ():
        if isa.machine == machine_of(os.uname().machine):
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("TILER_ISA", isa.name)
                library._find.cache_clear()
                try:
                    yield library.library()  # type: ignore[misc]
                except library.UsageError:
                    continue
                finally:
                    library._find.cache_clear()


LIBRARIES = list(running())
needs_library = pytest.mark.skipif(not LIBRARIES, reason=f"the library is {library.fault()}")
every_set = pytest.mark.parametrize("lib", LIBRARIES, ids=lambda lib: lib.isa)


class Case(NamedTuple):
    """A call: its struct, the tensors that it points to, the result among them, the expected result, and the struct of
    the product beside it."""

    call: Any
    tensors: tuple[Tensor, ...]
    out: Tensor
    want: Tensor
    tolerance: float
    beside: Product | None = None

    def run(self, lib: Library, threads: int = 2) -> Tensor:
        getattr(lib, OPERATIONS[type(self.call)])(self.call, threads)
        return self.out

    def error(self) -> float:
        """The error as the driver measures it; where the reference is NaN, any value is accepted."""
        known = ~self.want.isnan()
        apart = (self.out.double() - self.want)[known]
        return float(apart.abs().max() if self.out.dtype == torch.uint8 else apart.norm() / self.want[known].norm())


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def padded(n: int, to: int) -> int:
    return -(-n // to) * to


def lanes(weight: Tensor, values: int) -> Tensor:
    """(outputs, inputs, *taps) in the order of kernels.h: [outputs / 16][tap][lane][16][value]."""
    flat = weight.flatten(2) if weight.ndim > 2 else weight[..., None]
    flat = F.pad(flat, (0, 0, 0, -flat.shape[1] % values, 0, -len(flat) % 16))
    return flat.view(-1, 16, flat.shape[1] // values, values, flat.shape[2]).permute(0, 4, 2, 1, 3).contiguous()


def in_lanes(x: Tensor, values: int) -> Tensor:
    """(..., channels) with the last axis padded to whole lanes."""
    return F.pad(x, (0, -x.shape[-1] % values)).contiguous()


ACTIVATIONS = {
    Activation.NONE: lambda x: x,
    Activation.SILU: F.silu,
    Activation.GELU: F.gelu,
    Activation.GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
}


def activated(x: Tensor, how: Activation, gated: bool) -> Tensor:
    if gated:
        hidden, gate = x.chunk(2, dim=-1)
        return hidden * ACTIVATIONS[how](gate)
    return ACTIVATIONS[how](x)


def weights_of(kind: Kind, *shape: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Whole weights, one of four large, or weights that the kind represents exactly; their scales; the weights in
    lanes; their sums."""
    if kind is Kind.INT8:
        weight, scale = torch.randint(-9, 10, shape, dtype=torch.int8), torch.rand(shape[0]) / 50 + 0.01
        for first in (0, 2):  # with inputs 1, 4 and 5, or 3, 6 and 7, of eight
            large = weight[:, first::8]
            large.copy_(torch.randint(-101, 102, large.shape))
    else:
        weight = (torch.randn(shape) / 8).to(torch.bfloat16 if kind is Kind.BF16 else torch.float32)
        scale = torch.ones(shape[0])
    return weight, scale, lanes(weight, VALUES[kind]), weight.flatten(1).float().sum(1).to(torch.int32)


def inputs_of(kind: Kind, *shape: int) -> Tensor:
    if kind is Kind.INT8:
        return torch.randint(0, 256, shape, dtype=torch.uint8)
    return torch.randn(shape).to(torch.bfloat16 if kind is Kind.BF16 else torch.float32)


def linear(
    kind: Kind, rows: int, inputs: int, outputs: int, *, act: Activation = Activation.NONE,
    out_type: Type = Type.FP32, more: bool = True, apart: int = 0, gated: bool = False, rank: int = 0,
) -> Case:  # fmt: skip
    """`more`: a bias and a residual. `apart`: lanes between rows. `gated`: the second half of the outputs are gates.
    `rank`: inputs of a product beside it."""
    torch.manual_seed(rows + inputs + outputs)
    weight, factor, packed, sums = weights_of(kind, outputs, inputs)
    x, scale, zero = inputs_of(kind, rows, inputs), torch.rand(rows) / 50 + 0.01, torch.tensor([128], dtype=torch.int32)
    a = F.pad(in_lanes(x, VALUES[kind]), (0, apart * VALUES[kind])).contiguous()
    real = (x.double() - 128) * scale.double()[:, None] if kind is Kind.INT8 else x.double()
    width = outputs // 2 if gated else outputs
    bias, residual = (torch.randn(outputs), torch.randn(rows, width)) if more else (None, None)
    want = real @ (weight.double() * factor.double()[:, None]).T
    if rank:
        beside = linear(kind, rows, rank, outputs, more=False, apart=2 * apart)
        want += beside.want
    want = activated(want if bias is None else want + bias, act, gated)
    want = want if residual is None else want + residual
    out = torch.full((rows, width), 99.0).to(DTYPES[out_type])
    call = Product(
        kind=kind, activation=act, out_type=out_type, taps=1, rows=rows, outputs=width, steps=packed.shape[2],
        a=address(a), row_bytes=a.stride(0) * a.element_size(), weights=address(packed), weight_scale=address(factor),
        weight_sum=address(sums), scale=address(scale), zero=address(zero), scale_rows=1, bias=address(bias),
        residual=address(residual), out=address(out), out_step=width, residual_step=width,
    )  # fmt: skip
    if gated:
        call.gate_weights = address(packed[width // 16 :])
        call.gate_scale, call.gate_sum = address(factor[width:]), address(sums[width:])
        call.gate_bias = None if bias is None else address(bias[width:])
    tensors = [t for t in (a, packed, factor, sums, scale, zero, bias, residual, out) if t is not None]
    if rank:
        low, (_, packed, factor, sums, *_) = beside.call, beside.tensors
        low.outputs, call.beside = width, ctypes.addressof(low)
        if gated:
            low.gate_weights = address(packed[width // 16 :])
            low.gate_scale, low.gate_sum = address(factor[width:]), address(sums[width:])
        return Case(call, (*tensors, *beside.tensors), out, want, 2e-6, low)
    return Case(call, tuple(tensors), out, want, 4e-3 if out_type is Type.BF16 else 2e-6)


def convolution(
    kind: Kind, images: int, sides: tuple[int, int], inputs: int, outputs: int, side: int, stride: int
) -> Case:
    torch.manual_seed(inputs + outputs)
    weight, factor, packed, sums = weights_of(kind, outputs, inputs, side, side)
    pad = side // 2
    x = inputs_of(kind, images, sides[0] + 2 * pad, sides[1] + 2 * pad, inputs)
    scale, zero = torch.rand(images) / 50 + 0.01, torch.randint(0, 256, (images,), dtype=torch.int32)
    real = (x.double() - zero.view(-1, 1, 1, 1)) * scale.double().view(-1, 1, 1, 1) if kind is Kind.INT8 else x.double()
    bias = torch.randn(outputs)
    want = F.conv2d(real.movedim(-1, 1), weight.double() * factor.double().view(-1, 1, 1, 1), bias.double(), stride)
    want = want.movedim(1, -1).contiguous()
    a, out = in_lanes(x, VALUES[kind]), torch.full(want.shape, 99.0)
    place = a.shape[-1] * a.element_size()
    line = a.shape[2] * place
    taps = torch.tensor([i * line + j * place for i in range(side) for j in range(side)])
    places = want.shape[1] * want.shape[2]
    call = Product(
        kind=kind, out_type=Type.FP32, taps=side * side, rows=images * places, outputs=outputs, steps=packed.shape[2],
        a=address(a), per_image=places, width=want.shape[2], image_bytes=a.shape[1] * line, line_bytes=stride * line,
        place_bytes=stride * place, tap=address(taps), weights=address(packed), weight_scale=address(factor),
        weight_sum=address(sums), scale=address(scale), zero=address(zero), scale_rows=places, zero_step=1,
        bias=address(bias), out=address(out), out_step=outputs,
    )  # fmt: skip
    return Case(call, (a, packed, factor, sums, scale, zero, taps, bias, out), out, want, 2e-6)


def quantised(outputs: int, inputs: int, side: int) -> Case:
    """Rows of whose values one is so large that it decides about the scale."""
    torch.manual_seed(inputs)
    x = torch.randn(outputs, inputs, side, side)
    x[:, inputs // 2, 0, 0] = 100
    values, scale = torch.full(x.shape, 99, dtype=torch.int8), torch.full((outputs,), 99.0)
    call = library.Quantise(
        x=address(x), outputs=outputs, inputs=inputs, taps=side * side, out=address(values), scale=address(scale)
    )
    return Case(call, (x, values, scale), scale, torch.full((outputs,), 100 / 127, dtype=torch.float64), 1e-6)


def walsh_hadamard(n: int) -> Tensor:
    """(n, n) fp64: −1 to the number of bits that row and column number share, divided by √n."""
    shared = torch.arange(n)[:, None] & torch.arange(n)
    return (-1.0) ** torch.tensor([[number.bit_count() for number in row] for row in shared.tolist()]).double() / n**0.5


def tokens(rows: int, width: int, out_type: Type, *, norm: bool, apart: int = 0, rotated: bool = False) -> Case:
    torch.manual_seed(rows + width)
    x = torch.randn(rows, width + apart) * torch.logspace(-2, 2, rows)[:, None] + 0.3
    gamma, beta = (torch.randn(width), torch.randn(width)) if norm else (None, None)
    want = x[:, :width].double()
    if gamma is not None and beta is not None:
        want = F.layer_norm(want, (width,), gamma.double(), beta.double(), 1e-5)
    if rotated:
        want = (want.view(rows, -1, 64) @ walsh_hadamard(64)).view(rows, width)
    scale = torch.zeros(rows)
    filled = padded(width, {Type.UINT8: 4, Type.BF16: 2, Type.FP32: 1}[out_type])
    out = torch.empty(rows, filled, dtype=DTYPES[out_type])
    if out_type is Type.UINT8:
        want = (want / want.abs().amax(1, keepdim=True) * 127).round() + 128
    want = F.pad(want, (0, filled - width), value=128.0 if out_type is Type.UINT8 else 0.0)
    call = Rows(
        x=address(x), rows=rows, width=width, step=width + apart, gamma=address(gamma), beta=address(beta), eps=1e-5,
        norm=norm, rotated=rotated,
        out_type=out_type, out=address(out), out_bytes=out.stride(0) * out.element_size(), scale=address(scale),
    )  # fmt: skip
    tensors = [t for t in (x, gamma, beta, scale, out) if t is not None]
    return Case(call, tuple(tensors), out, want, {Type.UINT8: 1.0, Type.BF16: 4e-3, Type.FP32: 1e-6}[out_type])


def image(
    images: int, sides: tuple[int, int], channels: tuple[int, int], out_type: Type, *,
    groups: int = 2, silu: bool = True, padding: int = 1, lines: int | None = None, shift: float = 0.5,
    each_place: bool = False, given: bool = False,
) -> Case:  # fmt: skip
    """`lines`: rows of the frame above and below; None: as many as left and right. `given`: gamma and beta are each
    channel's factor and summand."""
    torch.manual_seed(sum(channels) + images)
    parts = [torch.randn(images, *sides, c) * (1 + 2 * i) + shift for i, c in enumerate(channels)]
    total = sum(channels)
    gamma, beta = torch.randn(total), torch.randn(total)
    want = torch.cat(parts, dim=-1).double().movedim(-1, 1)
    lines = padding if lines is None else lines
    factors = torch.stack([gamma, beta])
    if given:
        want = want * gamma.double().view(-1, 1, 1) + beta.double().view(-1, 1, 1)
    elif groups:
        want = F.group_norm(want, groups, gamma.double(), beta.double(), 1e-5)
    want = F.silu(want) if silu else want
    places = sides[0] * sides[1]
    zero, scale = torch.zeros(images, dtype=torch.int32), torch.zeros(images * places if each_place else images)
    if each_place:
        want = want / want.abs().amax(1, keepdim=True) * 127 + 128
    elif out_type is Type.UINT8:
        # The range is that of SiLU over each channel's ends: wider than what occurs by less than a step.
        low, high = want.flatten(1).amin(1).clamp_max(0), want.flatten(1).amax(1)
        low = torch.where(low < -0.27, -0.27846455, low) if silu else low
        step = (high - low) / 254
        want = want / step.view(-1, 1, 1, 1) + (-low / step).round().view(-1, 1, 1, 1)
    frame = torch.zeros(images, sides[0] + 2 * lines, sides[1] + 2 * padding, total, dtype=torch.float64)
    if out_type is Type.UINT8 and not each_place:
        frame += (-low / step).round().view(-1, 1, 1, 1)
    frame[:, lines : lines + sides[0], padding : padding + sides[1]] = want.movedim(1, -1)
    frame = frame.round() if out_type is Type.UINT8 else frame
    filled = padded(total, 4)
    out = torch.empty(*frame.shape[:3], filled, dtype=DTYPES[out_type])
    out[..., total:] = 0
    scratch = torch.empty(library.scratch_floats(images, places, total))
    call = Image(
        x=(ctypes.c_void_p * 2)(*map(address, parts)), channels=(ctypes.c_int64 * 2)(*channels), images=images,
        height=sides[0], width=sides[1], padding=padding, padding_lines=lines, groups=0 if given else groups, silu=silu,
        out_type=out_type, each_place=each_place, eps=1e-5, gamma=address(gamma), beta=address(beta),
        given=address(factors) if given else None, out=address(out),
        place_bytes=filled * out.element_size(), scale=address(scale), zero=address(zero), scratch=address(scratch),
    )  # fmt: skip
    frame = F.pad(frame, (0, filled - total))
    if filled > total:  # what fills the lanes is multiplied by zero: any value
        frame[..., total:] = float("nan")
    tolerance = {Type.UINT8: 1.0, Type.BF16: 4e-3, Type.FP32: 2e-6}[out_type]
    return Case(call, (*parts, gamma, beta, scale, zero, scratch, factors, out), out, frame, tolerance)


def moments(places: int, channels: int, groups: int, shift: float) -> Case:
    torch.manual_seed(places + channels)
    x = torch.randn(places, channels) * torch.logspace(-1, 1, channels) + shift
    of_groups = x.double().view(places, groups, -1)
    mean = of_groups.mean((0, 2))
    squares = (of_groups - mean[:, None]).square().sum((0, 2))
    want = torch.cat([mean, squares, torch.stack([x.min(), x.max()]).double()])
    out, scratch = torch.empty_like(want), torch.empty(library.scratch_floats(1, places, channels))
    call = library.Moments(
        x=address(x), places=places, channels=channels, groups=groups, scratch=address(scratch), out=address(out)
    )
    return Case(call, (x, scratch, out), out, want, 1e-6)


def attention(
    kind: Kind, samples: int, heads: int, queries: int, keys: int, dims: int, *, apart: int = 0, spread: float = 1.5
) -> Case:
    """`apart`: values between tokens. `spread`: the spread of queries and keys."""
    torch.manual_seed(queries + keys + dims)
    width = heads * dims
    q, k, v = (torch.randn(samples, tokens, width + apart) for tokens in (queries, keys, keys))
    q, k = q * spread, k * spread
    split = [x[..., :width].double().unflatten(-1, (heads, dims)).transpose(1, 2) for x in (q, k, v)]
    want = F.scaled_dot_product_attention(*split).transpose(1, 2).contiguous()
    out = torch.full((samples, queries, heads, dims), 99.0)
    call = Attention(kind=kind, scale=dims**-0.5, samples=samples, heads=heads, queries=queries, keys=keys, dims=dims)
    for name, x, step in (
        ("q", q, width + apart),
        ("k", k, width + apart),
        ("v", v, width + apart),
        ("out", out, width),
    ):
        setattr(call, name, address(x))
        setattr(call, f"{name}_step", (ctypes.c_int64 * 3)(len(x[0]) * step, dims, step))
    return Case(call, (q, k, v, out), out, want, 1.5e-6 if kind is Kind.FP32 else 2.5e-2 if keys * dims < 20 else 9e-3)


def kinds(lib: Library) -> list[Kind]:
    return [kind for kind in Kind if kind is not Kind.BF16 or lib.isa == "v4-bf16"]


def products(lib: Library) -> Iterator[Case]:
    for kind in kinds(lib):
        for rows, inputs, outputs in (
            (1, 1, 1), (2, 33, 17), (3, 64, 16), (5, 516, 80), (6, 640, 48), (7, 129, 160), (77, 768, 64),
            (193, 96, 33),
        ):  # fmt: skip
            yield linear(kind, rows, inputs, outputs, apart=rows % 3)
        for act in Activation:
            yield linear(kind, 11, 70, 96, act=act)
            yield linear(kind, 10, 70, 160, act=act, more=False, gated=True)
        yield linear(kind, 9, 130, 37, out_type=Type.BF16)
        yield convolution(kind, 1, (9, 7), 36, 20, 3, 1)
        yield convolution(kind, 3, (8, 5), 5, 64, 3, 2)
        yield convolution(kind, 2, (11, 10), 140, 33, 3, 1)
        yield convolution(kind, 2, (5, 5), 24, 16, 1, 1)
        yield scattered(kind)
    for rank, rows, outputs in ((1, 7, 33), (4, 12, 64), (20, 101, 160), (128, 3, 17)):
        yield linear(Kind.INT8, rows, 516, outputs, act=Activation.SILU, apart=rows % 2, rank=rank)
    for rank, outputs in ((4, 96), (20, 320), (1, 160)):
        yield linear(Kind.INT8, 25, 70, outputs, act=Activation.GELU, gated=True, rank=rank)


def scattered(kind: Kind) -> Case:
    """A product of 12 rows whose results are every other place of every other line."""
    case = linear(kind, 12, 40, 33, more=False)
    out = torch.full((6, 8, 33), -7.0)
    want = out.double()
    want[::2, ::2] = case.want.view(3, 4, 33)
    call = case.call
    call.out, call.out_step, call.out_width, call.out_line = address(out), 2 * 33, 4, 2 * 8 * 33
    return case._replace(tensors=(*(t for t in case.tensors if t is not case.out), out), out=out, want=want)


def others() -> Iterator[Case]:
    for out_type in Type:
        for rows, width in ((1, 5), (3, 16), (37, 77), (70, 320)):
            yield tokens(rows, width, out_type, norm=rows % 2 == 1, apart=rows % 5)
        yield image(1, (8, 8), (32, 0), out_type)
        yield image(3, (9, 17), (12, 24), out_type, padding=2)
        yield image(2, (5, 4), (10, 8), out_type, silu=False)
        yield image(2, (13, 11), (20, 0), out_type, groups=0, silu=False, padding=0, shift=-3)
        if out_type is not Type.UINT8:
            yield image(1, (3, 600), (20, 0), out_type, padding=1, lines=0, given=True)
            yield image(2, (4, 5), (12, 7), out_type, padding=0, lines=1, given=True, silu=False)
    for places, channels, groups, shift in ((1, 1, 1, 0), (130, 12, 3, 5), (700, 48, 2, -20)):
        yield moments(places, channels, groups, shift)
    yield tokens(37, 128, Type.UINT8, norm=False, apart=3, rotated=True)
    yield tokens(5, 320, Type.UINT8, norm=True, rotated=True)
    yield image(2, (7, 5), (20, 0), Type.UINT8, silu=False, padding=0, each_place=True)
    yield image(1, (7, 5), (20, 7), Type.UINT8, groups=3, padding=0, each_place=True)


def attentions(lib: Library) -> Iterator[Case]:
    for kind in kinds(lib):
        if kind is not Kind.INT8:
            for samples, heads, queries, keys, dims in (
                (2, 3, 40, 77, 40), (1, 2, 100, 301, 64), (1, 1, 49, 130, 72), (3, 2, 33, 121, 80),
                (1, 2, 65, 240, 128), (1, 1, 70, 97, 160), (2, 1, 20, 49, 256), (2, 1, 101, 51, 512), (1, 2, 17, 25, 300), (1, 1, 1, 1, 1), (1, 2, 2, 5, 7),
                (1, 1, 3, 12, 17), (1, 2, 4, 8, 47), (1, 1, 5, 77, 129), (2, 2, 6, 2, 16), (1, 1, 7, 119, 33),
                (1, 8, 288, 7, 160),  # as many queries as a task takes
            ):  # fmt: skip
                yield attention(kind, samples, heads, queries, keys, dims, apart=queries % 3)


def packed(kind: Kind, outputs: int, inputs: int, side: int) -> Case:
    torch.manual_seed(outputs + inputs)
    weight = torch.randn(outputs, inputs, side, side)
    want = lanes(weight.to(DTYPES[Type(kind)]), VALUES[kind])
    out = torch.full(want.shape, 99.0).to(want.dtype)
    call = Pack(kind=kind, outputs=outputs, inputs=inputs, taps=side**2, rows=address(weight), out=address(out))
    return Case(call, (weight, out), out, want.double(), 0.0)


def transformed(weight: Tensor, kind: Kind, lib: Library, *, enlarged: bool = False) -> tuple[Tensor, int]:
    """A weight (outputs, inputs, 3, 3) in the form that `Winograd` takes, and the bytes from one point to the next."""
    outputs, inputs = weight.shape[:2]
    point = -(-outputs // 16) * -(-inputs // VALUES[kind]) * 64
    points = torch.empty((25 if enlarged else 36) * point // 4)
    call = Pack(
        kind=kind, is_transformed=True, enlarged=enlarged, outputs=outputs, inputs=inputs, taps=9, rows=address(weight),
        out=address(points), point_bytes=point,
    )  # fmt: skip
    lib.pack(call, 2)
    return points, point


def winograd(
    lib: Library, kind: Kind, images: int, sides: tuple[int, int], inputs: int, outputs: int, *, frame: int = 1,
    is_late: bool = False,
) -> Case:  # fmt: skip
    """A 3 × 3 convolution of images whose frame of zeros is stored, or lies outside of the stored image. The weights
    are transformed before, or by the convolution (`is_late`)."""
    torch.manual_seed(inputs + outputs)
    weight, bias = torch.randn(outputs, inputs, 3, 3) / 8, torch.randn(outputs)
    x, residual = torch.randn(images, *(n + 2 for n in sides), inputs), torch.randn(images, *sides, outputs)
    if not frame:
        x[:, -1], x[:, :, -1] = 0, 0
    want = F.conv2d(x.double().movedim(-1, 1), weight.double(), bias.double()).movedim(1, -1) + residual
    x = x if frame else x[:, :-1, :-1].contiguous()
    points, point = (lanes(weight, 1), 0) if is_late else transformed(weight, kind, lib)
    out = torch.full(want.shape, 99.0)
    seen = torch.empty(36 * 96 * -(-inputs // VALUES[kind]))
    products = torch.empty(36 * 96 * padded(outputs, 16))
    call = Winograd(
        kind=kind, images=images, lines=x.shape[1], places=x.shape[2], channels=inputs, height=sides[0],
        width=sides[1], outputs=outputs, a=address(x), image_step=x[0].numel(), weights=address(points),
        point_bytes=point, bias=address(bias), residual=address(residual), out=address(out), out_step=outputs,
        residual_step=outputs, seen=address(seen), products=address(products),
    )  # fmt: skip
    tensors = (x, points, bias, residual, out, seen, products)
    return Case(call, tensors, out, want.contiguous(), 1e-6 if kind is Kind.FP32 else 1.5e-2)


def enlarged(lib: Library, kind: Kind, images: int, sides: tuple[int, int], inputs: int, outputs: int) -> Case:
    """The same for images that are enlarged first, with both sides doubled; the frame of the small ones is stored."""
    torch.manual_seed(inputs + outputs)
    weight, bias = torch.randn(outputs, inputs, 3, 3) / 8, torch.randn(outputs)
    small = torch.randn(images, inputs, *sides)
    large = F.interpolate(small.double(), scale_factor=2.0, mode="nearest")
    want = F.conv2d(large, weight.double(), bias.double(), padding=1).movedim(1, -1)
    x = F.pad(small, (1, 1, 1, 1)).movedim(1, -1).contiguous()
    points, point = transformed(weight, kind, lib, enlarged=True)
    out = torch.full(want.shape, 99.0)
    seen, products = torch.empty(16 * 96 * -(-inputs // VALUES[kind])), torch.empty(25 * 96 * padded(outputs, 16))
    call = Winograd(
        kind=kind, enlarged=True, images=images, lines=x.shape[1], places=x.shape[2], channels=inputs,
        height=want.shape[1], width=want.shape[2], outputs=outputs, a=address(x), image_step=x[0].numel(),
        weights=address(points), point_bytes=point, bias=address(bias), out=address(out), out_step=outputs,
        seen=address(seen), products=address(products),
    )  # fmt: skip
    tensors = (x, points, bias, out, seen, products)
    return Case(call, tensors, out, want.contiguous(), 4e-7 if kind is Kind.FP32 else 1.5e-2)


def weights(lib: Library) -> Iterator[Case]:
    for kind in Kind:
        if kind is not Kind.INT8:
            for outputs, inputs, side in ((16, 16, 1), (33, 37, 3), (5, 3, 2), (48, 64, 3), (1, 1, 1)):
                yield packed(kind, outputs, inputs, side)


def transforms(lib: Library) -> Iterator[Case]:
    for kind in kinds(lib):
        if kind is not Kind.INT8:
            yield winograd(lib, kind, 1, (8, 8), 32, 64)
            yield winograd(lib, kind, 2, (9, 7), 21, 33)
            yield winograd(lib, kind, 1, (41, 42), 16, 16)
            yield winograd(lib, kind, 3, (5, 1), 3, 1, frame=0)
            yield enlarged(lib, kind, 1, (8, 8), 32, 64)
            yield enlarged(lib, kind, 2, (9, 7), 21, 33)
            yield enlarged(lib, kind, 3, (21, 1), 3, 1)
    yield winograd(lib, Kind.FP32, 2, (9, 7), 21, 33, is_late=True)
    yield winograd(lib, Kind.FP32, 3, (41, 5), 320, 16, is_late=True)


def cases(lib: Library) -> list[Case]:
    return [
        *(
            linear(kind, 203, 260, 160, act=Activation.GELU, gated=gated)
            for kind in kinds(lib)
            for gated in (False, True)
        ),
        linear(Kind.INT8, 203, 260, 160, gated=True, rank=20),
        convolution(Kind.INT8, 3, (13, 9), 40, 80, 3, 1),
        quantised(5, 100, 1),
        quantised(3, 12, 3),
        tokens(203, 96, Type.UINT8, norm=True),
        tokens(67, 192, Type.UINT8, norm=True, rotated=True),
        image(3, (33, 17), (12, 24), Type.UINT8),
        *(
            make(lib, kind, 2, (41, 22), 40, 96)
            for make in (winograd, enlarged)
            for kind in kinds(lib)
            if kind is not Kind.INT8
        ),
        winograd(lib, Kind.FP32, 2, (41, 22), 40, 96, is_late=True),
        *(attention(kind, 2, 3, 300, 200, 40) for kind in kinds(lib) if kind is not Kind.INT8),
        attention(Kind.FP32, 1, 8, 288, 20, 40),  # tasks of one thread have more queries
    ]
