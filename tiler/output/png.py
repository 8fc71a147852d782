"""Write a PNG row by row, in sRGB, with its parameters in the form that AUTOMATIC1111 writes and many tools read."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping
from typing import BinaryIO

import numpy as np

from tiler.output.profile import srgb_profile

_FILTERED = 2**16  # pixels filtered at a time
_CHUNK = 2**16  # bytes of an IDAT chunk


class DeflatedRows:
    """The pixels of a PNG as its IDAT chunks contain them (also those of a PDF's image with /Predictor 15): each row is
    filtered, then deflated. Rows come from first to last and are not held."""

    def __init__(self, width: int) -> None:
        self._deflate, self._above = zlib.compressobj(6), np.zeros((1, width, 3), np.uint8)

    def add(self, rows: np.ndarray) -> Iterator[bytes]:
        """rows: (n, width, 3) uint8."""
        step = max(1, _FILTERED // rows.shape[1])
        for first in range(0, len(rows), step):
            part = rows[first : first + step]
            if data := self._deflate.compress(_filtered(part, self._above).tobytes()):
                yield data
            self._above = part[-1:].copy()

    def end(self) -> bytes:
        return self._deflate.flush()


class PngWriter:
    """Writes rows from first to last without holding the picture: W3C PNG (third edition), 8-bit RGB, not interlaced.

    `texts` become iTXt chunks before the pixels; an ICC profile declares sRGB.
    """

    def __init__(
        self, file: BinaryIO, width: int, height: int, texts: Mapping[str, str], dpi: float | None = None
    ) -> None:
        self._file, self._pixels, self._deflated = file, DeflatedRows(width), bytearray()
        file.write(b"\x89PNG\r\n\x1a\n")
        self._chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        self._chunk(b"iCCP", b"sRGB\0\0" + zlib.compress(srgb_profile()))
        if dpi is not None:
            self._chunk(b"pHYs", struct.pack(">IIB", round(dpi / 0.0254), round(dpi / 0.0254), 1))  # pixels per metre
        for key, text in texts.items():
            self._chunk(b"iTXt", key.encode("latin-1") + b"\0\0\0\0\0" + text.encode(errors="replace"))

    def write(self, rows: np.ndarray) -> None:
        """rows: (n, width, 3) uint8 sRGB."""
        for data in self._pixels.add(rows):
            self._deflated += data
            # Chunks of one size: the file's bytes do not depend on how many rows came at a time.
            while len(self._deflated) >= _CHUNK:
                self._chunk(b"IDAT", bytes(self._deflated[:_CHUNK]))
                del self._deflated[:_CHUNK]

    def close(self) -> None:
        self._chunk(b"IDAT", bytes(self._deflated) + self._pixels.end())
        self._chunk(b"IEND", b"")

    def _chunk(self, kind: bytes, data: bytes) -> None:
        self._file.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))


def _filtered(rows: np.ndarray, above: np.ndarray) -> np.ndarray:
    """Filter rows (n, W, 3) below the row `above`, and return (n, 1 + 3W) uint8. Each row gets the filter with the
    least sum of absolute values."""
    x = rows.astype(np.int16)
    up = np.concatenate([above.astype(np.int16), x[:-1]])
    left, corner = (np.pad(a[:, :-1], ((0, 0), (1, 0), (0, 0))) for a in (x, up))
    base = left + up - corner
    near_left, near_up, near_corner = (np.abs(base - a) for a in (left, up, corner))
    paeth = np.where(
        (near_left <= near_up) & (near_left <= near_corner), left, np.where(near_up <= near_corner, up, corner)
    )
    best = np.zeros((len(x), 1 + 3 * x.shape[1]), np.uint8)
    least = np.full(len(x), np.iinfo(np.int64).max)
    for kind, predicted in enumerate((np.int16(0), left, up, (left + up) // 2, paeth)):
        coded = (x - predicted).astype(np.uint8).reshape(len(x), -1)
        score = np.abs(coded.view(np.int8).astype(np.int16)).sum(axis=1, dtype=np.int64)
        better = score < least
        best[better, 0], best[better, 1:], least[better] = kind, coded[better], score[better]
    return best
