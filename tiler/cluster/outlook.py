"""A forecast of what a cluster brings for a render, before the render starts: each worker estimates its speed without
reading any weights, and the sharing of the tiles is simulated."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from typing import Any

from tiler.cluster import tasks
from tiler.cluster.ceilings import plan_of_worker, share_of
from tiler.cluster.engine import Engine
from tiler.cluster.shared import Estimate, SharedJob
from tiler.cluster.sharing import Pace
from tiler.cluster.simulation import Forecast, simulate
from tiler.cluster.slabs import DECODING, ENCODING, slab_seconds
from tiler.decoding.lockstep import slabs_in
from tiler.decoding.method import DecodePlan
from tiler.errors import ClusterError
from tiler.events import Phase
from tiler.planning.summary import seconds_per_tile
from tiler.planning.time import Speed, coding_seconds
from tiler.render_run import RenderRun
from tiler.request.cluster import Cluster, Where

_JOINING = 15.0  # seconds in which workers that look for a scheduler may join
_LAST = 7.0  # seconds after the last worker joined: each retries every 5
_ANSWER = 60.0  # seconds for their estimates
_TASKS = 20_000  # in a simulation: further steps take as long as the simulated ones


@dataclass(frozen=True, kw_only=True)
class Expected:
    """The expected work of one worker. `problem` says why it would do nothing; `idle` is the fraction of the canvas's
    time that it waits."""

    name: str
    problem: str = ""
    seconds_per_tile: float = 0.0
    tiles: int = 0
    idle: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """The time of the canvas in seconds with these workers, of two such canvases at once, and with this process alone;
    and that of encoding the guide's picture, and of decoding, with them and alone."""

    workers: tuple[Expected, ...]
    canvas_seconds: float
    pair_seconds: float
    alone_seconds: float
    encode_seconds: float
    encode_alone_seconds: float
    decode_seconds: float
    decode_alone_seconds: float

    def facts(self) -> dict[str, Any]:
        """Return the outlook for JSON."""
        return asdict(self)


def look(run: RenderRun, cluster: Cluster, speed: Speed) -> Outlook:
    """Ask the workers of `cluster` for estimates; workers that would be started on this machine share its `speed`.
    Raises ClusterError, UsageError, BudgetRefused."""
    plan = run.plan
    here = seconds_per_tile(run.request, plan, run.models, speed)
    found = _local(run, cluster, here) if cluster.where is Where.LOCAL else _asked(run, cluster)
    _leave_out_other_bits(found)
    able = [name for name, estimate in found.items() if not estimate.refusal]
    tiles, steps = len(plan.regions), len(plan.canvas_steps)
    alone = here * sum(map(len, plan.canvas_steps))
    decoder, encoder = plan.methods[Phase.DECODE], plan.methods.get(Phase.GUIDE_PICTURE)
    decoding, encoding = (0.0 if method is None else coding_seconds(method, speed) for method in (decoder, encoder))
    if not able or not steps:
        return Outlook(
            workers=tuple(Expected(name=name, problem=found[name].refusal) for name in found),
            canvas_seconds=alone, pair_seconds=2 * alone, alone_seconds=alone,
            encode_seconds=encoding, encode_alone_seconds=encoding,
            decode_seconds=decoding, decode_alone_seconds=decoding,
        )  # fmt: skip
    fleet = [Pace.expected(found[name].seconds, found[name].tiles) for name in able]
    simulated = max(1, min(steps, _TASKS // max(1, tiles)))
    one, two = (simulate(fleet, tiles, simulated, canvases) for canvases in (1, 2))
    scale = steps / simulated
    speeds = [here / found[name].seconds for name in able]

    def together(method: DecodePlan | None, seconds: float, costs: tuple[float, float]) -> float:
        if method is None or not (cluster.decodes and method.by_layers):
            return seconds
        return slab_seconds(seconds, slabs_in(plan.canvas[0] + 2 * method.margin[0]), speeds, costs)

    return Outlook(
        workers=tuple(_expected(name, found[name], able, one, scale) for name in found),
        canvas_seconds=one.seconds * scale, pair_seconds=two.seconds * scale, alone_seconds=alone,
        encode_seconds=together(encoder, encoding, ENCODING), encode_alone_seconds=encoding,
        decode_seconds=together(decoder, decoding, DECODING),
        decode_alone_seconds=decoding,
    )  # fmt: skip


def _expected(name: str, estimate: Estimate, able: list[str], forecast: Forecast, scale: float) -> Expected:
    if estimate.refusal:
        return Expected(name=name, problem=estimate.refusal)
    at = able.index(name)
    return Expected(
        name=name, seconds_per_tile=estimate.seconds, tiles=round(forecast.tiles[at] * scale),
        idle=1 - forecast.busy[at] / forecast.seconds,
    )  # fmt: skip


def _local(run: RenderRun, cluster: Cluster, seconds: float) -> dict[str, Estimate]:
    """Estimate the processes that share this machine's cores: N processes each take N times as long."""
    plan = plan_of_worker(run, share_of(run, cluster.workers))
    one = Estimate(seconds=cluster.workers * seconds, tiles=max(1, plan.batch // plan.regions[0].samples))
    return {f"local-{number}": one for number in range(1, cluster.workers + 1)}


def _asked(run: RenderRun, cluster: Cluster) -> dict[str, Estimate]:
    """Return each worker's own estimate, by name."""
    job = SharedJob.of(run, {}).to_bytes()
    with Engine(cluster, run.request.keys, insecure=run.request.insecure) as engine:
        members = _joined(engine, cluster, run)
        asked = {engine.submit(address, tasks.assess, job): name for address, name in members.items()}
        found = {name: Estimate(refusal="busy with a long pass") for name in members.values()}
        begin, left = time.monotonic(), len(asked)
        while left and time.monotonic() - begin < _ANSWER:
            for ticket, value, error in engine.answers(0.2):
                left -= 1
                said = f"{type(error).__name__}: {error}".partition("\n")[0]
                found[asked[ticket]] = Estimate(**json.loads(value)) if error is None else Estimate(refusal=said)
    return found


def _joined(engine: Engine, cluster: Cluster, run: RenderRun) -> dict[str, str]:
    """Return the name of each worker by its address. If this process listens, wait until no more workers seem to
    come."""
    members = engine.members()
    if members is None:
        raise ClusterError(f"{engine.address}: no answer; check address, port, firewall and keys")
    if cluster.where is Where.LISTEN:
        run.note(f"waiting for workers at {engine.address}")
        begin = last = time.monotonic()
        while (now := time.monotonic()) - begin < _JOINING and not (members and now - last > _LAST):
            time.sleep(0.5)
            present = engine.members() or {}
            members, last = present, now if len(present) > len(members) else last
    return members


def _leave_out_other_bits(found: dict[str, Estimate]) -> None:
    """If workers compute with different instructions, refuse all but the group that is fastest together."""
    speeds: dict[str, float] = {}
    able = {name: estimate for name, estimate in found.items() if not estimate.refusal}
    for estimate in able.values():
        speeds[estimate.instructions] = speeds.get(estimate.instructions, 0.0) + 1 / estimate.seconds
    best = max(speeds, key=lambda name: speeds[name], default="")
    for name, estimate in able.items():
        if estimate.instructions != best:
            found[name] = Estimate(refusal=f"computes other bits than the others ({estimate.instructions})")
