"""Read a PNG row by row, the counterpart of `PngWriter`. Pillow decodes only complete files, so each strip of rows
becomes a small PNG of its own, which Pillow decodes."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from PIL import Image

_STRIP_PIXELS = 2**18
_MOST_CHUNK = 2**31  # bytes, W3C PNG (third edition), 5.3
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by PNG's colour type
_KEPT = (b"PLTE", b"tRNS")  # chunks that each strip needs


def is_streamed(path: Path) -> bool:
    """Whether a file is a PNG with 8 bits per channel and rows from first to last (not interlaced). Raises OSError."""
    with path.open("rb") as file:
        head = file.read(29)
    if head[:8] != _SIGNATURE or head[12:16] != b"IHDR":
        return False
    depth, colours, interlaced = head[24], head[25], head[28]
    return depth == 8 and colours in _CHANNELS and interlaced == 0


def read_strips(path: Path) -> Iterator[Image.Image]:
    """Yield the rows of a PNG for which `is_streamed` is true, strip by strip, in the file's own mode. Only a few rows
    are in memory. Raises OSError, and ValueError for a damaged file."""
    with path.open("rb") as file:
        chunks = _chunks(file)
        kind, header = next(chunks)
        width, height, _, colours = struct.unpack(">IIBB", header[:10])
        row_bytes = 1 + width * _CHANNELS[colours]
        step = max(1, _STRIP_PIXELS // width)
        kept, inflate, waiting = b"", zlib.decompressobj(), bytearray()
        above, done = bytes(row_bytes), 0
        for kind, data in chunks:
            if kind in _KEPT:
                kept += _chunk(kind, data)
            if kind != b"IDAT":
                continue
            while data and done < height:
                waiting += inflate.decompress(data, step * row_bytes)
                data = inflate.unconsumed_tail
                while len(waiting) >= (rows := min(step, height - done)) * row_bytes and rows:
                    strip = _strip(header, kept, above, bytes(waiting[: rows * row_bytes]), rows)
                    del waiting[: rows * row_bytes]
                    above, done = b"\0" + strip.crop((0, rows - 1, width, rows)).tobytes(), done + rows
                    yield strip
        if done < height:
            raise ValueError(f"it ends after {done} of {height} rows")


def _strip(header: bytes, kept: bytes, above: bytes, filtered: bytes, rows: int) -> Image.Image:
    """Decode filtered rows below an unfiltered row, `above`, which the filter of the first may refer to."""
    head = struct.pack(">II", struct.unpack(">I", header[:4])[0], rows + 1) + header[8:]
    data = _chunk(b"IHDR", head) + kept + _chunk(b"IDAT", zlib.compress(above + filtered, 0)) + _chunk(b"IEND", b"")
    with Image.open(BytesIO(_SIGNATURE + data)) as picture:
        return picture.crop((0, 1, picture.width, rows + 1))


def _chunks(file: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """Yield (kind, data) of each chunk up to the end; a long chunk comes in parts."""
    file.seek(len(_SIGNATURE))
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if length >= _MOST_CHUNK:
            raise ValueError("a chunk is too long")
        while length > 0:
            if not (data := file.read(min(length, 2**20))):
                raise ValueError("it ends early")
            length -= len(data)
            yield kind, data
        file.seek(4, 1)  # its checksum
        if kind == b"IEND":
            return


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
