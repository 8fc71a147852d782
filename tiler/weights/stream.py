"""Run any module tree whose weights stay on disk.

`stream_layers` turns the Linear, Conv2d and Embedding layers of a meta-device module into layers that fetch their
weights when they run; norms and biases, which are small, are loaded at once. `Streamer.run` runs a module on a list of
samples so that one read of the weights serves all of them:

- a module whose weights fit the arena (a unit) is held there in fp32 and runs sample by sample: transients are one
  sample's. Each weight is fetched when it is first used, and stays until the unit is done;
- a larger one runs on the stacked samples; the units inside it do as above, and a layer larger than the arena streams
  its weights in pieces, each applied to every sample.

Arithmetic never sees the batch: every matrix product is one sample's, over pieces cut at the same rows, so results do
not depend on how many samples share a read. A convolution whose weight outweighs its input gets it in oneDNN's own order,
once for all samples. Layers stored as int8 are computed in int8 (int8.py), where sums are exact.
On meta tensors the same code computes shapes only, which is how the planner predicts the peak. Knows nothing of Stable
Diffusion.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from tiler.errors import ModelError
from tiler.memory import cpu, process
from tiler.weights import int8
from tiler.weights.arena import Arena
from tiler.weights.index import TensorInfo
from tiler.weights.store import PIECE_ELEMENTS, SCALE, WeightStore, check_dtype, piece_rows

ARENA_BYTES = 76 * 2**20  # fp32; the largest unit of SD 1.5 worth holding is its widest feed-forward, 78.7 MB
INT8_ARENA_BYTES = 46 * 2**20  # the widest resnet of SD 1.5 whole
SMALL = 64 * 1024  # parameters of up to this many elements are loaded at once and stay


class Streamer:
    """The weights of one module tree: what is held in the arena now, what stays, and what is fetched.

    With `store=None` nothing is loaded: for planning on meta tensors; `int8_keys` then names the weights that will be stored
    as int8. Where the processor has the instructions, these are computed with as int8 too. `short` says whether memory is
    short: then what one sample freed goes back to the system before the next one runs, and so does what the arena does not
    need.
    """

    def __init__(
        self, store: WeightStore | None, *, int8_keys: frozenset[str] = frozenset(), arena_bytes: int | None = None
    ) -> None:
        self.store = store
        stored = int8_keys if store is None else store.int8
        self.int8_keys = stored if cpu.int8().products else frozenset[str]()
        self.arena_bytes = arena_bytes or (INT8_ARENA_BYTES if self.int8_keys else ARENA_BYTES)
        self.short: Callable[[], bool] = lambda: False
        self.used: dict[str, None] = {}  # names in the order of first use
        self.holding = False
        self.prepack = False  # oneDNN's order depends on the size of the input, which only `run` knows to be one
        self._held: dict[str, Tensor] = {}
        self._packed: dict[str, int8.Packed] = {}
        self._reordered: dict[str, list[tuple[int, int, Tensor]]] = {}
        self._arena = Arena(0 if store is None else self.arena_bytes)
        self._filled = 0  # bytes of the arena that held weights take

    def nbytes(self, layer: StreamedLayer) -> int:
        """What its weight takes while it is held."""
        return layer.weight.numel() * (1 if layer.key in self.int8_keys else 4)

    def fits(self, module: nn.Module) -> bool:
        """Whether all streamed weights of `module` can be held at once."""
        return sum(self.nbytes(layer) for layer in streamed_layers(module)) <= self.arena_bytes

    @contextmanager
    def hold(self, module: nn.Module) -> Iterator[None]:
        """Until this ends, every streamed weight of `module` that is fetched stays: fp32 in the arena, packed beside it."""
        assert not self.holding
        layers = [layer for layer in streamed_layers(module) if self.store is None or not self._kept(layer)]
        integers = [self.nbytes(layer) for layer in layers if layer.key in self.int8_keys]
        room = sum(map(self.nbytes, layers)) - sum(integers) + max(integers, default=0)
        planned = None
        if self.store is None:
            self.used.update(dict.fromkeys(layer.key for layer in layers))
            planned = torch.empty(room + sum(integers), device="meta", dtype=torch.uint8)  # counted by whoever plans
        else:
            self._arena.take(room, short=self.short())
        self.holding = True
        try:
            yield
        finally:
            self._held.clear()
            self._packed.clear()
            self._reordered.clear()
            self.holding, self._filled = False, 0
            del planned

    def _kept(self, layer: StreamedLayer) -> bool:
        """Whether the layer's weight is resident in fp32."""
        assert self.store is not None
        kept = self.store.resident.get(layer.key)
        return kept is not None and kept.dtype == torch.float32

    def _between_samples(self) -> None:
        if self.short():
            process.release_heap()

    def whole(self, layer: StreamedLayer) -> Tensor | None:
        """The layer's weight in fp32 if it is in memory already."""
        if self.store is None:
            self.used[layer.key] = None
            return layer.weight
        if self._kept(layer):
            return self.store.resident[layer.key]
        if self.holding and layer.key not in self._held:
            self._held[layer.key] = self._fetched(layer, torch.float32)
            self._filled += self.nbytes(layer)
        return self._held.get(layer.key)

    def _fetched(self, layer: StreamedLayer, dtype: torch.dtype) -> Tensor:
        """The layer's whole weight, in the arena behind what is held."""
        assert self.store is not None
        weight = self._room(layer.weight.numel(), dtype).view(layer.weight.shape)
        for piece in self.store.pieces(layer.key):
            self.store.fetch(piece, weight[piece.first : piece.last])
        return weight

    def _room(self, count: int, dtype: torch.dtype) -> Tensor:
        """`count` elements of the arena behind what is held, or of their own if they are more than it has."""
        end = self._filled + count * dtype.itemsize
        if end > len(self._arena):
            return torch.empty(count, dtype=dtype)
        room = self._arena.take(end, short=not self.holding and self.short())
        return room[self._filled :].view(dtype)

    def parts(self, layer: StreamedLayer, dtype: torch.dtype = torch.float32) -> Iterator[tuple[int, int, Tensor]]:
        """(first, last, weight rows in fp32 or int8), one after another in the same buffer."""
        assert self.store is not None
        for piece in self.store.pieces(layer.key):
            shape = piece.last - piece.first, *layer.weight.shape[1:]
            rows = self._room(math.prod(shape), dtype).view(shape)
            self.store.fetch(piece, rows)
            yield piece.first, piece.last, rows

    def reordered(self, layer: StreamedConv2d, sides: Sequence[int]) -> Iterable[tuple[int, int, Tensor]]:
        """As `parts`, in oneDNN's order for inputs of `sides` (height, width); held where weights are."""
        pieces = ((first, last, layer.reordered(rows, sides)) for first, last, rows in self.parts(layer))
        if not self.holding:
            return pieces
        if layer.key not in self._reordered:
            self._reordered[layer.key] = list(pieces)
        return self._reordered[layer.key]

    def packs(self, layer: StreamedLayer) -> Iterable[int8.Packed]:
        """The layer's int8 weight, held or piece by piece."""
        if self.store is None:
            return self._planned_packs(layer)
        scale = self.store.scale(layer.key)
        if not self.holding:
            return (
                int8.pack(layer, first, rows, scale[first:last]) for first, last, rows in self.parts(layer, torch.int8)
            )
        if layer.key not in self._packed:
            self._packed[layer.key] = int8.pack(layer, 0, self._fetched(layer, torch.int8), scale)
        return [self._packed[layer.key]]

    def _planned_packs(self, layer: StreamedLayer) -> Iterator[int8.Packed]:
        self.used[layer.key] = None
        count = 2 * piece_rows(layer.weight[0].numel(), PIECE_ELEMENTS)  # as stored, and packed: counted
        planned = None if self.holding else layer.weight.new_empty(count, *layer.weight.shape[1:], dtype=torch.int8)
        yield int8.Packed(0, len(layer.weight), layer.weight, layer.weight)
        del planned

    def run(self, module: nn.Module, calls: list[tuple[Tensor, ...]], **shared: object) -> list[Tensor]:
        """`module(*call, **shared)` for each call (tensors of batch 1) under one read of its weights.

        All calls are of one size. `calls` is emptied from the front, so that inputs nobody else holds are freed as they are
        used. Neighbours with the very same tensors get the very same result.
        """
        self.prepack = cpu.prepacks() and torch.backends.mkldnn.is_available()
        try:
            return self._run(module, calls, shared)
        finally:
            self.prepack = False

    def _run(self, module: nn.Module, calls: list[tuple[Tensor, ...]], shared: dict[str, object]) -> list[Tensor]:
        if not self.fits(module):
            stacked = [torch.cat(column) for column in zip(*calls, strict=True)]
            calls.clear()
            return list(_first(module(*stacked, **shared)).split(1))
        with self.hold(module):
            results: list[Tensor] = []
            before: tuple[Tensor, ...] = ()
            while calls:
                call = calls.pop(0)
                if before and all(a is b for a, b in zip(call, before, strict=True)):
                    results.append(results[-1])
                elif results and calls and call[0].is_meta:
                    results.append(torch.empty_like(results[0]))  # planning: the last sample's transients are the peak
                else:
                    results.append(_first(module(*call, **shared)))
                    self._between_samples()
                before = call if calls and calls[0][0] is call[0] else ()
                del call
            return results

    def run_unit(self, module: nn.Module, forward: Callable[..., object], *args: object, **kwargs: object) -> object:
        """The forward of a unit: sample by sample while its weights are held. Arguments are cut where their first
        axis is the batch (that of the first tensor argument)."""
        if self.holding:
            return forward(*args, **kwargs)
        batch = next(len(a) for a in (*args, *kwargs.values()) if isinstance(a, Tensor))

        def cut(i: int, value: object) -> object:
            return value[i : i + 1] if isinstance(value, Tensor) and value.ndim and len(value) == batch else value

        with self.hold(module):
            results: list[object] = []
            for i in range(batch):
                if self.store is None and 0 < i < batch - 1:  # planning: the last sample's transients are the peak
                    results.append(tree_map(torch.empty_like, results[0]))
                else:
                    results.append(forward(*(cut(i, a) for a in args), **{k: cut(i, v) for k, v in kwargs.items()}))
                    self._between_samples()
        leaves = [tree_flatten(result) for result in results]
        joined = [
            torch.cat(column) if isinstance(column[0], Tensor) else column[0]
            for column in zip(*(flat for flat, _ in leaves), strict=True)
        ]
        return results[0] if batch == 1 else tree_unflatten(joined, leaves[0][1])


