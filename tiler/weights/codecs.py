"""Decode stored values to fp32, with one codec for each way in which files store the rows of a tensor. No other module
knows what the bytes mean.

A row consists of complete blocks, and a block is some values in some bytes; blocks of one value are plain numbers. The
integer blocks are GGUF's (ggml-org/ggml, ggml-common.h describes each structure).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from tiler.weights.gguf import BLOCKS

CHUNK_ELEMENTS = 2**18  # decoded at a time: what integers and indices take beside the result stays near 4 MB

Blocks = Callable[[Tensor], Tensor]
"""(n, bytes of a block) uint8 → (n, values of a block) fp32."""


@dataclass(frozen=True, kw_only=True)
class Codec:
    """`name` as in files; a block is `values` values in `nbytes` bytes. `stored` is torch's own dtype, if there is one;
    otherwise `blocks` decodes."""

    name: str
    values: int = 1
    nbytes: int
    stored: torch.dtype | None = None
    blocks: Blocks | None = None

    def row_bytes(self, elements: int) -> int:
        """The bytes of a row of so many elements."""
        return -(-elements // self.values) * self.nbytes

    def decode(self, raw: Tensor, out: Tensor) -> None:
        """Fill `out` (rows, …) fp32 from `raw` (bytes,) uint8, contiguous."""
        if self.stored is not None:
            out.copy_(raw.view(self.stored).view_as(out))
            return
        assert self.blocks is not None
        row, blocks = math.prod(out.shape[1:]), raw.view(-1, self.nbytes)
        aligned = self.values // math.gcd(row, self.values)  # so many rows are whole blocks
        step = max(1, CHUNK_ELEMENTS // row // aligned) * aligned
        for first in range(0, len(out), step):
            some = out[first : first + step]
            begin, end = first * row // self.values, (first * row + some.numel()) // self.values
            some.copy_(self.blocks(blocks[begin:end]).view_as(some))


def _halves(block: Tensor) -> Tensor:
    """(n, 2k) bytes → (n, k) fp32 of fp16."""
    return block.contiguous().view(torch.float16).float()


def _nibbles(block: Tensor) -> Tensor:
    """(n, k) bytes → (n, 2, k): low halves, high halves."""
    return torch.stack([block & 15, block >> 4], dim=1)


def _bits(block: Tensor, width: int, count: int) -> Tensor:
    """(n, k) bytes → (n, count, k): fields of `width` bits from the lowest up."""
    shifts = torch.arange(0, width * count, width, dtype=torch.uint8)[:, None]
    return block[:, None] >> shifts & (2**width - 1)


def _q4_0(b: Tensor) -> Tensor:
    return _halves(b[:, :2]) * (_nibbles(b[:, 2:]).flatten(1).float() - 8)


def _q4_1(b: Tensor) -> Tensor:
    return _halves(b[:, :2]) * _nibbles(b[:, 4:]).flatten(1) + _halves(b[:, 2:4])


def _fives(low: Tensor, high: Tensor) -> Tensor:
    """16 bytes of low halves and 4 of fifth bits → (n, 32)."""
    fifth = _bits(high, 1, 8).transpose(1, 2).flatten(1)
    return _nibbles(low).flatten(1) | fifth << 4


def _q5_0(b: Tensor) -> Tensor:
    return _halves(b[:, :2]) * (_fives(b[:, 6:], b[:, 2:6]).float() - 16)


def _q5_1(b: Tensor) -> Tensor:
    return _halves(b[:, :2]) * _fives(b[:, 8:], b[:, 4:8]) + _halves(b[:, 2:4])


def _q8_0(b: Tensor) -> Tensor:
    return _halves(b[:, :2]) * b[:, 2:].contiguous().view(torch.int8)


def _q2_k(b: Tensor) -> Tensor:
    scales, quants = b[:, :16], b[:, 16:80].reshape(-1, 32)
    scale, least = _halves(b[:, 80:82]) * (scales & 15), _halves(b[:, 82:]) * (scales >> 4)
    values = _bits(quants, 2, 4).reshape(len(b), 16, 16)
    return (scale[..., None] * values - least[..., None]).flatten(1)


def _q3_k(b: Tensor) -> Tensor:
    high, quants, packed = b[:, :32], b[:, 32:96].reshape(-1, 32), b[:, 96:108]
    scales = _nibbles(packed[:, :8]).flatten(1) | _bits(packed[:, 8:], 2, 4).flatten(1) << 4
    scale = _halves(b[:, 108:]) * (scales.float() - 32)
    values = _bits(quants, 2, 4).reshape(len(b), 8, 32).float() - 4.0 * (1 - _bits(high, 1, 8).float())
    return (scale[..., None] * values.reshape(len(b), 16, 16)).flatten(1)


def _scales_k(b: Tensor) -> tuple[Tensor, Tensor]:
    """The scales and minima (n, 8, 1) of Q4_K and Q5_K: two fp16 factors, then 6 bits for each of 8 groups in 12
    bytes."""
    first, second, third = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scale = torch.cat([first & 63, third & 15 | first >> 6 << 4], dim=1)
    least = torch.cat([second & 63, third >> 4 | second >> 6 << 4], dim=1)
    return (_halves(b[:, :2]) * scale)[..., None], (_halves(b[:, 2:4]) * least)[..., None]


def _q4_k(b: Tensor) -> Tensor:
    scale, least = _scales_k(b)
    values = _nibbles(b[:, 16:].reshape(-1, 32)).reshape(len(b), 8, 32)
    return (scale * values - least).flatten(1)


def _q5_k(b: Tensor) -> Tensor:
    scale, least = _scales_k(b)
    values = _nibbles(b[:, 48:].reshape(-1, 32)).reshape(len(b), 8, 32) | _bits(b[:, 16:48], 1, 8) << 4
    return (scale * values - least).flatten(1)


def _q6_k(b: Tensor) -> Tensor:
    low = _nibbles(b[:, :128].reshape(-1, 64)).reshape(len(b), 8, 32)
    high = _bits(b[:, 128:192].reshape(-1, 32), 2, 4).reshape(len(b), 8, 32)
    scale = _halves(b[:, 208:]) * b[:, 192:208].contiguous().view(torch.int8)
    values = (low | high << 4).float().reshape(len(b), 16, 16) - 32
    return (scale[..., None] * values).flatten(1)


@cache
def _codebook() -> Tensor:
    """The 16 values of IQ4, from the gguf library."""
    from gguf.quants import IQ4_NL

    return torch.tensor(IQ4_NL.kvalues, dtype=torch.float32)


def _iq4_nl(b: Tensor) -> Tensor:
    return _halves(b[:, :2]) * _codebook()[_nibbles(b[:, 2:]).flatten(1).int()]


def _iq4_xs(b: Tensor) -> Tensor:
    low = _nibbles(b[:, 4:8].reshape(-1, 1)).reshape(len(b), 8)
    high = _bits(b[:, 2:4].reshape(-1, 1), 2, 4).reshape(len(b), 8)
    scale = _halves(b[:, :2]) * ((low | high << 4).float() - 32)
    values = _codebook()[_nibbles(b[:, 8:].reshape(-1, 16)).int()].reshape(len(b), 8, 32)
    return (scale[..., None] * values).flatten(1)


@cache
def _table(dtype: torch.dtype) -> Tensor:
    """The value of each of 256 bytes; a lookup is four times as fast as torch's own cast."""
    return torch.arange(256, dtype=torch.uint8).view(dtype).float()


