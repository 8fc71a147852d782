"""Attributes of scenes as numbers, for the heads that train the UNet and for the classifier that judges its
pictures."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from art import PALETTES, Body, Scene, Side, Style, Terrain, Time
from captions import Object, has
from torch import Tensor

MOST_DISCS = 2  # more count as two
OBJECTS = tuple(Object)
# Name → number of classes; objects are seven answers of yes or no.
ATTRIBUTES = {
    "palette": len(PALETTES),
    "time": len(Time),
    "terrain": len(Terrain),
    "body": len(Body),
    "side": len(Side) + 1,  # with "no disc"
    "count": MOST_DISCS + 1,
    "style": len(Style),
    "objects": len(OBJECTS),
}


def labels(scenes: list[Scene]) -> dict[str, Tensor]:
    """ATTRIBUTES of each scene: indices (n,), of objects (n, 7) fp32, 1 where there is one."""
    no_side = len(Side)
    return {
        "palette": torch.tensor([list(PALETTES).index(s.palette_name) for s in scenes]),
        "time": torch.tensor([tuple(Time).index(s.palette.time) for s in scenes]),
        "terrain": torch.tensor([tuple(Terrain).index(s.terrain) for s in scenes]),
        "body": torch.tensor([tuple(Body).index(s.body) for s in scenes]),
        "side": torch.tensor([tuple(Side).index(s.side) if s.discs else no_side for s in scenes]),
        "count": torch.tensor([min(MOST_DISCS, len(s.discs)) for s in scenes]),
        "style": torch.tensor([tuple(Style).index(s.style) for s in scenes]),
        "objects": torch.tensor([[float(has(s, thing)) for thing in OBJECTS] for s in scenes]),
    }


def attribute_loss(got: dict[str, Tensor], want: dict[str, Tensor], counted: Tensor | None = None) -> Tensor:
    """Cross-entropy summed over the attributes in `got`: logits (n, classes) against `labels`. The mean of the
    pictures, or of those for which `counted` (n,) is true; 0 if it is true for none."""
    losses = torch.stack([_per_picture(name, logits, want[name]) for name, logits in got.items()]).sum(0)
    return losses.mean() if counted is None else (losses * counted).sum() / counted.sum().clamp_min(1)


def _per_picture(name: str, logits: Tensor, want: Tensor) -> Tensor:
    if name == "objects":
        return F.binary_cross_entropy_with_logits(logits, want, reduction="none").mean(1)
    return F.cross_entropy(logits, want, reduction="none")
