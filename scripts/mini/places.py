"""Where the committed weights lie, and where training keeps what can be made again."""

from pathlib import Path

SHIPPED = Path(__file__).parents[2] / "tiler/models/mini"
CACHE = Path.home() / ".cache/tiler/mini"
