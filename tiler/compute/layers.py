"""Layers that fetch their weights when they run.

`stream_layers` turns the Linear, Conv2d and Embedding layers of a meta-device module into them; norms and biases, which are
small, are loaded at once. A layer is an operation (kernels.py): what is computed before and after its product may be handed
in with a call, so that a kernel which can do it all at once gets it whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from tiler.compute import cpu
from tiler.compute.choose import choose_kernel
from tiler.compute.kernels import (
    Epilogue,
    Group,
    Input,
    Kernel,
    Kind,
    Op,
    Operands,
    Policy,
    activated,
    input_shape,
    joined,
    normed,
)
from tiler.compute.onednn import Geometry

if TYPE_CHECKING:
    from tiler.compute.stream import Streamer

SMALL = 64 * 1024  # parameters of up to this many elements are loaded at once and stay
_PLAIN = Input()


class StreamedLayer(nn.Module):
    """What the streamed classes share: a meta weight for its shape, the parameter's name, and where to get it; `first` is the
    parameter's row where the weight begins."""

    weight: Tensor
    key: str
    streamer: Streamer
    kind: Kind
    first: int = 0

    def op(self, made_of: Input = _PLAIN, *, residual: bool = False) -> Op:
        """The layer as an operation."""
        bias: Tensor | None = self.bias  # type: ignore[assignment]
        geometry = Geometry.of(self) if isinstance(self, nn.Conv2d) else None
        epilogue = Epilogue(bias=bias, residual=residual)
        group = Group(name=self.key, meta=self.weight, first=self.first)
        return Op(kind=self.kind, weights=group, geometry=geometry, input=made_of, epilogue=epilogue)

    def compute(self, op: Op, x: Operands, out: Tensor | None = None) -> Tensor:
        """The operation by the kernel that was chosen for it, under one read of the weight for all samples."""
        shape = input_shape(op, x.parts)
        kernel = self.streamer.kernel(op, shape)
        x = kernel.begin(op, x)
        if out is None:
            out = kernel.empty(op, x.parts[0], shape)
        with _held(self, kernel):
            return kernel.apply(op, x, self.streamer.prepared(op, kernel, shape), out)


class StreamedLinear(nn.Linear, StreamedLayer):
    kind = Kind.LINEAR

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, ..., in) fp32 → (batch, ..., out)."""
        return self.compute(self.op(), Operands((x,)))


class StreamedConv2d(nn.Conv2d, StreamedLayer):
    kind = Kind.CONVOLUTION

    def forward(self, *parts: Tensor, made_of: Input = _PLAIN, residual: Tensor | None = None) -> Tensor:
        """parts: (batch, C, height, width) fp32 each, joined, normed and activated first → (batch, out, height', width'), plus
        `residual`."""
        return self.compute(self.op(made_of, residual=residual is not None), Operands(parts, residual))

    @property
    def rows_together(self) -> int:
        """How many rows of the result are computed at once: inputs should be cut at multiples of them."""
        return self.streamer.kernel(self.op(), None).rows_together


class StreamedEmbedding(nn.Embedding, StreamedLayer):
    def forward(self, ids: Tensor) -> Tensor:
        """ids: (batch, n) → (batch, n, width) fp32; only the rows that occur are read."""
        assert self.streamer.store is not None
        unique, back = ids.unique(return_inverse=True)
        return self.streamer.store.rows(self.key, unique.tolist())[back]


def rows_of(layer: nn.Linear, first: int, last: int) -> nn.Linear:
    """Outputs [first, last) of a linear layer as a layer of their own, streamed if it is."""
    cls = StreamedLinear if isinstance(layer, StreamedLinear) else nn.Linear
    part: nn.Linear = cls.__new__(cls)
    nn.Module.__init__(part)
    part.in_features, part.out_features = layer.in_features, last - first
    part.weight = nn.Parameter(layer.weight[first:last], requires_grad=False)
    part.bias = None if layer.bias is None else nn.Parameter(layer.bias[first:last], requires_grad=False)  # type: ignore[assignment]
    if isinstance(layer, StreamedLinear) and isinstance(part, StreamedLinear):
        part.key, part.streamer, part.first = layer.key, layer.streamer, layer.first + first
    return part


def convolve(
    conv: Callable[..., Tensor], *parts: Tensor, norm: nn.Module, activation: nn.Module, residual: Tensor | None = None
) -> Tensor:
    """`conv` of the parts joined, normed and activated, plus `residual`: one operation where the layer is streamed."""
    if isinstance(conv, StreamedConv2d):
        made_of = Input(parts=len(parts), norm=norm, activation=activation)
        out: Tensor = conv(*parts, made_of=made_of, residual=residual)
        return out
    out = conv(activated(activation, normed(norm, joined(parts))))
    return out if residual is None else out.add_(residual)


def linear_layers(layers: Sequence[Callable[..., Tensor]], x: Tensor) -> list[Tensor]:
    """What several linear layers make of one input; what their kernel can make of it for all of them is made once."""
    streamed = [(layer, layer.op()) for layer in layers if isinstance(layer, StreamedLinear)]
    shape = tuple(x.shape)
    kernels = {layer.streamer.kernel(op, shape) for layer, op in streamed}
    shared: Any = None
    if len(streamed) == len(layers) and len(kernels) == 1:
        shared = next(iter(kernels)).share(streamed[0][1], (x,))
    if shared is None:
        return [layer(x) for layer in layers]
    (kernel,) = kernels
    results = [kernel.empty(op, x, shape) for _, op in streamed]
    for (layer, op), out in zip(streamed, results, strict=True):
        layer.compute(op, Operands((x,), shared=shared), out)
    return results


def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention, an operation without weights: (n, heads, tokens, width) each → the queries' shape."""
    op, parts = _ATTENTION, (queries, keys, values)
    kernel = choose_kernel(op, tuple(queries.shape), Policy(), cpu.isa())
    return kernel.apply(op, Operands(parts), (), queries)


