"""Decode rows of 4-bit values whose groups have factors in separate tensors.

`columns` are the bytes of some rows: their own, then those of each tensor beside them, (rows, bytes) uint8 each.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from tiler.weights.codecs import CHUNK_ELEMENTS, CODECS
from tiler.weights.index import Source, TensorInfo

QINT4, FOUR_BITS = "QINT4", "4 bits of a table"


def is_read(info: TensorInfo) -> bool:
    """Whether tiler can read the format of this tensor."""
    return info.dtype in CODECS or info.dtype in _DECODERS


def decode_rows(info: TensorInfo, first: int, columns: Sequence[Tensor], out: Tensor) -> None:
    """Fill `out` with fp32 rows from `first` on."""
    decode, step = _DECODERS[info.dtype], max(1, CHUNK_ELEMENTS // math.prod(out.shape[1:]))
    begin = 0
    for place in info.places(first, first + len(out)):
        end = begin + place.rows
        for start in range(begin, end, step):
            rows = slice(start, min(start + step, end))
            made = decode(info, _moved(info, place, start - begin), [column[rows] for column in columns])
            out[rows].copy_(made.view_as(out[rows]))
        begin = end


def _moved(info: TensorInfo, place: Source, rows: int) -> Source:
    return place._replace(offset=place.offset + info.alone().bytes_of(rows))


def _factors(column: Tensor, dtype: str) -> Tensor:
    """(rows, bytes) → (rows, groups, 1) fp32."""
    stored = CODECS[dtype].stored
    assert stored is not None
    return column.contiguous().view(stored).float()[..., None]


def _table(values: array[float]) -> Tensor:
    return torch.frombuffer(values, dtype=torch.float32)


def _qint4(info: TensorInfo, place: Source, columns: Sequence[Tensor]) -> Tensor:
    """optimum-quanto's format: w = scale · value − shift, or scale · (value − zero) with integer zeros; the second half
    of a weight's rows is in the high bits of the first half's bytes."""
    values, scale = (columns[0] >> place.shift & 15).float(), _factors(columns[1], info.beside[0].dtype)
    groups = values.view(len(values), scale.shape[1], -1)
    shift, kind = columns[2], info.beside[1].dtype
    if kind == "U8":
        return scale * (groups - shift.float()[..., None])
    return (groups * scale).sub_(_factors(shift, kind))


def _of_table(info: TensorInfo, place: Source, columns: Sequence[Tensor]) -> Tensor:
    """bitsandbytes' format: two values per byte, the first in the high bits; each block is multiplied by its factor."""
    packed, kept = columns[0], info.nested
    assert kept is not None
    values = _table(kept.table)[torch.stack([packed >> 4, packed & 15], dim=-1).flatten(1).int()]
    if kept.factors is not None and kept.factors_factors is not None:
        number = columns[1].int()
        first = 2 * (place.offset - kept.start) // kept.values  # which block of the whole tensor
        block = torch.arange(first, first + number.numel()) // kept.factors_of
        factors = _table(kept.factors)[number] * _table(kept.factors_factors)[block].view_as(number)
        factors = (factors + kept.offset)[..., None]
    else:
        factors = _factors(columns[1], info.beside[0].dtype)
    return values.view(len(values), -1, kept.values) * factors


_DECODERS: Mapping[str, Callable[[TensorInfo, Source, Sequence[Tensor]], Tensor]] = {
    QINT4: _qint4,
    FOUR_BITS: _of_table,
}
