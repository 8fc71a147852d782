"""Write one part's weights in optimum-quanto's layout, a few rows at a time.

Formulas are optimum-quanto's (0.2.7, tensor/optimizers, library/quantize.py): with 8 bits, the scale of a row is its
largest absolute value over the format's largest; with 4 bits, each group of up to 128 values covers the range from its
smallest to its largest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiler.errors import ModelError
from tiler.files import atomic
from tiler.request.choices import Weights
from tiler.weights.index import TensorInfo, header_bytes
from tiler.weights.store import Piece, WeightStore

QTYPES = {Weights.INT8: "qint8", Weights.FP8: "qfloat8_e4m3fn", Weights.INT4: "qint4"}
_EIGHTS = {
    Weights.INT8: ("I8", torch.int8, 127.0, -128.0, 127.0),
    Weights.FP8: ("F8_E4M3", torch.float8_e4m3fn, 448.0, -448.0, 448.0),
}
_PLAIN = ("F32", "F16", "BF16")
_AS_STORED = (*_PLAIN, "F8_E4M3", "F8_E5M2")  # what needs nothing beside it
_PIECE_ELEMENTS = 2**20  # weights at a time: 4 MB in fp32, and a few copies


def group_of(width: int) -> int:
    """The number of 4-bit values, of a row of `width`, that share their factors."""
    group = next((size for size in (128, 96, 64, 32) if width % size == 0), width)
    return group if width > 128 else width


def quantise_8(rows: Tensor, kind: Weights) -> tuple[Tensor, Tensor]:
    """(n, …) fp32 → the rows in 8 bits, and what multiplies each, (n,) fp32."""
    _, dtype, largest, low, high = _EIGHTS[kind]
    scale = rows.flatten(1).abs().amax(1) / largest
    scale[scale == 0] = 1
    values = rows / scale.view(-1, *(1,) * (rows.ndim - 1))
    return (values.round_() if kind is Weights.INT8 else values).clamp_(low, high).to(dtype), scale


def quantise_4(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(n, …) fp32 → numbers from 0 to 15, (groups, values) uint8, and scale and shift of each group, (groups, 1) fp32:
    a value is number · scale − shift."""
    groups = rows.reshape(-1, group_of(math.prod(rows.shape[1:])))
    least, largest = groups.aminmax(dim=1, keepdim=True)
    scale = (largest - least) / 15
    scale[scale == 0] = 1
    return ((groups - least) / scale).round_().clamp_(0, 15).to(torch.uint8), scale, -least


def write_quanto(
    path: Path, index: Mapping[str, TensorInfo], names: frozenset[str], kind: Weights | None, made: str,
    progress: Callable[[int], None],
) -> dict[str, dict[str, str]]:  # fmt: skip
    """Write the tensors of `index`, by parameter, under the names that they have in files; those in `names` are
    quantised as `kind`. `made` is stored as a description of the process. `progress` gets bytes as they are written.
    Returns optimum-quanto's map. Raises ModelError, StorageError, NumericalError."""
    for name, info in index.items():
        if info.dtype not in (_PLAIN if name in names else _AS_STORED) or info.scale is not None:
            raise ModelError(
                f"{info.path}: {info.name!r} is quantised already ({info.dtype}); quantise the model it was made of"
            )
    chosen = {name for name in names if kind is not Weights.INT4 or index[name].shape[0] % 2 == 0}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "made": made}}
    end = 0
    for name, info in index.items():
        for tensor, dtype, shape, nbytes in _places(info, kind if name in chosen else None):
            header[tensor] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + nbytes]}
            end += nbytes
    with WeightStore(dict(index), piece_elements=_PIECE_ELEMENTS) as store, atomic(path) as file:
        file.write(header_bytes(header))
        for name in index:
            for data in _written(store, name, kind if name in chosen else None):
                progress(file.write(data))
    if kind is None:
        return {}
    modules = (index[name].name.removesuffix(".weight") for name in index if name in chosen)
    return {module: {"weights": QTYPES[kind], "activations": "none"} for module in modules}


def written_bytes(info: TensorInfo, kind: Weights | None) -> int:
    """What a tensor takes in such a file, quantised or, with None, as it is stored."""
    rows = info.shape[0] if info.shape else 1
    return sum(nbytes for *_, nbytes in _places(info, None if kind is Weights.INT4 and rows % 2 else kind))


def _places(info: TensorInfo, kind: Weights | None) -> Iterator[tuple[str, str, tuple[int, ...], int]]:
    """Name, dtype, shape and bytes of the tensors that store one parameter."""
    name, elements = info.name, math.prod(info.shape)
    if kind is None:
        yield name, info.dtype, info.shape, info.nbytes
        return
    if kind is Weights.INT4:
        width = math.prod(info.shape[1:])
        group, groups = group_of(width), elements // group_of(width)
        # A row of no groups keeps its axes.
        rest = (group,) if group < width else info.shape[1:]
        yield f"{name}._data._data", "U8", (groups // 2, *rest), elements // 2
        ones = (1,) * len(rest)
        yield f"{name}._scale", "F32", (groups, *ones), 4 * groups
        yield f"{name}._shift", "F32", (groups, *ones), 4 * groups
    else:
        yield f"{name}._data", _EIGHTS[kind][0], info.shape, elements
        yield f"{name}._scale", "F32", (info.shape[0], *(1,) * (len(info.shape) - 1)), 4 * info.shape[0]
    for ending in (".input_scale", ".output_scale"):
        yield name.removesuffix(".weight") + ending, "F32", (), 4


def _written(store: WeightStore, name: str, kind: Weights | None) -> Iterator[bytes]:
    """The bytes of these tensors, in order."""
    info, beside = store.index[name], list[tuple[Tensor, ...]]()
    if kind is None:
        for piece in store.pieces(name):
            yield store.raw(piece)
        return
    if kind is Weights.INT4:
        half = info.shape[0] // 2
        for first, last in _spans(half, store.pieces(name)[0]):
            low, high = (quantise_4(_rows(store, Piece(name, first + n, last + n))) for n in (0, half))
            yield (low[0] | high[0] << 4).numpy().tobytes()
            beside.append((low[1], high[1], low[2], high[2]))
        scales, shifts = ([torch.cat([part[n] for part in beside]) for n in halves] for halves in ((0, 1), (2, 3)))
        for tensor in (*scales, *shifts):
            yield tensor.numpy().tobytes()
    else:
        for piece in store.pieces(name):
            rows, scale = quantise_8(_rows(store, piece), kind)
            yield rows.view(torch.uint8).numpy().tobytes()
            beside.append((scale,))
        yield torch.cat([scale for (scale,) in beside]).numpy().tobytes()
    yield torch.ones(2).numpy().tobytes()


def _spans(rows: int, piece: Piece) -> Iterator[tuple[int, int]]:
    step = piece.last - piece.first
    return ((first, min(first + step, rows)) for first in range(0, rows, step))


def _rows(store: WeightStore, piece: Piece) -> Tensor:
    rows = torch.empty(piece.last - piece.first, *store.index[piece.name].shape[1:])
    store.fetch(piece, rows)
    return rows
