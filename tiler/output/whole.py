"""Write WebP and AVIF, whose encoders need the complete picture: for pictures that fit in memory."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from io import BytesIO
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from tiler.output.exif import said_of
from tiler.output.jpeg import FULL_COLOUR
from tiler.request.choices import Format


class Encoder(NamedTuple):
    """An encoder and its limits. Encoding takes `pixel_bytes` for each pixel and `other_bytes` in addition to the
    picture: measured with Pillow 13 on noise over gradients, 512² to 2048², quality 80 to 100, and rounded up."""

    title: str
    module: str  # Pillow's
    longest: int  # pixels of a side that its readers accept
    pixel_bytes: int
    other_bytes: int
    options: Mapping[str, Any]


ENCODERS: Mapping[Format, Encoder] = {
    Format.WEBP: Encoder("WebP", "WebPImagePlugin", 16_383, 28, 3_000_000, {"method": 4}),
    # With its own threads, libaom takes more memory on machines with more processors.
    Format.AVIF: Encoder("AVIF", "AvifImagePlugin", 32_768, 44, 24_000_000, {"max_threads": 1, "speed": 6}),
}
PICTURE_BYTES = 3  # per pixel


class WholeWriter:
    """Holds all rows until `close` encodes them."""

    def __init__(
        self,
        file: BinaryIO,
        width: int,
        height: int,
        texts: Mapping[str, str],
        quality: int,
        format: Format,
    ) -> None:
        self._file, self._format, self._done = file, format, 0
        self._picture = np.empty((height, width, PICTURE_BYTES), np.uint8)
        self._options = dict(ENCODERS[format].options) | said_of(texts) | {"quality": quality}
        if format is Format.AVIF and quality >= FULL_COLOUR:
            self._options["subsampling"] = "4:4:4"

    def write(self, rows: np.ndarray) -> None:
        """rows: (n, width, 3) uint8 sRGB."""
        self._picture[self._done : self._done + len(rows)] = rows
        self._done += len(rows)

    def close(self) -> None:
        from PIL import Image

        importlib.import_module(f"PIL.{ENCODERS[self._format].module}")
        encoded = BytesIO()
        Image.fromarray(self._picture).save(encoded, self._format.upper(), **self._options)
        self._file.write(encoded.getbuffer())
