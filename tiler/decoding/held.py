"""Store the held statistics of a decoder in a spool, so that a resumed decode does not measure them again. The
attention's keys and values have the first number, the norms follow."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from safetensors.torch import load, save
from torch import Tensor

from tiler.decoding.rows import MidAttention, Norm, Resnet, Stage
from tiler.decoding.scratch import Rows, Scratch
from tiler.decoding.spool import MEASURED, Line


def remember(stages: list[Stage], scratch: Scratch) -> None:
    """Write all statistics that the stages hold to the scratch's spool, if it has one. Raises StorageError."""
    spool = scratch.spool
    if spool is None:
        return
    attention = _attention(stages)
    memory = None if attention is None else attention.memory
    channels, width = (0, 0) if memory is None else (memory.shape[1], memory.shape[3])
    tokens = Rows(scratch, channels, width, number=MEASURED)
    if memory is not None:
        tokens.append(memory)
    for number, norm in enumerate(_norms(stages), MEASURED + 1):
        assert norm.held is not None
        mean, var = ([x.hex() for x in held.tolist()] for held in norm.held)
        line = Line(
            number=number,
            channels=0,
            width=0,
            count=0,
            row_bytes=0,
            whole=True,
            statistics=(0, mean, var),
            closes=(number,),
        )
        spool.note(line, tokens.fd)
    spool.note(tokens.line(whole=True), tokens.fd)  # noted last: if it exists, all others do


def recall(stages: list[Stage], scratch: Scratch) -> bool:
    """Set the stages' statistics to those stored by `remember`; return whether they exist."""
    spool = scratch.spool
    if spool is None or (known := spool.of(MEASURED)) is None:
        return False
    tokens = Rows(scratch, known.channels, known.width, number=MEASURED, known=known)
    # Row by row, as they were gathered: products of the same numbers may differ if their order in memory does.
    if (attention := _attention(stages)) is not None:
        attention.hold(torch.cat([tokens.read(row, row + 1) for row in range(known.count)], dim=2))
    for number, norm in enumerate(_norms(stages), MEASURED + 1):
        line = spool.of(number)
        assert line is not None and line.statistics is not None
        norm.hold(*(_tensor(texts) for texts in line.statistics[1:]))
    return True


def to_bytes(stages: list[Stage]) -> bytes:
    """All statistics that the stages hold, for another process."""
    attention = _attention(stages)
    memory = None if attention is None else attention.memory
    tensors = {}
    if memory is not None:
        rows = memory[0].permute(1, 2, 0).contiguous()
        half = rows.half()  # what was stored so is sent so
        tensors["memory"] = half if torch.equal(half.float(), rows) else rows
    for number, norm in enumerate(_norms(stages)):
        assert norm.held is not None
        tensors |= {f"mean.{number}": norm.held[0].contiguous(), f"var.{number}": norm.held[1].contiguous()}
    return save(tensors)


def from_bytes(stages: list[Stage], data: bytes) -> None:
    """Set the stages' statistics to those in `data`."""
    tensors = load(data)
    if (attention := _attention(stages)) is not None:
        rows = tensors["memory"].float().split(1)  # row by row, like `recall`
        attention.hold(torch.cat([row[None].permute(0, 3, 1, 2) for row in rows], dim=2))
    for number, norm in enumerate(_norms(stages)):
        norm.hold(tensors[f"mean.{number}"], tensors[f"var.{number}"])


def _tensor(texts: list[str]) -> Tensor:
    return torch.tensor([float.fromhex(text) for text in texts], dtype=torch.float64)


def _attention(stages: list[Stage]) -> MidAttention | None:
    """The attention stage; some autoencoders have none."""
    return next((stage for stage in stages if isinstance(stage, MidAttention)), None)


def _norms(stages: list[Stage]) -> Iterator[Norm]:
    for stage in stages:
        for part in (stage.conv1, stage.conv2) if isinstance(stage, Resnet) else (stage,):
            norm = getattr(part, "norm", None)
            if isinstance(norm, Norm):
                yield norm