class StreamedLayer(nn.Module):
    """What the streamed classes share: a meta weight for its shape, the parameter's name, and where to get it."""

    weight: Tensor
    key: str
    streamer: Streamer


class StreamedLinear(nn.Linear, StreamedLayer):
    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, ..., in) fp32 → (batch, ..., out)."""
        if self.key in self.streamer.int8_keys:

            def product(sample: int8.Quantized, weight: int8.Packed, bias: Tensor | None) -> Tensor:
                return int8.linear(sample, weight, bias).view(1, *x.shape[1:-1], weight.last - weight.first)

            return _by_rows_int8(self, x, -1, int8.quantize_tokens, product)
        return _by_rows(self, x, x.new_empty(*x.shape[:-1], self.out_features), -1, F.linear)


class StreamedConv2d(nn.Conv2d, StreamedLayer):
    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, in, height, width) fp32 → (batch, out, height', width')."""
        if self.key in self.streamer.int8_keys:
            pointwise = int8.is_pointwise(self)  # then each pixel is a token, with a scale of its own

            def product(sample: int8.Quantized, weight: int8.Packed, bias: Tensor | None) -> Tensor:
                if not pointwise:
                    return int8.conv2d(sample, weight, bias, self)
                return int8.linear(sample, weight, bias).view(1, *x.shape[2:], -1).permute(0, 3, 1, 2)

            return _by_rows_int8(self, x, 1, int8.quantize_pixels if pointwise else int8.quantize_image, product)

        def conv(sample: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            if not weight.is_mkldnn:
                return F.conv2d(sample[None], weight, bias, self.stride, self.padding, self.dilation, self.groups)[0]
            geometry = self.padding, self.stride, self.dilation, self.groups
            out: Tensor = torch.ops.mkldnn._convolution_pointwise(sample[None], weight, bias, *geometry, "none", [], "")
            return out[0]

        sides = int8.conv_sides(self, x.shape[2:])
        return _by_rows(self, x, x.new_empty(len(x), self.out_channels, *sides), 0, conv)

    def outweighs(self, x: Tensor) -> bool:
        """Whether the weight is larger than one sample of `x`: then bringing it into oneDNN's order, which a plain
        convolution does at every call, costs as much as the arithmetic (1280 channels, 8 × 8: 46 ms against 24)."""
        return self.streamer.prepack and self.weight.numel() > x[0].numel()

    def reordered(self, rows: Tensor, sides: Sequence[int]) -> Tensor:
        """Some rows of the weight in oneDNN's order for an input of `sides`."""
        shape = 1, self.in_channels, *sides
        out: Tensor = torch.ops.mkldnn._reorder_convolution_weight(
            rows, self.padding, self.stride, self.dilation, self.groups, shape
        )
        return out


class StreamedEmbedding(nn.Embedding, StreamedLayer):
    def forward(self, ids: Tensor) -> Tensor:
        """ids: (batch, n) → (batch, n, width) fp32; only the rows that occur are read."""
        assert self.streamer.store is not None
        unique, back = ids.unique(return_inverse=True)
        return self.streamer.store.rows(self.key, unique.tolist())[back]


def _by_rows(layer: StreamedLayer, x: Tensor, out: Tensor, axis: int, op: Callable[..., Tensor]) -> Tensor:
    """Fill `out` sample by sample; `axis` is where a sample's output channels lie."""
    bias: Tensor | None = layer.bias  # type: ignore[assignment]
    streamer = layer.streamer
    reorder = isinstance(layer, StreamedConv2d) and layer.outweighs(x)
    if not streamer.holding and not reorder and streamer.fits(layer):
        with streamer.hold(layer):
            return _by_rows(layer, x, out, axis, op)
    whole = None if reorder and not x.is_meta else streamer.whole(layer)
    step = piece_rows(
        layer.weight[0].numel(), PIECE_ELEMENTS if streamer.store is None else streamer.store.piece_elements
    )
    if whole is not None and len(x) == 1 and step >= len(whole):
        return op(x[0], whole, bias)[None]
    # Held or streamed, the same cuts: the same arithmetic, and oneDNN's packed copy of a weight stays a piece's size.
    planned = None
    if x.is_meta and not streamer.holding:
        planned = x.new_empty(min(step, len(layer.weight)) * layer.weight[0].numel())  # counted: the piece in the arena
    parts: Iterable[tuple[int, int, Tensor]]
    if reorder and not x.is_meta:
        parts = streamer.reordered(layer, x.shape[2:])  # type: ignore[arg-type]
    elif whole is None:
        parts = streamer.parts(layer)
    else:
        parts = ((i, min(i + step, len(whole)), whole[i : i + step]) for i in range(0, len(whole), step))
    for first, last, rows in parts:
        part = None if bias is None else bias[first:last]
        for i in range(1 if x.is_meta else len(x)):
            out[i].narrow(axis, first, last - first).copy_(op(x[i], rows, part))
    del planned
    return out


def _by_rows_int8(
    layer: StreamedLayer,
    x: Tensor,
    axis: int,
    quantize: Callable[[Tensor], int8.Quantized],
    product: Callable[..., Tensor],
) -> Tensor:
    """The same for an int8 weight: each sample is quantised once, each piece of the weight applied to all of them.
    `axis` of a batch is where the output channels lie."""
    bias: Tensor | None = layer.bias  # type: ignore[assignment]
    streamer = layer.streamer
    if not streamer.holding and streamer.fits(layer):
        with streamer.hold(layer):
            return _by_rows_int8(layer, x, axis, quantize, product)
    samples = [quantize(sample) for sample in x]
    columns: list[list[Tensor]] = [[] for _ in samples]
    for weight in streamer.packs(layer):
        for column, sample in zip(columns, samples, strict=True):
            column.append(product(sample, weight, None if bias is None else bias[weight.first : weight.last]))
    return _joined([_joined(column, axis) for column in columns], 0)


def _joined(parts: list[Tensor], axis: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)


def _first(result: object) -> Tensor:
    """The tensor of a module's result: itself, or the first of a tuple or of a model output."""
    while not isinstance(result, Tensor):
        result = result[0]  # type: ignore[index]
    return result


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


def match_index(
    module: nn.Module, stored: dict[str, TensorInfo], rename: Callable[[str], list[str]]
) -> dict[str, TensorInfo]:
    """The stored tensor of every parameter of `module`. `rename` gives the names a parameter may have in files.

    An int8 tensor brings its scales. Raises ModelError naming the first parameter that is missing, has another shape, or an
    unusable dtype.
    """
    where = next(iter(stored.values())).path.parent if stored else "the checkpoint"
    matched = {}
    for name, parameter in module.named_parameters():
        info = next((stored[alias] for alias in rename(name) if alias in stored), None)
        if info is None:
            raise ModelError(f"{where}: tensor {name!r} is missing; the weights and config.json do not belong together")
        want = tuple(parameter.shape)
        squeezed = tuple(n for n in info.shape if n != 1) == tuple(n for n in want if n != 1)
        if info.shape != want and not squeezed:
            raise ModelError(
                f"{info.path}: tensor {info.name!r} has shape {list(info.shape)}, config.json asks for {list(want)}"
            )
        check_dtype(info, stored)
        matched[name] = info._replace(shape=want)
        if (scale := stored.get(info.name + SCALE)) is not None:
            matched[name + SCALE] = scale
    return matched
