"""Paper sizes and lengths in millimetres, and their conversion to pixels. Imports no torch."""

from __future__ import annotations

import re

from tiler.errors import UsageError

_MM = {"mm": 1.0, "cm": 10.0, "in": 25.4, '"': 25.4}
_NAMED = {"letter": (215.9, 279.4), "legal": (215.9, 355.6), "tabloid": (279.4, 431.8)}  # ANSI/ASME Y14.1
_ISO = {"a": (841, 1189), "b": (1000, 1414)}  # ISO 216, size 0 of each series


def parse_length(text: str) -> float:
    """ "3mm", "0.5 cm" or "0.125in" → millimetres. Raises UsageError."""
    match = re.fullmatch(r'\s*(\d+(?:\.\d+)?)\s*(mm|cm|in|")\s*', text.lower())
    if not match:
        raise UsageError(f"{text!r} is not a length; write it like 3mm, 0.5cm or 0.125in")
    return float(match[1]) * _MM[match[2]]


def parse_paper(text: str) -> tuple[float, float]:
    """Parse "A2", "B1", "letter" (all upright) or "60x40cm" (as written) → (width, height) in millimetres. Raises
    UsageError. ISO 216: the next size is half of the sheet, rounded down to whole millimetres."""
    name = text.strip().lower()
    if name in _NAMED:
        return _NAMED[name]
    if match := re.fullmatch(r"([ab])(\d|10)", name):
        short, long = _ISO[match[1]]
        for _ in range(int(match[2])):
            short, long = long // 2, short
        return short, long
    if match := re.fullmatch(r'(\d+(?:\.\d+)?)\s*[x×]\s*(\d+(?:\.\d+)?)\s*(mm|cm|in|")', name):
        width, height = (float(side) * _MM[match[3]] for side in match.groups()[:2])
        if width and height:
            return width, height
    raise UsageError(
        f"unknown paper {text!r}; use A0–A10, B0–B10, {', '.join(_NAMED)}, or a size like 60x40cm or 24x36in"
    )


def sheet_pixels(paper: str, dpi: float, *, landscape: bool = False, bleed_mm: float = 0.0) -> tuple[int, int]:
    """(width, height) in pixels of a sheet with `bleed_mm` added at each edge. Raises UsageError."""
    width, height = parse_paper(paper)
    if landscape:
        width, height = max(width, height), min(width, height)
    if bleed_mm > min(width, height) / 4:
        raise UsageError(
            f"a bleed of {bleed_mm:g} mm is more than a quarter of the paper's short side; 3mm to 5mm are usual"
        )
    return round((width + 2 * bleed_mm) / 25.4 * dpi), round((height + 2 * bleed_mm) / 25.4 * dpi)
