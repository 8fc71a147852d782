"""Colours mixed in OKLab (Björn Ottosson 2020, bottosson.github.io/posts/oklab), where halfway looks halfway."""

from __future__ import annotations

import numpy as np

Array = np.ndarray
_TO_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)
_FROM_LMS, _FROM_LAB = np.linalg.inv(_TO_LMS), np.linalg.inv(_TO_LAB)


def to_oklab(srgb: Array) -> Array:
    """(..., 3) sRGB in [0, 1] → OKLab."""
    c = np.asarray(srgb, float)
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    return np.cbrt(linear @ _TO_LMS.T) @ _TO_LAB.T


def to_srgb(oklab: Array) -> Array:
    """(..., 3) OKLab → sRGB, clipped to [0, 1]."""
    linear = np.clip(((oklab @ _FROM_LAB.T) ** 3) @ _FROM_LMS.T, 0, 1)
    return np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)


def parse_hex(text: str) -> Array:
    """`7d9cc4` → (3,) sRGB in [0, 1]."""
    return np.array([int(text[i : i + 2], 16) for i in (0, 2, 4)]) / 255


def mix(a: Array, b: Array, share: float) -> Array:
    """Two sRGB colours (3,), `share` of it `b`."""
    return to_srgb(to_oklab(a) * (1 - share) + to_oklab(b) * share)
