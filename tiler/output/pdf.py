"""Write a PDF of one page with one picture, row by row: ISO 32000-1, an image whose pixels are coded as in a PNG."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import BinaryIO

import numpy as np

from tiler.output.png import DeflatedRows
from tiler.output.profile import srgb_profile

POINTS = 72  # per inch
_LONGEST = 14_400  # units of a page's side: ISO 32000-1, annex C
_CATALOG, _PAGES, _PAGE, _CONTENT, _PROFILE, _INFO, _IMAGE, _LENGTH = range(1, 9)


class PdfWriter:
    """Writes rows from first to last without holding the picture. The page is the picture at `dpi`; its TrimBox, the
    part that remains after cutting the paper, lies `bleed_mm` inside. `texts["parameters"]` becomes the document's
    subject."""

    def __init__(
        self, file: BinaryIO, width: int, height: int, texts: Mapping[str, str], dpi: float, bleed_mm: float = 0.0
    ) -> None:
        self._file, self._pixels, self._at, self._starts = file, DeflatedRows(width), 0, dict[int, int]()
        unit = max(1, math.ceil(max(width, height) / dpi * POINTS / _LONGEST))  # points, more than 1 for pages over 5 m
        x, y, bleed = (inches * POINTS / unit for inches in (width / dpi, height / dpi, bleed_mm / 25.4))
        media, trim = f"[0 0 {x:.4f} {y:.4f}]", f"[{bleed:.4f} {bleed:.4f} {x - bleed:.4f} {y - bleed:.4f}]"
        self._write(b"%PDF-1.6\n%\xe2\xe3\xcf\xd3\n")  # bytes above 127 mark the file as binary
        self._object(_CATALOG, f"<< /Type /Catalog /Pages {_PAGES} 0 R >>")
        self._object(_PAGES, f"<< /Type /Pages /Kids [{_PAGE} 0 R] /Count 1 >>")
        self._object(
            _PAGE,
            f"<< /Type /Page /Parent {_PAGES} 0 R /MediaBox {media} /BleedBox {media} /TrimBox {trim} "
            f"{f'/UserUnit {unit} ' if unit > 1 else ''}"
            f"/Contents {_CONTENT} 0 R /Resources << /XObject << /Picture {_IMAGE} 0 R >> >> >>",
        )
        self._stream(_CONTENT, "", f"q {x:.4f} 0 0 {y:.4f} 0 0 cm /Picture Do Q".encode())
        self._stream(_PROFILE, "/N 3 /Alternate /DeviceRGB /Filter /FlateDecode", zlib.compress(srgb_profile()))
        subject = texts.get("parameters", "").encode("utf-16-be", errors="replace").hex()
        self._object(_INFO, f"<< /Producer (tiler) /Subject <FEFF{subject}> >>")
        self._begin(_IMAGE)
        self._write(
            f"<< /Type /XObject /Subtype /Image /Width {width} /Height {height} /BitsPerComponent 8 "
            f"/ColorSpace [/ICCBased {_PROFILE} 0 R] /Filter /FlateDecode "
            f"/DecodeParms << /Predictor 15 /Colors 3 /Columns {width} >> /Length {_LENGTH} 0 R >>\nstream\n".encode()
        )
        self._image_start = self._at

    def write(self, rows: np.ndarray) -> None:
        """rows: (n, width, 3) uint8 sRGB."""
        for data in self._pixels.add(rows):
            self._write(data)

    def close(self) -> None:
        self._write(self._pixels.end())
        length = self._at - self._image_start
        self._write(b"\nendstream\nendobj\n")
        self._object(_LENGTH, str(length))
        table, count = self._at, len(self._starts) + 1
        entries = "".join(f"{self._starts[number]:010} 00000 n \n" for number in range(1, count))
        self._write(
            f"xref\n0 {count}\n0000000000 65535 f \n{entries}trailer\n"
            f"<< /Size {count} /Root {_CATALOG} 0 R /Info {_INFO} 0 R >>\nstartxref\n{table}\n%%EOF\n".encode()
        )

    def _write(self, data: bytes) -> None:
        self._at += self._file.write(data)

    def _begin(self, number: int) -> None:
        self._starts[number] = self._at
        self._write(f"{number} 0 obj\n".encode())

    def _object(self, number: int, text: str) -> None:
        self._begin(number)
        self._write(text.encode() + b"\nendobj\n")

    def _stream(self, number: int, entries: str, data: bytes) -> None:
        self._begin(number)
        self._write(f"<< {entries} /Length {len(data)} >>\nstream\n".encode() + data + b"\nendstream\nendobj\n")
