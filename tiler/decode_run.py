"""The preparation of `tiler decode` before its only phase: open saved latents, and plan."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tiler.decoding.method import ScratchSpace
from tiler.events import OnEvent
from tiler.memory.budget import Budget
from tiler.memory.limits import memory_warning
from tiler.models import family as families
from tiler.output.latents import LatentsFile
from tiler.output.picture import check_picture, check_size
from tiler.phases import open_models
from tiler.pixels import Decoding
from tiler.planning.render import choose_decode_precision, plan_decode
from tiler.planning.table import MemoryPlan
from tiler.planning.whole import whole_picture
from tiler.request import DecodePrecision, DecodeRequest, Precision
from tiler.run import Run, measure


@dataclass(kw_only=True)
class DecodeRun(Run):
    """A run of `tiler decode`. `width` and `height` are in pixels; `texts` are the picture's metadata."""

    output: Path
    width: int
    height: int
    texts: dict[str, str]
    latents: LatentsFile
    decoding: Decoding
    plan: MemoryPlan


@contextmanager
def start(request: DecodeRequest, budget: Budget, on_event: OnEvent) -> Iterator[DecodeRun]:
    """Open the latents, check that the picture can be written, and plan. Raises TilerError."""
    output = request.output or Path("tiler.png")
    check_picture(output, request.format, force=request.force)
    models = open_models(families.open_family(request, reads_text=False), request.tiny_vae)
    family, vae = models.family, models.decoder
    found = family.checkpoint
    with LatentsFile(request.latents, vae.unscale_) as latents:
        latents.check(family.latent_channels, found.name)
        models.vae(vae)
        scratch = request.scratch or output.parent
        facts = measure(scratch)
        space = ScratchSpace(scratch, facts.scratch_free_bytes, request.scratch_dtype)
        height, width = latents.shape[2:]
        box = latents.picture_box
        check_size(output, request.format, box.width, box.height)
        how, plan, resident = plan_decode(
            models, (height, width), facts, budget.max_bytes, decode=request.decode,
            precision=_precision(request, latents, bf16=facts.bf16), space=space, wrap=request.wrap,
            whole=whole_picture(output, request.format, box.width, box.height),
        )  # fmt: skip
        run = DecodeRun(
            models=models,
            budget=budget,
            on_event=on_event,
            output=output,
            width=box.width,
            height=box.height,
            texts=latents.texts,
            latents=latents,
            decoding=Decoding(vae, how, resident, plan.peak_bytes, (box.top, box.left)),
            plan=plan,
        )
        run.tell((*found.notes, *family.notes, memory_warning(budget.max_bytes)))
        yield run


def _precision(request: DecodeRequest, latents: LatentsFile, *, bf16: bool) -> Precision:
    """The precision to compute in. With `auto`, bf16 if the render that saved the latents used it. Raises
    UsageError."""
    wanted = request.decode_precision
    if wanted is DecodePrecision.AUTO and bf16 and latents.decode_precision == DecodePrecision.BF16:
        wanted = DecodePrecision.BF16
    return choose_decode_precision(wanted, Precision.FP32, bf16=bf16)
