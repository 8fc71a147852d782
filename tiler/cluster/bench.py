"""Where a worker works: one job's denoiser, open under the worker's own ceiling. Imports torch, which the worker does
late."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tiler import phases
from tiler.cluster.shared import Estimate, Greeting, SharedJob, Window
from tiler.compute.cpu import computed_by
from tiler.denoiser import DenoiserRun, denoiser_id, open_denoiser, prepare_weights
from tiler.diffusion.prompts import Prompts
from tiler.diffusion.runner import Runner, Tile
from tiler.diffusion.tiles import Text2ImageRegion
from tiler.errors import BudgetRefused, ClusterError, ModelError
from tiler.memory import process
from tiler.memory.budget import Budget, format_mb
from tiler.models import family as families
from tiler.models.family import Family, Role
from tiler.models.loras import apply_loras, find_loras
from tiler.packing import packed_parts
from tiler.planning.render import plan_render
from tiler.planning.tiling import plan_tiling
from tiler.planning.time import measure as measure_speed
from tiler.planning.time import seconds_per_tile
from tiler.request import ResolvedRequest
from tiler.run import measure
from tiler.weights.packed import default_cache


class Bench:
    """`models` are the folders or files of models by the names that jobs have for them. `budget` is entered already."""

    def __init__(self, budget: Budget, models: Mapping[str, str]) -> None:
        self.job = ""
        self._budget, self._models = budget, models
        self._stack = ExitStack()
        self._runner: Runner | None = None
        self._batch = 1
        self._digest, self._tiles, self._seconds = "", 0, 0.0  # of this job

    @property
    def peak_rss_bytes(self) -> int:
        return self._budget.peak_rss_bytes

    def facts(self) -> dict[str, object]:
        """What `tiler cluster status` shows."""
        pace = self._seconds / self._tiles if self._tiles else 0.0
        return {
            "job": self.job, "digest": self._digest, "tiles": self._tiles, "seconds_per_tile": pace,
            "peak_rss_bytes": self.peak_rss_bytes,
        }  # fmt: skip

    def close(self) -> None:
        """Let the denoiser go."""
        self.job, self._runner = "", None
        self._digest, self._tiles, self._seconds = "", 0, 0.0
        self._stack.close()
        process.trim()

    @torch.no_grad()
    def open(self, job: SharedJob) -> None:
        """Find the job's model, plan under the ceiling, and open the denoiser, unless it is open already. Raises
        TilerError."""
        if self.job == job.name:
            return
        self.close()
        run = self._plan(job)
        prepare_weights(run)
        self._runner = self._stack.enter_context(open_denoiser(run, Prompts(run.plan.family, job.texts)))
        self.job, self._batch = job.name, run.plan.batch

    @torch.no_grad()
    def assess(self, job: SharedJob) -> Estimate:
        """How fast this machine would be with a job; its speed is measured for a second or two. Raises TilerError."""
        if self.job:
            raise ClusterError("it works for another render")
        run = self._plan(job)
        seconds = seconds_per_tile(run.request, run.plan, run.models, measure_speed())
        tiles = max(1, run.plan.batch // run.plan.regions[0].samples)
        return Estimate(seconds=seconds, tiles=tiles, instructions=computed_by())

    def _plan(self, job: SharedJob) -> DenoiserRun:
        """Raises TilerError."""
        request = replace(job.request, model=self._models.get(job.request.model, job.request.model))
        if not request.scratch_folder.is_dir():  # of the machine that the job comes from
            request = replace(request, scratch=default_cache().parent)
            request.scratch_folder.mkdir(parents=True, exist_ok=True)
        if request.cache_dir is not None and not request.cache_dir.is_dir():
            request = replace(request, cache_dir=None)
        family = _open_family(job, request)
        models = phases.open_models(family)
        models.loras = apply_loras(find_loras(request), models)
        if (found := denoiser_id(models)) != job.model_id:
            raise ClusterError(f"{request.model} is another model here (its id is {found}, not {job.model_id})")
        models.module(family.part(Role.DENOISER))
        facts = measure(request.scratch_folder)
        tiling = plan_tiling(request, family)
        plan = plan_render(
            request, models, tiling, facts, self._budget.max_bytes, encoded=True, tiles_only=True, embeds=job.embeds
        )
        try:
            plan.memory.check(table=False)
        except BudgetRefused as error:
            raise BudgetRefused(
                f"its ceiling of {format_mb(self._budget.max_bytes)} is too low; the smallest --max-ram that would do is "
                f"{plan.memory.smallest_text}"
            ) from error
        weights = {p.name: (family.checkpoint.weights(p.name), p.aliases) for p in packed_parts(family)}
        return DenoiserRun(
            models=models, budget=self._budget, on_event=lambda event: None, request=request, plan=plan, weights=weights
        )

    @torch.no_grad()
    def greet(self, step: int, window: Window, latents: np.ndarray) -> Greeting:
        """Ready, with what a probe tile tells of this machine. Its first pass is slow; how slow others
        are is known by theirs."""
        start = time.perf_counter()
        prediction = self.predict(step, [window], latents)
        self._digest = hashlib.sha256(np.ascontiguousarray(prediction).tobytes()).hexdigest()[:16]
        return Greeting(
            digest=self._digest,
            seconds=time.perf_counter() - start, batch=self._batch, threads=torch.get_num_threads(),
            max_ram_bytes=self._budget.max_bytes, peak_rss_bytes=self.peak_rss_bytes,
        )  # fmt: skip

    @torch.no_grad()
    def predict(self, step: int, windows: Sequence[Window], latents: np.ndarray) -> np.ndarray:
        """(n, C, h, w) fp32 → the guided predictions, (n, C, h, w). Raises TilerError."""
        assert self._runner is not None
        start = time.perf_counter()
        tiles = [tile_of(window, torch.from_numpy(one)) for window, one in zip(windows, latents, strict=True)]
        predictions = torch.stack(list(self._runner.predict(step, tiles)))
        self._budget.check("cluster")
        self._tiles, self._seconds = self._tiles + len(tiles), self._seconds + time.perf_counter() - start
        return predictions.numpy()


def tile_of(window: Window, latents: Tensor) -> Tile:
    """`latents` (C, h, w) as a tile of the canvas; it has no weights, which the blend alone needs."""
    region = Text2ImageRegion(
        top=window.top, left=window.left, height=window.height, width=window.width, condition=window.condition,
        guidance_scale=window.guidance_scale, weights=torch.empty(0),
        canvas=(window.canvas_height, window.canvas_width),
        unconditional=window.unconditional, prompts=window.prompts,
    )  # fmt: skip
    return Tile(latents[None], region)


def _open_family(job: SharedJob, request: ResolvedRequest) -> Family:
    """With text encoders where they are there: int8 weights are then packed together, in a file that renders share."""
    if job.reads_text:
        try:
            return families.open_family(request)
        except ModelError:
            pass
    return families.open_family(request, reads_text=False)
