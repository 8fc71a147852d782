"""Run any module tree whose weights stay on disk.

`Streamer.run` runs a module whose layers are those of layers.py on a list of samples so that one read of the weights serves
all of them:

- a module whose weights fit the arena (a unit) is held there in fp32 and runs sample by sample: transients are one
  sample's. Each weight is fetched when it is first used, and stays until the unit is done;
- a larger one runs on the stacked samples; the units inside it do as above, and a layer larger than the arena streams
  its weights in pieces, each applied to every sample.

On meta tensors the same code computes shapes only, which is how the planner predicts the peak. Knows nothing of Stable
Diffusion.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from tiler.compute import int8, onednn, winograd
from tiler.compute.arena import Arena
from tiler.compute.layers import Rows, StreamedConv2d, StreamedLayer, streamed_layers
from tiler.memory import process
from tiler.weights.store import PIECE_ELEMENTS, WeightStore, piece_rows

# Elements of the samples that run together where weights are int8, whose sums are exact: those of one sample of SD 1.5's
# second level. Its inner levels would be many small products.
GROUP_ELEMENTS = 640 * 32 * 32
_TRANSFORM_BYTES = 4 * (1 + winograd.GROWTH)  # of an element of a weight, transformed beside what it was
ARENA_BYTES = 76 * 2**20  # fp32; the largest unit of SD 1.5 worth holding is its widest feed-forward, 78.7 MB


class Streamer:
    """The weights of one module tree: what is held in the arena now, what stays, and what is fetched.

    With `store=None` nothing is loaded: for planning on meta tensors; `int8_keys` then names the weights that will be stored
    as int8. Where the processor has the instructions, these are computed with as int8 too, unless `int8_products` is False.
    `short` says whether memory is short: then what one sample freed goes back to the system before the next one runs, and
    so does what the arena does not need. With `transform`, convolutions that are large enough go by winograd.py under `run`.
    """

    def __init__(
        self,
        store: WeightStore | None,
        *,
        int8_keys: frozenset[str] = frozenset(),
        int8_products: bool = True,
        arena_bytes: int | None = None,
        transform: bool = False,
    ) -> None:
        self.store = store
        stored = int8_keys if store is None else store.int8
        self.int8_keys = stored if int8_products and onednn.int8().products else frozenset[str]()
        self.arena_bytes = arena_bytes or ARENA_BYTES
        self.can_prepack = onednn.prepacks()
        self._transform = transform and self.can_prepack
        self.short: Callable[[], bool] = lambda: False
        self.used: dict[str, None] = {}  # names in the order of first use
        self.holding = False
        self.prepack = False  # oneDNN's order depends on the size of the input, which only `run` knows to be one
        self._held: dict[str, Tensor] = {}
        self._packed: dict[str, list[int8.Packed]] = {}
        self._reordered: dict[str, list[Rows]] = {}
        self._arena = Arena(0 if store is None else self.arena_bytes)
        self._filled = 0  # bytes of the arena that held weights take

    def nbytes(self, layer: StreamedLayer) -> int:
        """What its weight takes while it is held."""
        if self.transforms(layer):
            return layer.weight.numel() * 4 * winograd.GROWTH
        return layer.weight.numel() * (1 if layer.key in self.int8_keys else 4)

    def transforms(self, layer: nn.Module) -> bool:
        """Whether a layer's weight is held transformed: if an arena of the usual size has room for both, at any ceiling."""
        return (
            self._transform
            and isinstance(layer, StreamedConv2d)
            and layer.key not in self.int8_keys
            and winograd.suits(layer)
            and _TRANSFORM_BYTES * layer.weight.numel() <= ARENA_BYTES
        )

    def _taps(self, layers: Sequence[StreamedLayer]) -> int:
        """Bytes beside held weights while the largest of them is transformed."""
        return max((4 * layer.weight.numel() for layer in layers if self.transforms(layer)), default=0)

    @staticmethod
    def _piece(layer: StreamedLayer) -> int:
        """The most elements of a piece of the layer's weight."""
        row = layer.weight[0].numel()
        return row * min(len(layer.weight), piece_rows(row, PIECE_ELEMENTS))

    def fits(self, module: nn.Module) -> bool:
        """Whether all streamed weights of `module` can be held at once."""
        return self._held_bytes(module) <= self.arena_bytes

    def would_fit(self, module: nn.Module) -> bool:
        """The same for an arena of the usual size: for cuts that must not depend on the ceiling."""
        return self._held_bytes(module) <= ARENA_BYTES

    def _held_bytes(self, module: nn.Module) -> int:
        layers = streamed_layers(module)
        return sum(map(self.nbytes, layers)) + self._taps(layers)

    @contextmanager
    def hold(self, module: nn.Module) -> Iterator[None]:
        """Until this ends, every streamed weight of `module` that is fetched stays: fp32 in the arena, packed beside it."""
        assert not self.holding
        layers = [layer for layer in streamed_layers(module) if self.store is None or not self._kept(layer)]
        integers = [layer for layer in layers if layer.key in self.int8_keys]
        packed, piece = sum(map(self.nbytes, integers)), max(map(self._piece, integers), default=0)
        room = sum(map(self.nbytes, layers)) - packed + max(piece, self._taps(layers))
        # On meta the weights are counted by whoever plans; a piece is as stored, and copied once on its way.
        planned = torch.empty(room + packed + piece, device="meta", dtype=torch.uint8) if self.store is None else None
        if planned is None:
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

    @contextmanager
    def hold_transformed(self, module: nn.Module) -> Iterator[None]:
        """`hold`, and convolutions that suit it go by winograd.py meanwhile: where many strips share one transformed weight."""
        before, self._transform = self._transform, self.can_prepack
        try:
            with self.hold(module):
                yield
        finally:
            self._transform = before
            self._arena.take(0, short=True)  # the largest weights are not those beside the largest activations

    def _kept(self, layer: StreamedLayer) -> bool:
        """Whether the layer's weight is resident as it is computed with."""
        assert self.store is not None
        kept = self.store.resident.get(layer.key)
        return kept is not None and kept.dtype == torch.float32 and not self.transforms(layer)

    def _between_samples(self) -> None:
        if self.short():
            process.release_heap()

    def whole(self, layer: StreamedLayer) -> Tensor | None:
        """The layer's weight in fp32 if it is resident, or may stay because weights are held: then it is fetched."""
        if self.store is None:
            self.used[layer.key] = None
            return layer.weight
        if self._kept(layer):
            return self.store.resident[layer.key]
        if self.holding and layer.key not in self._held:
            self._held[layer.key] = self._fetched(layer)
            self._filled += self.nbytes(layer)
        return self._held.get(layer.key)

    def _fetched(self, layer: StreamedLayer) -> Tensor:
        """The layer's whole weight in fp32, in the arena behind what is held; a convolution's channels-last."""
        assert self.store is not None
        rows, *others = layer.weight.shape
        weight = self._room(layer.weight.numel(), torch.float32).view(rows, *others[1:], others[0]).movedim(-1, 1)
        for piece in self.store.pieces(layer.key):
            self.store.fetch(piece, weight[piece.first : piece.last])
        return weight

    def _room(self, count: int, dtype: torch.dtype) -> Tensor:
        """`count` elements of the arena behind what is held, or of their own if they are more than it has."""
        end = self._filled + count * dtype.itemsize
        if end > len(self._arena):
            return torch.empty(count, dtype=dtype)
        return self._arena.take(end, short=not self.holding and self.short())[self._filled :].view(dtype)

    def parts(
        self, layer: StreamedLayer, dtype: torch.dtype = torch.float32, channels_last: bool = False
    ) -> Iterator[Rows]:
        """The weight in fp32 or int8, piece by piece in the same buffer."""
        assert self.store is not None
        for piece in self.store.pieces(layer.key):
            shape = piece.last - piece.first, *layer.weight.shape[1:]
            rows = self._room(math.prod(shape), dtype)
            rows = rows.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1) if channels_last else rows.view(shape)
            self.store.fetch(piece, rows)
            yield piece.first, piece.last, rows

    def reordered(self, layer: StreamedConv2d, sides: Sequence[int]) -> Iterable[Rows]:
        """As `parts`, in oneDNN's order for inputs of `sides` (height, width); held where weights are."""
        # oneDNN reorders from channels-last: cast into that at once (9.0 → 6.6 ms for 352 × 1280 × 3 × 3).
        parts = self.parts(layer, channels_last=True)
        pieces = ((first, last, layer.reordered(rows, sides)) for first, last, rows in parts)
        if not self.holding:
            return pieces
        if layer.key not in self._reordered:
            self._reordered[layer.key] = list(pieces)
        return self._reordered[layer.key]

    def transformed(self, layer: StreamedConv2d) -> Iterator[Rows]:
        """The weight as winograd.py computes with it: whole and held where weights are, else as much as the arena has room
        for. What a column of a matrix product adds up to does not depend on where it is cut (a test compares)."""
        total, _, *taps = layer.weight.shape
        most = PIECE_ELEMENTS if self.store is None else self.store.piece_elements
        elements = layer.weight.numel() if self.holding else min(most, self.arena_bytes // _TRANSFORM_BYTES)
        step = total if self.holding else min(total, piece_rows(layer.weight[0].numel(), elements))
        if self.store is None:
            yield from self._planned_transformed(layer, step)
            return
        if layer.key in self._held:
            yield 0, total, self._held[layer.key]
            return
        for first in range(0, total, step):
            rows = min(step, total - first)
            weight = self._room(winograd.GROWTH * rows * layer.weight[0].numel(), torch.float32)
            self._filled += weight.nbytes
            plane = self._room(rows * layer.weight[0].numel(), torch.float32).view(*taps, layer.in_channels, rows)
            for piece in self.store.pieces(layer.key, elements):
                if first <= piece.first < first + rows:
                    self.store.fetch(piece, plane[..., piece.first - first : piece.last - first].permute(3, 2, 0, 1))
            weight = winograd.transform(plane, weight.view(-1, layer.in_channels, rows))
            if self.holding:
                self._held[layer.key] = weight
            else:
                self._filled = 0
            yield first, first + rows, weight

    def _planned_transformed(self, layer: StreamedConv2d, rows: int) -> Iterator[Rows]:
        self.used[layer.key] = None
        count = 0 if self.holding else rows * layer.weight[0].numel()  # counted: the taps and what becomes of them
        planned = layer.weight.new_empty((1 + winograd.GROWTH) * count)
        yield 0, rows, layer.weight.new_empty(1).expand(9 * winograd.GROWTH, layer.in_channels, rows)
        del planned

    def packs(self, layer: StreamedLayer) -> Iterable[int8.Packed]:
        """The layer's int8 weight, piece by piece; held where weights are."""
        if self.store is None:
            return self._planned_packs(layer)
        scale = self.store.scale(layer.key)
        pieces = (int8.pack(first, rows, scale[first:last]) for first, last, rows in self.parts(layer, torch.int8))
        if not self.holding:
            return pieces
        if layer.key not in self._packed:
            self._packed[layer.key] = list(pieces)
        return self._packed[layer.key]

    def _planned_packs(self, layer: StreamedLayer) -> Iterator[int8.Packed]:
        self.used[layer.key] = None
        # As stored, copied and packed: counted.
        planned = None if self.holding else layer.weight.new_empty(3 * self._piece(layer), dtype=torch.int8)
        yield int8.Packed(0, len(layer.weight), layer.weight, layer.weight)
        del planned

    def run(self, module: nn.Module, calls: list[tuple[Tensor, ...]], **shared: object) -> list[Tensor]:
        """`module(*call, **shared)` for each call (tensors of batch 1) under one read of its weights.

        All calls are of one size. `calls` is emptied from the front, so that inputs nobody else holds are freed as they are
        used. Neighbours with the very same tensors get the very same result.
        """
        self.prepack = self.can_prepack
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
            while calls:
                group, same = self._next_group(module, calls)
                if results and calls and group[0][0].is_meta:
                    # Planning: the last ones' transients are the peak.
                    made = [torch.empty_like(results[0]) for _ in group]
                else:
                    inputs = group[0] if len(group) == 1 else map(torch.cat, zip(*group, strict=True))
                    made = list(_first(module(*inputs, **shared)).split(1))
                    del inputs
                    self._between_samples()
                results += [result for result, times in zip(made, same, strict=True) for _ in range(times)]
                del group
            return results

    def _next_group(
        self, module: nn.Module, calls: list[tuple[Tensor, ...]]
    ) -> tuple[list[tuple[Tensor, ...]], list[int]]:
        """Take from the front of `calls` those that run together, neighbours with the very same tensors once; and how often
        each was there."""
        most = 1
        # A small layer that is not streamed computes all samples in one product, whose bits depend on their number.
        if self.int8_keys and not any(type(m) in (nn.Linear, nn.Conv2d) for m in module.modules()):
            most = max(1, GROUP_ELEMENTS // max(x.numel() for x in calls[0]))
        group, same = [calls.pop(0)], [1]
        while calls:
            if all(a is b for a, b in zip(calls[0], group[-1], strict=True)):
                same[-1] += 1
            elif len(group) < most:
                group.append(calls[0])
                same.append(1)
            else:
                break
            calls.pop(0)
        return group, same

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


def _first(result: object) -> Tensor:
    """The tensor of a module's result: itself, or the first of a tuple or of a model output."""
    while not isinstance(result, Tensor):
        result = result[0]  # type: ignore[index]
    return result
