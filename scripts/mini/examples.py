"""What the UNet learns from: latents of the pool with captions, layouts and attributes; and batches of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from art import Scene
from captions import as_seen, caption
from labels import labels
from torch import Tensor
from transformers import CLIPTokenizer
from workshop import Workshop

CAPTIONS = 6  # of each picture
_WHOLE = (1.0, 1.0, 0.9, 0.8, 0.6, 0.4)  # how much of a scene its captions mention
_CROP, _CROP_WHOLE = (1.0, 0.7, 0.5), (1.0, 0.8, 0.6)


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Of pictures of one shape, H × W px."""

    latents: Tensor  # (n, 8, H/8, W/8) fp16
    layout: Tensor  # (n, H/16, W/16): index in THINGS
    ids: Tensor  # (n, 6, 77) tokens of the captions
    labels: dict[str, Tensor]  # of labels()
    whole: Tensor  # (n,): whether it is a whole scene rather than a crop


@dataclass(frozen=True, kw_only=True)
class Batch:
    latents: Tensor  # (b, 8, H/8, W/8)
    noise: Tensor  # likewise
    timesteps: Tensor  # (b,)
    ids: Tensor  # (b, 77)
    layout: Tensor  # (b, H/16, W/16)
    labels: dict[str, Tensor]
    told: Tensor  # (b,): a whole scene with its caption


def load_examples(workshop: Workshop, version: str, tokenizer: CLIPTokenizer, seed: int) -> list[Examples]:
    """Of all encoded shards for training, by the shape of their pictures, with captions drawn anew from `seed`."""
    shapes: dict[tuple[int, int], list[int]] = {}
    for shard in workshop.pool.shards():
        shapes.setdefault(workshop.pool.shape(shard), []).append(shard)
    return [examples_of(workshop, shards, version, tokenizer, seed) for shards in shapes.values()]


def examples_of(workshop: Workshop, shards: list[int], version: str, tokenizer: CLIPTokenizer, seed: int) -> Examples:
    """Of encoded shards with pictures of one shape."""
    rng, pool = np.random.default_rng(seed), workshop.pool
    ids, scenes, whole = [], [], []
    notes = [pool.notes(shard) for shard in shards]
    for shard, (_, shares) in zip(shards, notes, strict=True):
        for i in range(2 * pool.part):
            scene, is_whole = pool.scene(shard, i), i < pool.whole(shard)
            if is_whole:
                scene = as_seen(scene, shares[i])
            ids.append(_tokens(tokenizer, _captions(scene, rng, None if is_whole else shares[i])))
            scenes.append(scene)
            whole.append(is_whole)
    return Examples(
        latents=torch.cat([workshop.latents(shard, version) for shard in shards]),
        layout=torch.from_numpy(np.concatenate([note.layout for note in notes])).long(),
        ids=torch.stack(ids),
        labels=labels(scenes),
        whole=torch.tensor(whole),
    )


def _captions(scene: Scene, rng: np.random.Generator, shares: np.ndarray | None) -> list[str]:
    """A tile of a poster is refined under the poster's prompt: crops carry the whole scene's words as often as their
    own."""
    if shares is None:
        return [caption(scene, rng, keep) for keep in _WHOLE]
    own = [caption(scene, rng, keep, shares) for keep in _CROP]
    return own + [caption(scene, rng, keep) for keep in _CROP_WHOLE]


def _tokens(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    return tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids


class Sampler:
    """Draws batches of examples on the processor, the same from the same seed. Pictures of a batch have one shape;
    `crops` is the share of crops where their shape has any."""

    def __init__(self, examples: list[Examples], tokenizer: CLIPTokenizer, crops: float, seed: int) -> None:
        self.examples, self.crops = examples, crops
        self.sizes = torch.tensor([float(len(e.whole)) for e in examples])
        self.empty = _tokens(tokenizer, [""])[0]
        self.generator = torch.Generator().manual_seed(seed)

    def batch(self, size: int) -> Batch:
        """Scenes are composed where noise hides everything small, from step 800 upwards: three quarters of theirs are
        logit-normal around that (arXiv:2403.03206, 3.1). Crops are for refinement: three quarters of theirs are below
        600. One in ten has no caption."""
        g = self.generator
        e = self.examples[int(torch.multinomial(self.sizes, 1, generator=g))]
        crop = torch.rand(size, generator=g) < (0 if e.whole.all() else self.crops)
        index = torch.where(crop, self._choose(e.whole.logical_not(), size), self._choose(e.whole, size))
        t, often = torch.rand(size, generator=g), torch.rand(size, generator=g) < 0.75
        composing = torch.sigmoid(1.5 + torch.randn(size, generator=g))
        t = torch.where(often, torch.where(crop, t * 0.6, composing), t)
        ids = e.ids[index, torch.randint(CAPTIONS, (size,), generator=g)]
        silent = torch.rand(size, generator=g) < 0.1
        ids[silent] = self.empty
        latents = e.latents[index].float()
        return Batch(
            latents=latents,
            noise=torch.randn(latents.shape, generator=g),
            timesteps=(t * 1000).long().clamp_max(999),
            ids=ids,
            layout=e.layout[index],
            labels={name: values[index] for name, values in e.labels.items()},
            told=~crop & ~silent,
        )

    def _choose(self, among: Tensor, size: int) -> Tensor:
        """Indices (size,) of places where `among` (n,) is true; zeros where it is nowhere."""
        if not among.any():
            return torch.zeros(size, dtype=torch.long)
        places = among.nonzero()[:, 0]
        return places[torch.randint(len(places), (size,), generator=self.generator)]
