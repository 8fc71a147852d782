"""LoRA files for tests: random factors for modules of a model, and the resulting weights by closed formulas in
float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn


def kohya(prefix: str, path: str) -> str:
    """A module's name as kohya's trainer writes it."""
    return f"{prefix}_{path.replace('.', '_')}"


def random_lora(
    module: nn.Module, paths: list[str], *, rank: int = 3, seed: int = 0
) -> dict[str, tuple[Tensor, Tensor]]:
    """Factors down and up for each module; their product is a tenth of a weight in size."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for path in paths:
        weight: Any = module.get_submodule(path).weight
        out, *rest = weight.shape
        down = torch.randn(rank, *rest, generator=generator)
        up = torch.randn(out, rank, *(1,) * (len(rest) - 1), generator=generator) * 0.05 * float(weight.detach().std())
        found[path] = down, up
    return found


def layers_of(module: nn.Module, every: int = 3) -> list[str]:
    """The paths of some Linear and Conv2d layers, at least one of every kind."""
    paths = [path for path, child in module.named_modules() if isinstance(child, nn.Linear | nn.Conv2d)]
    return paths[::every]


def save(path: Path, tensors: dict[str, Tensor], **said: str) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, said or None)
    return path


def as_kohya(prefix: str, lora: dict[str, tuple[Tensor, Tensor]], alpha: float) -> dict[str, Tensor]:
    tensors = {}
    for path, (down, up) in lora.items():
        name = kohya(prefix, path)
        tensors |= {
            f"{name}.lora_down.weight": down,
            f"{name}.lora_up.weight": up,
            f"{name}.alpha": torch.tensor(alpha),
        }
    return tensors


@torch.no_grad()
def fuse(module: nn.Module, lora: dict[str, tuple[Tensor, Tensor]], scale: float) -> None:
    """Add scale · up · down to the weights, in float64."""
    for path, (down, up) in lora.items():
        weight: Any = module.get_submodule(path).weight
        delta = scale * (up.flatten(1).double() @ down.flatten(1).double())
        weight.copy_(weight.double() + delta.view(weight.shape))
