"""Weights that files hold as several tensors: numbers of few bits, and the factors that make values of them.

`understood` makes one tensor of each, under the parameter's own name:

- optimum-quanto: `X.weight._data` of int8 or fp8 and `X.weight._scale`; of 4 bits `X.weight._data._data`, `._scale`,
  `._shift`;
- bitsandbytes: int8 `X.weight` and `X.SCB`; 4 bits with `X.weight.absmax`, its tables, and `X.weight.quant_state.…` in
  JSON;
- fp8 with factors: ComfyUI's `X.scale_weight` under the marker `scaled_fp8`, or `X.weight_scale` where the header's
  `_quantization_metadata` or a tensor `X.comfy_quant` names the format; diffusers' `X.weight_scale`;
- tiler's own `X.weight.scale`, or `X.weight.rotated_scale` (rotation.py).
"""

from __future__ import annotations

import json
import math
import os
from array import array
from bisect import bisect_left
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tiler.errors import ModelError
from tiler.weights.blocks import OUTPUTS
from tiler.weights.codecs import CODECS
from tiler.weights.grouped import FOUR_BITS, QINT4
from tiler.weights.index import Nested, Source, TensorInfo, open_regular, read_metadata
from tiler.weights.rotation import ROTATED_SCALE

Index = Mapping[str, TensorInfo]

_TINY = 2**20  # bytes of a table or a description; a file that says more is damaged
_STATE = ".quant_state.bitsandbytes__"
_MARKER = "scaled_fp8"
# Of arithmetic with activations of few bits, and descriptions that were read.
_DROPPED = (".input_scale", ".output_scale", ".scale_input", _MARKER, ".comfy_quant", ".weight_format")
_EIGHTS = {"I8": "QINT8", "F8_E4M3": "F8_E4M3", "F8_E5M2": "F8_E5M2"}
_FOREIGN = {
    ".weight_scale_2": "NVFP4", ".wscales": "SVDQuant (Nunchaku)", ".smooth_factor": "SVDQuant (Nunchaku)",
    "_weight_qdata": "torchao", ".qzeros": "GPTQ or AWQ",
}  # fmt: skip
_DTYPES = {"F4": "MXFP4 or NVFP4", "F8_E8M0": "MXFP8"}
_READ = "tiler reads fp16, bf16, fp8, GGUF, optimum-quanto and bitsandbytes; use one of these"


def understood(index: Index) -> dict[str, TensorInfo]:
    """The index with one tensor for each parameter. Raises ModelError for formats that tiler does not read, and for
    additional data of a weight that is missing."""
    _refuse(index)
    found, used = dict(index), set[str]()
    promised = _promises(index)
    names = sorted(index)
    for name, info in index.items():
        if name.endswith("._data._data"):
            weight = name.removesuffix("._data._data")
            found[weight] = _quanto_4(index, weight, info)
            used |= {name, f"{weight}._scale", f"{weight}._shift"}
        elif name.endswith("._data"):
            weight = name.removesuffix("._data")
            found[weight] = _quanto_8(index, weight, info)
            used |= {name, f"{weight}._scale"}
        elif _STATE in name:
            weight = name.partition(_STATE)[0]
            found[weight] = _of_blocks(index, weight, info)
            used |= set(names[bisect_left(names, f"{weight}.") : bisect_left(names, f"{weight}/")])  # / comes after .
        elif info.dtype in _EIGHTS:
            scale = _scale(index, info, promised)
            if scale is not None:
                rotated = scale.name == name + ROTATED_SCALE
                own = rotated or scale.name == f"{name}.scale"
                dtype = info.dtype if own else _EIGHTS[info.dtype]
                found[name] = info._replace(dtype=dtype, scale=scale, rotated=rotated)
                used.add(scale.name)
    return {name: info for name, info in found.items() if name not in used and not name.endswith(_DROPPED)}


def check_map(folder: Path, index: Index, layers: Mapping[str, Any]) -> None:
    """That the modules which optimum-quanto's `layers` name have weights in the understood `index`. Raises
    ModelError."""
    for name, entry in layers.items():
        kind = entry.get("weights", "none") if isinstance(entry, dict) else None
        if not isinstance(kind, str):
            raise ModelError(f"{folder}: the quantisation of {name!r} is malformed; download it again")
        info = index.get(f"{name}.weight")
        if info is None:
            raise ModelError(
                f"{folder}: {name!r} is to be quantised, and the weight files have no such weight; download both again"
            )
        if kind != "none" and info.scale is None and not info.beside:
            raise ModelError(f"{folder}: {name!r} is to be {kind}, and is stored as {info.dtype}; download both again")


