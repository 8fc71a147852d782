"""The work of an autoencoder's layers, so that progress is proportional to time: floating-point operations, and for
everything else as many as a convolution does in the same time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Annotated

from torch import Tensor, nn

from tiler.decoding.rows import Conv, Down, MidAttention, Resnet, Stage, Up
from tiler.memory.tuning import Passport

if TYPE_CHECKING:
    from tiler.decoding.rows import Check
    from tiler.decoding.scratch import Scratch

_MEASURED = "python scripts/remaining.py"
# One value that goes into or comes out of a convolution: norm, SiLU, rounding, the scratch file. Narrow layers are also
# less efficient. Fitted to all passes of SD 1.5's autoencoder at 384² (fp32, bf16) and 512², and of mini's at 768² and
# 1280².
VALUE: Annotated[float, Passport("operations", _MEASURED)] = 2800.0
# One weight of a pass: read, and packed for the kernels or transformed.
WEIGHT: Annotated[float, Passport("operations", _MEASURED)] = 14_000.0
# One operation of attention (SD 1.5's at 768² in bf16), and one pixel of the picture: rounding, filter and deflate.
ATTENTION: Annotated[float, Passport("operations", _MEASURED)] = 5.5
PIXEL: Annotated[float, Passport("operations", _MEASURED)] = 120_000.0
# The work of all layers on a few rows at a time, over that layer by layer: weights are packed again for each strip, and
# nothing goes through files (SD 1.5's, 256²: 1.15 in fp32, 1.05 in bf16; mini's, 1280²: about 1).
BY_ROWS: Annotated[float, Passport("ratio", _MEASURED)] = 1.05


def _weight(layer: nn.Module) -> Tensor:
    assert isinstance(layer.weight, Tensor)
    return layer.weight


def of_conv(layer: nn.Module) -> float:
    """For each pixel of a convolution's output, or each token of a linear layer's."""
    weight = _weight(layer)
    pixel = PIXEL if weight.shape[0] == 3 else 0.0
    return 2 * weight.numel() + VALUE * (weight.shape[0] + weight.shape[1]) + pixel


def of_weights(layers: Iterable[nn.Module]) -> float:
    """For a pass, however large the picture."""
    return WEIGHT * sum(_weight(layer).numel() for layer in layers)


def layers_of(stage: Stage) -> list[nn.Module]:
    """The layers with large weights."""
    if isinstance(stage, Resnet):
        return [conv.conv for conv in (stage.conv1, stage.conv2, stage.shortcut) if conv is not None]
    if isinstance(stage, MidAttention):
        a = stage.attention
        return [a.to_q, a.to_k, a.to_v, a.to_out[0]]
    assert isinstance(stage, Conv | Up | Down)
    conv = stage.conv.conv if isinstance(stage.conv, Conv) else stage.conv
    assert isinstance(conv, nn.Module)
    return [conv]


def of_attention(width: int, tokens: int) -> float:
    """For each token that attends to so many."""
    return ATTENTION * 4 * width * tokens


def of_stage(stage: Stage, tokens: int) -> float:
    """For each pixel of a stage's output. `tokens` are seen by attention."""
    seen = of_attention(stage.attention.to_q.in_features, tokens) if isinstance(stage, MidAttention) else 0.0
    return sum(map(of_conv, layers_of(stage))) + seen


def through(stages: Sequence[Stage], one: Callable[[Stage], float]) -> float:
    """For each pixel that comes out of a chain of stages, of which `one` gives the work for its own output."""
    total, pixels = 0.0, 1.0
    for stage in reversed(stages):
        total += pixels * one(stage)
        pixels *= 0.25 if isinstance(stage, Up) else 4.0 if isinstance(stage, Down) else 1.0
    return total


def of_picture(stages: Sequence[Stage], height: int, width: int, most: int | None = None) -> float:
    """For a picture of (height, width) at the stages' input, whose attention sees at most `most` tokens."""
    scale = 1.0  # output pixels for each at the input, and tokens for each
    tokens = 0
    for stage in stages:
        scale *= 4.0 if isinstance(stage, Up) else 0.25 if isinstance(stage, Down) else 1.0
        if isinstance(stage, MidAttention):
            tokens = int(height * width * scale)
    seen = tokens if most is None else tokens // max(1, math.ceil(math.sqrt(tokens / most))) ** 2
    fixed = sum(of_weights(layers_of(stage)) for stage in stages)
    return fixed + scale * height * width * through(stages, lambda stage: of_stage(stage, seen))


def telling(check: Check, scratch: Scratch, total: float, progress: Callable[[float], None]) -> Check:
    """Wrap `check` so that it also reports the share of the `total` that `scratch` counts as done."""

    def both(where: str) -> None:
        check(where)
        progress(min(1.0, scratch.worked / total))

    return both
