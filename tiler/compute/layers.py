"""Layers that fetch their weights when they run, one sample's matrix product at a time.

`stream_layers` turns the Linear, Conv2d and Embedding layers of a meta-device module into them; norms and biases, which are
small, are loaded at once. Arithmetic never sees the batch: every matrix product is one sample's, over pieces cut at the same
rows, so results do not depend on how many samples share a read. A convolution's weight is brought into oneDNN's own order
once for all samples, or transformed (winograd.py). Layers stored as int8 are computed in int8 (int8.py), where sums are exact.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiler.compute import int8, onednn, winograd
from tiler.weights.store import PIECE_ELEMENTS, piece_rows

if TYPE_CHECKING:
    from tiler.compute.stream import Streamer

Rows = tuple[int, int, Tensor]  # of a weight: first, last + 1, and the rows themselves
SMALL = 64 * 1024  # parameters of up to this many elements are loaded at once and stay


class StreamedLayer(nn.Module):
    """What the streamed classes share: a meta weight for its shape, the parameter's name, and where to get it."""

    weight: Tensor
    key: str
    streamer: Streamer


class StreamedLinear(nn.Linear, StreamedLayer):
    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, ..., in) fp32 → (batch, ..., out)."""
        out = x.new_empty(*x.shape[:-1], self.out_features)
        with _held(self):
            if self.key in self.streamer.int8_keys:  # a token has a scale of its own: samples are tokens like others
                _by_rows_int8(self, x[None], out[None], int8.quantize_tokens, int8.linear)
                return out
            return _by_rows(self, x, out, -1, F.linear)


def linear_layers(layers: Sequence[Callable[..., Tensor]], x: Tensor) -> list[Tensor]:
    """What several linear layers make of one input, which is quantised once where all of them are int8."""
    streamed = [
        layer for layer in layers if isinstance(layer, StreamedLinear) and layer.key in layer.streamer.int8_keys
    ]
    if len(streamed) < len(layers):
        return [layer(x) for layer in layers]
    tokens = int8.quantize_tokens(x)
    results = [x.new_empty(*x.shape[:-1], layer.out_features) for layer in streamed]
    for layer, out in zip(streamed, results, strict=True):
        with _held(layer):
            _by_rows_int8(layer, x[None], out[None], lambda _: tokens, int8.linear)
    return results


class StreamedConv2d(nn.Conv2d, StreamedLayer):
    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, in, height, width) fp32 → (batch, out, height', width')."""
        sides = int8.conv_sides(self, x.shape[2:])
        if self.key in self.streamer.int8_keys:
            out = x.new_empty(len(x), *sides, self.out_channels)
            quantize = functools.partial(int8.quantize_image, padding=self.padding[0])  # type: ignore[arg-type]
            product: Callable[..., None] = functools.partial(int8.conv2d, layer=self)
            if int8.is_pointwise(self):  # then each pixel is a token, with a scale of its own
                quantize, product = int8.quantize_pixels, int8.linear  # type: ignore[assignment]
            with _held(self):
                return _by_rows_int8(self, x, out, quantize, product).permute(0, 3, 1, 2)

        def conv(sample: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            if not weight.is_mkldnn:
                return F.conv2d(sample, weight, bias, self.stride, self.padding, self.dilation, self.groups)
            return onednn.convolution(sample, weight, bias, onednn.Geometry.of(self))

        layout = torch.channels_last if self.streamer.can_prepack else torch.contiguous_format
        out = torch.empty(len(x), self.out_channels, *sides, device=x.device, memory_format=layout)
        # Elsewhere than under `run` a small input is the end of a larger one.
        if self.streamer.transforms(self) and (not self.streamer.prepack or winograd.pays(*sides)):
            with _held(self):
                return _by_winograd(self, x, out)
        with nullcontext() if self.streamer.prepack else _held(self):
            return _by_rows(self, x, out, 1, conv)

    @property
    def rows_together(self) -> int:
        """How many rows of the result are computed at once: inputs should be cut at multiples of them."""
        return winograd.SIDE if self.streamer.transforms(self) else 1

    def reordered(self, rows: Tensor, sides: Sequence[int]) -> Tensor:
        """Some rows of the weight in oneDNN's order for an input of `sides`."""
        return onednn.reorder(rows, onednn.Geometry.of(self), sides)


class StreamedEmbedding(nn.Embedding, StreamedLayer):
    def forward(self, ids: Tensor) -> Tensor:
        """ids: (batch, n) → (batch, n, width) fp32; only the rows that occur are read."""
        assert self.streamer.store is not None
        unique, back = ids.unique(return_inverse=True)
        return self.streamer.store.rows(self.key, unique.tolist())[back]


def _held(layer: StreamedLayer) -> AbstractContextManager[None]:
    """Its weight is held for all samples, if it fits and weights are not held already."""
    streamer = layer.streamer
    return nullcontext() if streamer.holding or not streamer.fits(layer) else streamer.hold(layer)


def _by_rows(layer: StreamedLayer, x: Tensor, out: Tensor, axis: int, op: Callable[..., Tensor]) -> Tensor:
    """Fill `out` sample by sample, each a batch of one; `axis` is where the output channels lie."""
    bias: Tensor | None = layer.bias  # type: ignore[assignment]
    streamer = layer.streamer
    # A plain convolution brings its weight into oneDNN's order at every call (1280 channels, 8 × 8: 46 ms beside 24).
    reorder = isinstance(layer, StreamedConv2d) and streamer.prepack
    whole = None if reorder and not x.is_meta else streamer.whole(layer)
    step = piece_rows(
        layer.weight[0].numel(), PIECE_ELEMENTS if streamer.store is None else streamer.store.piece_elements
    )
    alone = len(x) == 1 and step >= len(layer.weight)
    if whole is not None and alone:
        return op(x, whole, bias)
    # Held or streamed, the same cuts: the same arithmetic, and oneDNN's packed copy of a weight stays a piece's size.
    planned = None
    if x.is_meta and not streamer.holding:
        planned = x.new_empty(min(step, len(layer.weight)) * layer.weight[0].numel())  # counted: the piece in the arena
    parts: Iterable[Rows]
    if whole is not None:
        parts = ((i, min(i + step, len(whole)), whole[i : i + step]) for i in range(0, len(whole), step))
    elif reorder:
        parts = streamer.reordered(layer, x.shape[2:])  # type: ignore[arg-type]
    else:
        parts = streamer.parts(layer)
    for first, last, rows in parts:
        part = None if bias is None else bias[first:last]
        if alone and not x.is_meta:
            return op(x, rows, part)
        for i in range(1 if x.is_meta else len(x)):
            out[i : i + 1].narrow(axis, first, last - first).copy_(op(x[i : i + 1], rows, part))
    del planned
    return out


def _by_rows_int8(
    layer: StreamedLayer,
    x: Tensor,
    out: Tensor,
    quantize: Callable[[Tensor], int8.Quantized],
    product: Callable[..., None],
) -> Tensor:
    """The same for an int8 weight: each sample is quantised once, each piece of the weight applied to all of them. The
    output channels are the last axis of `out`."""
    bias: Tensor | None = layer.bias  # type: ignore[assignment]
    samples = [quantize(sample) for sample in x]
    for weight in layer.streamer.packs(layer):
        part = None if bias is None else bias[weight.first : weight.last]
        for sample, filled in zip(samples, out, strict=True):
            product(sample, weight, part, filled[..., weight.first : weight.last])
    return out


def _by_winograd(layer: StreamedConv2d, x: Tensor, out: Tensor) -> Tensor:
    """The same for a convolution by winograd.py."""
    for first, last, weight in layer.streamer.transformed(layer):
        part = None if layer.bias is None else layer.bias[first:last]
        for sample, filled in zip(x, out, strict=True):
            winograd.conv2d(sample, weight, part, filled[first:last], layer.padding[0])  # type: ignore[arg-type]
    return out


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