def in_rows(info: TensorInfo, shape: tuple[int, ...]) -> TensorInfo:
    """A weight stored in groups, as the rows of a parameter of `shape`. Raises ModelError if it does not fit."""
    if info.dtype != QINT4 or len(info.sources) > 1 or math.prod(info.shape) != math.prod(shape):
        return info
    rows, groups = shape[0], info.shape[0]
    if rows % 2 or groups % rows:
        raise ModelError(
            f"{info.path}: tensor {info.name!r} is {groups} groups of {info.shape[1]} values of 4 bits, which tiler cannot cut "
            f"into {rows} rows; use int8"
        )
    half = Source(info.path, info.offset, rows // 2)
    sources = half, half._replace(shift=4)
    return info._replace(
        shape=shape, sources=sources, beside=tuple(other.reshaped((rows, groups // rows)) for other in info.beside)
    )


def _refuse(index: Index) -> None:
    for name, info in index.items():
        what = next((what for ending, what in _FOREIGN.items() if name.endswith(ending)), _DTYPES.get(info.dtype))
        if what is not None:
            raise ModelError(f"{info.path}: tensor {name!r} is of {what}, which tiler does not read; {_READ}")


def _promises(index: Index) -> dict[str, str]:
    """The format that ComfyUI's files state for each module; "" stands for all modules. Raises ModelError for an
    unsupported one."""
    found = {"": _MARKER} if any(name.endswith(_MARKER) for name in index) else {}
    eights = {info.path for info in index.values() if info.dtype in ("I8", "U8", "F8_E4M3", "F8_E5M2")}
    for path in eights:
        said = _object(path, read_metadata(path).get("_quantization_metadata", "{}")) if path.suffix != ".gguf" else {}
        layers = said.get("layers", {})
        for module, entry in (layers if isinstance(layers, dict) else {}).items():
            found[module] = _format(path, module, entry)
    for name, info in index.items():
        if name.endswith(".comfy_quant"):
            module = name.removesuffix(".comfy_quant")
            found[module] = _format(info.path, module, _object(info.path, _bytes(info).decode("utf-8", "replace")))
    return found


def _object(path: Path, text: str) -> dict[str, Any]:
    try:
        said = json.loads(text)
    except (ValueError, RecursionError, TypeError):
        said = None
    if not isinstance(said, dict):
        raise ModelError(
            f"{path}: what it says of its quantisation is no JSON object; the file is damaged, download it again"
        )
    return said


def _format(path: Path, module: str, entry: Any) -> str:
    kind = str(entry.get("format")) if isinstance(entry, dict) else "None"
    if not kind.startswith("float8_e"):
        raise ModelError(f"{path}: {module!r} is of {kind}, which tiler does not read; {_READ}")
    return kind


def _scale(index: Index, info: TensorInfo, promised: Mapping[str, str]) -> TensorInfo | None:
    """The scale of an 8-bit tensor: one factor, or one for each of its rows. Raises ModelError if it is required and
    missing."""
    module = info.name.removesuffix(".weight")
    # tiler's; diffusers' and ComfyUI's newer one; ComfyUI's older one; bitsandbytes'.
    own = f"{info.name}.scale", info.name + ROTATED_SCALE
    names = *own, f"{info.name}_scale", f"{module}.scale_weight", f"{module}.SCB"
    found = next((index[name] for name in names if name in index), None)
    if found is not None:
        rows = info.shape[0] if info.shape else 1
        _check_factors(found, {1, OUTPUTS * rows if len(info.shape) == 5 else rows})  # five sides: blocked
        return found._replace(dtype="SCB") if found.name == names[-1] and found.dtype == "F32" else found
    if info.dtype != "I8" and len(info.shape) > 1 and (module in promised or "" in promised):
        raise ModelError(
            f"{info.path}: the file says that its fp8 weights are scaled, but {info.name!r} has no scale; download it again"
        )
    return None


def _check_factors(info: TensorInfo, counts: set[int], *, may_be_bytes: bool = False) -> None:
    if math.prod(info.shape) not in counts:
        raise ModelError(
            f"{info.path}: tensor {info.name!r} has shape {list(info.shape)}, which is not a factor for each row; download the file again"
        )
    if may_be_bytes and info.dtype == "U8":
        return
    if info.dtype not in CODECS or CODECS[info.dtype].stored is None or info.dtype in ("I8", "QINT8"):
        raise ModelError(f"{info.path}: tensor {info.name!r} holds factors as {info.dtype}; download the file again")


def _need(index: Index, name: str, of: TensorInfo) -> TensorInfo:
    if name not in index:
        raise ModelError(f"{of.path}: tensor {name!r} is missing beside {of.name!r}; download the file again")
    return index[name]


def _quanto_8(index: Index, weight: str, info: TensorInfo) -> TensorInfo:
    if info.dtype not in _EIGHTS:
        raise ModelError(
            f"{info.path}: tensor {info.name!r} is {info.dtype}, which optimum-quanto does not write; {_READ}"
        )
    scale = _need(index, f"{weight}._scale", info)
    _check_factors(scale, {1, info.shape[0] if info.shape else 1})
    return info._replace(name=weight, dtype=_EIGHTS[info.dtype], scale=scale)


def _quanto_4(index: Index, weight: str, info: TensorInfo) -> TensorInfo:
    """optimum-quanto's 4-bit weight as (groups, values per group), until `in_rows` gets the parameter's shape."""
    scale, shift = _need(index, f"{weight}._scale", info), _need(index, f"{weight}._shift", info)
    groups = math.prod(scale.shape)
    if info.dtype != "U8" or len(info.shape) < 2 or info.shape[0] != -(-groups // 2):
        raise ModelError(
            f"{info.path}: tensor {info.name!r} is {info.dtype} {list(info.shape)}, which is not {groups} groups of 4 bits, two "
            "in a byte; optimum-quanto's qint2 is not read"
        )
    _check_factors(scale, {groups})
    _check_factors(shift, {groups}, may_be_bytes=True)
    if groups % 2:
        raise ModelError(f"{info.path}: tensor {info.name!r} has an odd number of groups ({groups}); use int8")
    beside, width = (scale.reshaped((groups, 1)), shift.reshaped((groups, 1))), math.prod(info.shape[1:])
    nbytes = groups * width + sum(other.nbytes for other in beside)  # each byte is read twice
    sources = (Source(info.path, info.offset, groups),)
    return TensorInfo(weight, QINT4, (groups, width), sources, nbytes, beside=beside)


def _of_blocks(index: Index, weight: str, state: TensorInfo) -> TensorInfo:
    """bitsandbytes' 4-bit weight."""
    info, absmax = _need(index, weight, state), _need(index, f"{weight}.absmax", state)
    said = _object(info.path, _bytes(state).decode("utf-8", "replace"))
    shape, values = said.get("shape"), said.get("blocksize")
    if (
        not isinstance(shape, list) or len(shape) != 2 or not all(type(side) is int and side > 0 for side in shape)
        or type(values) is not int or values < 2
    ):  # fmt: skip
        raise ModelError(
            f"{info.path}: tensor {state.name!r} states no shape and size of blocks; download the file again"
        )
    rows, width = shape
    if values % 2 or width % values:
        raise ModelError(
            f"{info.path}: the rows of {weight!r}, {width} values, are no whole blocks of {values}; "
            "tiler does not read that"
        )
    if info.dtype != "U8" or info.nbytes * 2 != rows * width or math.prod(absmax.shape) != rows * width // values:
        raise ModelError(
            f"{info.path}: tensor {weight!r} says {rows} × {width} values in blocks of {values}, which does not fit "
            f"its {info.nbytes} bytes and {math.prod(absmax.shape)} factors; the file is damaged, download it again"
        )
    table = _values(_need(index, f"{weight}.quant_map", state))
    nested = Nested(table=table, values=values, start=info.offset)
    if absmax.dtype == "U8":
        kinds = _values(_need(index, f"{weight}.nested_quant_map", state))
        factors = _values(_need(index, f"{weight}.nested_absmax", state))
        of, offset = said.get("nested_blocksize"), said.get("nested_offset")
        if (
            type(of) is not int or of < 1 or not isinstance(offset, int | float) or len(kinds) != 256
            or len(factors) != -(-rows * width // values // of)
        ):  # fmt: skip
            raise ModelError(
                f"{info.path}: the nested factors of {weight!r} do not fit; the file is damaged, download it again"
            )
        nested = Nested(
            table=table, values=values, start=info.offset, factors=kinds, factors_of=of, factors_factors=factors,
            offset=float(offset),
        )  # fmt: skip
    elif absmax.dtype not in ("F32", "F16", "BF16"):
        raise ModelError(
            f"{info.path}: tensor {absmax.name!r} holds factors as {absmax.dtype}; download the file again"
        )
    if len(table) != 16:
        raise ModelError(
            f"{info.path}: the table of {weight!r} has {len(table)} values, not 16; the file is damaged, download it "
            "again"
        )
    flat = absmax.reshaped((rows, width // values))
    return TensorInfo(
        weight, FOUR_BITS, (rows, width), (Source(info.path, info.offset, rows),), info.nbytes + absmax.nbytes,
        beside=(flat,), nested=nested,
    )  # fmt: skip


def _bytes(info: TensorInfo) -> bytes:
    """The bytes of a small tensor. Raises ModelError."""
    if info.nbytes > _TINY:
        raise ModelError(
            f"{info.path}: tensor {info.name!r} takes {info.nbytes} bytes, too many; the file is damaged, download it again"
        )
    fd = open_regular(info.path)
    try:
        return os.pread(fd, info.nbytes, info.offset)
    except OSError as error:
        raise ModelError(f"{info.path}: reading failed ({error.strerror}); check the disk") from error
    finally:
        os.close(fd)


def _values(info: TensorInfo) -> array[float]:
    """The values of a small fp32 tensor. Raises ModelError."""
    raw = _bytes(info)
    if info.dtype != "F32" or len(raw) % 4:
        raise ModelError(f"{info.path}: tensor {info.name!r} is {info.dtype}; a table is F32. Download the file again")
    return array("f", raw)
