"""What a scene shows and where, as labels, and the heads that read it from `mini` while it trains."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import scenes
import torch
import torch.nn.functional as F

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# What a place of a whole scene shows. Single stars and windows are smaller than any place.
THINGS = (
    "sky", "land", "water", "snow", "skyline", "sun", "big sun", "full moon", "crescent moon", "clouds", "birds", "pines", "cabin",
    "boat", "balloon",
)  # fmt: skip


def layout(scene: scenes.Scene, side: int) -> np.ndarray:
    """(side, side): the index in THINGS of what lies in the middle of each place."""
    shapes = []
    for shape in scene.shapes:
        tag = scene.body if shape.tag == "body" else shape.tag
        if tag in THINGS:
            shapes.append(shape._replace(colour=(16 * THINGS.index(tag), 0, 0), alpha=1.0))
    drawn = scenes.render(replace(scene, shapes=shapes), None, 3 * side, 3 * side, smooth=False)
    return drawn[1::3, 1::3, 0] // 16


OBJECTS = ("stars", "clouds", "birds", "pines", "cabin", "boat", "balloon")
ATTRIBUTES = {
    "palette": len(scenes.PALETTES),
    "terrain": len(scenes.TERRAINS),
    "body": len(scenes.BODIES),
    "side": 4,  # with "none"
    "objects": len(OBJECTS),
}


def labels(known: list[scenes.Scene]) -> dict[str, torch.Tensor]:
    """ATTRIBUTES of each: indices (n,), of objects (n, 7) fp32, 1 where there is one."""
    none = len(scenes.SIDES)
    return {
        "palette": torch.tensor([list(scenes.PALETTES).index(s.palette) for s in known]),
        "terrain": torch.tensor([scenes.TERRAINS.index(s.terrain) for s in known]),
        "body": torch.tensor([scenes.BODIES.index(s.body) for s in known]),
        "side": torch.tensor([none if s.body == "none" else scenes.SIDES.index(s.side) for s in known]),
        "objects": torch.tensor([[float(bool(getattr(s, name))) for name in OBJECTS] for s in known]),
    }


def attribute_loss(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy summed over ATTRIBUTES: logits (n, ...) against labels."""
    objects = F.binary_cross_entropy_with_logits(got["objects"], want["objects"])
    return objects + sum(F.cross_entropy(got[name], want[name]) for name in ATTRIBUTES if name != "objects")


class Layout:
    """A head that reads the layout from the UNet's middle features while it trains, and is thrown away after it: what should
    be where is then learnt from words and from noise more directly than through noise predictions alone (as with the features
    of arXiv:2410.06940)."""

    def __init__(self, unet: torch.nn.Module, known: list[scenes.Scene], side: int) -> None:
        self.known = torch.from_numpy(np.stack([layout(scene, side) for scene in known])).long().to(DEVICE)
        self.head = torch.nn.Conv2d(unet.config.block_out_channels[-1], len(THINGS), 1).to(DEVICE)
        self.weight = torch.tensor([1.0 if i < 5 else 4.0 for i in range(len(THINGS))], device=DEVICE)
        unet.up_blocks[0].register_forward_hook(self._keep)

    def _keep(self, module: torch.nn.Module, given: object, features: torch.Tensor) -> None:
        self.features = features

    def loss(self, scene: torch.Tensor) -> torch.Tensor:
        """Cross-entropy for those samples of the last call that are whole scenes: `scene` has their numbers, −1 elsewhere."""
        whole = scene >= 0
        read = self.head(self.features.float()[whole.to(DEVICE)])
        return F.cross_entropy(read, self.known[scene[whole].to(DEVICE)], self.weight)


class Words:
    """A head that reads a scene's attributes from the text encoder's output while it trains, and is thrown away after it.
    Without it the encoder dropped, before the UNet could learn to use them, the words for what is small: after 200,000 samples
    "left" and "right" differed by 0.04 % of its output."""

    def __init__(self, text: torch.nn.Module, known: list[scenes.Scene]) -> None:
        self.known = {name: label.to(DEVICE) for name, label in labels(known).items()}
        width = text.config.hidden_size
        self.heads = torch.nn.ModuleDict({n: torch.nn.Linear(width, k) for n, k in ATTRIBUTES.items()}).to(DEVICE)

    def loss(self, features: torch.Tensor, scene: torch.Tensor) -> torch.Tensor:
        """For `features` (n, tokens, width) of captions of the scenes numbered in `scene`, −1 for those of no whole one. The
        mean over tokens is what attention sees before it has learnt where to look."""
        whole = scene >= 0
        mean = features.float()[whole.to(DEVICE)].mean(1)
        number = scene[whole].to(DEVICE)
        return attribute_loss(
            {n: head(mean) for n, head in self.heads.items()}, {n: v[number] for n, v in self.known.items()}
        )
