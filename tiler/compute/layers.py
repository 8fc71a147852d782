"""Layers that fetch their weights when they run.

`stream_layers` turns the Linear, Conv2d and Embedding layers of a meta-device module into such layers; norms and
biases, which are small, are loaded at once.

A layer is an operation (kernels.py). `convolve`, `linear` and `linear_layers` also take the operations before and after
its product, so that a kernel that can fuse them gets everything. They work with plain layers too, step by step.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
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
    Shape,
    Some,
    Weight,
    input_shape,
)
from tiler.compute.onednn import Geometry, plain_convolution
from tiler.compute.steps import finished, made_input, product

if TYPE_CHECKING:
    from tiler.compute.stream import Streamer

# Parameters of up to this many elements are loaded at once and stay, except those of the narrow layers below. A choice,
# no measurement: together, those of SD 1.5 take 2 MB, and loading them in every pass would take more reads than all its
# other weights.
SMALL = 64 * 1024
# In a denoiser, a linear layer or convolution with at least so many inputs and outputs is streamed however few elements
# it has: tiler's library computes several samples at once with it. A choice, no measurement; `mini` has 48.
_DENOISER_CHANNELS = 48
# The same for convolutions of an autoencoder: `mini`, whose layers have 16 to 64, decodes 1024² in 4.0–5.3 s of one
# thread instead of 6.1–6.8, without the library in 5.7 instead of 7.2–7.8; TAESD 2048 × 256 in 5.8–6.3 instead of
# 8.4–8.7 (Zen 3).
_AUTOENCODER_CHANNELS = 16
_PLAIN, _NOTHING = Input(), Epilogue()

_T = TypeVar("_T")


class StreamedLayer(nn.Module):
    """The base of the streamed layers: a meta weight that gives the shape, the parameter's name, and the streamer that
    provides its values. `first` is the row of the parameter at which the weight starts."""

    weight: Tensor
    key: str
    streamer: Streamer
    kind: Kind
    first: int = 0

    def op(self, made_of: Input = _PLAIN, after: Epilogue = _NOTHING) -> Op:
        """The layer as an operation."""
        return _op([self], made_of, after)


class StreamedLinear(nn.Linear, StreamedLayer):
    kind = Kind.LINEAR

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, ..., in) fp32 → (batch, ..., out)."""
        return linear(self, x)


class StreamedConv2d(nn.Conv2d, StreamedLayer):
    """Its input is an image of half the size if it `enlarges`."""

    kind = Kind.CONVOLUTION
    enlarges = False

    def op(self, made_of: Input = _PLAIN, after: Epilogue = _NOTHING) -> Op:
        return super().op(Input(enlarged=True) if self.enlarges else made_of, after)

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, in, height, width) fp32 → (batch, out, height', width')."""
        return convolve(self, x)

    @property
    def rows_together(self) -> int:
        """The number of rows of the result that are computed at once: inputs should be cut at multiples of it."""
        return self.streamer.kernel(self.op(), None).rows_together

    @property
    def takes_small(self) -> bool:
        """Whether it `enlarges` and its kernel enlarges the input itself."""
        return self.enlarges and self.streamer.kernel(self.op(), None).enlarges


def each_sample(product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The product of each sample by itself: its bits must not depend on their number."""
    return product(x) if len(x) == 1 or x.is_meta else torch.cat([product(one) for one in x.split(1)])


class SmallLinear(nn.Linear):
    """A linear layer whose weight stays in memory."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, ..., in) fp32 → (batch, ..., out)."""
        return each_sample(lambda one: product(one, self.weight, self.bias), x)


class SmallConv2d(nn.Conv2d):
    """A convolution whose weight stays in memory."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (n, in, height, width) fp32 → (n, out, height', width')."""
        return each_sample(lambda one: plain_convolution(one, self.weight, self.bias, Geometry.of(self)), x)


class StreamedEmbedding(nn.Embedding, StreamedLayer):
    def forward(self, ids: Tensor) -> Tensor:
        """ids: (batch, n) → (batch, n, width) fp32; only the rows that occur are read."""
        if self.streamer.store is None:
            return self.weight.new_empty(*ids.shape, self.weight.shape[1])
        unique, back = ids.unique(return_inverse=True)
        return self.streamer.store.rows(self.key, unique.tolist())[back]


