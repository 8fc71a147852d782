"""What the UNet learns from: latents of the pool with captions, layouts and attributes; and batches of them."""

from __future__ import annotations

from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context

import numpy as np
import torch
from art import Scene
from captions import as_seen, caption
from diffusers import AutoencoderKL
from labels import labels
from machine import DEVICE
from pool import HELD_OUT_SHARD
from torch import Tensor
from transformers import CLIPTokenizer
from workshop import Workshop, fingerprint

CAPTIONS = 6  # of each picture
_WHOLE = (1.0, 1.0, 0.9, 0.8, 0.6, 0.4)  # how much of a scene its captions mention
_CROP, _CROP_WHOLE = (1.0, 0.7, 0.5), (1.0, 0.8, 0.6)
_DESCRIBERS = 4  # processes beside a GPU, which learns from a shard in less time than one needs to caption it


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Of pictures of one shape, H × W px."""

    latents: Tensor  # (n, 8, H/8, W/8) fp16
    layout: Tensor  # (n, H/16, W/16): index in THINGS
    ids: Tensor  # (n, 6, 77) tokens of the captions
    labels: dict[str, Tensor]  # of labels()
    whole: Tensor  # (n,): whether it is a whole scene rather than a crop

    @classmethod
    def joined(cls, parts: list[Examples]) -> Examples:
        return cls(
            latents=torch.cat([part.latents for part in parts]),
            layout=torch.cat([part.layout for part in parts]),
            ids=torch.cat([part.ids for part in parts]),
            labels={name: torch.cat([part.labels[name] for part in parts]) for name in parts[0].labels},
            whole=torch.cat([part.whole for part in parts]),
        )


@dataclass(frozen=True, kw_only=True)
class Batch:
    latents: Tensor  # (b, 8, H/8, W/8)
    noise: Tensor  # likewise
    timesteps: Tensor  # (b,)
    ids: Tensor  # (b, 77)
    layout: Tensor  # (b, H/16, W/16)
    labels: dict[str, Tensor]
    told: Tensor  # (b,): a whole scene with its caption

    def tensors(self) -> list[Tensor]:
        return [self.latents, self.noise, self.timesteps, self.ids, self.layout, self.told, *self.labels.values()]


class Supply:
    """Examples of the pool, with captions drawn anew from `seed`. The pool may grow while a UNet learns from it."""

    def __init__(self, workshop: Workshop, vae: AutoencoderKL, seed: int) -> None:
        self._workshop, self._vae, self._version, self._seed = workshop, vae, fingerprint(vae), seed
        self._described: dict[int, Future[_Description]] = {}
        self._known: set[int] = set()
        self._executor: Executor = (
            ProcessPoolExecutor(_DESCRIBERS, mp_context=get_context("spawn"))
            if DEVICE.type == "cuda"
            else ThreadPoolExecutor(1)
        )

    def new(self, wait: bool) -> list[Examples]:
        """Of shards that were not given before. Unless told to wait, only of those that are captioned by now."""
        shards = [k for k in self._workshop.pool.shards() if k not in self._known]
        for shard in shards:
            if shard not in self._described:
                self._described[shard] = self._executor.submit(_describe, self._workshop, shard, self._seed)
        ready = [shard for shard in shards if wait or self._described[shard].done()]
        self._known.update(ready)
        return [self._examples(shard, self._described.pop(shard).result()) for shard in ready]

    def held_out(self) -> Examples:
        return self._examples(HELD_OUT_SHARD, _describe(self._workshop, HELD_OUT_SHARD, 3))

    def close(self) -> None:
        self._executor.shutdown(cancel_futures=True)

    def _examples(self, shard: int, description: _Description) -> Examples:
        self._workshop.encode(self._vae, shard, self._version)
        return Examples(
            latents=self._workshop.latents(shard, self._version).to(DEVICE),
            layout=torch.from_numpy(self._workshop.pool.notes(shard).layout).long().to(DEVICE),
            ids=torch.from_numpy(description.ids).to(DEVICE),
            labels={name: torch.from_numpy(values).to(DEVICE) for name, values in description.labels.items()},
            whole=torch.from_numpy(description.whole).to(DEVICE),
        )


@dataclass(frozen=True, kw_only=True)
class _Description:
    """As Examples. Arrays, because tensors go from process to process through shared memory, which may be small."""

    ids: np.ndarray
    labels: dict[str, np.ndarray]
    whole: np.ndarray


def _describe(workshop: Workshop, shard: int, seed: int) -> _Description:
    """The pictures of a shard."""
    rng, pool, tokenizer = np.random.default_rng((seed, shard)), workshop.pool, _tokenizer(workshop)
    shares = pool.notes(shard).shares
    ids, scenes, whole = [], [], []
    for i in range(2 * pool.part):
        scene, is_whole = pool.scene(shard, i), i < pool.whole(shard)
        if is_whole:
            scene = as_seen(scene, shares[i])
        ids.append(_tokens(tokenizer, _captions(scene, rng, None if is_whole else shares[i])).numpy())
        scenes.append(scene)
        whole.append(is_whole)
    named = {name: values.numpy() for name, values in labels(scenes).items()}
    return _Description(ids=np.stack(ids), labels=named, whole=np.array(whole))


@cache
def _tokenizer(workshop: Workshop) -> CLIPTokenizer:
    return workshop.tokenizer()


def _captions(scene: Scene, rng: np.random.Generator, shares: np.ndarray | None) -> list[str]:
    """A tile of a poster is refined under the poster's prompt: crops carry the whole scene's words as often as their
    own."""
    if shares is None:
        return [caption(scene, rng, keep) for keep in _WHOLE]
    own = [caption(scene, rng, keep, shares) for keep in _CROP]
    return own + [caption(scene, rng, keep) for keep in _CROP_WHOLE]


def _tokens(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    return tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids


class _Shape:
    """Examples of one shape, and where whole scenes and crops are among them."""

    def __init__(self, examples: Examples) -> None:
        self.examples = examples
        self.whole = examples.whole.nonzero()[:, 0]
        self.crops = examples.whole.logical_not().nonzero()[:, 0]


class Sampler:
    """Draws batches of examples, the same from the same seed on one kind of device. Pictures of a batch have one shape;
    `crops` is the share of crops where their shape has any."""

    def __init__(self, tokenizer: CLIPTokenizer, crops: float, seed: int) -> None:
        self.crops = crops
        self.empty = _tokens(tokenizer, [""])[0].to(DEVICE)
        self.generator = torch.Generator(DEVICE).manual_seed(seed)
        self._shapes: dict[tuple[int, ...], _Shape] = {}
        self._rng = np.random.default_rng(seed)

    def add(self, examples: list[Examples]) -> None:
        parts: dict[tuple[int, ...], list[Examples]] = {}
        for more in examples:
            parts.setdefault(tuple(more.latents.shape[2:]), []).append(more)
        for shape, new in parts.items():
            known = [self._shapes[shape].examples] if shape in self._shapes else []
            self._shapes[shape] = _Shape(Examples.joined(known + new))

    @property
    def count(self) -> int:
        """Pictures."""
        return sum(len(shape.examples.whole) for shape in self._shapes.values())

    def batch(self, size: int) -> Batch:
        """Scenes are composed where noise hides everything small, from step 800 upwards: three quarters of theirs are
        logit-normal around that (arXiv:2403.03206, 3.1). Crops are for refinement: three quarters of theirs are below
        600. One in ten has no caption."""
        shapes = list(self._shapes.values())
        sizes = np.array([len(shape.examples.whole) for shape in shapes])
        shape = shapes[self._rng.choice(len(shapes), p=sizes / sizes.sum())]
        e = shape.examples
        crop = self._uniform(size) < (self.crops if len(shape.crops) else 0)
        index = torch.where(crop, self._choose(shape.crops, size), self._choose(shape.whole, size))
        t, often = self._uniform(size), self._uniform(size) < 0.75
        composing = torch.sigmoid(1.5 + self._normal(size))
        t = torch.where(often, torch.where(crop, t * 0.6, composing), t)
        ids = e.ids[index, self._choose(torch.arange(CAPTIONS, device=DEVICE), size)]
        silent = self._uniform(size) < 0.1
        latents = e.latents[index].float()
        return Batch(
            latents=latents,
            noise=self._normal(*latents.shape),
            timesteps=(t * 1000).long().clamp_max(999),
            ids=torch.where(silent[:, None], self.empty, ids),
            layout=e.layout[index],
            labels={name: values[index] for name, values in e.labels.items()},
            told=~crop & ~silent,
        )

    def _choose(self, among: Tensor, size: int) -> Tensor:
        """(size,) of `among`; zeros where there is nothing."""
        if not len(among):
            return torch.zeros(size, dtype=torch.long, device=DEVICE)
        return among[torch.randint(len(among), (size,), generator=self.generator, device=DEVICE)]

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=DEVICE)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=DEVICE)
