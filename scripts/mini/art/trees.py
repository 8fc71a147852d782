"""Pines along a ridge, self-similar: boughs are teeth that widen downwards, and teeth have teeth."""

from __future__ import annotations

import numpy as np

from art.ground import Ground
from art.noise import Array, F, fade, hashed, noise1
from art.ridges import profile

_ROWS = ((0.42, 1.0), (0.30, 0.8), (0.22, 0.55))  # distance of trees and their height, of the tallest tree's height


def draw_pines(ground: Ground) -> Array:
    """The mask of three rows of trees, one tree in each cell along the ridge; (rows, W)."""
    mask = np.zeros((ground.rows.stop - ground.rows.start, len(ground.canvas.x)), F)
    for k, (distance, height) in enumerate(_ROWS):
        cell = ground.trees * distance
        if cell >= 1.5 * ground.canvas.px:
            mask = np.maximum(mask, _row(ground, k, cell, ground.trees * height))
    return mask


def draw_fringe(ground: Ground) -> Array:
    """Pines in groves along the ridge: a rough edge from far, trees from near; (rows, W)."""
    canvas = ground.canvas
    groves = 0.5 + 2.5 * noise1(canvas.x, canvas.px, ground.layer.seed + 70, 2.5, 0.5, 5)
    return draw_pines(ground) * np.clip(groves, 0, 1).astype(F)[None, :]


def _row(ground: Ground, k: int, cell: float, height: float) -> Array:
    canvas, layer, x, seed = ground.canvas, ground.layer, ground.canvas.x, ground.layer.seed + 41 * k
    i = np.floor(x / cell + 0.37 * k)
    centre = (i + 0.5 + 0.25 * hashed(i, 0, seed) - 0.37 * k) * cell
    size = height * (0.72 + 0.28 * hashed(i, 1, seed))
    tip = (profile(layer, centre, 0.02) - size * 0.92).astype(F)
    down = (ground.y - tip[None, :]) * (1 / size).astype(F)[None, :]  # 0 at the tip, 1 at the foot
    side = np.abs(x - centre).astype(F)[None, :] * (1 / size).astype(F)[None, :]
    width = _half_width(ground, down, side, i, np.where(x < centre, 0.5, 0.0).astype(F)[None, :], seed)
    inside = np.clip((width - side) * (size / (1.4 * canvas.px)).astype(F)[None, :] + F(0.5), 0, 1)
    return inside * (down > 0) * (down < 1.15)


def _half_width(ground: Ground, down: Array, side: Array, tree: Array, left: Array, seed: int) -> Array:
    """How wide the tree is at each height: `left` (0.5 or 0) shifts the boughs of its left half."""
    boughs = (7 + 2 * hashed(tree, 2, seed)).astype(F)[None, :]
    tooth = _saw(down * boughs - side * F(9) + left + 0.25 * hashed(tree, 3, seed)[None, :])
    width = down * F(0.215) * (F(0.42) + F(0.7) * tooth) + F(0.005)
    near = fade(40 / ground.trees, ground.canvas.px)
    if near > 0:
        twigs, needles = _saw(down * boughs * 3.3 - side * 22 + left), _saw(down * boughs * 8.7 - side * 40)
        width = width * (1 + F(0.3 * near) * (twigs - F(0.5)) + F(0.22 * near) * (needles - F(0.5)))
    return width


def _saw(x: Array) -> Array:
    return x - np.floor(x)
