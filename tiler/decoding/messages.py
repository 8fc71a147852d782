"""What processes that decode or encode slabs of one picture tell each other: plain numbers and arrays. Imports no
torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np


class Packed(NamedTuple):
    """Rows of a picture from the row `first` on, in the bytes in which they are stored: `data` is (n, row_bytes) uint8.
    `scales` are the factors, one for each row, that the stored values lack."""

    first: int
    scales: tuple[float, ...]
    data: np.ndarray


class Edge(NamedTuple):
    """Rows that other slabs need for the next pass: `picture` is their place among the pictures that the pass reads,
    `to` are the numbers of the slabs."""

    picture: int
    to: tuple[int, ...]
    rows: Packed


class Begin(NamedTuple):
    """The slab `number` of a picture that is cut in proportion to `shares`, which add up to 1. `frame` are the fields
    of its Frame. Its rows follow as the edges of the first orders. `edge_bytes`: about the most that a report may send
    to others. `attend_to`: how many tokens attention sees, None for all."""

    number: int
    shares: tuple[float, ...]
    frame: tuple[int, int, int, int]
    edge_bytes: int
    attend_to: int | None


class Report(NamedTuple):
    """What a slab has to tell between two passes. `counts` and `moments`, (m, 2, groups) fp64, are of the strips of the
    pass that ended: the number of values, their mean, and their squared differences from it. If `has_more`, the next
    report has more edges of the same pass. With `is_ready`, the rows of the result can be fetched. `worked` is the
    slab's work so far, in the unit of work.py. `reads` are the rows that the pass that comes reads, (first, last)."""

    counts: tuple[int, ...] = ()
    moments: np.ndarray | None = None
    edges: tuple[Edge, ...] = ()
    has_more: bool = False
    is_ready: bool = False
    worked: float = 0.0
    reads: tuple[int, int] = (0, 0)


class Orders(NamedTuple):
    """The answer to all slabs' reports: `mean` and `var`, (groups,) fp64, of the whole picture if the pass that ended
    measured them, and the rows of others that the slab needs. The next pass begins unless some slab `has_more` to send,
    which all wait for."""

    mean: np.ndarray | None = None
    var: np.ndarray | None = None
    edges: tuple[Edge, ...] = ()
    has_more: bool = False


class Fetch(NamedTuple):
    """Ask for the next rows of a slab's part of the result; with `ahead`, only to have all of them computed."""

    ahead: bool = False


class Piece(NamedTuple):
    """Rows of the result, (C, n, W) fp32, in strips of these `heights`, cut as one process does. None follow the `last`
    piece of a slab."""

    heights: tuple[int, ...]
    rows: np.ndarray
    is_last: bool
