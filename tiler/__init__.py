"""Posters from Stable-Diffusion-class models on machines that cannot hold the model.

    from tiler import Budget, RenderRequest, render
    render(RenderRequest(prompt="a sailing boat at sunset", output=Path("poster.png"), width=2048), Budget("800MB"))

Importing this package imports no torch; `render` does when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tiler.errors import TilerError
from tiler.memory.budget import Budget
from tiler.request import Region, RenderRequest

if TYPE_CHECKING:
    from tiler.pipeline import Result, render

__all__ = ["Budget", "Region", "RenderRequest", "Result", "TilerError", "render"]


def __getattr__(name: str) -> object:
    if name in ("render", "Result"):
        from tiler import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module 'tiler' has no attribute {name!r}")
