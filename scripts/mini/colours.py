"""Fit the colours of previews to `mini`'s autoencoder, on decoded scenes of its own.

python scripts/mini/colours.py       writes tiler/models/mini/vae/preview.json
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from tiler import RenderRequest, render
from tiler.decoding.colours import fit_colours
from tiler.previewing import SHIPPED

SCENES, SIZE, STEPS = 8, 256, 8
FILE = Path(__file__).parents[2] / "tiler/models/mini/vae" / SHIPPED


def main() -> None:
    latents, pixels = [], []
    with tempfile.TemporaryDirectory() as name:
        for seed in range(SCENES):
            picture, saved = (Path(name) / f"{seed}.{kind}" for kind in ("png", "safetensors"))
            request = RenderRequest(
                size=SIZE, num_inference_steps=STEPS, seed=seed, guide=False, output=picture, save_latents=saved
            )
            render(request)
            latents.append(load_file(saved)["latents"])
            pixels.append(np.asarray(Image.open(picture)))
    colours = fit_colours(torch.cat(latents, dim=2), np.concatenate(pixels))
    FILE.write_text(json.dumps([[round(v, 4) for v in row] for row in colours.tolist()]) + "\n")


if __name__ == "__main__":
    main()
