"""A PNG with its parameters in it, as AUTOMATIC1111 writes and many tools read them, and sRGB."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tiler.output.files import atomic


def infotext(prompt: str, negative_prompt: str, fields: Mapping[str, object]) -> str:
    """AUTOMATIC1111's `parameters` text: prompt, `Negative prompt: …`, then `Key: value` pairs on one line.

    Values with a comma, a colon or a newline are JSON-quoted, as that format's readers expect.
    """

    def quote(value: object) -> str:
        text = str(value)
        return json.dumps(text, ensure_ascii=False) if re.search(r"[,:\n\"]", text) else text

    lines = [prompt]
    if negative_prompt:
        lines.append(f"Negative prompt: {negative_prompt}")
    lines.append(", ".join(f"{key}: {quote(value)}" for key, value in fields.items()))
    return "\n".join(lines)


def write_png(path: Path, pixels: np.ndarray, texts: Mapping[str, str]) -> None:
    """pixels: (H, W, 3) uint8 sRGB. `texts` become iTXt chunks. Atomic. Raises StorageError."""
    from PIL import Image, ImageCms
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, text in texts.items():
        info.add_itxt(key, text)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    with atomic(path) as file:
        Image.fromarray(pixels).save(file, format="PNG", pnginfo=info, icc_profile=profile)
