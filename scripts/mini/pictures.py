"""Pictures that `mini` makes: small ones through diffusers, many at a time, and large ones through `tiler`."""

from __future__ import annotations

import math
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from machine import DEVICE, autocast
from PIL import Image
from places import SHIPPED

from tiler import Budget, RenderRequest, render

_DEFAULTS = tomllib.loads((SHIPPED / "tiler.toml").read_text())
GUIDANCE, STEPS = _DEFAULTS["guidance_scale"], _DEFAULTS["num_inference_steps"]
_FIRST, _LAST = _DEFAULTS["guidance_interval"]
assert _FIRST == 0
_GUIDED = math.ceil(STEPS * _LAST)  # steps
_BATCH = 16 if DEVICE.type == "cpu" else 256
_CEILING = "4GB"
# Written by hand, in words that captions use.
PROMPTS = (
    "mountains at dawn, a sun in the centre, woodblock print",
    "misty mountains in jade green, a big sun on the right",
    "Mount Fuji in indigo blue with a big sun on the left, ukiyo-e",
    "a mountain lake at dusk, stars, a full moon on the left",
    "the sea at sunset, a big sun in the middle, a sailing boat, travel poster",
    "islands in the sea in moonlight, a full moon on the right, screen print",
    "rolling hills in spring with clouds, watercolour",
    "sand dunes at golden hour, a small sun on the right, woodblock print",
    "mesas in the heat, a big sun in the centre, national park poster",
    "a misty forest in autumn, a sun on the left, woodblock print",
    "a sea of clouds in coral light with snow-capped peaks, watercolour",
    "mountains in black ink, a big sun on the right, sumi-e",
    "mountains at night with northern lights and pine trees",
    "a lake in winter, snowy peaks, no sun, watercolour",
    "misty mountains on a stormy day, no sun, ink wash",
    "the ocean at night, a crescent moon on the right, many stars",
    "misty mountains in indigo blue, a small sun on the left, woodblock print",
    "a pine forest in winter, a small sun on the left, woodblock print",
    "misty mountains in coral light, a sun on the left, watercolour",
    "misty mountains at sunset, a sun in the centre, pine trees in front",
    "mountains at noon with snow and pine trees, screen print",
    "a lone volcano at dusk, a small sun on the right, woods",
    "soft hills in golden light, a big sun on the left, travel poster",
    "a rocky coast on a grey rainy day, ink wash",
)


def load_pipeline(folder: Path) -> Any:
    pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32).to(DEVICE)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: Any, prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
    """(n, 256, 256, 3) uint8, one picture for each prompt and seed, guided in the steps that `tiler` guides."""
    pictures = []
    for first in range(0, len(prompts), _BATCH):
        part = slice(first, first + _BATCH)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
        with autocast():
            made = pipe(
                list(prompts[part]),
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE,
                generator=generators,
                callback_on_step_end=_end_guidance,
                callback_on_step_end_tensor_inputs=["prompt_embeds"],
            ).images
        pictures += [np.asarray(image) for image in made]
    return np.stack(pictures)


def _end_guidance(pipe: Any, step: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """Guidance costs a call without the prompt in each step; diffusers documents this way to leave it out."""
    if step + 1 == _GUIDED:
        pipe._guidance_scale = 1.0
        tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[1]
    return tensors


def rendered(model: Path, prompt: str, width: int, height: int, seed: int, **settings: Any) -> np.ndarray:
    """(height, width, 3) uint8 of `tiler render` with the model's own defaults."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.png"
        asked = {"prompt": prompt, "width": width, "height": height, "seed": seed, **settings}
        render(RenderRequest(output=out, model=str(model), **asked), Budget(_CEILING))
        return np.asarray(Image.open(out))


def page(pictures: Sequence[np.ndarray], columns: int, side: int) -> Image.Image:
    """Pictures of any shape on one sheet, each as large as a square of `side` px allows."""
    sheet = Image.new("RGB", (columns * side, -(-len(pictures) // columns) * side), "white")
    for k, picture in enumerate(pictures):
        image = Image.fromarray(picture)
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        corner = k % columns * side + (side - image.width) // 2, k // columns * side + (side - image.height) // 2
        sheet.paste(image, corner)
    return sheet