def _byte(dtype: torch.dtype, block: Tensor) -> Tensor:
    return _table(dtype).index_select(0, block.flatten().int())


def _plain(name: str, dtype: torch.dtype) -> Codec:
    return Codec(name=name, nbytes=dtype.itemsize, stored=dtype)


def _block(name: str, values: int, nbytes: int, blocks: Blocks) -> Codec:
    return Codec(name=name, values=values, nbytes=nbytes, blocks=blocks)


CODECS: Mapping[str, Codec] = {
    codec.name: codec
    for codec in (
        _plain("F32", torch.float32),
        _plain("F16", torch.float16),
        _plain("BF16", torch.bfloat16),
        _plain(
            "I8", torch.int8
        ),  # of rows that have scales beside them, quantised as tiler's integer products want them
        _plain("QINT8", torch.int8),  # the same by others, computed with in fp32
        _plain("SCB", torch.float32),  # bitsandbytes' largest value of a row, 127 times the factor of its int8
        _block("F8_E4M3", 1, 1, partial(_byte, torch.float8_e4m3fn)),
        _block("F8_E5M2", 1, 1, partial(_byte, torch.float8_e5m2)),
        _block("Q8_0", *BLOCKS["Q8_0"], _q8_0),
        _block("Q4_0", *BLOCKS["Q4_0"], _q4_0),
        _block("Q4_1", *BLOCKS["Q4_1"], _q4_1),
        _block("Q5_0", *BLOCKS["Q5_0"], _q5_0),
        _block("Q5_1", *BLOCKS["Q5_1"], _q5_1),
        _block("Q2_K", *BLOCKS["Q2_K"], _q2_k),
        _block("Q3_K", *BLOCKS["Q3_K"], _q3_k),
        _block("Q4_K", *BLOCKS["Q4_K"], _q4_k),
        _block("Q5_K", *BLOCKS["Q5_K"], _q5_k),
        _block("Q6_K", *BLOCKS["Q6_K"], _q6_k),
        _block("IQ4_NL", *BLOCKS["IQ4_NL"], _iq4_nl),
        _block("IQ4_XS", *BLOCKS["IQ4_XS"], _iq4_xs),
    )
}
