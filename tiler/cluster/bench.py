"""The worker's side of a job: the denoiser, opened under the worker's own ceiling. This module imports torch, so a
worker imports it late."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from tiler import phases
from tiler.cluster.decoder import BandDecoder, SlabCoder
from tiler.cluster.shared import FORGOTTEN, BandPlace, Estimate, Greeting, SharedJob, Taken, Window, digest_of, tile_of
from tiler.compute.cpu import computed_by
from tiler.compute.stream import Streamer
from tiler.decoding.directions import DIRECTIONS
from tiler.decoding.messages import Begin, Fetch, Orders, Piece, Report
from tiler.denoiser import DenoiserRun, denoiser_id, open_weights, prepare_weights, runner_on
from tiler.diffusion.prompts import Prompts
from tiler.diffusion.runner import Runner
from tiler.errors import BudgetRefused, ClusterError, ModelError
from tiler.memory import process
from tiler.memory.budget import Budget, format_mb
from tiler.models import family as families
from tiler.models.family import Family, Role
from tiler.models.loras import apply_loras, find_loras
from tiler.models.samples import Prompt
from tiler.packing import packed_parts
from tiler.planning.render import plan_render
from tiler.planning.summary import seconds_per_tile
from tiler.planning.tiling import Tiling, plan_tiling
from tiler.planning.time import Speed
from tiler.request import Decode, ResolvedRequest
from tiler.request.render import OF_THE_DENOISER
from tiler.run import measure
from tiler.weights.packed import default_cache

_Coder = BandDecoder | SlabCoder
_JOBS = 3  # open at once
_FEW_BYTES = 4_000_000  # of prompts that are within a plan's margin
_KEPT = 60.0  # FORGOTTEN for a slab under way: if it is lost, so are those of all other workers


class _Ahead(NamedTuple):
    """The run of a job whose denoiser is open before its prompts are known, and when it was opened."""

    job: str
    run: DenoiserRun
    opened: float


@dataclass
class _Open:
    """An open job: its run, the runner that predicts its tiles unless it was set aside, and the work done so far."""

    run: DenoiserRun
    prompts: Prompts
    prompt_bytes: int
    runner: Runner | None = None
    digest: str = ""
    tiles: int = 0
    seconds: float = 0.0
    used: float = field(default_factory=time.monotonic)


class Bench:
    """The jobs that a worker has open. `models` maps the names of models in jobs to files or folders here; `budget` is
    already entered. `scratch` is the folder of scratch files; None: the job's if it is here, else tiler's cache.

    Jobs that differ only in what they draw share one denoiser, so that the renders of a queue can take turns at a
    worker. A decoder gives way to a canvas. A denoiser is set aside while the same render's guide is encoded: then its
    job stays open, and its weights are opened again for the next tile.
    """

    def __init__(self, budget: Budget, models: Mapping[str, str], scratch: Path | None = None) -> None:
        self.jobs: dict[str, _Open] = {}
        self._budget, self._models, self._scratch = budget, models, scratch
        self._stack = ExitStack()
        self._sets = 1  # of prompts like those of the first open job: the plan has room for so many
        self._streamer: Streamer | None = None
        self._ahead: _Ahead | None = None
        self._coder: _Coder | None = None
        self._coded = 0.0  # when it was used last

    @property
    def peak_rss_bytes(self) -> int:
        return self._budget.peak_rss_bytes

    def facts(self) -> dict[str, object]:
        """Return the facts that `tiler cluster status` shows."""
        tiles, seconds = (sum(getattr(job, name) for job in self.jobs.values()) for name in ("tiles", "seconds"))
        names = [*self.jobs, *([self._ahead.job] if self._ahead is not None else [])]
        return {
            "job": " ".join(names), "digest": next((job.digest for job in self.jobs.values()), ""), "tiles": tiles,
            "seconds_per_tile": seconds / tiles if tiles else 0.0, "peak_rss_bytes": self.peak_rss_bytes,
        }  # fmt: skip

    def close(self, name: str | None = None) -> None:
        """Close one job, or all if `name` is None; closing the last job also closes the denoiser."""
        if self._coder is not None and name in (None, self._coder.job):
            self._close_coder()
        if self._ahead is not None and name in (None, self._ahead.job):
            self._ahead = None
        self.jobs = {} if name is None else {other: job for other, job in self.jobs.items() if other != name}
        if not self.jobs and self._ahead is None:
            self._set_aside()

    @torch.no_grad()
    def open_ahead(self, job: SharedJob) -> None:
        """Plan a job under the ceiling and open its denoiser before its prompts are known, if nothing else is open.
        Raises Taken if the jobs that are open leave no place for it, so that its prompts are not sent in vain, and
        TilerError."""
        self.forget()
        if job.name in self.jobs or self._joined(job) or self._ahead is not None or self._coder is not None:
            return
        run = self._plan(job)
        self._open_weights(run)
        self._ahead = _Ahead(job.name, run, time.monotonic())

    def _from_ahead(self, job: SharedJob) -> DenoiserRun | None:
        """Return a run of `job` on the denoiser that was opened ahead. If it does not serve this job, it is closed."""
        if self._ahead is None:
            return None
        ahead = self._ahead
        try:
            if _is_alike(ahead.run.request, self._of_here(job)):
                run = self._beside(ahead.run, job)
                self._ahead = None
                return run
        except Taken:
            pass
        self.close(ahead.job)
        return None

    def _open_weights(self, run: DenoiserRun) -> None:
        prepare_weights(run)
        self._streamer = self._stack.enter_context(open_weights(run))

    @torch.no_grad()
    def open(self, job: SharedJob) -> None:
        """Find the job's model, plan under the ceiling, and open the denoiser if it is not open yet. Raises
        TilerError."""
        if job.name in self.jobs:
            return
        run = self._from_ahead(job)
        if run is None:
            self.forget()
            if self._coder is not None:  # its coordinator can decode the rest; nobody waits for a canvas so long
                if self._coder.is_under_way and time.monotonic() - self._coded < _KEPT:
                    raise Taken("it works for another render")
                self.close(self._coder.job)
            run = self._joined(job) or self._plan(job)
        opened = _Open(run, Prompts(run.plan.family, job.texts), bytes_of(job.texts))
        self._take_up(opened)
        self.jobs[job.name] = opened

    def _take_up(self, opened: _Open) -> Runner:
        """Return the runner of a job, on weights that are opened if they are not. Raises TilerError."""
        if opened.runner is None:
            if self._streamer is None:
                self._close_coder()
                self._open_weights(opened.run)
            assert self._streamer is not None
            opened.runner = runner_on(self._streamer, opened.run, opened.prompts)
        return opened.runner

    def _close_coder(self) -> None:
        if self._coder is not None:
            self._coder.close()
            self._coder = None
            process.trim()

    def _set_aside(self) -> None:
        """Close the denoiser, also one that was opened ahead, and keep the jobs that use it."""
        self._ahead = None
        for opened in self.jobs.values():
            opened.runner = None
        self._streamer = None
        self._stack.close()
        process.trim()

    def _joined(self, job: SharedJob) -> DenoiserRun | None:
        """Return a run of `job` on the denoiser of the jobs that are open, None if there are none. Raises Taken if it
        cannot join them."""
        begun = next((opened.run for opened in self.jobs.values()), None)
        if begun is None:
            return None
        if len(self.jobs) >= _JOBS or not _is_alike(begun.request, self._of_here(job)):
            raise Taken("it works for another render")
        first, *others = (opened.prompt_bytes for opened in self.jobs.values())
        if sum(others) + bytes_of(job.texts) > max((self._sets - 1) * first, _FEW_BYTES):
            raise Taken("it has no memory for another render's prompts")
        return self._beside(begun, job)

    def forget(self) -> None:
        """Close what nobody has used for long."""
        used = [self._coded] * (self._coder is not None) + [opened.used for opened in self.jobs.values()]
        used += [] if self._ahead is None else [self._ahead.opened]
        if all(time.monotonic() - when > FORGOTTEN for when in used):
            self.close()

    @torch.no_grad()
    def open_decoder(self, job: SharedJob, statistics_bytes: int, size: tuple[int, int]) -> None:
        """Open the decoder of a job for bands if this machine has nothing else to do. Raises TilerError."""
        self._open_coder(job, lambda here: BandDecoder(job, here, statistics_bytes, size, self._budget))

    @torch.no_grad()
    def open_slabs(self, job: SharedJob, direction: str, method: str, size: tuple[int, int], canvas: str) -> None:
        """Open the autoencoder of a job for slabs if this machine has nothing else to do but the job named `canvas`,
        which is set aside. Raises TilerError."""

        def opened(here: ResolvedRequest) -> SlabCoder:
            return SlabCoder(job, here, DIRECTIONS[direction], Decode(method), size, self._budget)

        self._open_coder(job, opened, canvas)

    def _open_coder(self, job: SharedJob, opened: Callable[[ResolvedRequest], _Coder], canvas: str = "") -> None:
        if canvas in self.jobs:
            self.jobs[canvas].used = time.monotonic()
        self.forget()
        if self._coder is None or self._coder.job != job.name:
            if self.jobs.keys() - {canvas} or self._coder is not None:
                raise Taken("it works for another render")
            self._set_aside()
            self._coder = opened(self._of_here(job))
        self._used_coder()

    def _used_coder(self) -> None:
        self._coded = time.monotonic()
        for opened in self.jobs.values():  # set aside
            opened.used = self._coded

    def _greeting(self, digest: str, seconds: float) -> Greeting:
        return Greeting(
            digest=digest, seconds=seconds, threads=torch.get_num_threads(),
            max_ram_bytes=self._budget.max_bytes, peak_rss_bytes=self.peak_rss_bytes,
        )  # fmt: skip

    @torch.no_grad()
    def greet_decoder(self, job: str, statistics: bytes, latents: np.ndarray) -> Greeting:
        """Give the open decoder its statistics, and return a greeting with the digest of the pixels of a few latents.
        Raises TilerError."""
        if not isinstance(self._coder, BandDecoder) or self._coder.job != job:
            raise Taken("it works for another render")
        self._coded, start = time.monotonic(), time.perf_counter()
        digest = digest_of(self._coder.probe(statistics, latents))
        return self._greeting(digest, time.perf_counter() - start)

    @torch.no_grad()
    def greet_slabs(self, job: str, small: np.ndarray) -> Greeting:
        """Return a greeting with the digest of what the corner of a picture becomes. Raises TilerError."""
        if not isinstance(self._coder, SlabCoder) or self._coder.job != job:
            raise Taken("it works for another render")
        self._coded = time.monotonic()
        result, seconds = self._coder.probe(small)
        return self._greeting(digest_of(result), seconds)

    @torch.no_grad()
    def decode(self, job: str, place: BandPlace, row: int, columns: np.ndarray | None) -> np.ndarray | None:
        """The next rows of a band, (3, n, w) fp32. None if its latents must be sent, or the job is not open. Raises
        TilerError."""
        if not isinstance(self._coder, BandDecoder) or self._coder.job != job:
            return None
        rows = self._coder.decode(place, row, columns)
        self._budget.check("decode")
        self._coded = time.monotonic()
        return rows

    @torch.no_grad()
    def run_slab(self, job: str, number: int, asked: Begin | Orders | Fetch) -> Report | Piece | None:
        """Do what comes next for a slab, of which this is the message `number`. None if the job or its slab is not
        open. Raises TilerError."""
        if not isinstance(self._coder, SlabCoder) or self._coder.job != job:
            return None
        told = self._coder.run(number, asked)
        self._budget.check("slabs")
        self._used_coder()
        return told

    def _beside(self, begun: DenoiserRun, job: SharedJob) -> DenoiserRun:
        """Return a run of `job` that uses the weights of `begun`, a run that is already open. Raises Taken if it
        cannot."""
        if denoiser_id(begun.models) != job.model_id:
            raise Taken("it works for another render")
        request, plan = self._of_here(job), begun.plan
        tiling = plan_tiling(request, plan.family)
        if tiling.regions.tile != plan.regions.tile:
            raise Taken("it works for another render")
        canvas = {one.name: getattr(tiling, one.name) for one in fields(Tiling)} | {"guide": None}
        return replace(begun, request=request, plan=replace(plan, **canvas), prepared=None)

    @torch.no_grad()
    def assess(self, job: SharedJob) -> Estimate:
        """Estimate how fast this machine would work on a job, from a speed measurement of half a second. Raises
        TilerError."""
        if self.jobs or self._ahead is not None or self._coder is not None:
            raise Taken("it works for another render")
        run = self._plan(job)
        stored, _ = run.weights[run.plan.family.part(Role.DENOISER).name]
        path = max(stored.values(), key=lambda info: info.nbytes).path
        seconds = seconds_per_tile(run.request, run.plan, run.models, Speed(path))
        tiles = max(1, run.plan.batch // run.plan.regions[0].samples)
        return Estimate(seconds=seconds, tiles=tiles, instructions=computed_by())

    def _plan(self, job: SharedJob) -> DenoiserRun:
        """Plan the job under this machine's ceiling. Raises TilerError."""
        request = self._of_here(job)
        family = _open_family(job, request)
        models = phases.open_models(family)
        models.loras = apply_loras(find_loras(request), models)
        if (found := denoiser_id(models)) != job.model_id:
            raise ClusterError(f"{request.model} is another model here (its id is {found}, not {job.model_id})")
        models.module(family.part(Role.DENOISER))
        facts = measure(request.scratch_folder)
        tiling = plan_tiling(request, family)
        for sets in range(_JOBS, 0, -1):  # of as many jobs as there is memory for
            plan = plan_render(
                request, models, tiling, facts, self._budget.max_bytes, encoded=True, tiles_only=True,
                embeds=job.embeds, prompt_sets=sets,
            )  # fmt: skip
            if plan.memory.fits:
                break
        self._sets = sets
        try:
            plan.memory.check(table=False)
        except BudgetRefused as error:
            raise BudgetRefused(
                f"its ceiling of {format_mb(self._budget.max_bytes)} is too low; the smallest --max-ram that works is "
                f"{plan.memory.smallest_text}"
            ) from error
        weights = {p.name: (family.checkpoint.weights(p.name), p.aliases) for p in packed_parts(family)}
        return DenoiserRun(
            models=models, budget=self._budget, on_event=lambda event: None, request=request, plan=plan, weights=weights
        )

    def _of_here(self, job: SharedJob) -> ResolvedRequest:
        """Return the job's request with the paths of this machine."""
        request = replace(job.request, model=self._models.get(job.request.model, job.request.model))
        if self._scratch is not None:
            request = replace(request, scratch=self._scratch)
        # The path is from the machine that sent the job.
        elif not (request.scratch_folder.is_dir() and os.access(request.scratch_folder, os.W_OK)):
            request = replace(request, scratch=default_cache().parent)
            request.scratch_folder.mkdir(parents=True, exist_ok=True)
        if request.cache_dir is not None and not request.cache_dir.is_dir():
            request = replace(request, cache_dir=None)
        if request.lora_dir is not None and not request.lora_dir.is_dir():  # this machine's lora_dirs then apply
            request = replace(request, lora_dir=None)
        return request

    @torch.no_grad()
    def greet(self, job: str, step: int, window: Window, latents: np.ndarray) -> Greeting:
        """Predict a probe tile, and return a greeting with its digest, its time and the limits of this machine. The
        first pass is slow; later passes correct the speed that is expected. Raises TilerError."""
        if job not in self.jobs:
            raise Taken("it works for another render")
        start = time.perf_counter()
        prediction = self.predict(job, step, [window], latents)
        self.jobs[job].digest = digest_of(prediction)
        return Greeting(
            digest=self.jobs[job].digest, seconds=time.perf_counter() - start, batch=self.jobs[job].run.plan.batch,
            threads=torch.get_num_threads(), max_ram_bytes=self._budget.max_bytes, peak_rss_bytes=self.peak_rss_bytes,
        )  # fmt: skip

    @torch.no_grad()
    def predict(self, job: str, step: int, windows: Sequence[Window], latents: np.ndarray) -> np.ndarray:
        """Return the guided predictions, (n, C, h, w) fp32, for `latents`, (n, C, h, w) fp32. Raises TilerError."""
        start, opened = time.perf_counter(), self.jobs[job]
        tiles = [tile_of(window, torch.from_numpy(one)) for window, one in zip(windows, latents, strict=True)]
        predictions = torch.stack(list(self._take_up(opened).predict(step, tiles)))
        self._budget.check("cluster")
        opened.tiles, opened.seconds = opened.tiles + len(tiles), opened.seconds + time.perf_counter() - start
        opened.used = time.monotonic()
        return predictions.numpy()


def bytes_of(texts: Mapping[str | None, Prompt]) -> int:
    """The bytes of encoded prompts."""
    tensors = (tensor for prompt in texts.values() for tensor in (prompt.tokens, prompt.pooled))
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _is_alike(one: ResolvedRequest, other: ResolvedRequest) -> bool:
    """Whether two renders differ only in what they draw, so that one denoiser serves both."""
    return all(getattr(one, name) == getattr(other, name) for name in OF_THE_DENOISER)


def _open_family(job: SharedJob, request: ResolvedRequest) -> Family:
    """Open the model, with its text encoders if their files are here: int8 weights are then packed into the same file
    that renders use."""
    if job.reads_text:
        with suppress(ModelError):
            return families.open_family(request)
    return families.open_family(request, reads_text=False)
