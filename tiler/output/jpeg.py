"""Write a JPEG row by row: libjpeg encodes strips one by one, and they are joined into one scan (ITU-T T.81, B.2.1 and
E.1.4)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from io import BytesIO
from typing import Any, BinaryIO

import numpy as np

from tiler.output.exif import said_of

LONGEST = 65_500  # pixels of a side: the limit of libjpeg
FULL_COLOUR = 90  # the quality from which colours are stored at full resolution, as ImageMagick does
_ENCODED = 2**18  # pixels encoded at a time
_RESTARTS = re.compile(rb"\xff[\xd0-\xd7]")  # in a scan, another byte 255 is always followed by 0
_FRAMES = (0xC0, 0xC1, 0xC2)  # SOF markers, whose segments contain the picture's size
_SCAN = 0xDA
_END = b"\xff\xd9"


class JpegWriter:
    """Writes rows from first to last without holding the picture. The bytes are those that libjpeg writes for the
    complete picture with a restart marker after each row of blocks. Nothing that is coded depends on anything above
    such a marker, so strips can be joined there."""

    def __init__(
        self,
        file: BinaryIO,
        width: int,
        height: int,
        texts: Mapping[str, str],
        dpi: float | None,
        quality: int,
    ) -> None:
        from PIL import JpegImagePlugin  # noqa: F401 - Pillow loads it at its first use else, when memory is short

        full = quality >= FULL_COLOUR
        self._file, self._height, self._rest = file, height, np.empty((0, width, 3), np.uint8)
        self._unit = 8 if full else 16  # rows that are coded together
        self._step = self._unit * max(1, _ENCODED // (self._unit * width))
        self._options: dict[str, Any] = {
            "quality": quality, "subsampling": "4:4:4" if full else "4:2:0", "restart_marker_rows": 1,
        }  # fmt: skip
        self._said: dict[str, Any] = dict(said_of(texts))
        if dpi is not None:
            self._said["dpi"] = (round(dpi), round(dpi))
        self._strips = self._restarts = 0

    def write(self, rows: np.ndarray) -> None:
        """rows: (n, width, 3) uint8 sRGB."""
        rows = np.concatenate([self._rest, rows]) if len(self._rest) else rows
        whole = len(rows) - len(rows) % self._unit
        for first in range(0, whole, self._step):
            self._encode(rows[first : min(first + self._step, whole)])
        self._rest = rows[whole:].copy()

    def close(self) -> None:
        if len(self._rest):
            self._encode(self._rest)
        self._file.write(_END)

    def _encode(self, rows: np.ndarray) -> None:
        from PIL import Image

        buffer = BytesIO()
        Image.fromarray(rows).save(buffer, "JPEG", **self._options, **({} if self._strips else self._said))
        data = buffer.getvalue()
        frame, scan = _places(data)
        if self._strips == 0:
            header = bytearray(data[:scan])
            header[frame + 5 : frame + 7] = self._height.to_bytes(2, "big")
            self._file.write(header)
        else:
            self._file.write(self._restart())
        self._file.write(_RESTARTS.sub(lambda match: self._restart(), data[scan : -len(_END)]))
        self._strips += 1

    def _restart(self) -> bytes:
        """Return the next restart marker. The markers count modulo 8."""
        self._restarts += 1
        return bytes((0xFF, 0xD0 + (self._restarts - 1) % 8))


def _places(data: bytes) -> tuple[int, int]:
    """Return the offsets of a JPEG's frame header and of its coded pixels."""
    at, frame = 2, 0
    while True:
        marker, end = data[at + 1], at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker in _FRAMES:
            frame = at
        if marker == _SCAN:
            return frame, end
        at = end
