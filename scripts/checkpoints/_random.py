"""Random weights for a model of any size: tensor by tensor into a safetensors file, so that memory holds one at a
time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """A model without data."""
    with torch.device("meta"):
        return build()


def random_parameter(name: str, shape: tuple[int, ...]) -> Tensor:
    """Weights as torch initialises them, biases and norms that differ from 0 and 1: activations neither vanish nor
    overflow."""
    if name.endswith("bias"):
        return torch.empty(shape).normal_(0, 0.02)
    if len(shape) == 1:
        return torch.empty(shape).normal_(1, 0.05)
    if "embedding" in name.rpartition(".")[0].rpartition(".")[2]:  # a table, whose rows are the states themselves
        return torch.empty(shape).normal_(0, 0.02)
    bound = 1 / math.sqrt(math.prod(shape[1:]))
    return torch.empty(shape).uniform_(-bound, bound)


def write_random(path: Path, model: nn.Module, prefix: str = "") -> None:
    """The parameters of `model`, fp16, under `prefix` and their names."""
    shapes = {prefix + name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name, shape in shapes.items():
            file.write(random_parameter(name, shape).half().numpy().data)
