"""Cases of the kernels as files for driver.c, which runs them under sanitisers or for a processor of another kind."""

from __future__ import annotations

import ctypes
import struct
from pathlib import Path

import torch

from tests.native.kernel_cases import DTYPES, OPERATIONS, Case

DRIVER = Path(__file__).with_name("driver.c")
POOL_DRIVER = DRIVER.with_name("pool_driver.c")
NATIVE = Path(__file__).resolve().parents[2] / "tiler" / "native"


def write(case: Case, path: Path) -> None:
    """Write the call for driver.c: its struct and that of the product beside it, with addresses replaced by numbers of
    arrays, and the arrays."""
    structs = [case.call] if case.beside is None else [case.call, case.beside]
    size = ctypes.sizeof(case.call)
    begins = [(tensor.data_ptr(), tensor.nbytes) for tensor in case.tensors]
    pointers = [] if case.beside is None else [type(case.call).beside.offset, -1, size]
    for number, struct_of in enumerate(structs):
        for name, kind in struct_of._fields_:
            count = {ctypes.c_void_p: 1, ctypes.c_void_p * 2: 2}.get(kind, 0)
            value = getattr(struct_of, name)
            for i, one in enumerate(value if count == 2 else [value] * count):
                for array, (begin, nbytes) in enumerate(begins):
                    if one and 0 <= one - begin < nbytes:
                        pointers += [number * size + getattr(type(case.call), name).offset + 8 * i, array, one - begin]
    result = next(i for i, tensor in enumerate(case.tensors) if tensor is case.out)
    number = list(OPERATIONS).index(type(case.call))
    out_type = next(i for i, dtype in enumerate((*DTYPES.values(), torch.float64)) if dtype == case.out.dtype)
    fields = b"".join(map(bytes, structs))
    with path.open("wb") as file:
        file.write(struct.pack("<5q", number, len(case.tensors), out_type, result, case.want.numel()))
        file.write(struct.pack("<d", case.tolerance) + case.want.contiguous().numpy().tobytes())
        for tensor in case.tensors:
            file.write(struct.pack("<q", tensor.nbytes) + tensor.contiguous().view(torch.uint8).numpy().tobytes())
        file.write(struct.pack(f"<q{len(pointers)}q", len(pointers) // 3, *pointers))
        file.write(struct.pack("<q", len(fields)) + fields)
