"""Fractal noise over continuous coordinates: the same field at any zoom, with finer octaves as pixels become smaller.

A lattice of hashed values is interpolated by cubic B-splines. These are separable, so one octave over an axis-aligned
view is two small matrix products. Octaves finer than the pixels fade out before they would alias.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

import numpy as np

F = np.float32
Array = np.ndarray
_MIX = np.uint32(0x9E3779B1), np.uint32(0x85EBCA77), np.uint32(0xC2B2AE3D)
_SEED = 0x27D4EB2F
_UNIT = F(1.8)  # brings spline-smoothed hashes to about [-1, 1]


class Fractal(StrEnum):
    """What an octave looks like."""

    SMOOTH = "smooth"
    RIDGED = "ridged"  # sharp crests
    BILLOWING = "billowing"  # round bumps, sharp valleys
    RIDGED_SLOPE = "ridged slope"  # the slope of RIDGED along x


def hashed(ix: Array, iy: Array | int, seed: int) -> Array:
    """Uniform fp32 values in [-1, 1] of the integer lattice points (ix, iy), broadcast against each other."""
    m1, m2, m3 = _MIX
    with np.errstate(over="ignore"):
        h = ix.astype(np.int64).astype(np.uint32) * m1 + np.asarray(iy).astype(np.int64).astype(np.uint32) * m2
        h = h + np.uint32((seed * _SEED) & 0xFFFFFFFF)
        h ^= h >> np.uint32(15)
        h *= m2
        h ^= h >> np.uint32(13)
        h *= m3
        h ^= h >> np.uint32(16)
    return (h.astype(F) * F(2 / 4294967295.0)) - F(1)


def fade(frequency: float, pixel: float) -> float:
    """The share of an octave that is drawn: 1 where a wave spans four pixels or more, 0 from two pixels downwards."""
    return float(np.clip((1 / np.maximum(1e-9, frequency * pixel) - 2) / 2, 0, 1))


def smoothstep(low: float, high: float, x: Array) -> Array:
    """0 up to `low`, 1 from `high` on, rising smoothly between."""
    t = np.clip((x - F(low)) * F(1 / (high - low)), 0, 1)
    return t * t * (3 - 2 * t)


def _values(t: Array) -> tuple[Array, ...]:
    """The weights of the four lattice points around a position, `t` in [0, 1) beyond the second of them."""
    u = 1 - t
    return u * u * u / 6, (3 * t * t * t - 6 * t * t + 4) / 6, (3 * u * u * u - 6 * u * u + 4) / 6, t * t * t / 6


def _slopes(t: Array) -> tuple[Array, ...]:
    """The derivatives of `_values`."""
    return -0.5 * (1 - t) ** 2, 1.5 * t * t - 2 * t, -1.5 * t * t + t + 0.5, 0.5 * t * t


def _spline(at: Array, weights: Callable[[Array], tuple[Array, ...]] = _values) -> tuple[Array, Array]:
    """Lattice indices (m,) around the positions `at` (n,), and the matrix (n, m) that interpolates from them."""
    i = np.floor(at).astype(np.int64)
    t = (at - i).astype(F)
    lattice = np.arange(int(i.min()) - 1, int(i.max()) + 3)
    matrix = np.zeros((len(at), len(lattice)), F)
    rows, base = np.arange(len(at)), i - 1 - lattice[0]
    for k, weight in enumerate(weights(t)):
        matrix[rows, base + k] = weight
    return lattice, matrix


def noise1(
    x: Array,
    pixel: float,
    seed: int,
    frequency: float,
    gain: float = 0.5,
    octaves: int = 14,
    kind: Fractal = Fractal.SMOOTH,
) -> Array:
    """A profile over the positions `x` (n,), which lie `pixel` apart; `gain` is the amplitude of an octave over the
    last."""
    total, amplitude = np.zeros(len(x), F), 1.0
    crest = np.ones(len(x), F)
    for octave in range(octaves):
        shown = fade(frequency, pixel)
        if shown <= 0:
            break
        at = x * frequency + 17.3 * octave + 0.37
        i = np.floor(at).astype(np.int64)
        n = sum(w * hashed(i - 1 + k, octave, seed) for k, w in enumerate(_values((at - i).astype(F)))) * _UNIT
        if kind is Fractal.RIDGED:  # valleys are smoother than crests: what lies low carries less of the next octave
            n = (1 - np.sqrt(n * n + 1e-4) * F(2)) * crest
            crest = np.clip(0.35 + 0.65 * (n + 1) / 2 * 1.3, 0.15, 1)
        elif kind is Fractal.BILLOWING:
            n = np.sqrt(n * n + 2e-4) * F(2) - F(0.6)
        total += F(amplitude * shown) * n
        amplitude *= gain
        frequency *= 2
    return total


def noise2(
    x: Array,
    y: Array,
    pixel: tuple[float, float],
    seed: int,
    fx: float,
    fy: float,
    gain: float = 0.5,
    octaves: int = 14,
    kind: Fractal = Fractal.SMOOTH,
    row_weights: Callable[[float], Array] | None = None,
) -> Array:
    """A field (len(y), len(x)) whose first octave has `fx` and `fy` waves a unit.

    `row_weights` gives each row its weight (len(y),) of the octave of a frequency, in place of `gain`: in perspective,
    waves and clouds become finer towards the horizon.
    """
    total, amplitude = np.zeros((len(y), len(x)), F), 1.0
    for octave in range(octaves):
        shown = fade(fx, pixel[0]) * fade(fy, pixel[1])
        if shown <= 0:
            break
        rows = None if row_weights is None else row_weights(fx)
        if rows is None or rows.max() > 0.01:
            n = _octave(x * fx + 13.7 * octave + 0.41, y * fy + 7.9 * octave + 0.23, seed + 101 * octave, kind)
            n *= F(amplitude * shown) if rows is None else (amplitude * shown * rows).astype(F)[:, None]
            total += n
        amplitude *= gain if rows is None else 1.0
        fx *= 2
        fy *= 2
    return total


def _octave(at_x: Array, at_y: Array, seed: int, kind: Fractal) -> Array:
    """One octave at lattice positions (n,) and (m,): (m, n)."""
    columns, across = _spline(at_x)
    rows, down = _spline(at_y)
    lattice = hashed(columns[None, :], rows[:, None], seed)
    if kind is Fractal.RIDGED_SLOPE:
        slopes = down @ lattice @ _spline(at_x, _slopes)[1].T * _UNIT
        return slopes * (np.sign(down @ lattice @ across.T) * F(-2))
    n = (down @ lattice @ across.T) * _UNIT
    if kind is Fractal.RIDGED:
        return 1 - np.abs(n) * F(2)
    if kind is Fractal.BILLOWING:
        return np.abs(n) * F(2) - F(0.6)
    return n
