"""Checks on the ways to give a picture's size, which exclude each other: a sheet of paper, sides in pixels, or a
picture of the user's to enlarge or repaint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tiler.errors import UsageError
from tiler.request.choices import Layout, Wrap
from tiler.request.paper import parse_length, parse_paper

if TYPE_CHECKING:
    from tiler.request.render import RenderRequest


def check_sheet(request: RenderRequest) -> None:
    """Raise UsageError if two of these ways contradict each other."""
    sides = {"size": request.size, "width": request.width, "height": request.height}
    said = next((name for name, v in (*sides.items(), ("paper", request.paper)) if v is not None), None)
    if request.guide_image is None and (request.repaint is not None or request.scale is not None):
        what = "--scale enlarges" if request.repaint is None else "--repaint changes a part of"
        raise UsageError(f"{what} an existing picture; give that with --guide IMG")
    if request.repaint is not None and said is not None:
        raise UsageError(f"--repaint keeps the size of --guide's picture; leave out --{said}, or --repaint")
    if request.scale is not None and said is not None:
        raise UsageError(f"--scale takes the size from --guide's picture; leave out --{said}, or --scale")
    if request.paper is not None:
        parse_paper(request.paper)
        if any(side is not None for side in sides.values()):
            raise UsageError("--paper sets the size; leave out --size, --width and --height, or --paper")
    elif request.landscape or (request.bleed is not None and parse_length(request.bleed)):
        raise UsageError("--landscape and --bleed need a sheet; give one, like --paper A2")


def check_repaint(request: RenderRequest) -> None:
    """Raise UsageError for options that cannot be combined with --repaint."""
    if request.repaint is None:
        return
    excluded = {
        "--wrap": request.wrap is not Wrap.NONE, "--regions": bool(request.regions),
        "--scale": request.scale is not None, f"--layout {request.layout}": request.layout not in (None, Layout.GRID),
        "--save-latents": request.save_latents is not None, "--cluster": request.cluster is not None,
    }  # fmt: skip
    if (said := next((name for name, given in excluded.items() if given), None)) is not None:
        raise UsageError(f"--repaint works at one spot of a picture, with one prompt; leave out {said}")