_ATTENTION = Op(kind=Kind.ATTENTION, input=Input(parts=3))


def _held(layer: StreamedLayer, kernel: Kernel) -> AbstractContextManager[None]:
    """Its weight is held for all samples, if it fits, the kernel gains by it, and weights are not held already."""
    streamer = layer.streamer
    held = streamer.holding or not kernel.holds_alone or not streamer.fits(layer)
    return nullcontext() if held else streamer.hold(layer)


def streamed_layers(module: nn.Module) -> list[StreamedLayer]:
    """The layers inside whose weights are held or cut; a table is neither, its rows are read one by one."""
    return [m for m in module.modules() if isinstance(m, StreamedLayer) and not isinstance(m, nn.Embedding)]


_CLASSES: Sequence[tuple[type[nn.Module], type[StreamedLayer]]] = (
    (nn.Linear, StreamedLinear),
    (nn.Conv2d, StreamedConv2d),
    (nn.Embedding, StreamedEmbedding),
)


def stream_layers(module: nn.Module, streamer: Streamer) -> None:
    """Turn the large layers of a meta-device `module` into streamed ones, and load the small parameters.

    The layers change class in place, so the tree, its names and its hooks stay what they were.
    """
    for path, child in module.named_modules():
        for plain, streamed in _CLASSES:
            if type(child) is plain and child.weight.numel() > SMALL:  # type: ignore[operator]
                child.__class__ = streamed
                child.key, child.streamer = f"{path}.weight".lstrip("."), streamer  # type: ignore[assignment]
    _mark_units(module, streamer)
    if streamer.store is None:
        return
    for path, child in module.named_modules():
        for name, parameter in list(child.named_parameters(recurse=False)):
            if isinstance(child, StreamedLayer) and name == "weight":
                continue
            value = streamer.store.load(f"{path}.{name}".lstrip("."))
            setattr(child, name, nn.Parameter(value.view(parameter.shape), requires_grad=False))


def _mark_units(module: nn.Module, streamer: Streamer) -> None:
    """Give the largest modules that fit the arena the forward of a unit."""
    if isinstance(module, StreamedLayer) or not streamed_layers(module):
        return
    if streamer.fits(module) and not isinstance(module, nn.ModuleList):
        module.forward = functools.partial(streamer.run_unit, module, module.forward)
        return
    for child in module.children():
        _mark_units(child, streamer)
