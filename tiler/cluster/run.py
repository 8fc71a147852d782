"""The part of a render that --cluster adds: the runner of the canvas, open while the canvas is denoised, and workers
that encode the guide's picture and decode the canvas."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch

from tiler import events, interrupts
from tiler.cluster.shared import SharedJob, digest_of
from tiler.decoding.apart import DECODERS, Apart, Work
from tiler.decoding.lockstep import FEWEST, SlabsElsewhere, SlabWork, Team, slabs_in
from tiler.decoding.method import Others
from tiler.denoiser import open_denoiser
from tiler.diffusion.prompts import Prompts
from tiler.diffusion.runner import Runner, Tile
from tiler.errors import ClusterError
from tiler.events import Phase
from tiler.jobs.temporary import own_folder
from tiler.memory.budget import Budget
from tiler.phases import OpenRunner, start
from tiler.planning.render import TILES_AHEAD, tile_bytes
from tiler.planning.time import Speed
from tiler.render_run import RenderRun
from tiler.request import Decode, RenderRequest
from tiler.request.cluster import Cluster, Where, parse_cluster
from tiler.run import WorkerUse

if TYPE_CHECKING:
    from subprocess import Popen

    from tiler.cluster.ceilings import Shares
    from tiler.cluster.engine import Engine
    from tiler.cluster.greetings import Asked
    from tiler.cluster.members import Members
    from tiler.cluster.outlook import Outlook

_PATIENCE = 60.0  # seconds without any worker after which this process continues alone
_DECODING_PATIENCE = 15.0  # the same for decoding
_GREETING = 45.0  # seconds in which a worker opens the decoder, if it has nothing else to do
_RETURNING = 45.0  # the same for workers that have lost the canvas's scheduler, and look for it less and less often
_SETTLING = 2.0  # seconds that others have to get ready once some can decode
_JOINING = 12.0  # the same for workers that look for this process's scheduler
_LOOK = 0.1  # seconds until a signal is noticed
_FIRST = 1.0  # the most seconds until it is known who is there
_CLOSING = 2.0  # seconds that the end of a render waits for the scheduler's answer to an earlier request


def prepare(request: RenderRequest) -> None:
    """Import what a cluster needs, before anything is measured. Raises UsageError if it is missing."""
    if request.cluster is not None:
        from tiler.cluster import engine

        engine.security_of(request.keys)


def wake(request: RenderRequest) -> None:
    """Prepare, and have workers that have joined a scheduler elsewhere import torch, while this process does so and
    plans. Nobody waits for them. Raises UsageError."""
    prepare(request)
    if request.cluster is None or (cluster := parse_cluster(request.cluster)).where in (Where.LOCAL, Where.LISTEN):
        return
    from tiler.cluster import tasks
    from tiler.cluster.engine import Engine

    # A scheduler that does not answer is reported where its workers are needed.
    asked = cluster, request.keys
    with suppress(ClusterError), interrupts.deferred(), Engine(*asked, insecure=request.insecure) as engine:
        for address in engine.members() or {}:
            engine.tell(address, tasks.wake)


class Greeted(NamedTuple):
    """What opens the runner of the canvas, and the workers that encode the guide's picture, if any may."""

    open_runner: OpenRunner
    encoders: SlabsElsewhere | None = None


Workers = Callable[[Prompts], AbstractContextManager[Greeted]]
"""Takes the encoded prompts; in its context workers are greeted, until the runner is opened."""


def workers_of(run: RenderRun) -> AbstractContextManager[Workers]:
    """Return a context for all phases up to the canvas, which leads to the opener of the canvas's runner: this process,
    or the requested cluster. Raises BudgetRefused if too little memory is left for the workers."""
    if run.request.cluster is None:
        return nullcontext(lambda prompts: nullcontext(Greeted(open_denoiser)))
    cluster = parse_cluster(run.request.cluster)
    if cluster.where is Where.LOCAL:
        from tiler.cluster.ceilings import share_of

        opener = partial(_open_local, cluster, share_of(run, cluster.workers))
        return nullcontext(lambda prompts: nullcontext(Greeted(opener)))
    return _joined(cluster, run)


