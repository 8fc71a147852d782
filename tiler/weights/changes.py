"""The changes that a LoRA or one of its variants makes to a weight, row by row: each piece of a weight is changed after
it was read, and the complete difference never exists.

Formulas: LoRA, Hu et al. 2021 (arXiv:2106.09685); LoHa, LoKr and Tucker, Yeh et al. 2023 (arXiv:2309.14859); DoRA, Liu
et al. 2024 (arXiv:2402.09353). All in fp32; factors are read when they are needed and released with the weight that
they change.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tiler.errors import ModelError, NumericalError, StorageError
from tiler.weights.codecs import CODECS
from tiler.weights.index import TensorInfo, open_regular, read_into
from tiler.weights.lora_keys import Kind, Slot

_INTEGERS = {"I64": torch.int64, "I32": torch.int32}  # an alpha may be one
STEP_ELEMENTS = 2**18  # of a difference at a time: 1 MB, beside the piece that is changed
_LANES = 16  # columns of a product: of 36 or 40 MKL computes some in another order with one thread than with several


@dataclass(frozen=True, kw_only=True, eq=False)
class Magnitude:
    """DoRA's norms, of each row or of each input over all rows."""

    info: TensorInfo
    of_rows: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class Change:
    """The difference that one file adds to one parameter, multiplied by `strength`. Rows [first, first + rows) of the
    difference are the parameter's rows; `scale` is alpha / rank."""

    kind: Kind
    tensors: Mapping[Slot, TensorInfo]
    scale: float
    strength: float
    first: int
    rows: int
    magnitude: Magnitude | None = None

    @property
    def infos(self) -> list[TensorInfo]:
        """All tensors that the change reads."""
        return [*self.tensors.values(), *([] if self.magnitude is None else [self.magnitude.info])]

    @property
    def rank(self) -> int | None:
        """The rank of a change that can be computed as a low-rank path beside the weight."""
        return self.tensors[Slot.DOWN].shape[0] if self.kind is Kind.LORA and self.magnitude is None else None

    @property
    def flops_of_weight(self) -> int:
        """The approximate cost of one element of the difference, two operations for each multiply-add."""
        ranks = [self.tensors[slot].shape[0] for slot in (Slot.DOWN, Slot.W1_B, Slot.W2_B) if slot in self.tensors]
        return 2 * sum(ranks) + 2

    @property
    def factor_elements(self) -> int:
        """The number of elements that are in memory while the parameter is changed."""
        if self.kind is Kind.FULL:
            return STEP_ELEMENTS
        sides = {slot: info.shape for slot, info in self.tensors.items()}
        count = sum(math.prod(info.shape) for info in self.infos)
        for core, right in ((Slot.MID, Slot.DOWN), (Slot.T1, Slot.W1_B), (Slot.T2, Slot.W2_B)):  # multiplied out
            if core in sides:
                count += math.prod(sides[right][:2]) * math.prod(sides[core][2:])
        if self.kind is Kind.LOKR and Slot.W2 not in sides:
            taps = math.prod(sides[Slot.T2][2:]) if Slot.T2 in sides else 1
            count += sides[Slot.W2_A][Slot.T2 in sides] * math.prod(sides[Slot.W2_B][1:]) * taps
        return count


Changes = Mapping[str, Sequence[Change]]
"""By parameter."""


def rank_beside(changes: Iterable[Change]) -> int:
    """The rank of the path beside a weight for all `changes` that can be one, including zero padding; 0 for none."""
    rank = sum(change.rank or 0 for change in changes)
    return rank + -rank % _LANES


class LowRank(NamedTuple):
    """A low-rank path beside a weight (outputs, inputs, *taps): `load` reads `down` (rank, inputs, *taps) and `up`
    (outputs, rank), fp32, with strengths and scales applied."""

    rank: int
    load: Callable[[], tuple[Tensor, Tensor]]


