"""What a decoder with held statistics has measured, in a spool: it is not measured again when the decode goes on."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tiler.decoding.rows import MidAttention, Norm, Resnet, Stage
from tiler.decoding.scratch import Rows, Scratch
from tiler.decoding.spool import Line

_TOKENS = 400  # the number of the attention's keys and values; norms follow


def remember(stages: list[Stage], scratch: Scratch) -> None:
    """Note all that the stages hold, where the scratch has a spool. Raises StorageError."""
    spool = scratch.spool
    if spool is None:
        return
    attention = _attention(stages)
    assert attention.memory is not None
    channels, width = attention.memory.shape[1], attention.memory.shape[3]
    tokens = Rows(scratch, channels, width, number=_TOKENS)
    tokens.append(attention.memory)
    for number, norm in enumerate(_norms(stages), _TOKENS + 1):
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
    spool.note(tokens.line(whole=True), tokens.fd)  # the last one: with it all are there


def recall(stages: list[Stage], scratch: Scratch) -> bool:
    """Let the stages hold what `remember` noted, if it did."""
    spool = scratch.spool
    if spool is None or (known := spool.of(_TOKENS)) is None:
        return False
    tokens = Rows(scratch, known.channels, known.width, number=_TOKENS, known=known)
    # Row by row, as they were gathered: products of the same numbers in another order in memory may differ.
    _attention(stages).hold(torch.cat([tokens.read(row, row + 1) for row in range(known.count)], dim=2))
    for number, norm in enumerate(_norms(stages), _TOKENS + 1):
        line = spool.of(number)
        assert line is not None and line.statistics is not None
        norm.hold(*(_tensor(texts) for texts in line.statistics[1:]))
    return True


def _tensor(texts: list[str]) -> Tensor:
    return torch.tensor([float.fromhex(text) for text in texts], dtype=torch.float64)


def _attention(stages: list[Stage]) -> MidAttention:
    return next(stage for stage in stages if isinstance(stage, MidAttention))


def _norms(stages: list[Stage]) -> Iterator[Norm]:
    for stage in stages:
        for part in (stage.conv1, stage.conv2) if isinstance(stage, Resnet) else (stage,):
            norm = getattr(part, "norm", None)
            if isinstance(norm, Norm):
                yield norm
