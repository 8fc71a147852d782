"""The numbers of a model's configs, checked before anything is built or allocated from them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tiler.errors import ModelError

# Bounds on config numbers: nothing is allocated from a value outside them.
_BOUNDS: Mapping[str, tuple[int, int]] = {
    "in_channels": (1, 64), "out_channels": (1, 64), "latent_channels": (1, 64), "sample_size": (1, 4096),
    "cross_attention_dim": (1, 8192), "norm_num_groups": (1, 256), "hidden_size": (1, 8192), "vocab_size": (2, 1_000_000),
    "num_hidden_layers": (1, 128), "num_attention_heads": (1, 128), "intermediate_size": (1, 65_536),
    "max_position_embeddings": (1, 4096),
}  # fmt: skip
_LIST_BOUNDS: Mapping[str, tuple[int, int]] = {
    "block_out_channels": (1, 8192), "layers_per_block": (1, 16), "attention_head_dim": (1, 512),
    "transformer_layers_per_block": (1, 64), "num_attention_heads": (1, 128),
}  # fmt: skip


def check_bounds(where: str, config: dict[str, Any]) -> None:
    """Raises ModelError for a number out of range, or one that is missing."""
    needed = ("block_out_channels",) if "block_out_channels" in config or "sample_size" in config else ("hidden_size",)
    for key in needed:
        if key not in config:
            raise ModelError(f"{where}: {key!r} is missing; download it again")
    for key, value in config.items():
        low, high = _LIST_BOUNDS.get(key) or _BOUNDS.get(key) or (0, 0)
        if not high or value is None:
            continue
        values = value if isinstance(value, list) and key in _LIST_BOUNDS else [value]
        if not values or len(values) > 16 or not all(type(v) is int and low <= v <= high for v in values):
            raise ModelError(f"{where}: {key} = {str(value)[:60]} is out of range ({low}–{high})")
    if (eps := config.get("norm_eps")) is not None and not (isinstance(eps, float) and math.isfinite(eps)):
        raise ModelError(f"{where}: norm_eps = {eps!r} is not a number")