class Factors:
    """Reads tensors of LoRA files, complete or by rows. A context manager that keeps the files open."""

    def __init__(self, paths: Iterable[Path]) -> None:
        """Raises ModelError."""
        self._fds: dict[Path, int] = {}
        try:
            for path in paths:
                if path not in self._fds:
                    self._fds[path] = open_regular(path)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def whole(self, info: TensorInfo) -> Tensor:
        """A complete tensor in fp32. Raises NumericalError if it contains NaN or Inf."""
        return self.rows(info, 0, info.shape[0] if info.shape else 1)

    def rows(self, info: TensorInfo, first: int, last: int) -> Tensor:
        """Rows [first, last) in fp32."""
        (place,) = info.places(first, last) or info.sources[:1]
        raw = torch.empty(info.bytes_of(last - first), dtype=torch.uint8)
        out = torch.empty((last - first, *info.shape[1:]) if info.shape else (), dtype=torch.float32)
        try:
            whole = read_into(self._fds[info.path], memoryview(raw.numpy()), place.offset)  # type: ignore[arg-type]
        except OSError as error:
            raise StorageError(f"{info.path}: reading failed ({error.strerror}); check the disk") from error
        if not whole:
            raise ModelError(f"{info.path}: the file became shorter while it was read; download it again")
        if info.dtype in _INTEGERS:
            return out.copy_(raw.view(_INTEGERS[info.dtype]).view(out.shape))
        CODECS[info.dtype].decode(raw, out)
        if not bool(out.sum().isfinite()):
            raise NumericalError(f"{info.path}: tensor {info.name!r} holds NaN or Inf; download the file again")
        return out


Rows = Callable[[int, int], Tensor]
"""Rows [first, last) of a difference, (last − first, inputs · taps) fp32."""


def low_rank_factors(change: Change, read: Factors) -> tuple[Tensor, Tensor]:
    """`down` (rank, inputs, *taps) and `up` (outputs, rank) of a change that has a rank, with strength and scale in
    `up`."""
    tensors, rank = change.tensors, change.tensors[Slot.DOWN].shape[0]
    up = read.rows(tensors[Slot.UP], change.first, change.first + change.rows).view(change.rows, rank)
    down = read.whole(tensors[Slot.DOWN])
    if Slot.MID in tensors:
        down = torch.einsum("mn...,nj->mj...", read.whole(tensors[Slot.MID]), down.flatten(1))
    return down, up.mul_(change.scale * change.strength)