def outlook(run: RenderRun, speed: Speed) -> Outlook | None:
    """Return a forecast for the requested cluster, None without one; `speed` is this machine's. Raises ClusterError,
    UsageError, BudgetRefused."""
    if run.request.cluster is None:
        return None
    from tiler.cluster.outlook import look

    return look(run, parse_cluster(run.request.cluster), speed)


@torch.no_grad()
def divide(request: RenderRequest, budget: Budget) -> Shares:
    """Divide `budget` among the pictures of a queue that are like `request` and drawn at the same time, and the workers
    of `request.cluster` that are here. Raises TilerError."""
    assert request.cluster is not None
    with budget:
        prepare(request)
        # A queue's rows join its scheduler by an address, so that workers decode for them, also those of local:N.
        joining = replace(request, cluster="tcp://127.0.0.1:1", keys=None, insecure=True)
        run = start(joining, budget, lambda event: None, planning=True)
        from tiler.cluster.ceilings import shares_of_queue

        return shares_of_queue(run, parse_cluster(request.cluster), budget.max_bytes)


@contextmanager
def _joined(cluster: Cluster, run: RenderRun) -> Iterator[Workers]:
    """Join the scheduler of other workers, or be it. They have memory of their own, so that they open the model while
    prompts are encoded and are greeted while the guide is made; workers of this machine alone share its ceiling with
    the guide, and start after it."""
    from tiler.cluster import tasks
    from tiler.cluster.early import Early, Notes
    from tiler.cluster.engine import Engine

    if run.job.resumed or not len(run.plan.canvas_steps):  # perhaps nothing is left to denoise
        yield lambda prompts: nullcontext(Greeted(partial(_open_joined, cluster)))
        return
    opening = SharedJob.of(run, {})

    def leave() -> None:
        with interrupts.deferred():
            early.end(_CLOSING)
            if cluster.where is not Where.LISTEN:
                for address in list(early.told):
                    engine.tell(address, tasks.close, opening.name)

    with ExitStack() as stack:
        with interrupts.deferred():
            engine = stack.enter_context(Engine(cluster, run.request.keys, insecure=run.request.insecure))
            early, notes = Early(engine, opening.to_bytes()), Notes()
            stack.callback(leave)
        _note_address(cluster, engine, run)

        def members_of(prompts: Prompts) -> Members:
            return _members_of(run, replace(opening, texts=prompts.encoded), engine, notes)

        @contextmanager
        def greeted(prompts: Prompts) -> Iterator[Greeted]:
            members = members_of(prompts)
            early.greet(members)
            yield Greeted(partial(opened, members), partial(_open_encoders, run, engine.address, members, opening.name))

        @contextmanager
        def opened(members: Members, run: RenderRun, prompts: Prompts) -> Iterator[Runner]:
            early.end()
            notes.tell(run.note)
            if early.failure is not None:
                run.note(f"workers could not be told to open the model ahead: {early.failure}")
            if early.error is not None:
                run.note(f"greeting workers ahead failed ({early.error}): they are greeted again")
                members.end()
                members = members_of(prompts)
            members.begin()
            with _open_pool(cluster, run, prompts, members, opening.name) as runner:
                yield runner

        yield greeted


@contextmanager
def _open_joined(cluster: Cluster, run: RenderRun, prompts: Prompts) -> Iterator[Runner]:
    from tiler.cluster.engine import Engine

    job = SharedJob.of(run, prompts.encoded)
    with Engine(cluster, run.request.keys, insecure=run.request.insecure) as engine:
        _note_address(cluster, engine, run)
        with _open_pool(cluster, run, prompts, _members_of(run, job, engine, run.note), job.name) as runner:
            yield runner


@contextmanager
def _open_local(cluster: Cluster, share: int, run: RenderRun, prompts: Prompts) -> Iterator[Runner]:
    """Start workers here, each with a ceiling of `share` bytes."""
    from tiler.cluster.engine import Engine
    from tiler.cluster.keys import make_keys
    from tiler.cluster.local import processes, running

    job = SharedJob.of(run, prompts.encoded)
    with own_folder("tiler-cluster-") as folder:
        keys = folder / "keys"
        make_keys(keys)
        with (
            Engine(cluster, keys) as engine,
            processes(engine.address, folder, cluster.workers, share, torch.get_num_threads()) as started,
        ):
            members = _members_of(run, job, engine, run.note, partial(running, started))
            with _open_pool(cluster, run, prompts, members, job.name) as runner:
                yield runner


