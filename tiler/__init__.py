"""Posters from diffusion models on machines that cannot hold the model.

    from pathlib import Path
    from tiler import Budget, RenderRequest, render

    render(RenderRequest(prompt="misty mountains in indigo blue", output=Path("poster.png"), size=2048),
    Budget("800MB"))

Importing this package imports no torch; the functions do when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tiler.errors import TilerError
from tiler.memory.budget import Budget
from tiler.request import DecodeRequest, EncodeRequest, QuantizeRequest, Region, RenderRequest

if TYPE_CHECKING:
    from tiler.pipeline import Planned, Result, decode, encode, plan, quantize, render

__all__ = [
    "Budget",
    "DecodeRequest",
    "EncodeRequest",
    "Planned",
    "QuantizeRequest",
    "Region",
    "RenderRequest",
    "Result",
    "TilerError",
    "decode",
    "encode",
    "plan",
    "quantize",
    "render",
]


def __getattr__(name: str) -> object:
    if name in ("Planned", "Result", "decode", "encode", "plan", "quantize", "render"):
        from tiler import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module 'tiler' has no attribute {name!r}")
