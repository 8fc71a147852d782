"""What the tests of families share: requests, their latents, a canvas of four tiles, and checkpoints that are damaged
in one place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tiler import Budget, RenderRequest, events, render
from tiler.diffusion.guide import guide_size, upscale
from tiler.diffusion.layouts import plan_tiles
from tiler.memory.process import read_rss
from tiler.models.family import read_family
from tiler.planning.resolve import resolve
from tiler.request import GuideUpscale, Precision
from tiler.weights import checkpoint


def ask(model: Path, folder: Path, **values: Any) -> RenderRequest:
    """A request for a boat in three steps, in fp32 and without a guide; picture and latents go to `folder`."""
    defaults: dict[str, Any] = {
        "prompt": "a boat", "model": str(model), "num_inference_steps": 3, "guide": False, "seed": 5,
        "precision": Precision.FP32, "output": folder / "x.png", "save_latents": folder / "x.safetensors",
        "force": True,
    }  # fmt: skip
    return RenderRequest(**(defaults | values))


def rendered(request: RenderRequest, said: list[str] | None = None) -> tuple[Tensor, dict[str, Any]]:
    """The canvas's latents, (1, C, h, w), and the report; notes are added to `said`."""

    def hear(event: events.Event) -> None:
        if said is not None and isinstance(event, events.Note):
            said.append(event.text)

    result = render(request, Budget(read_rss().now + 10**9), hear)
    assert request.save_latents is not None
    return load_file(request.save_latents)["latents"], result.report


FOUR_TILES: dict[str, Any] = {
    "height": 192, "width": 160, "num_inference_steps": 4, "guide": True, "strength": 0.5,
    "guide_upscale": GuideUpscale.LATENT,
}  # fmt: skip
"""A canvas of 24 × 20 latents, four tiles of 16 × 16, under a guide that is not square, for two of its four steps."""

Loop = Callable[[Tensor, list[tuple[Any, Tensor]], int, Tensor | None, int], Tensor]
"""Denoises latents by diffusers' transformer and scheduler: (noise, index and weights of each tile, first step,
reference, steps)."""


def four_tiles(request: RenderRequest, loop: Loop) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """The latents of a request with FOUR_TILES, those that `loop` gives, (1, C, 24, 20), and the report."""
    got, report = rendered(request)
    family = read_family(checkpoint.resolve(request.model))
    canvas, tile, steps = (24, 20), (16, 16), 4
    size = guide_size(canvas, 16, 2)
    assert size is not None and size.height != size.width

    def noise(height: int, width: int) -> Tensor:
        generator = torch.Generator().manual_seed(5)
        return torch.randn(1, family.latent_channels, height, width, generator=generator)

    everything = [((slice(None), slice(None), slice(None), slice(None)), torch.ones(()))]
    guide = loop(noise(size.height, size.width), everything, 0, None, steps)
    tiles = plan_tiles(resolve(request, family), canvas=canvas, tile=tile, overlap=4)
    assert len(tiles) == 4 and all(tile.top % 2 == tile.left % 2 == 0 for tile in tiles)
    crops = [((slice(None), slice(None), *tile.crop), tile.weights) for tile in tiles]
    return got, loop(noise(*canvas), crops, 2, upscale(guide, size, canvas, (False, False)), steps), report


def edit(folder: Path, part: str, **values: object) -> None:
    """Change fields of a part's config.json, or with "" of model_index.json."""
    path = folder / part / ("config.json" if part else "model_index.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def lose_shard(folder: Path, part: str) -> None:
    """Let a part's weights have two shards in the index, of which one file is missing."""
    path = next((folder / part).glob("*.safetensors"))
    stem = path.name.split(".")[0]
    names = [f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    path.rename(path.with_name(names[0]))
    index = {"weight_map": dict(zip("ab", names, strict=True))}
    path.with_name(f"{stem}.safetensors.index.json").write_text(json.dumps(index))
