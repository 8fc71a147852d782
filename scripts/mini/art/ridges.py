"""The outlines of land: y over x."""

from __future__ import annotations

import numpy as np

from art.noise import Array, Fractal, noise1
from art.scene import Layer, Ridge


def profile(layer: Layer, x: Array, px: float) -> Array:
    """y of the layer's ridge over `x` (n,), with detail down to pixels of `px`."""
    return {
        Ridge.PEAKS: _peaks,
        Ridge.CONE: _cone,
        Ridge.HILLS: _hills,
        Ridge.DUNES: _dunes,
        Ridge.STACKS: _stacks,
        Ridge.MESAS: _mesas,
        Ridge.PINES: _ground,
        Ridge.WOODS: _woods,
    }[layer.ridge](layer, x, px)


def _peaks(layer: Layer, x: Array, px: float) -> Array:
    n = noise1(x, px, layer.seed, layer.frequency, 0.5, kind=Fractal.RIDGED)
    broad = noise1(x, px, layer.seed + 1, layer.frequency * 0.6, 0.5, 1)
    return layer.base - layer.height * (0.55 + 0.42 * n + 0.25 * broad)


def _cone(layer: Layer, x: Array, px: float) -> Array:
    """A volcano: concave flanks, a crater, a rough surface."""
    d = np.abs(x - layer.centre) / layer.width
    top = 0.16  # half the crater's width
    u = np.maximum(d - top, 0)
    cone = 1 / (1 + 0.62 * u**1.15 + 0.22 * u * u)
    crater = 0.018 * np.clip(1 - (d / top) ** 2, 0, 1)
    rough = 0.022 * noise1(x, px, layer.seed, 7.0, 0.55) * (0.35 + np.minimum(d, 1.5))
    return layer.base - layer.height * (cone - crater) - rough * 0.6


def _hills(layer: Layer, x: Array, px: float) -> Array:
    broad = noise1(x, px, layer.seed, layer.frequency, 0.3, 2)
    fine = noise1(x, px, layer.seed + 3, 24, 0.6)
    return layer.base - layer.height * (0.5 + 0.6 * broad + 0.012 * fine)


def _dunes(layer: Layer, x: Array, px: float) -> Array:
    n = noise1(x, px, layer.seed, layer.frequency, 0.33, 3, kind=Fractal.RIDGED)
    return layer.base - layer.height * (0.5 + 0.42 * n)


def _stacks(layer: Layer, x: Array, px: float) -> Array:
    """Rocks where the noise is high, below the water elsewhere."""
    n = noise1(x, px, layer.seed, layer.frequency, 0.5)
    n = n + 0.25 * noise1(x, px, layer.seed + 1, 3 * layer.frequency, 0.5, kind=Fractal.RIDGED)
    up = np.maximum(n - 0.22, 0)
    return layer.base + 0.004 - layer.height * 1.9 * up / (0.35 + up) * 0.9 + np.where(n < 0.22, 0.03, 0)


def _mesas(layer: Layer, x: Array, px: float) -> Array:
    """Two steps with steep walls, on skirts of rubble."""
    n = noise1(x, px, layer.seed, layer.frequency, 0.5, 6)
    lower, upper = 0.5 + 0.5 * np.tanh(15.0 * (n - 0.05)), 0.5 + 0.5 * np.tanh(13 * (n - 0.38))
    rough = noise1(x, px, layer.seed + 2, 9.0, 0.55)
    skirt = np.clip((n + 0.45) * 0.55, 0, 0.45)
    return layer.base - layer.height * (0.08 + 0.5 * lower + 0.24 * upper + 0.3 * skirt + 0.03 * rough)


def _ground(layer: Layer, x: Array, px: float) -> Array:
    """What pines stand on."""
    return layer.base - layer.height * (0.5 + 0.6 * noise1(x, px, layer.seed, layer.frequency, 0.4, 4))


def _woods(layer: Layer, x: Array, px: float) -> Array:
    """The round outline of crowns."""
    crowns = noise1(x, px, layer.seed + 5, 13.0, 0.62, kind=Fractal.BILLOWING)
    return _ground(layer, x, px) - 0.03 * crowns - 0.03 * noise1(x, px, layer.seed + 6, 4.0, 0.5, 2)
