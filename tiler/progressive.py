"""Progressive upscaling (Du et al. 2023, arXiv:2311.16973): the guide of a large picture is a smaller one, rendered
first, whose guide may be a smaller one still. Each is a render of its own, with a job inside the larger one's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from tiler.events import Event, Note, OnEvent
from tiler.jobs.folder import Job
from tiler.memory.budget import Budget
from tiler.planned import Planned
from tiler.render_run import RenderRun
from tiler.request import Decode, DecodePrecision, RenderRequest
from tiler.request.cluster import Where, parse_cluster

_LARGE = 2048**2  # pixels


class Rendered(Protocol):
    @property
    def report(self) -> Mapping[str, Any]: ...


class Render(Protocol):
    """`pipeline.render`."""

    def __call__(self, request: RenderRequest, budget: Budget, on_event: OnEvent, *, inside: Job) -> Rendered: ...


def render_first(run: RenderRun, render: Render) -> None:
    """Render the picture that takes the guide's place, if the plan has one and no earlier run has done so. Its work
    counts as the run's. Raises TilerError."""
    if run.plan.smaller is None or run.job.has_reference or run.smaller_picture.exists():
        return
    (height, width), own = run.plan.smaller, f"{run.request.width}×{run.request.height}"
    run.note(f"a picture of {width}×{height} comes first: it is the guide of the one of {own}")
    asked = _smaller_request(run, run.smaller_picture)
    report = render(asked, run.budget, partial(_unless_told, run), inside=run.job).report
    for name in run.counts:
        run.counts[name] += report[name]
    run.first_peak_bytes = report["predicted_peak_bytes"]
    if (spoken := run.spoken).cache is not None:  # it has encoded the prompts
        run.spoken = replace(spoken, encoded={**spoken.encoded, **spoken.cache.load(spoken.texts)})
    run.note(f"now the picture of {own}")


def _unless_told(run: RenderRun, event: Event) -> None:
    """Pass the events of the smaller picture on, and those notes that the larger one has not told already."""
    if isinstance(event, Note):
        if event.text in run.told:
            return
        run.told.add(event.text)
    run.on_event(event)


def plan_first(run: RenderRun, plan: Callable[[RenderRequest, Budget], Planned]) -> Planned | None:
    """Plan the picture that is rendered first, by this process alone; None if there is none. Raises TilerError."""
    return None if run.plan.smaller is None else plan(_alone(_smaller_request(run)), run.budget)


def _smaller_request(run: RenderRun, output: Path | None = None) -> RenderRequest:
    """The request of the smaller picture of `run`, to be written to `output`; None for a plan. Like every guide, it is
    of the prompt alone: most regions would be smaller than a tile."""
    assert run.plan.smaller is not None
    height, width = run.plan.smaller
    smaller = replace(
        run.said, seed=run.request.seed, width=width, height=height, size=None, paper=None, landscape=False, bleed=None,
        dpi=None, regions=(), output=output, format=None, quality=None, save_latents=None, metadata=False, force=True,
        keep_job=False, job_dir=None, scratch=run.request.scratch_folder, precision=run.plan.precision,
        decode_precision=DecodePrecision(run.plan.decode_precision),
        # As for every guide, the model's own autoencoder decodes it.
        decode=Decode.AUTO if run.said.decode is Decode.TINY else run.said.decode,
        tiny_vae=None if run.said.preview is None else run.said.tiny_vae,
    )  # fmt: skip
    return smaller if _may_share(smaller, height * width) else _alone(smaller)


def _may_share(request: RenderRequest, pixels: int) -> bool:
    """Whether the workers of a cluster help with a picture: those that this process starts, or that look for its
    scheduler, need longer to come than a small one takes."""
    if request.cluster is None or request.cluster_only or pixels >= _LARGE:
        return True
    return parse_cluster(request.cluster).where not in (Where.LOCAL, Where.LISTEN)


def _alone(request: RenderRequest) -> RenderRequest:
    return replace(request, cluster=None, cluster_only=False, keys=None, insecure=False)
