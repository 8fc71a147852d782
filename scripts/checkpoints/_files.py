"""Weight files written tensor by tensor, so that models of any size can be made: random, or sparse, whose holes read as
zeros."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

PIECE = 4_194_301  # values drawn for a tensor; larger ones repeat them, not in step with their rows


def write_weights(
    path: Path,
    shapes: Mapping[str, torch.Size],
    *,
    sparse: bool = False,
    seed: int = 0,
    spreads: Mapping[str, float] = {},
) -> None:
    """A safetensors file of fp16 tensors. Random ones keep the size of activations: matrices of 1/√in, norms near 1,
    biases near 0; `spreads` are the standard deviations of others."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * shape.numel()
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in () if sparse else shapes.items():
            mean, spread = (0.0, shape[1:].numel() ** -0.5) if len(shape) > 1 else (1.0, 0.05)
            if name.endswith("bias"):
                mean, spread = 0.0, 0.02
            spread = spreads.get(name, spread)
            values = torch.randn(min(PIECE, shape.numel()), generator=generator)
            raw = values.mul_(spread).add_(mean).half().numpy()
            for first in range(0, shape.numel(), PIECE):
                file.write(raw[: shape.numel() - first].data)
        file.truncate(8 + len(text) + end)
