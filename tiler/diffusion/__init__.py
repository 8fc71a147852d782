"""Tiles, masks, the canvas and its guide, the sampling loop. Knows nothing of where weights live."""
