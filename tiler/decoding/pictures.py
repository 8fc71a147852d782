"""Pictures of uint8 as fp32 in about [-1, 1], and back."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def to_tensor(image: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 → (1, 3, H, W) fp32 in [-1, 1]."""
    return from_pixels_(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float())


def from_pixels_(x: Tensor) -> Tensor:
    """fp32 pixels, 0 to 255 → [-1, 1], in place."""
    return x.div_(127.5).sub_(1)


def to_uint8(strip: Tensor) -> np.ndarray:
    """(3, n, W) in about [-1, 1] → (n, W, 3) uint8, rounded as diffusers' VaeImageProcessor does."""
    image: np.ndarray = (
        (strip / 2 + 0.5).clamp_(0, 1).mul_(255).round_().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    )
    return image
