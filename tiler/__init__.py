"""Posters from diffusion models on machines that cannot hold the model.

    from pathlib import Path
    from tiler import Budget, RenderRequest, render

    render(RenderRequest(prompt="misty mountains in indigo blue", output=Path("poster.png"), size=2048),
    Budget("800MB"))

Importing this package imports no torch; the functions do when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tiler.errors import TilerError
    from tiler.memory.budget import Budget
    from tiler.pipeline import Result, decode, encode, plan, quantize, render
    from tiler.planned import Planned
    from tiler.request import DecodeRequest, EncodeRequest, QuantizeRequest, Region, RenderRequest

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
    if name not in __all__:
        raise AttributeError(f"module 'tiler' has no attribute {name!r}")
    from importlib import import_module

    rooms = {"TilerError": "errors", "Budget": "memory.budget", "Planned": "planned"}
    room = rooms.get(name, "request" if name == "Region" or name.endswith("Request") else "pipeline")
    return getattr(import_module(f"tiler.{room}"), name)
