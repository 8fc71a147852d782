"""What `mini` learns from: views of drawn scenes as batches.

Seeds below HELD_OUT are for training, from there on for evaluation.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import TypeVar

import model
import numpy as np
import scenes
import torch
from shapes import View

HELD_OUT = 10_000_000
T = TypeVar("T")


def random_view(rng: np.random.Generator, aspect: float, sizes: tuple[float, ...]) -> View:
    """A square crop whose side is one of `sizes` of the picture's height (jittered)."""
    side = min(1.0, aspect, float(rng.choice(sizes)) * rng.uniform(0.85, 1.2))
    x, y = rng.uniform(0, aspect - side), rng.uniform(0, 1 - side)
    return View(x, y, x + side, y + side)


def busy_view(rng: np.random.Generator, scene: scenes.Scene, sizes: tuple[float, ...]) -> View:
    """A crop that is not one flat colour, if three draws find one."""
    for _ in range(3):
        view = random_view(rng, scene.aspect, sizes)
        if scenes.render(scene, view, 24, 24).std(axis=(0, 1)).max() > 8:
            break
    return view


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """(N, H, W, 3) uint8 → (N, 3, H, W) fp32 in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def crops(seed: int, batch: int, size: int) -> Iterator[np.ndarray]:
    """Endless batches of (batch, size, size, 3) uint8; half are cut from 256-px whole scenes, half from close views."""
    rng = np.random.default_rng(seed)
    while True:
        out = np.empty((batch, size, size, 3), np.uint8)
        for i in range(0, batch, 4):
            scene = scenes.make(int(rng.integers(HELD_OUT)))
            for j in range(i, min(i + 4, batch)):
                whole = size / model.NATIVE
                sizes = (whole,) if j % 2 else (whole / 2, whole / 4, whole / 8)
                out[j] = scenes.render(scene, busy_view(rng, scene, sizes), size, size)
        yield out


def ahead(source: Iterator[T], depth: int = 8) -> Iterator[T]:
    """Draw in a thread while the model computes."""
    buffer: queue.Queue[T] = queue.Queue(depth)

    def fill() -> None:
        for item in source:
            buffer.put(item)

    threading.Thread(target=fill, daemon=True).start()
    while True:
        yield buffer.get()