def _members_of(
    run: RenderRun, job: SharedJob, engine: Engine, note: Callable[[str], None],
    running: Callable[[], list[Popen[bytes]]] | None = None,
) -> Members:  # fmt: skip
    from tiler.cluster.greetings import Probe
    from tiler.cluster.members import Members

    opening = replace(job, texts={}).to_bytes()
    asked = Probe(job.name, opening, job.to_bytes(), run.plan.begin, _probe(run))
    return Members(engine, asked, note, None if run.request.cluster_only else _PATIENCE, running)


@contextmanager
def _open_pool(
    cluster: Cluster, run: RenderRun, prompts: Prompts, members: Members, name: str
) -> Iterator[Runner]:  # fmt: skip
    from tiler.cluster import tasks
    from tiler.cluster.pool import Pool

    is_local = cluster.where is Where.LOCAL
    pool = Pool(
        members,
        name,
        partial(open_denoiser, run, prompts),
        partial(run.budget.check, Phase.CANVAS),
        run.note,
        run.counts,
        show=lambda workers: run.on_event(events.Workers(workers=workers)),
        farthest=TILES_AHEAD if is_local else _farthest(run),  # workers here have the rest of the ceiling
    )
    with pool:
        try:
            yield pool
        finally:
            run.workers, run.is_alone = members.uses(), not members.are_present
            if cluster.where in (Where.CONNECT, Where.FILE, Where.ENV):  # scheduler and workers outlive this run
                for address in members.greeted():
                    members.engine.tell(address, tasks.close, name)


def _note_address(cluster: Cluster, engine: Engine, run: RenderRun) -> None:
    if cluster.where is Where.LISTEN:
        run.note(f"waiting for workers at {engine.address}")


def decoders_of(run: RenderRun) -> Others | None:
    """Return what opens the workers that decode the picture with this process; None if its method knows none, or if all
    workers share this machine with this process alone."""
    if run.request.cluster is None or run.plan.methods[Phase.DECODE].kind is Decode.TINY:
        return None
    cluster = parse_cluster(run.request.cluster)
    if not cluster.decodes:
        return None
    return Others(partial(_open_bands, cluster, run), partial(_open_slabs, cluster, run))


@contextmanager
def _open_bands(cluster: Cluster, run: RenderRun, work: Work) -> Iterator[Apart | None]:
    from tiler.cluster.bands import BandProbe, Bands

    job = SharedJob.of_coder(run)
    asked = BandProbe(job.to_bytes(), job.name, work)
    with _open_coders(cluster, run, job.name, asked, work.probe, "decodes", run.decoders) as members:
        check = partial(run.budget.check, Phase.DECODE)
        yield None if members is None else Bands(members, job.name, work, check)


@contextmanager
def _open_slabs(cluster: Cluster, run: RenderRun, work: SlabWork) -> Iterator[Team | None]:
    from tiler.cluster import slabs

    job = SharedJob.of_coder(run)
    asked = slabs.SlabProbe(job.to_bytes(), job.name, run.plan.methods[Phase.DECODE].kind, work)
    speeds = {use.name: use.tiles / use.seconds for use in run.workers if use.seconds}
    grace = _JOINING if cluster.where is Where.LISTEN else _SETTLING
    with _open_coders(cluster, run, job.name, asked, work.probe, "decodes", run.decoders) as members:
        check = partial(run.budget.check, Phase.DECODE)
        yield None if members is None else slabs.Team(members, job.name, speeds, work, grace, check, run.note)


