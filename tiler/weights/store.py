"""Read weights from disk in pieces of rows, with preadv into reused buffers, and cast them to fp32 at the point of use.

Files are never mapped: mapped pages count as RSS, the page cache behind pread does not. A thread reads ahead in the
order of the previous pass, or in the announced order. This module knows only the names and shapes of parameters,
nothing about layers.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import torch

from tiler.errors import ModelError, NumericalError, StorageError
from tiler.weights.blocks import OUTPUTS, block_sides, can_block, unblocked
from tiler.weights.changes import STEP_ELEMENTS, Changes, LowRank, Merger, Rows
from tiler.weights.codecs import CODECS
from tiler.weights.grouped import decode_rows, is_read
from tiler.weights.index import TensorInfo, open_regular, read_into
from tiler.weights.layouts import in_rows
from tiler.weights.rotation import rotate_

TORCH_DTYPES = {codec.name: codec.stored for codec in CODECS.values() if codec.stored is not None}
SCALE = ".scale"  # suffix of the fp32 factors of an int8 tensor's rows
# 8 MiB of fp16, 16 MiB once cast. A choice, no measurement: large enough for disks, small beside the arena.
PIECE_ELEMENTS = 4 * 2**20
READ_AHEAD = 1  # pieces in flight; each has its own buffer


class Piece(NamedTuple):
    """Rows [first, last) of a tensor, contiguous in the file."""

    name: str
    first: int
    last: int


def piece_rows(row_elements: int, piece_elements: int) -> int:
    """The number of rows in a piece of about `piece_elements` elements: a multiple of 32, at least 32, so that no cut
    divides a kernel's block of outputs."""
    return max(32, piece_elements // max(1, row_elements) // 32 * 32)


def check_dtype(info: TensorInfo, *, scaled: bool) -> None:
    """Raise ModelError for a tensor that cannot be read: of an unknown dtype, or int8 that is not `scaled`."""
    if not is_read(info) or (info.dtype in ("I8", "QINT8") and not scaled):
        known = ", ".join(name for name in CODECS if name not in ("I8", "QINT8", "SCB"))
        raise ModelError(f"{info.path}: tensor {info.name!r} is stored as {info.dtype}; tiler reads {known}")


def match_index(
    module: torch.nn.Module, stored: dict[str, TensorInfo], rename: Callable[[str], list[str]]
) -> dict[str, TensorInfo]:
    """The stored tensor of every parameter of `module`. `rename` gives the names that a parameter may have in files.
    Raises ModelError naming the first parameter that is missing, has another shape, or has an unusable dtype."""
    where = next(iter(stored.values())).path.parent if stored else "a part of the checkpoint without tensors"
    matched = {}
    for name, parameter in module.named_parameters():
        info = next((stored[alias] for alias in rename(name) if alias in stored), None)
        if info is None:
            raise _missing(where, name, stored)
        want = tuple(parameter.shape)
        info = in_rows(info, want)
        squeezed = tuple(n for n in info.shape if n != 1) == tuple(n for n in want if n != 1)
        is_blocked = info.dtype == "I8" and len(info.shape) == 5 and can_block(want) and info.shape == block_sides(want)
        if info.shape != want and not squeezed and not is_blocked:
            raise ModelError(
                f"{info.path}: tensor {info.name!r} has shape {list(info.shape)}, config.json asks for {list(want)}; "
                "weights and config do not belong together: download both again"
            )
        check_dtype(info, scaled=info.scale is not None)
        matched[name] = info.reshaped(want)._replace(blocked=is_blocked)
    return matched


def _missing(where: Path | str, name: str, stored: dict[str, TensorInfo]) -> ModelError:
    """The error for a parameter without a tensor. If its neighbours have other names in their file, it gives the name
    that the file should contain."""
    words = name.split(".")
    for depth in range(len(words) - 1, 0, -1):
        prefix, rest = ".".join(words[:depth]) + ".", ".".join(words[depth:])
        for known, info in stored.items():
            tail = known[len(prefix) :]
            if known.startswith(prefix) and info.name.endswith(f".{tail}") and not info.name.endswith(known):
                own = info.name[: -len(tail)] + rest
                return ModelError(f"{info.path}: tensor {own!r} is missing; download the file again")
    return ModelError(
        f"{where}: tensor {name!r} is missing; weights and config.json do not belong together: download both again"
    )


class WeightStore:
    """The tensors of one model, by the model's own parameter names. `index` maps parameter names to places in files;
    `piece_elements` limits one read. `changes` are added to weights that are read in fp32; int8 weights are returned as
    stored, with the changes as a `low_rank` path."""

    def __init__(
        self,
        index: dict[str, TensorInfo],
        *,
        piece_elements: int = PIECE_ELEMENTS,
        check_finite: bool = True,
        changes: Changes | None = None,
    ) -> None:
        self.index = index | {name + SCALE: info.scale for name, info in index.items() if info.scale is not None}
        self.piece_elements = piece_elements
        self.bytes_read = 0
        self.resident: dict[str, torch.Tensor] = {}
        self.sums: dict[Piece, torch.Tensor] = {}  # sums of an int8 piece's rows, for kernels that need them again
        self._scales: dict[str, torch.Tensor] = {}
        self._check_finite = check_finite
        self._checked: set[Piece] = set()
        self._next: dict[Piece, Piece] = {}  # the piece that was requested after each piece
        self._last: Piece | None = None
        self._ahead: deque[tuple[Piece, Future[torch.Tensor]]] = deque()
        self._buffers: list[torch.Tensor] = []
        self._fds: dict[Path, int] = {}
        self._merger = Merger(changes or {}, self._inputs_squared)
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tiler-read-ahead")
        try:
            for name, info in self.index.items():
                check_dtype(info, scaled=name + SCALE in self.index)
                for source in (source for some in (info, *info.beside) for source in some.sources):
                    if source.path not in self._fds:
                        self._fds[source.path] = open_regular(source.path)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the reader, close the files and release the buffers."""
        self._reader.shutdown(wait=True, cancel_futures=True)
        self._merger.close()
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()
        self._ahead.clear()
        self._buffers.clear()
        self.resident.clear()

    def load(self, name: str) -> torch.Tensor:
        """A complete tensor in fp32, newly allocated, for norms, biases and other small tensors."""
        info = self.index[name]
        out = torch.empty(info.shape, dtype=torch.float32)
        rows = info.shape[0] if info.shape else 1
        self._cast(Piece(name, 0, rows), self._read(Piece(name, 0, rows), self._new_buffer(info.nbytes)), out)
        return out

    @property
    def int8(self) -> frozenset[str]:
        """The names of the int8 tensors that are multiplied as stored, apart from low-rank paths."""
        stored = (name for name, info in self.index.items() if info.dtype == "I8")
        return frozenset(name for name in stored if all(one.rank for one in self._merger.changes.get(name, ())))

    def blocks(self, name: str) -> torch.Tensor | None:
        """A resident int8 weight in the order of blocks.py; None for all others."""
        kept = self.resident.get(name)
        return kept if kept is not None and kept.dtype == torch.int8 and self.index[name].blocked else None

    def scale(self, name: str) -> torch.Tensor:
        """The scales (rows,) fp32 of a scaled tensor; they stay in memory."""
        if name not in self._scales:
            self._scales[name] = self.load(name + SCALE).flatten().expand(self.index[name].shape[0]).contiguous()
        return self._scales[name]

    def low_rank(self, name: str, first: int, outputs: int) -> LowRank | None:
        """The changes of outputs [first, first + outputs) of an int8 weight as a low-rank path; None without
        changes."""
        return self._merger.low_rank(name, first, outputs)

    def rows(self, name: str, rows: list[int]) -> torch.Tensor:
        """Single rows of a table in fp32: (len(rows), *shape[1:])."""
        out = torch.empty((len(rows), *self.index[name].shape[1:]), dtype=torch.float32)
        buffer = self._new_buffer(self.index[name].bytes_of(1))
        for i, row in enumerate(rows):
            piece = Piece(name, row, row + 1)
            self._cast(piece, self._read(piece, buffer), out[i : i + 1])
        return out

    def pieces(self, name: str, elements: int | None = None) -> list[Piece]:
        """Cut the tensor along its first axis into pieces of about `elements` elements, at most and by default
        `piece_elements`."""
        shape, elements = self.index[name].shape, min(elements or self.piece_elements, self.piece_elements)
        if self.index[name].transposed:
            return [Piece(name, 0, shape[0])]
        total, step = shape[0] if shape else 1, piece_rows(math.prod(shape[1:]), elements)
        return [Piece(name, first, min(first + step, total)) for first in range(0, total, step)]

    def fetch(self, piece: Piece, out: torch.Tensor, *, in_blocks: bool = False) -> None:
        """Cast a piece into `out` (rows × rest, fp32 or int8), and start reading the piece that followed it in the
        previous pass. A blocked tensor's rows are put in order, unless they are wanted `in_blocks`, as stored."""
        if self.index[piece.name].blocked and not in_blocks and piece.first % OUTPUTS + piece.last % OUTPUTS:
            last = -(-piece.last // OUTPUTS) * OUTPUTS  # complete blocks, some rows of which are left out
            around = Piece(piece.name, piece.first // OUTPUTS * OUTPUTS, last)
            rows = out.new_empty(last - around.first, *out.shape[1:])
            self.fetch(around, rows)
            out.copy_(rows[piece.first - around.first : piece.last - around.first])
            return
        if (kept := self.resident.get(piece.name)) is not None:
            if kept.dtype == torch.float32:
                out.copy_(kept[piece.first : piece.last].view_as(out))
            else:
                self._decode(piece, self._stored(kept, piece).view(torch.uint8), out, in_blocks=in_blocks, kept=True)
                self._change(piece, out)
            return
        if self._last is not None:
            self._next[self._last] = piece
        self._last = piece
        raw = self._take(piece)
        self._read_ahead(piece)
        self._cast(piece, raw, out, in_blocks=in_blocks)
        self._buffers.append(raw)

    def expect(self, pieces: Iterable[Piece]) -> None:
        """Announce the order in which pieces will be requested, so that a first pass reads ahead too. Resident ones are
        left out."""
        self._next.update(pairwise(piece for piece in pieces if piece.name not in self.resident))

    def raw(self, piece: Piece) -> bytes:
        """The bytes of a piece as stored."""
        buffer = self._read(piece, self._take_buffer())
        self._buffers.append(buffer)
        stored, info = buffer[: self._bytes(piece)], self.index[piece.name]
        if info.transposed:
            dtype = TORCH_DTYPES.get(info.dtype)
            if dtype is None:
                raise ModelError(
                    f"{info.path}: tensor {info.name!r} is stored as {info.dtype} and transposed; use an fp16 file"
                )
            stored = stored.view(dtype).view(info.shape[::-1]).T.contiguous().view(torch.uint8)
        return stored.numpy().tobytes()

    def keep(self, name: str, dtype: torch.dtype) -> None:
        """Keep a tensor in memory from now on, in fp32 or as stored (uint8 for formats without a torch dtype); a
        convolution's fp32 weight is channels-last."""
        info = self.index[name]
        if dtype == torch.float32:
            kept = torch.empty(info.shape)
            kept = kept.contiguous(memory_format=torch.channels_last) if kept.ndim == 4 else kept
        else:
            kept = torch.empty(info.nbytes // dtype.itemsize, dtype=dtype)
        for piece in self.pieces(name):
            raw = self._read(piece, self._take_buffer())
            if dtype == torch.float32:
                self._decode(piece, raw[: self._bytes(piece)], kept[piece.first : piece.last])
                self._change(piece, kept[piece.first : piece.last])
            else:
                rows = raw[: self._bytes(piece)]
                if info.beside:  # stored row by row, so that any rows may be requested
                    rows = torch.cat(self._columns(piece, rows, kept=False), dim=1).flatten()
                self._stored(kept, piece).copy_(rows.view(dtype))
            self._buffers.append(raw)
        self.resident[name] = kept

    # --- reading
    # ---------------------------------------------------------------------------------------------------------

    def _bytes(self, piece: Piece) -> int:
        info = self.index[piece.name]
        return info.nbytes if info.transposed else info.bytes_of(piece.last - piece.first)

    def _stored(self, kept: torch.Tensor, piece: Piece) -> torch.Tensor:
        """A piece of a tensor that is resident in its stored format; the complete tensor if it is stored transposed."""
        if self.index[piece.name].transposed:
            return kept
        ends = (self.index[piece.name].bytes_of(row) // kept.itemsize for row in (piece.first, piece.last))
        return kept[slice(*ends)]

    @staticmethod
    def _new_buffer(nbytes: int) -> torch.Tensor:
        return torch.empty(max(1, nbytes), dtype=torch.uint8)

    def _take_buffer(self) -> torch.Tensor:
        # A piece of 32 wide rows may be larger than piece_elements: buffers fit the largest piece that exists.
        return self._buffers.pop() if self._buffers else self._new_buffer(self.buffer_bytes)

    @property
    def buffer_bytes(self) -> int:
        """The size of one read buffer. There are READ_AHEAD + 1 of them."""
        return max(self._bytes(self.pieces(name)[0]) for name, info in self.index.items() if info.nbytes)

    def _take(self, piece: Piece) -> torch.Tensor:
        while self._ahead:
            ahead, future = self._ahead.popleft()
            raw = future.result()
            if ahead == piece:
                return raw
            self._buffers.append(raw)  # the order changed: drop the pieces that were read ahead
        return self._read(piece, self._take_buffer())

    def _read_ahead(self, piece: Piece) -> None:
        behind = self._ahead[-1][0] if self._ahead else piece
        while len(self._ahead) < READ_AHEAD and (following := self._next.get(behind)) is not None:
            self._ahead.append((following, self._reader.submit(self._read, following, self._take_buffer())))
            behind = following

    def _read(self, piece: Piece, buffer: torch.Tensor) -> torch.Tensor:
        info = self.index[piece.name]
        view = memoryview(buffer.numpy())[: self._bytes(piece)]  # type: ignore[arg-type]
        self.bytes_read += len(view)
        for some_of in (info.alone(), *info.beside):
            ends = (0, info.shape[0]) if info.transposed else (piece.first, piece.last)
            for path, at, rows, _ in some_of.places(*ends):
                some, view = view[: some_of.bytes_of(rows)], view[some_of.bytes_of(rows) :]
                self._fill(path, at, some)
        assert not view, "every row has its place"
        return buffer

    def _fill(self, path: Path, at: int, view: memoryview) -> None:
        try:
            whole = read_into(self._fds[path], view, at)
        except OSError as error:
            raise StorageError(f"{path}: reading failed after byte {at} ({error.strerror}); check the disk") from error
        if not whole:
            raise ModelError(f"{path}: the file became shorter while it was read; download it again")

    def _cast(self, piece: Piece, raw: torch.Tensor, out: torch.Tensor, *, in_blocks: bool = False) -> None:
        self._decode(piece, raw[: self._bytes(piece)], out, in_blocks=in_blocks)
        if self._check_finite and out.dtype == torch.float32 and piece not in self._checked:
            # Checked once for each piece: the sum of finite fp32 weights of this size is finite.
            if not torch.isfinite(out.sum()):
                path = self.index[piece.name].path
                raise NumericalError(f"{path}: tensor {piece.name!r} holds NaN or Inf; download the file again")
            self._checked.add(piece)
        self._change(piece, out)

    def _change(self, piece: Piece, out: torch.Tensor) -> None:
        if out.dtype == torch.float32:
            self._merger.add(piece.name, piece.first, out)

    def _inputs_squared(self, name: str, rows: Rows) -> torch.Tensor:
        """The sum of squares, (inputs,) fp64, of each input over a complete weight, with `rows` added to it."""
        info = self.index[name]
        total = torch.zeros(info.shape[1], dtype=torch.float64)
        for piece in self.pieces(name, STEP_ELEMENTS):
            out = torch.empty(piece.last - piece.first, *info.shape[1:])
            raw = self._read(piece, self._new_buffer(self._bytes(piece)))
            self._decode(piece, raw, out)
            out += rows(piece.first, piece.last).reshape(out.shape)
            total += out.flatten(2).double().square_().sum((0, 2)) if out.ndim > 2 else out.double().square_().sum(0)
        return total

    def _columns(self, piece: Piece, raw: torch.Tensor, *, kept: bool) -> list[torch.Tensor]:
        """The bytes of a piece and of the tensors beside it, (rows, bytes) each. In `kept` bytes they alternate row by
        row, otherwise tensor by tensor."""
        info, rows = self.index[piece.name], piece.last - piece.first
        widths = [some.bytes_of(1) for some in (info.alone(), *info.beside)]
        if kept:
            return list(raw.view(rows, -1).split(widths, dim=1))
        return [some.view(rows, -1) for some in raw.split([rows * width for width in widths])]

    def _decode(
        self, piece: Piece, raw: torch.Tensor, out: torch.Tensor, *, in_blocks: bool = False, kept: bool = False
    ) -> None:
        """Decode rows as stored, (bytes,) uint8, into `out`: scaled fp32, or int8 as stored."""
        info = self.index[piece.name]
        if info.beside:
            decode_rows(info, piece.first, self._columns(piece, raw, kept=kept), out)
            return
        if info.blocked and not in_blocks:
            assert piece.first % OUTPUTS == 0, piece
            rows = unblocked(raw.view(torch.int8), (piece.last - piece.first, *info.shape[1:]))
            raw = rows.flatten().view(torch.uint8)
        if out.dtype == torch.int8:
            out.copy_(raw.view(torch.int8).view_as(out))
            return
        if not info.transposed:
            CODECS[info.dtype].decode(raw, out)
        elif len(out) == info.shape[0]:
            CODECS[info.dtype].decode(raw, out.T)
        else:
            CODECS[info.dtype].decode(raw, whole := torch.empty(info.shape[::-1]))
            out.copy_(whole[:, piece.first : piece.last].T)
        if piece.name + SCALE in self.index:
            out.mul_(self.scale(piece.name)[piece.first : piece.last].view(-1, *(1,) * (out.ndim - 1)))
        if info.scale is not None and info.scale.dtype == "SCB":
            out.mul_(1 / 127)  # last, as in bitsandbytes: the other order differs in the last bit
        if info.rotated:
            rotate_(out)
