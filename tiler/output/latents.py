"""Latents in a safetensors file: tensor `latents`, (1, C, h, w) fp32, scaled as the scheduler left them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tiler.errors import UsageError
from tiler.output.files import atomic

if TYPE_CHECKING:
    from torch import Tensor

MAX_BYTES = 1_000_000_000


def save_latents(path: Path, latents: Tensor) -> None:
    """Write atomically. Raises StorageError."""
    from safetensors.torch import save

    with atomic(path) as file:
        file.write(save({"latents": latents.contiguous()}))


def load_latents(path: Path) -> Tensor:
    """Raises UsageError when the file holds no tensor `latents`, or is no safetensors file."""
    from safetensors.torch import load

    if not path.is_file() or path.stat().st_size > MAX_BYTES:
        raise UsageError(f"{path}: no such latents file; `tiler render --save-latents FILE.safetensors` writes one")
    try:
        tensors = load(path.read_bytes())
    except Exception as error:  # safetensors raises its own SafetensorError, a plain Exception
        raise UsageError(f"{path}: not a safetensors file ({error})") from error
    if "latents" not in tensors:
        raise UsageError(f"{path}: holds no tensor `latents` but {', '.join(sorted(tensors)[:5]) or 'nothing'}")
    return tensors["latents"].float()