@contextmanager
def _open_encoders(
    run: RenderRun, scheduler: str, canvas: Members, canvas_job: str, work: SlabWork
) -> Iterator[Team | None]:
    """The workers that have been greeted for the `canvas`, whose job they have open. Nobody waits for them longer than
    they would save."""
    from tiler.cluster import slabs

    check = partial(run.budget.check, Phase.GUIDE_PICTURE)
    alone, begin = work.seconds * work.probes, time.monotonic()

    def left() -> float:
        """The seconds that are left of those that they would save."""
        speeds = [1.0] * canvas.count
        together = slabs.slab_seconds(alone, slabs_in(work.size[0]), speeds, slabs.ENCODING)
        return alone - together - (time.monotonic() - begin)

    ready = _wait_for(canvas, left, check)
    if len(ready) < FEWEST or left() <= 0:
        if canvas.count and alone > slabs.ENCODING[1]:
            run.note("fewer than two workers are ready soon: this process encodes alone")
        yield None
        return
    # Another connection: the answers of this one belong to the thread that greets workers for the canvas.
    cluster, job = Cluster(where=Where.CONNECT, address=scheduler), SharedJob.of_coder(run)
    method = run.plan.methods[Phase.GUIDE_PICTURE].kind
    asked = slabs.SlabProbe(job.to_bytes(), job.name, method, work, canvas_job)
    with _open_coders(cluster, run, job.name, asked, work.probe, "encodes", run.encoders, ready) as members:
        at_most = left() + slabs.ENCODING[1]  # which are not left
        yield None if members is None else slabs.Team(members, job.name, {}, work, 0.0, check, run.note, at_most)


def _wait_for(canvas: Members, left: Callable[[], float], check: Callable[[], None]) -> set[str]:
    """Return the addresses of the workers that have been greeted, and wait for others that are being greeted, as long
    as any time is `left`, and less once there are enough."""
    begin = since = time.monotonic()
    while True:
        ready, now = canvas.answered(), time.monotonic()
        if len(ready) < FEWEST:
            since = now
        is_over = left() <= 0 or not canvas.awaited() if canvas.has_looked else now - begin >= _FIRST
        if is_over or now - since >= _SETTLING:
            return ready
        check()
        time.sleep(_LOOK)


@contextmanager
def _open_coders(
    cluster: Cluster, run: RenderRun, name: str, asked: Asked, probe: torch.Tensor, does: str, uses: list[WorkerUse],
    among: Container[str] | None = None,
) -> Iterator[Members | None]:  # fmt: skip
    """Greet workers that are to decode or encode, whose bits must be those of `probe`; None if no scheduler answers, or
    if nobody was there at the end of the canvas. `uses` receives their work. `among` are the addresses of those that
    may, which the user knows of; None for all."""
    if run.is_alone:
        yield None
        return
    from tiler.cluster import tasks
    from tiler.cluster.engine import Engine
    from tiler.cluster.members import Members

    with ExitStack() as stack:
        try:
            engine = stack.enter_context(Engine(cluster, run.request.keys, insecure=run.request.insecure))
        except ClusterError as error:
            run.note(f"{error}; this process {does} alone")
            yield None
            return
        patience = _RETURNING if cluster.where is Where.LISTEN and run.workers else _DECODING_PATIENCE
        if among is not None:
            patience = 0.0
        members = Members(engine, asked, run.note, patience, most=DECODERS, at_most=_GREETING, among=among)
        members.digest = digest_of(probe.numpy())
        try:
            yield members
        finally:
            uses[:] = members.uses()
            for address in members.greeted():
                engine.tell(address, tasks.close, name)


def _farthest(run: RenderRun) -> int:
    """The number of tiles for which there is room while this process predicts none itself."""
    plan, held = run.plan, ("python + libraries", "canvas", "prompts", "cluster")
    canvas = next(phase for phase in plan.memory.phases if phase.name == Phase.CANVAS)
    unused = sum(term.nbytes for term in canvas.terms if term.name not in held) - plan.preview_bytes
    return TILES_AHEAD + max(0, unused) // (2 * tile_bytes(plan.family, plan.regions.tile))


def _probe(run: RenderRun) -> Tile:
    """Return a tile of noise in the place of the canvas's first tile."""
    region = run.plan.canvas_steps[0][0]
    shape = (1, run.plan.family.latent_channels, region.height, region.width)
    return Tile(torch.randn(shape, generator=torch.Generator("cpu").manual_seed(0)), region)
