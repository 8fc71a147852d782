"""The only module here that knows inner parts of `tiler`: where the tiles of a canvas begin and end."""

from __future__ import annotations

from tiler import RenderRequest
from tiler.models.family import read_family
from tiler.planning.resolve import resolve as fill
from tiler.planning.tiling import plan_tiling
from tiler.weights.checkpoint import resolve


def tile_borders(model: str, width: int, height: int) -> tuple[set[int], set[int]]:
    """Rows and columns of pixels at which tiles of the last step begin or end, the canvas's own edges left out."""
    family = read_family(resolve(model))
    tiles = plan_tiling(fill(RenderRequest(prompt="x", width=width, height=height), family), family).canvas_steps[-1]
    rows = {8 * edge for tile in tiles for edge in (tile.top, tile.top + tile.height)}
    columns = {8 * edge for tile in tiles for edge in (tile.left, tile.left + tile.width)}
    return rows - {0, height}, columns - {0, width}
