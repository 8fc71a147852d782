"""Quantised weights in one file of tiler's own, in the order of use.

A safetensors file with each quantised tensor beside its fp32 scales, and all other tensors unchanged. Its metadata
record the source files, the rules and the order of values; a file that does not match is written again. Knows names,
dtypes and rows, but not their purpose.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tiler.errors import ModelError, NumericalError, StorageError
from tiler.files import atomic
from tiler.weights.blocks import block_sides, blocked, can_block
from tiler.weights.caches import INT8_VERSION, MODEL
from tiler.weights.changes import Changes
from tiler.weights.codecs import CODECS
from tiler.weights.index import TensorInfo, header_bytes, open_regular, read_file, read_index
from tiler.weights.layouts import understood
from tiler.weights.places import cache_home
from tiler.weights.rotation import ROTATED_SCALE
from tiler.weights.store import SCALE, Piece, WeightStore

_PIECE_ELEMENTS = 2**20  # weights at a time: 4 MB in fp32, and a few copies
_SAMPLES, _SAMPLE_BYTES = 256, 4096  # samples of each file, for its fingerprint

Quantise = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""(rows, ...) fp32 → the rows in int8 and a scale for each, (rows,) fp32."""


def default_cache() -> Path:
    """The folder of packed files, unless --cache-dir names another."""
    return cache_home() / "tiler" / "packed"


def packed_index(
    cache: Path, files: dict[str, TensorInfo], rules: str, write: Callable[[Path, str, str], None], *, in_blocks: bool
) -> dict[str, TensorInfo]:
    """The index of the packed file in `cache` that was made from `files` by `rules`. If it is missing or does not
    match, `write(path, fingerprint, reason)` is called first. With `in_blocks` its weights must be in blocks; without
    it, both orders are accepted. Raises StorageError, and the errors of `write`."""
    mark = fingerprint(files, rules)
    path = cache / f"{mark}.safetensors"
    reason = _misfit(path, mark, in_blocks)
    if reason is not None:
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"{cache}: cannot be made ({error.strerror}); choose another --cache-dir, or render with --precision fp32"
            ) from error
        write(path, mark, reason)
    return understood(read_index(path))


