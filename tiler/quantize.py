"""Weights in int8, written once into a file of tiler's own, in the order in which they are used.

A safetensors file of the text encoder, whose weights are int8 only there, and the UNet, which is computed in it: each
quantised tensor beside its fp32 scales, all others as they were. Its metadata says of which files,
and by which rules, it was made; one that does not fit is made again.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tiler import events
from tiler.errors import ModelError, StorageError
from tiler.events import OnEvent, percent
from tiler.memory import cpu
from tiler.memory.budget import Budget, at_layer
from tiler.models import family as families
from tiler.models.family import Family
from tiler.models.unet import int8_weights, order_of_use
from tiler.output.files import atomic
from tiler.weights.index import TensorInfo, open_regular, read_index, read_metadata
from tiler.weights.int8 import quantize_rows
from tiler.weights.store import SCALE, TORCH_DTYPES, WeightStore, match_index

VERSION = "4"  # of the rules: which layers, which scales
TEXT = "text_encoder."  # before the names of its parameters
_PIECE_ELEMENTS = 2**20  # weights at a time: 4 MB in fp32, and a few copies
_SAMPLES, _SAMPLE_BYTES = 256, 4096  # of each file, for its fingerprint


def default_cache() -> Path:
    """Where packed files lie unless --cache-dir says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tiler" / "packed"


def packed_weights(family: Family, cache: Path, progress: Callable[[float, str], None]) -> dict[str, TensorInfo]:
    """The index of the packed file in `cache`, which is made first if it is not there or does not fit: the UNet's parameters,
    and the text encoder's after `TEXT`.

    `progress` gets the share written and why. Raises StorageError, ModelError, NumericalError.
    """
    text = family.checkpoint.weights("text_encoder")
    mark = fingerprint(family.checkpoint.weights("unet") | {TEXT + name: info for name, info in text.items()})
    path = cache / f"{mark}.safetensors"
    why = _misfit(path, mark)
    if why is not None:
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"{cache}: cannot be made ({error.strerror}); choose another --cache-dir, or render with --precision fp32"
            ) from error
        _pack(family, path, mark, lambda share: progress(share, why))
    return read_index(path)


def prepare_int8(family: Family, cache: Path, budget: Budget, on_event: OnEvent) -> dict[str, TensorInfo]:
    """The index of the checkpoint's int8 weights in `cache`, made first where they are missing. Raises TilerError."""
    with budget.phase("quantize") as use:
        tell, check = percent(on_event, "quantize"), at_layer(budget, planned_bytes=budget.max_bytes)
        told: list[str] = []

        def progress(share: float, why: str) -> None:
            if not told:
                on_event(events.PhaseStarted(name="quantize", total=100))
                on_event(events.Note(text=f"int8 weights are made in {cache} ({why})"))
                told.append(why)
            tell(share)
            check("quantize")

        index = packed_weights(family, cache, progress)
    if told:
        on_event(events.PhaseDone(name="quantize", seconds=use.seconds, peak_rss_bytes=use.peak_rss_bytes))
    return index


def fingerprint(files: dict[str, TensorInfo]) -> str:
    """What tells two sets of weight files apart: names, shapes, dtypes and sizes, and 1 MB from all over each file; and how
    large whole values become here."""
    digest = hashlib.sha256(f"{cpu.int8().largest}".encode())
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


def _misfit(path: Path, mark: str) -> str | None:
    """Why the file at `path` cannot be used, None when it can."""
    if not path.exists():
        return "there are none of this model yet"
    try:
        read_index(path)
        wrong = read_metadata(path) != _metadata(mark)
    except ModelError as error:
        return str(error)
    return f"{path} is of another model or version of tiler" if wrong else None


def _metadata(mark: str) -> dict[str, str]:
    return {"format": "tiler-int8", "version": VERSION, "source": mark}


def packed_text_names(name: str) -> list[str]:
    """Where a packed file has a text encoder's parameter."""
    return [TEXT + name]


def _pack(family: Family, path: Path, mark: str, progress: Callable[[float], None]) -> None:
    unet, encoder = families.build_unet(family), families.build_text_encoder(family)
    quantised = int8_weights(unet) | {TEXT + name for name in int8_weights(encoder)}
    texts = match_index(encoder, family.checkpoint.weights("text_encoder"), families.text_names)
    index = match_index(unet, family.checkpoint.weights("unet"), families.plain_names)
    order = [TEXT + name for name in texts] + order_of_use(unet)
    index |= {TEXT + name: info for name, info in texts.items()}
    header: dict[str, Any] = {"__metadata__": _metadata(mark)}
    end = 0

    def place(name: str, dtype: str, shape: tuple[int, ...], nbytes: int) -> None:
        nonlocal end
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + nbytes]}
        end += nbytes

    for name in order:
        info = index[name]
        if name in quantised:
            place(name, "I8", info.shape, math.prod(info.shape))
        else:
            place(name, info.dtype, info.shape, info.nbytes)
    for name in order:
        if name in quantised:
            place(name + SCALE, "F32", index[name].shape[:1], 4 * index[name].shape[0])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    if (free := shutil.disk_usage(path.parent).free) < end:
        raise StorageError(
            f"{path.parent} has {free / 1e6:,.0f} MB free, int8 weights need {end / 1e6:,.0f} MB; "
            "choose another --cache-dir, or render with --precision fp32"
        )
    written = 0
    with WeightStore(index, piece_elements=_PIECE_ELEMENTS) as store, atomic(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        scales: list[torch.Tensor] = []
        for name in order:
            for data in _stored(store, name, quantised, scales):
                written += file.write(data)
                progress(written / end)
        for scale in scales:
            file.write(scale.numpy().tobytes())


def _stored(store: WeightStore, name: str, quantised: frozenset[str], scales: list[torch.Tensor]) -> Iterator[bytes]:
    """A tensor's bytes in the new file, in pieces; the scales of a quantised one are appended to `scales`."""
    info, parts = store.index[name], []
    for piece in store.pieces(name):
        rows = torch.empty(piece.last - piece.first, *info.shape[1:])
        store.fetch(piece, rows)
        if name in quantised:
            rows, scale = quantize_rows(rows, 127 if name.startswith(TEXT) else 0)
            parts.append(scale)
        else:
            rows = rows.to(TORCH_DTYPES[info.dtype])
        yield rows.view(torch.uint8).numpy().tobytes()
    if parts:
        scales.append(torch.cat(parts))
