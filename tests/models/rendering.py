"""What the tests of families share: requests, their latents, and checkpoints that are damaged in one place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from tiler import Budget, RenderRequest, events, render
from tiler.memory.process import read_rss
from tiler.request import Precision


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


def edit(folder: Path, part: str, **values: object) -> None:
    """Change fields of a part's config.json, or with "" of model_index.json."""
    path = folder / part / ("config.json" if part else "model_index.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def lose_shard(folder: Path, part: str) -> None:
    """Of a part's weights two shards are named, and one is there."""
    path = next((folder / part).glob("*.safetensors"))
    stem = path.name.split(".")[0]
    names = [f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    path.rename(path.with_name(names[0]))
    index = {"weight_map": dict(zip("ab", names, strict=True))}
    path.with_name(f"{stem}.safetensors.index.json").write_text(json.dumps(index))