def rows_of(layer: nn.Linear, first: int, last: int) -> nn.Linear:
    """Outputs [first, last) of a linear layer as a separate layer, streamed if the layer is."""
    cls = StreamedLinear if isinstance(layer, StreamedLinear) else nn.Linear
    part: nn.Linear = cls.__new__(cls)
    nn.Module.__init__(part)
    part.in_features, part.out_features = layer.in_features, last - first
    part.weight = nn.Parameter(layer.weight[first:last], requires_grad=False)
    bias = None if layer.bias is None else nn.Parameter(layer.bias[first:last], requires_grad=False)
    part.register_parameter("bias", bias)
    if isinstance(layer, StreamedLinear) and isinstance(part, StreamedLinear):
        part.key, part.streamer, part.first = layer.key, layer.streamer, layer.first + first
    return part


def enlarging(layer: nn.Conv2d) -> nn.Conv2d:
    """The layer as one whose input is enlarged first, both sides doubled by nearest neighbours: for
    `convolve(enlarged=True)`."""
    layer = copy.copy(layer)
    if isinstance(layer, StreamedConv2d):
        layer.enlarges = True
    return layer


def convolve(
    layer: nn.Module,
    *parts: Tensor,
    enlarged: bool = False,
    norm: nn.Module | None = None,
    activation: nn.Module | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Convolve the parts, (n, C, h, w) fp32 each, after they are joined, enlarged if requested, normalised and
    activated; then add `residual`."""
    made_of = Input(parts=len(parts), enlarged=enlarged, norm=norm, activation=activation)
    (out,) = _compute([layer], parts, made_of, Epilogue(residual=residual is not None), residual)
    return out


def linear(
    layer: nn.Module,
    x: Tensor,
    *,
    norm: nn.Module | None = None,
    activation: nn.Module | None = None,
    glu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """Apply a linear layer to x, (n, ..., in) fp32, normalised first. `activation` follows the product; with `glu` the
    result is the product's first half · activation(its second half). Then `residual` is added."""
    after = Epilogue(activation=activation, glu=glu, residual=residual is not None)
    (out,) = _compute([layer], (x,), Input(norm=norm), after, residual)
    return out


def linear_layers(layers: Sequence[nn.Module], x: Tensor, *, norm: nn.Module | None = None) -> tuple[Tensor, ...]:
    """Apply several linear layers to one input, normalised first: one operation if all are streamed."""
    return _compute(layers, (x,), Input(norm=norm), _NOTHING, None)


def attend(queries: Tensor, keys: Tensor, values: Tensor, layer: nn.Module | None = None) -> Tensor:
    """Compute attention, an operation without weights: (n, heads, tokens, width) each → the queries' shape. `layer` is
    a layer that computed one of them; attention follows its kernel policy."""
    policy = layer.streamer.policy if isinstance(layer, StreamedLayer) else Policy()
    kernel = choose_kernel(_ATTENTION, tuple(queries.shape), policy, cpu.isa())
    (out,) = kernel.apply(_ATTENTION, kernel.begin(_ATTENTION, Operands((queries, keys, values))), ())
    return out


def attend_in_parts(queries: Tensor, parts: Iterable[tuple[Tensor, Tensor]], layer: nn.Module | None = None) -> Tensor:
    """`attend` for keys and values that arrive a part at a time; partial results are combined by a running maximum
    (Milakov & Gimelshein 2018, arXiv:1805.02867)."""
    policy = layer.streamer.policy if isinstance(layer, StreamedLayer) else Policy()
    kernel = choose_kernel(_ATTENTION, tuple(queries.shape), policy, cpu.isa())
    seen: Some | None = None
    for keys, values in parts:
        some = kernel.some(kernel.begin(_ATTENTION, Operands((queries, keys, values))))
        seen = some if seen is None else _together(seen, some)
        del keys, values, some  # freed before the next ones
    assert seen is not None
    return seen.out


def _together(a: Some, b: Some) -> Some:
    top = torch.maximum(a.top, b.top)
    of_a, of_b = a.total * (a.top - top).exp2_(), b.total * (b.top - top).exp2_()
    total = of_a + of_b
    return Some((a.out * (of_a / total)).add_(b.out * (of_b / total)), top, total)


_ATTENTION = Op(kind=Kind.ATTENTION, input=Input(parts=3))


def _op(layers: Sequence[StreamedLayer], made_of: Input, after: Epilogue) -> Op:
    """Combine layers with one input into an operation."""
    layer = layers[0]
    geometry = Geometry.of(layer) if isinstance(layer, nn.Conv2d) else None
    weights = (
        Weight(
            name=one.key, meta=one.weight, first=one.first,
            bias=one.bias, low_rank=one.streamer.low_rank(one),  # type: ignore[arg-type]
            rotated=one.streamer.is_rotated(one),
        )
        for one in layers
    )  # fmt: skip
    return Op(kind=layer.kind, weights=Group(weights=tuple(weights)), geometry=geometry, input=made_of, epilogue=after)


def _compute(
    layers: Sequence[nn.Module], parts: tuple[Tensor, ...], made_of: Input, after: Epilogue, residual: Tensor | None
) -> tuple[Tensor, ...]:
    """Run layers that share one input, and the operations around them, with the chosen kernel and one read of the
    weights for all samples; step by step if one of the layers is not streamed."""
    streamed = [layer for layer in layers if isinstance(layer, StreamedLayer)]
    if len(streamed) < len(layers):
        made = made_input(made_of, parts)
        return finished(after, [layer(made) for layer in layers], residual)
    op, streamer = _op(streamed, made_of, after), streamed[0].streamer
    shape = input_shape(op, parts)
    kernel = streamer.kernel(op, shape)

    def compute() -> tuple[Tensor, ...]:
        return computed(streamed, op, kernel, kernel.begin(op, Operands(parts, residual)), shape)

    return compute() if streamer.store is not None else streamer.planned(op, kernel, parts, compute)


def computed(layers: Sequence[StreamedLayer], op: Op, kernel: Kernel, x: Operands, shape: Shape) -> tuple[Tensor, ...]:
    """Finish an operation that the kernel has begun, with one read of the layers' weights for all samples."""
    streamer = layers[0].streamer
    if streamer.fits(*layers):
        with streamer.hold(*layers):
            return kernel.apply(op, x, streamer.prepared(op, kernel, shape))
    return kernel.apply(op, x, streamer.prepared(op, kernel, shape))


def as_unit(module: nn.Module, forward: Callable[..., _T], *args: object) -> _T:
    """Return `forward(*args)`, running all layers of `module` sample by sample while its weights are held, if they can
    be."""
    layers = streamed_layers(module)
    return layers[0].streamer.run_unit(module, forward, *args) if layers else forward(*args)


def streamed_layers(module: nn.Module) -> list[StreamedLayer]:
    """The inner layers whose weights are held or cut into pieces. Tables are left out, because their rows are read one
    by one."""
    return [m for m in module.modules() if isinstance(m, StreamedLayer) and not isinstance(m, nn.Embedding)]


_CLASSES: Sequence[tuple[type[nn.Module], type[StreamedLayer]]] = (
    (nn.Linear, StreamedLinear),
    (nn.Conv2d, StreamedConv2d),
    (nn.Embedding, StreamedEmbedding),
)


def _is_small(layer: nn.Linear | nn.Conv2d | nn.Embedding, streamer: Streamer) -> bool:
    """Whether a layer's weight is loaded with the norms and stays."""
    if layer.weight.numel() > SMALL:
        return False
    if streamer.policy.winograd:  # a denoiser; an autoencoder's layers are transformed only while they are held
        return isinstance(layer, nn.Embedding) or min(layer.weight.shape[:2]) < _DENOISER_CHANNELS
    return not isinstance(layer, nn.Conv2d) or min(layer.weight.shape[:2]) < _AUTOENCODER_CHANNELS


def stream_layers(module: nn.Module, streamer: Streamer) -> None:
    """Turn the layers of a meta-device `module` into streamed ones, and load the small ones' parameters. No layer's
    result depends on the number of threads. The layers change class in place, so the tree, its names and its hooks stay
    the same."""
    named = list(module.named_modules())
    for path, child in named:
        for plain, streamed in _CLASSES:
            if type(child) is plain and not _is_small(child, streamer):  # type: ignore[arg-type]
                child.__class__ = streamed
                child.key, child.streamer = f"{path}.weight".lstrip("."), streamer  # type: ignore[assignment]
        for plain, small in (nn.Linear, SmallLinear), (nn.Conv2d, SmallConv2d):
            if type(child) is plain:
                child.__class__ = small
    if (units := streamer.units.get(module)) is None:  # a planning streamer is lent to a module again and again
        units = streamer.units[module] = list(_find_units(module, streamer))
    for unit in units:
        unit.forward = functools.partial(streamer.run_unit, unit, unit.forward)
    if streamer.store is None:
        return
    for path, child in named:
        for name, parameter in list(child._parameters.items()):
            if parameter is None or (isinstance(child, StreamedLayer) and name == "weight"):
                continue
            value = streamer.store.load(f"{path}.{name}".lstrip("."))
            setattr(child, name, nn.Parameter(value.view(parameter.shape), requires_grad=False))


def _find_units(module: nn.Module, streamer: Streamer) -> Iterator[nn.Module]:
    """The largest modules that fit the arena."""
    if isinstance(module, StreamedLayer) or not streamed_layers(module):
        return
    if streamer.fits(module) and not isinstance(module, nn.ModuleList):
        yield module
        return
    for child in module.children():
        yield from _find_units(child, streamer)
