"""Heads that read from `mini` while it trains, and are thrown away after it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from art import THINGS, Thing
from diffusers import UNet2DConditionModel
from labels import ATTRIBUTES, attribute_loss
from torch import Tensor, nn

_RARE = {Thing.CLOUDS: 2.0, Thing.BODY: 4.0, Thing.SNOW: 2.0, Thing.PINES: 2.0, Thing.WOODS: 3.0, Thing.BOAT: 4.0}


class LayoutHead(nn.Module):
    """Reads from the UNet's middle features which thing is at which place. That is learnt from words and from noise
    more directly than through noise predictions alone (as with the features of arXiv:2410.06940)."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.head = nn.Conv2d(unet.config.block_out_channels[-1], len(THINGS), 1)
        self.register_buffer("weight", torch.tensor([_RARE.get(thing, 1.0) for thing in THINGS]), persistent=False)
        unet.up_blocks[0].register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, given: object, features: Tensor) -> None:
        self.features = features

    def loss(self, layout: Tensor) -> Tensor:
        """For the UNet's last call; `layout` (b, 16, 16) are indices in THINGS."""
        return F.cross_entropy(self.head(self.features.float()), layout, self.weight)


class WordsHead(nn.Module):
    """Reads a scene's attributes from the text encoder's output. Without it the encoder dropped the words for what is
    small before the UNet could learn to use them: after 200,000 samples "left" and "right" differed by 0.04 % of it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(width, classes) for name, classes in ATTRIBUTES.items()})

    def loss(self, features: Tensor, labels: dict[str, Tensor], told: Tensor) -> Tensor:
        """For `features` (b, 77, width) where `told` (b,) is true. Their mean is what attention sees before it has
        learnt where to look."""
        mean = features.float().mean(1)
        return attribute_loss({name: head(mean) for name, head in self.heads.items()}, labels, told)