def fingerprint(files: dict[str, TensorInfo], rules: str) -> str:
    """Distinguish sets of weight files by names, shapes, dtypes, sizes and 1 MB sampled from each file; `rules` are
    further inputs of the packed values."""
    digest = hashlib.sha256(rules.encode())
    for name, info in sorted(files.items()):
        digest.update(f"{name} {info.dtype} {info.shape}\n".encode())
    for path in sorted({info.path for info in files.values()}):
        fd = open_regular(path)
        try:
            size = os.fstat(fd).st_size
            digest.update(f"{size}\n".encode())
            for i in range(_SAMPLES):
                digest.update(os.pread(fd, _SAMPLE_BYTES, i * max(0, size - _SAMPLE_BYTES) // (_SAMPLES - 1)))
        finally:
            os.close(fd)
    return digest.hexdigest()[:32]


def _misfit(path: Path, mark: str, in_blocks: bool) -> str | None:
    """The reason why the file at `path` cannot be used, or None."""
    if not path.exists():
        return "there are none of this model yet"
    try:
        said = {key: value for key, value in read_file(path).texts.items() if key != MODEL}
    except ModelError as error:
        return str(error)
    if said not in (_metadata(mark, True), _metadata(mark, False)):
        return f"{path} is of another model or version of tiler"
    if in_blocks and said != _metadata(mark, True):
        return f"{path} is not in the order of the kernels that tiler has now"
    return None


def _metadata(mark: str, in_blocks: bool) -> dict[str, str]:
    return {"format": "tiler-int8", "version": INT8_VERSION, "source": mark, "order": "blocks" if in_blocks else "rows"}


def write_packed(
    path: Path,
    mark: str,
    order: Sequence[str],
    index: dict[str, TensorInfo],
    quantised: Mapping[str, Quantise],
    progress: Callable[[float], None],
    *,
    in_blocks: frozenset[str] = frozenset(),
    rotated: frozenset[str] = frozenset(),
    changes: Changes | None = None,
    model: str = "",
) -> None:
    """Write the tensors of `index` in `order`, for people as those of `model`.

    Tensors in `quantised` become int8 by the function given there; those that are `in_blocks` and can be divided are
    stored in the order of blocks.py; the functions of those in `rotated` rotate them. Others stay as stored, or become
    fp32 if several tensors form one. `changes` are applied before quantising. `progress` gets the share written. Raises
    StorageError, ModelError, NumericalError.
    """
    header: dict[str, Any] = {"__metadata__": _metadata(mark, bool(in_blocks)) | ({MODEL: model} if model else {})}
    in_blocks = frozenset(name for name in in_blocks if can_block(index[name].shape))
    end = 0

    def place(name: str, dtype: str, shape: tuple[int, ...], nbytes: int) -> None:
        nonlocal end
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + nbytes]}
        end += nbytes

    for name in order:
        info = index[name]
        if name in quantised:
            place(name, "I8", block_sides(info.shape) if name in in_blocks else info.shape, math.prod(info.shape))
        elif _is_decoded(info):
            place(name, "F32", info.shape, 4 * math.prod(info.shape))
        else:
            place(name, info.dtype, info.shape, info.nbytes)
    for name in order:
        if name in quantised:
            place(
                name + (ROTATED_SCALE if name in rotated else SCALE),
                "F32",
                index[name].shape[:1],
                4 * index[name].shape[0],
            )
    if (free := shutil.disk_usage(path.parent).free) < end:
        raise StorageError(
            f"{path.parent} has {free / 1e6:,.0f} MB free, int8 weights need {end / 1e6:,.0f} MB; "
            "choose another --cache-dir, or render with --precision fp32"
        )
    written = 0
    with (
        WeightStore(index, piece_elements=_PIECE_ELEMENTS, changes=changes) as store,
        atomic(path, in_cache=True) as file,
    ):
        file.write(header_bytes(header))
        scales: list[torch.Tensor] = []
        for name in order:
            for data in _stored(store, name, quantised.get(name), scales, in_blocks=name in in_blocks):
                written += file.write(data)
                progress(written / end)
        for scale in scales:
            file.write(scale.numpy().tobytes())


def _is_decoded(info: TensorInfo) -> bool:
    """Whether the tensor's own bytes are not enough to decode it, or cannot be put in order undecoded."""
    if info.scale is not None or info.beside:
        return True
    return info.transposed and CODECS[info.dtype].stored is None


def _checked(data: bytes, info: TensorInfo, piece: Piece) -> bytes:
    """The stored bytes of a piece, checked for NaN and Inf, because a later message would blame the new file. Raises
    NumericalError."""
    values = torch.empty(piece.last - piece.first, *info.shape[1:])
    CODECS[info.dtype].decode(torch.frombuffer(bytearray(data), dtype=torch.uint8), values)
    if not torch.isfinite(values.sum()):
        raise NumericalError(f"{info.path}: tensor {info.name!r} holds NaN or Inf; download the file again")
    return data


def _stored(
    store: WeightStore, name: str, quantise: Quantise | None, scales: list[torch.Tensor], *, in_blocks: bool
) -> Iterator[bytes]:
    """A tensor's bytes for the new file, in pieces; the scales of a quantised one are appended to `scales`."""
    info, parts = store.index[name], []
    for piece in store.pieces(name):
        if quantise is None and not _is_decoded(info):
            yield _checked(store.raw(piece), info, piece)
            continue
        rows = torch.empty(piece.last - piece.first, *info.shape[1:])
        store.fetch(piece, rows)
        if quantise is None:
            yield rows.numpy().tobytes()
            continue
        rows, scale = quantise(rows)
        rows = blocked(rows) if in_blocks else rows
        parts.append(scale)
        yield rows.view(torch.uint8).numpy().tobytes()
    if parts:
        scales.append(torch.cat(parts))