def _difference(change: Change, read: Factors) -> Rows:
    """The rows of the difference that apply to the parameter, multiplied by `scale`."""
    tensors, scale, offset = change.tensors, change.scale, change.first
    if change.kind is Kind.FULL:
        info = tensors[Slot.DIFF]
        return lambda first, last: read.rows(info, first + offset, last + offset).view(last - first, -1).mul_(scale)
    have = {slot: read.whole(info) for slot, info in tensors.items() if slot is not Slot.UP}
    if change.kind is Kind.LORA:
        up = read.rows(tensors[Slot.UP], offset, offset + change.rows).view(change.rows, -1).mul_(scale)
        down = have[Slot.DOWN]
        if Slot.MID in have:
            down = torch.einsum("mn...,nj->mj...", have[Slot.MID], down.flatten(1))
        return _product(up, down)
    if change.kind is Kind.LOHA:
        one = _factor(have[Slot.W1_A], have[Slot.W1_B], have.get(Slot.T1))
        two = _factor(have[Slot.W2_A], have[Slot.W2_B], have.get(Slot.T2))
        return lambda first, last: (
            one(first + offset, last + offset).mul_(two(first + offset, last + offset)).mul_(scale)
        )
    w1 = have[Slot.W1] if Slot.W1 in have else _product(have[Slot.W1_A], have[Slot.W1_B])(0, len(have[Slot.W1_A]))
    if Slot.W2 in have:
        w2 = have[Slot.W2].flatten(1)
    else:
        made = _factor(have[Slot.W2_A], have[Slot.W2_B], have.get(Slot.T2))
        w2 = made(0, have[Slot.W2_A].shape[1 if Slot.T2 in have else 0])

    def kronecker(first: int, last: int) -> Tensor:
        at = torch.arange(first + offset, last + offset)
        return (w1[at // len(w2), :, None] * w2[at % len(w2), None, :]).flatten(1).mul_(scale)

    return kronecker


def _factor(a: Tensor, b: Tensor, core: Tensor | None) -> Rows:
    """a (out, rank) · b (rank, in, *taps); with Tucker's `core` (rank, rank, *taps), a is (rank, out)."""
    if core is None:
        return _product(a, b)
    return _product(a.T, torch.einsum("ij...,jr->ir...", core, b))


def _product(a: Tensor, b: Tensor) -> Rows:
    """a (out, rank) · b (rank, in, *taps)."""
    flat, row = b.flatten(1), math.prod(b.shape[1:])
    wide = F.pad(flat, (0, -row % _LANES)) if row % _LANES else flat
    return lambda first, last: (a[first:last] @ wide)[:, :row]


class Merger:
    """Adds changes to pieces of parameters. `inputs_squared(name, rows)` gives the sum of squares, (inputs,) fp64, of
    each input over the complete parameter, with `rows` added to it."""

    def __init__(self, changes: Changes, inputs_squared: Callable[[str, Rows], Tensor]) -> None:
        self.changes = changes
        self.factors = Factors(info.path for some in changes.values() for change in some for info in change.infos)
        self._inputs_squared = inputs_squared
        self._name: str | None = None  # whose factors are in memory
        self._rows: list[Rows] = []
        self._norms: dict[tuple[str, int], Tensor] = {}

    def close(self) -> None:
        self.factors.close()
        self._rows.clear()

    def low_rank(self, name: str, first: int, outputs: int) -> LowRank | None:
        """The combined low-rank path of all files beside outputs [first, first + outputs) of a weight."""
        some = [change for change in self.changes.get(name, ()) if change.rank]
        if not some:
            return None
        rank = rank_beside(some)

        def load() -> tuple[Tensor, Tensor]:
            pairs = [low_rank_factors(change, self.factors) for change in some]
            down = torch.cat([down.flatten(1) for down, _ in pairs])
            up = torch.cat([up[first : first + outputs] for _, up in pairs], dim=1)
            if missing := rank - len(down):
                down, up = F.pad(down, (0, 0, 0, missing)), F.pad(up, (0, missing))
            return down.view(rank, *pairs[0][0].shape[1:]), up

        return LowRank(rank, load)

    def add(self, name: str, first: int, out: Tensor) -> None:
        """Add the changes in place to `out`, the parameter's rows from `first` on, (rows, *rest) fp32."""
        changes = self.changes.get(name)
        if not changes:
            return
        if self._name != name:
            self._rows.clear()  # before others are read
            self._rows = [_difference(change, self.factors) for change in changes]
            self._name = name
        step = max(32, STEP_ELEMENTS // max(1, out[0].numel()) // 32 * 32)
        for start in range(0, len(out), step):
            some = out[start : start + step]
            last = first + start + len(some)
            added = [
                self._added(change, number, name, rows, first + start, last, some)
                for number, (change, rows) in enumerate(zip(changes, self._rows, strict=True))
            ]
            for one in added:
                some.add_(one.reshape(some.shape))

    def _added(
        self, change: Change, number: int, name: str, rows: Rows, first: int, last: int, weight: Tensor
    ) -> Tensor:
        """The sum that is added to rows [first, last) of the unchanged weight."""
        difference = rows(first, last)
        if change.magnitude is None:
            return difference.mul_(change.strength)
        plain = weight.reshape(len(weight), -1)
        changed = difference.add_(plain)
        shape, info = weight.shape, change.magnitude.info
        magnitude = self.factors.whole(info).flatten()
        if change.magnitude.of_rows:
            norm = torch.linalg.vector_norm(changed, dim=1, keepdim=True)
            changed.mul_(magnitude[change.first + first : change.first + last, None] / norm.clamp_min(_SMALLEST))
        else:
            if (name, number) not in self._norms:
                self._norms[name, number] = self._inputs_squared(name, rows).sqrt().float()
            by_input = magnitude / self._norms[name, number].clamp_min(_SMALLEST)
            changed.unflatten(1, shape[1:]).mul_(by_input.view(-1, *(1,) * (len(shape) - 2)))
        return changed.sub_(plain).mul_(change.strength)


_SMALLEST = torch.finfo(torch.float32).tiny  # a norm that can be divided by: rows of zeros stay zeros
