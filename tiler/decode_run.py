"""The phases of `tiler decode`: open saved latents, plan, and decode them."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tiler import events
from tiler.decoding.method import DecodePlan
from tiler.events import OnEvent, percent
from tiler.memory.budget import Budget
from tiler.memory.policy import at_rows
from tiler.models import family as families
from tiler.models.family import VaeSpec
from tiler.output.latents import LatentsFile
from tiler.output.picture import check_picture
from tiler.phases import cropped, decode_pixels, streamed
from tiler.planning.render import plan_decode
from tiler.planning.table import MemoryPlan
from tiler.request import DecodeRequest
from tiler.weights import checkpoint


@dataclass(frozen=True, kw_only=True)
class DecodeRun:
    """One decoding of saved latents under way. `width` and `height` in pixels; `texts` are what the picture says of itself."""

    output: Path
    width: int
    height: int
    texts: dict[str, str]
    crop: tuple[int, int]
    latents: LatentsFile
    vae: VaeSpec
    decode_plan: DecodePlan
    plan: MemoryPlan
    resident: dict[str, torch.dtype]
    budget: Budget
    on_event: OnEvent


@contextmanager
def start(request: DecodeRequest, budget: Budget, on_event: OnEvent) -> Iterator[DecodeRun]:
    """Open the latents, check that the picture can be written, and plan. Raises TilerError."""
    output = request.output or Path("tiler.png")
    check_picture(output, force=request.force)
    family = families.read_family(checkpoint.resolve(request.model, variant=request.variant, revision=request.revision))
    vae = family.autoencoder
    if request.tiny_vae is not None:
        vae = families.read_tiny(checkpoint.resolve_part(request.tiny_vae), family)
    with LatentsFile(request.latents, vae.unscale_) as latents:
        latents.check(family.latent_channels, family.checkpoint.name)
        height, width = latents.shape[2:]
        decode_plan, plan, resident = plan_decode(
            vae, (height, width), budget.max_bytes, decode=request.decode, scratch=request.scratch or output.parent,
            scratch_dtype=request.scratch_dtype, wrap=request.wrap,
        )  # fmt: skip
        box = latents.picture_box
        yield DecodeRun(
            output=output,
            width=box.width,
            height=box.height,
            crop=(box.top, box.left),
            texts=latents.texts,
            latents=latents,
            vae=vae,
            decode_plan=decode_plan,
            plan=plan,
            resident=resident,
            budget=budget,
            on_event=on_event,
        )


def decode(run: DecodeRun) -> Generator[np.ndarray]:
    """The picture's rows, (n, W, 3) uint8, top first."""
    vae = families.build_vae(run.vae)
    run.on_event(events.PhaseStarted(name="decode", total=100))
    run.on_event(events.Note(text=f"decoder: {run.decode_plan}"))
    with (
        run.budget.phase("decode") as use,
        streamed(vae, run.vae.weights, families.vae_names, run.resident) as streamer,
    ):
        check = at_rows(run.budget, run.plan.peak_bytes)
        rows = decode_pixels(run.decode_plan, vae, streamer, run.latents, check, percent(run.on_event, "decode"))
        yield from cropped(rows, *run.crop)
    run.on_event(events.PhaseDone(name="decode", seconds=use.seconds, peak_rss_bytes=use.peak_rss_bytes))
