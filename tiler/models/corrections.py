"""Corrections that diffusers makes to configs written by its old versions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def correct_unet(config: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Apply the correction that diffusers' StableDiffusionPipeline makes to UNet configs from before its version 0.9.0:
    a `sample_size` below 64 becomes 64. Returns the config, and a sentence about each correction.

    diffusers 0.42.1, pipelines/stable_diffusion/pipeline_stable_diffusion.py, `__init__`.
    """
    version, size = config.get("_diffusers_version"), config.get("sample_size")
    if not isinstance(version, str) or type(size) is not int or size >= 64 or _numbers(version) >= (0, 9):
        return dict(config), ()
    note = (
        f"unet/config.json is of diffusers {version}: sample_size is taken as 64 instead of {size}, as diffusers does"
    )
    return dict(config) | {"sample_size": 64}, (note,)


def _numbers(version: str) -> tuple[int, ...]:
    """`0.8.0.dev0` → (0, 8)."""
    head = version.split(".")[:2]
    return tuple(int(n) for n in head) if all(n.isdecimal() for n in head) else (0, 9)
