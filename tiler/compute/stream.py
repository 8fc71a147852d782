"""Run any module tree whose weights stay on disk.

`Streamer.run` runs a module whose layers are those of layers.py on a list of samples so that one read of the weights
serves all of them:

- a module whose weights fit the arena (a unit) is held there in fp32 and runs sample by sample, or a few small samples
  at a time: transients are those of one sample or of such a group. Each weight is fetched when it is first used, and
  stays until the unit is done;
- a larger one runs on the stacked samples; the units inside it do as above, and a layer larger than the arena streams
  its weights in pieces, each applied to every sample.

On meta tensors the same code computes shapes only, which is how the planner predicts the peak. Knows nothing of Stable
Diffusion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import NoReturn, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from tiler.compute import cpu
from tiler.compute.arena import Arena, Held
from tiler.compute.choose import choose_kernel
from tiler.compute.kernels import Kernel, Op, Policy, Prepared, Shape
from tiler.compute.layers import StreamedLayer, streamed_layers
from tiler.compute.shapes import Memo
from tiler.compute.tuning import ARENA_BYTES, GROUP_ELEMENTS
from tiler.memory import process
from tiler.weights.changes import LowRank
from tiler.weights.store import WeightStore

_T = TypeVar("_T")


def _never() -> bool:
    return False


class Streamer:
    """The weights of one module tree: those in the arena, those that stay in memory, and those that are fetched.

    With `store=None` nothing is loaded: this is for planning on meta tensors, and `int8_keys` then names the weights
    that will be stored as int8. If the processor has the instructions, products with int8 weights are computed in int8
    too, unless `int8_products` is False. If it has bf16 instructions, products with the weights in `bf16_keys` may
    round values to bf16. `short` says whether memory is short: then the memory freed by one sample returns to the
    system before the next sample runs, and so does unused space of the arena. `ranks` are the ranks of the low-rank
    paths beside int8 weights if there is no store; `in_place` tells that all int8 weights will stay in memory, where
    some kernels multiply them as they lie. With `transform`, as denoisers have it, 3 × 3 convolutions are transformed
    (winograd.py, native_winograd.py) and narrow layers are streamed too. Kernels in `prefer` take precedence over the
    processor's table.
    """

    def __init__(
        self,
        store: WeightStore | None,
        *,
        int8_keys: frozenset[str] = frozenset(),
        int8_products: bool = True,
        bf16_keys: frozenset[str] = frozenset(),
        arena_bytes: int | None = None,
        transform: bool = False,
        short: Callable[[], bool] = _never,
        prefer: Sequence[Kernel] = (),
        ranks: Mapping[str, int] = MappingProxyType({}),
        in_place: bool = False,
    ) -> None:
        self.store = store
        stored = int8_keys if store is None else store.int8
        products = int8_products and cpu.int8().products
        self.policy = Policy(
            int8=stored if products else frozenset(), bf16=bf16_keys, winograd=transform, prefer=tuple(prefer)
        )
        self.isa = cpu.isa()
        self.arena_bytes = arena_bytes or ARENA_BYTES
        self._short = short
        self._ranks = ranks
        self._in_place = in_place
        self.used: dict[str, None] = {}  # names in the order of first use
        self._arena = Arena(0 if store is None else self.arena_bytes)
        self._held: Held | None = None  # the weights of the unit that runs now
        self._choices: dict[tuple[object, ...], Kernel] = {}
        self._sizes: dict[tuple[object, ...], int] = {}  # of modules and policy: the bytes that holding them takes
        self._memo = Memo()  # for planning
        self.units: dict[nn.Module, list[nn.Module]] = {}  # of each module that it was lent to: what it holds at once

    @property
    def int8_keys(self) -> frozenset[str]:
        """The names of the weights that are multiplied as 8-bit integers."""
        return self.policy.int8

    def low_rank(self, layer: StreamedLayer) -> LowRank | None:
        """The low-rank path beside a layer's weight. Only int8 weights have one; others are changed as they are
        read."""
        if layer.key not in self.policy.int8:
            return None
        if self.store is not None:
            return self.store.low_rank(layer.key, layer.first, len(layer.weight))
        rank = self._ranks.get(layer.key)
        return None if rank is None else LowRank(rank, _unread)

    def is_rotated(self, layer: StreamedLayer) -> bool:
        """Whether a layer is computed in int8 with a weight that was quantised for rotated inputs."""
        return layer.key in self.policy.int8 and self.store is not None and self.store.index[layer.key].rotated

    @contextmanager
    def _under(self, policy: Policy) -> Iterator[None]:
        before, self.policy = self.policy, policy
        try:
            yield
        finally:
            self.policy = before

    # --- kernels
    # ---------------------------------------------------------------------------------------------------------

    def kernel(self, op: Op, shape: Shape | None) -> Kernel:
        """The kernel for an operation on a joined input of `shape`, None for any shape; chosen once."""
        key = (op.group.key, op.geometry, op.input, op.epilogue, shape, self.policy)
        if key not in self._choices:
            self._choices[key] = choose_kernel(op, shape, self.policy, self.isa)
        return self._choices[key]

    def prepared(self, op: Op, kernel: Kernel, shape: Shape) -> Iterable[Prepared]:
        """Yield the operation's weights in the form that its kernel needs, piece by piece; they are held if weights are
        held."""
        if self.store is None:
            self.used.update(dict.fromkeys(op.group.names))
        if self._held is None:
            return kernel.prepare(self.store, op, shape, Held(self._arena, self.arena_bytes, self._short, stays=False))
        if self.store is None:
            return kernel.prepare(None, op, shape, self._held)
        key = op.group.key, kernel.name
        if key not in self._held.prepared:
            self._held.prepared[key] = list(kernel.prepare(self.store, op, shape, self._held))
        return self._held.prepared[key]

    def planned(
        self, op: Op, kernel: Kernel, parts: Sequence[Tensor], compute: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """The result of `compute` for meta tensors, computed once for all identical operations."""
        self.used.update(dict.fromkeys(op.group.names))
        weights = tuple(
            (tuple(w.meta.shape), w.first, w.bias is not None, w.low_rank and w.low_rank.rank) for w in op.group.weights
        )
        made_of = op.input.enlarged, type(op.input.norm), type(op.input.activation)
        around = *made_of, type(op.epilogue.activation), op.epilogue.glu
        shapes = tuple((tuple(part.shape), part.stride()) for part in parts)
        key = kernel.name, op.geometry, weights, around, op.epilogue.residual, shapes, self._held is None, self.policy
        return self._memo.run(key, compute)

    # --- what is held
    # ----------------------------------------------------------------------------------------------------

    def fits(self, *modules: nn.Module) -> bool:
        """Whether all streamed weights of the modules are held, or can be held at once."""
        return self._held is not None or self._held_bytes(modules) <= self.arena_bytes

    def would_fit(self, module: nn.Module) -> bool:
        """Whether an arena of the usual size can hold the modules' weights; for cuts that must not depend on the memory
        ceiling."""
        return self._held_bytes([module]) <= ARENA_BYTES

    def _kernels(self, modules: Iterable[nn.Module]) -> list[tuple[Op, Kernel]]:
        """Each streamed layer as an operation of its own, with the kernel that its weight is prepared for."""
        layers = (layer for module in modules for layer in streamed_layers(module))
        return [(op := layer.op(), self.kernel(op, None)) for layer in layers]

    def _held_bytes(self, modules: Sequence[nn.Module]) -> int:
        # A run makes parts and units for one call, which the keys would keep; a plan is short.
        if self.store is not None or any(isinstance(module, StreamedLayer) for module in modules):
            return self._count_held(modules)
        key = *modules, self.policy
        if key not in self._sizes:
            self._sizes[key] = self._count_held(modules)
        return self._sizes[key]

    def _count_held(self, modules: Sequence[nn.Module]) -> int:
        kernels = self._kernels(modules)
        transient = max((kernel.transient_bytes(op, None) for op, kernel in kernels), default=0)
        return sum(kernel.held_bytes(op, None) for op, kernel in kernels) + transient

    @contextmanager
    def hold(self, *modules: nn.Module) -> Iterator[None]:
        """Keep every prepared weight of the modules until this context ends, in the arena. If weights are
        held already, these must be among them."""
        if self._held is not None:
            yield
            return
        every = self._kernels(modules)
        kernels = [(op, kernel) for op, kernel in every if not self._resident(op, kernel)]
        room = sum(kernel.held_bytes(op, None) for op, kernel in kernels)
        room += sum(kernel.beside_bytes(op) for op, kernel in every if self._resident(op, kernel))
        room += max((kernel.transient_bytes(op, None) for op, kernel in kernels), default=0)
        # On meta tensors, the planner counts the weights.
        planned = torch.empty(room, device="meta", dtype=torch.uint8) if self.store is None else None
        if planned is None:
            self._arena.take(room, short=self._short())
        self._held = Held(self._arena, self.arena_bytes, self._short, stays=True)
        try:
            yield
        finally:
            self._held = None
            del planned

    @contextmanager
    def hold_transformed(self, module: nn.Module) -> Iterator[None]:
        """`hold`, while suitable convolutions are computed by winograd.py, because many strips share one transformed
        weight."""
        try:
            with self._under(replace(self.policy, winograd=True)), self.hold(module):
                yield
        finally:
            self._arena.take(0, short=True)  # the largest weights are not those beside the largest activations

    def _resident(self, op: Op, kernel: Kernel) -> bool:
        """Whether the operation's weights stay in memory as its kernel needs them."""
        if self.store is None:
            return self._in_place and kernel.multiplies_in_place
        if kernel.multiplies_in_place:
            return all(self.store.blocks(name) is not None for name in op.group.names)
        resident = [self.store.resident.get(name) for name in op.group.names]
        return kernel.takes_resident and all(x is not None and x.dtype == torch.float32 for x in resident)

    # --- samples
    # ---------------------------------------------------------------------------------------------------------

    def _between_samples(self) -> None:
        if self._short():
            process.release_heap()

    def run(self, module: nn.Module, calls: list[tuple[Tensor, ...]], **shared: object) -> list[Tensor]:
        """Call `module(*call, **shared)` for each call (tensors of batch 1, all of one size) under one read of its
        weights. `calls` is emptied from the front, so that inputs without other references are freed as they are used.
        Consecutive calls with identical tensors share one result."""
        with self._under(replace(self.policy, one_size=True)):
            return self._run(module, calls, shared)

    def _run(self, module: nn.Module, calls: list[tuple[Tensor, ...]], shared: dict[str, object]) -> list[Tensor]:
        if not self.fits(module):
            stacked = [column[0] if len(column) == 1 else torch.cat(column) for column in zip(*calls, strict=True)]
            calls.clear()
            return list(_first(module(*stacked, **shared)).split(1))
        with self.hold(module):
            results: list[Tensor] = []
            while calls:
                group, same = self._next_group(calls)
                if results and calls and group[0][0].is_meta:
                    # Planning: the transients of the last samples are the peak.
                    made = [torch.empty_like(results[0]) for _ in group]
                else:
                    inputs = group[0] if len(group) == 1 else map(torch.cat, zip(*group, strict=True))
                    made = list(_first(module(*inputs, **shared)).split(1))
                    del inputs
                    self._between_samples()
                results += [result for result, times in zip(made, same, strict=True) for _ in range(times)]
                del group
            return results

    def _next_group(self, calls: list[tuple[Tensor, ...]]) -> tuple[list[tuple[Tensor, ...]], list[int]]:
        """Take the calls that run together from the front of `calls`, without consecutive duplicates, and the number of
        duplicates of each."""
        most = max(1, GROUP_ELEMENTS // max(x.numel() for x in calls[0]))
        group, same = [calls.pop(0)], [1]
        while calls:
            if all(a is b for a, b in zip(calls[0], group[-1], strict=True)):
                same[-1] += 1
            elif len(group) < most and all(a.shape == b.shape for a, b in zip(calls[0], group[0], strict=True)):
                group.append(calls[0])
                same.append(1)
            else:
                break
            calls.pop(0)
        return group, same

    def run_unit(self, module: nn.Module, forward: Callable[..., _T], *args: object, **kwargs: object) -> _T:
        """Run the forward of a unit, sample by sample while its weights are held, if they can be. Tensors in the
        arguments whose first axis is the batch (that of the first tensor argument) are split."""
        if self._held is not None or not self.fits(module):
            return forward(*args, **kwargs)
        batch = next(len(a) for a in (*args, *kwargs.values()) if isinstance(a, Tensor))

        def cut(i: int, value: object) -> object:
            return tree_map_only(Tensor, lambda x: x[i : i + 1] if x.ndim and len(x) == batch else x, value)

        with self.hold(module):
            results: list[_T] = []
            for i in range(batch):
                if self.store is None and 0 < i < batch - 1:  # planning: the last sample's transients are the peak
                    results.append(tree_map_only(Tensor, torch.empty_like, results[0]))
                else:
                    results.append(forward(*(cut(i, a) for a in args), **{k: cut(i, v) for k, v in kwargs.items()}))
                    self._between_samples()
        leaves = [tree_flatten(result) for result in results]
        joined = [
            torch.cat(column) if isinstance(column[0], Tensor) else column[0]
            for column in zip(*(flat for flat, _ in leaves), strict=True)
        ]
        return results[0] if batch == 1 else cast(_T, tree_unflatten(joined, leaves[0][1]))


def _first(result: object) -> Tensor:
    """The tensor of a module's result: the result itself, or the first element of a tuple or a model output."""
    while not isinstance(result, Tensor):
        result = result[0]  # type: ignore[index]
    return result


def _unread() -> NoReturn:
    raise AssertionError("a plan reads no weights")
