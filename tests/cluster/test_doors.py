"""Who may connect, and whose work is refused."""

from __future__ import annotations

import json
import os
import re
import socket
import stat
import threading
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import distributed
import make_checkpoint
import numpy as np
import pytest
import torch

from tests.conftest import Ran
from tiler import Budget, RenderRequest, interrupts
from tiler.cli import supervise
from tiler.cluster import bench as benches
from tiler.cluster import ceilings, run, shared, tasks
from tiler.cluster import engine as engines
from tiler.cluster.bench import Bench
from tiler.cluster.engine import Engine
from tiler.cluster.keys import find_keys, make_keys
from tiler.cluster.shared import Greeting, SharedJob, window_of
from tiler.decoding.messages import Fetch
from tiler.denoiser import denoiser_id
from tiler.diffusion.runner import Tile
from tiler.errors import BudgetRefused, ClusterError, Interrupted, UsageError
from tiler.memory.process import read_rss
from tiler.models import family as families
from tiler.models.built import Models
from tiler.models.samples import Prompt
from tiler.phases import start
from tiler.planning.render import CONNECTIONS_BYTES, JOINED_BYTES, SENT_PROMPTS, RenderPlan
from tiler.planning.resolve import resolve
from tiler.planning.tiling import plan_tiling
from tiler.request import Decode, Precision
from tiler.request.cluster import Cluster, Where, check_cluster, parse_cluster, scheduler_of
from tiler.weights.packed import default_cache


@pytest.mark.parametrize(
    "text", ["local:0", "local:65", "local", "listen:0", "listen:99999", "somewhere", "http://a:1", "tls://a", ""]
)
def test_what_is_no_cluster_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--cluster "):
        parse_cluster(text)


@pytest.mark.parametrize(("text", "host", "port"), [
    ("listen", "", 8786), ("listen:99", "", 99), ("listen:127.0.0.1:99", "127.0.0.1", 99), ("listen:[::1]:9", "[::1]", 9),
])  # fmt: skip
def test_where_to_listen(text: str, host: str, port: int) -> None:
    found = parse_cluster(text)
    assert (found.where, found.host, found.port) == (Where.LISTEN, host, port)


def test_without_keys_nobody_may_connect(tmp_path: Path) -> None:
    for text in (
        "listen", "listen:192.168.1.2:99", "tcp://192.168.1.2:99", "tls://laptop:8786", "tls://127.0.0.1:99",
        "listen:127.0.0.1:99", "listen:localhost", "tcp://localhost:99", "tcp://[::1]:99",
    ):  # fmt: skip
        with pytest.raises(UsageError, match="--keys"):
            check_cluster(text, None, insecure=False)
    for text in ("listen:127.0.0.1:99", "tcp://localhost:99"):
        check_cluster(text, None, insecure=True)
    check_cluster("local:2", None, insecure=False)
    for insecure in (False, True):
        with pytest.raises(UsageError, match="--keys works only with tls://"):
            check_cluster("tcp://127.0.0.1:1", tmp_path, insecure=insecure)
    check_cluster("listen", tmp_path, insecure=False)
    check_cluster("tcp://192.168.1.2:99", None, insecure=True)
    for text in ("local:2", "listen", "nonsense"):
        with pytest.raises(UsageError, match="is not a scheduler's address"):
            scheduler_of(text, tmp_path, insecure=False)


def test_keys_are_their_owners_alone_and_never_replaced(tmp_path: Path) -> None:
    for path in make_keys(tmp_path / "keys"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(UsageError, match="exists already"):
        make_keys(tmp_path / "keys")
    (tmp_path / "keys/key.pem").chmod(0o644)
    with pytest.raises(UsageError, match="chmod 600"):
        find_keys(tmp_path / "keys")
    with pytest.raises(UsageError, match="no such file"):
        find_keys(tmp_path)
    (tmp_path / "keys/key.pem").chmod(0o600)
    find_keys(tmp_path / "keys")
    (tmp_path / "keys/cert.pem").write_text("nonsense")
    with pytest.raises(UsageError, match="are not a pair of keys"):
        find_keys(tmp_path / "keys")


@pytest.mark.parametrize("host", ["127.0.0.1", "nosuch.invalid"])
def test_where_nobody_can_listen_is_said_in_one_line(host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        cluster = Cluster(where=Where.LISTEN, host=host, port=taken.getsockname()[1])
        with pytest.raises(ClusterError, match="cannot listen there"), Engine(cluster, None, insecure=True):
            pass


def test_a_client_that_cannot_start_leaves_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(self: object, timeout: object = None) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(engines.Client, "_ensure_connected", broken)
    before = {thread for thread in threading.enumerate() if thread.name == "IO loop"}
    cluster = Cluster(where=Where.CONNECT, address="tcp://127.0.0.1:1")
    with pytest.raises(RuntimeError, match="broken"), Engine(cluster, None, insecure=True):
        pass
    assert {thread for thread in threading.enumerate() if thread.name == "IO loop"} <= before


def test_a_stop_does_not_cut_off_the_close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    close = engines.Client.close

    def closing(self: object, *given: object, **more: object) -> object:
        interrupts.stop(2)
        return close(self, *given, **more)

    with (
        pytest.raises(Interrupted),
        Engine(Cluster(where=Where.LISTEN, host="127.0.0.1", port=0), None, insecure=True) as engine,
    ):
        monkeypatch.setattr(engines.Client, "close", closing)
    assert (engine._client.status, engine._scheduler.status.name) == ("closed", "closed")


def test_other_keys_and_none_do_not_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_SECONDS", 2.0)
    ours, others = tmp_path / "ours", tmp_path / "others"
    make_keys(ours)
    make_keys(others)
    with Engine(Cluster(where=Where.LISTEN, host="127.0.0.1", port=0), ours) as engine:
        plain = engine.address.replace("tls://", "tcp://")
        for address, keys in ((engine.address, others), (plain, None)):
            with (
                pytest.raises(ClusterError, match="no answer"),
                Engine(Cluster(where=Where.CONNECT, address=address), keys, insecure=keys is None),
            ):
                pass
        with Engine(Cluster(where=Where.CONNECT, address=engine.address), ours) as joined:
            assert joined.members() == {}


def ask(model: Path, **values: object) -> RenderRequest:
    defaults = {
        "model": str(model),
        "prompt": "a boat",
        "size": 160,
        "num_inference_steps": 3,
        "guide": False,
        "seed": 1,
    }
    return RenderRequest(**(defaults | values))  # type: ignore[arg-type]


@pytest.fixture
def job(tiny: Path) -> SharedJob:
    family = families.open_family(ask(tiny))
    request = resolve(ask(tiny), family)
    (sample,) = family.example([0], (8, 8))
    texts = {text: Prompt(torch.zeros(sample.prompt.tokens.shape)) for text in plan_tiling(request, family).texts}
    return SharedJob(
        name="job", request=request, model_id=denoiser_id(Models(family)), reads_text=True, embeds=False, texts=texts
    )


def hello(job: SharedJob) -> Greeting:
    """The answer of a worker in this process to the requests of a canvas after the first."""
    family = families.open_family(ask(Path(job.request.model)))
    tile = Tile(torch.zeros(1, 4, 8, 8), plan_tiling(job.request, family).canvas_steps[0][0])
    opened = Greeting.from_json(tasks.open_job(np.frombuffer(job.to_bytes(), np.uint8)))
    if opened.refusal:
        return opened
    return Greeting.from_json(tasks.hello(job.name, 0, window_of(tile), tile.latents.numpy()))


def greet(job: SharedJob, max_ram_bytes: int, models: dict[str, str] | None = None) -> Greeting:
    """The answer of a worker with that ceiling, in this process."""
    with Budget(max_ram_bytes) as budget:
        bench = Bench(budget, models or {})
        tasks.begin(lambda: bench, max_ram_bytes)
        try:
            first = Greeting.from_json(tasks.open_ahead(replace(job, texts={}).to_bytes()))
            said = hello(job)
            # The ceiling that would do is measured anew, in a process that the first attempt has left larger.
            words, again = (re.sub(r"\d+MB$", "", each.refusal) for each in (first, said))
            assert words == again, "nothing large is sent in vain"
            tasks.close("another")
            assert list(bench.jobs) == ([] if said.refusal else [job.name])
            tasks.close(job.name)
            assert not bench.jobs
            return said
        finally:
            bench.close()


def test_a_worker_says_why_it_does_not_take_a_job(
    job: SharedJob, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = read_rss().now + 2_000_000_000
    ready = greet(job, room)
    assert not ready.refusal and ready.digest and ready.batch > 1
    assert greet(job, room).digest == ready.digest
    other = greet(job, room, {job.request.model: str(checkpoints / "tiny-sd2")})
    assert "is another model here" in other.refusal
    assert "/nowhere/x: no such folder" in greet(job, room, {job.request.model: "/nowhere/x"}).refusal
    small = greet(job, read_rss().now - 1)
    assert "the smallest --max-ram that works is" in small.refusal
    (tmp_path / "full").write_text("no folder, so nothing can be written there")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "full"))
    packed = replace(job, request=replace(job.request, precision=Precision.INT8, scratch=tmp_path))
    assert "full" in greet(packed, room).refusal, "int8 weights have no place there"
    theirs = job.to_bytes()
    monkeypatch.setattr(shared, "versions", lambda: {"tiler": "0.0", "torch": "0.0"})
    refused = Greeting.from_json(tasks.open_ahead(theirs))
    assert refused.refusal.startswith("other versions: tiler 0.0 here, ")


def test_a_job_is_opened_before_its_prompts_are_known(job: SharedJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its greeting finds the denoiser open; a job of another kind does not wait for one that has not come."""
    plan, planned = Bench._plan, list[str]()
    monkeypatch.setattr(Bench, "_plan", lambda bench, of: planned.append(of.name) or plan(bench, of))
    with Budget(read_rss().now + 2_000_000_000) as budget:
        bench = Bench(budget, {})
        tasks.begin(lambda: bench, budget.max_bytes)
        try:
            tasks.open_ahead(replace(job, texts={}).to_bytes())
            assert planned == ["job"] and not bench.jobs and bench.facts()["job"] == "job"
            assert not hello(job).refusal and planned == ["job"] and list(bench.jobs) == ["job"]
            tasks.open_ahead(replace(job, name="b").to_bytes())
            assert planned == ["job"], "it works"
            other = replace(job, name="c", request=replace(job.request, attention_window=8)).to_bytes()
            assert Greeting.from_json(tasks.open_ahead(other)).is_taken, "no prompts are sent to be refused"
            tasks.close("job")
            tasks.open_ahead(other)
            tasks.close("job")
            assert bench.facts()["job"] == "c"
            assert not hello(job).refusal and planned == ["job", "c", "job"] and list(bench.jobs) == ["job"]
            tasks.close("job")
            monkeypatch.delattr("tiler.cluster.bench.runner_on")
            assert hello(job).refusal and bench._streamer is None, "what fails is closed"
        finally:
            bench.close()


def test_jobs_share_a_worker_as_long_as_their_prompts_fit(job: SharedJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan has room for the prompts of three, or of fewer where the ceiling is too low."""
    monkeypatch.setattr("tiler.cluster.bench._FEW_BYTES", 0)
    planned, room = list[int](), 3
    plan_render = benches.plan_render

    def planning(*asked: Any, prompt_sets: int, **more: Any) -> RenderPlan:
        planned.append(prompt_sets)
        found = plan_render(*asked, prompt_sets=prompt_sets, **more)
        return found if prompt_sets <= room else replace(found, memory=replace(found.memory, max_bytes=1))

    monkeypatch.setattr("tiler.cluster.bench.plan_render", planning)
    with Budget(read_rss().now + 2_000_000_000) as budget:
        bench = Bench(budget, {})
        tasks.begin(lambda: bench, budget.max_bytes)
        try:
            long = {text: Prompt(torch.cat(2 * [one.tokens], dim=1)) for text, one in job.texts.items()}
            for room, expected in ((3, ["a", "b", "c"]), (2, ["a", "b"]), (1, ["a"])):
                planned.clear()
                for name in "abc":
                    tasks.open_job(np.frombuffer(replace(job, name=name).to_bytes(), np.uint8))
                assert list(bench.jobs) == expected and planned == list(range(3, room - 1, -1))
                bench.close()
            room = 3
            for name, texts in (("a", job.texts), ("b", long), ("c", job.texts)):
                tasks.open_job(np.frombuffer(replace(job, name=name, texts=texts).to_bytes(), np.uint8))
            assert list(bench.jobs) == ["a", "b"], "the second has two of the three places"
        finally:
            bench.close()


class FakeDecoder:
    """In place of the autoencoder of a job; a probe of ones fails."""

    opened: ClassVar[list[FakeDecoder]]
    is_under_way = False  # whether others wait for it

    def __init__(self, job: SharedJob, *more: object) -> None:
        self.job, self.is_open = job.name, True
        self.opened.append(self)

    def probe(self, statistics: bytes, latents: np.ndarray) -> np.ndarray:
        if latents.any():
            raise ClusterError("no memory")
        return latents

    def close(self) -> None:
        self.is_open = False


def test_a_worker_imports_the_lean_torch_before_it_reads_a_job(job: SharedJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading it imports torch, and 20 MB more unless the bench has done so."""
    done, read = list[str](), SharedJob.from_bytes

    def opener() -> Bench:
        done.append("bench")
        return Bench(Budget("1GB"), {})

    monkeypatch.setattr(SharedJob, "from_bytes", lambda data: done.append("job") or read(data))
    monkeypatch.setattr(Bench, "open_ahead", lambda bench, job: None)
    tasks.begin(opener, 10**9)
    assert not Greeting.from_json(tasks.open_ahead(job.to_bytes())).refusal
    assert done == ["bench", "job"]


def test_workers_import_torch_while_a_render_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that have joined; and a render that has a scheduler of its own has no workers yet."""
    done, told = list[str](), list[str]()

    class Connection:
        def __init__(self, cluster: Cluster, keys: Path | None, *, insecure: bool) -> None:
            assert cluster.address == "tcp://a:1" and insecure

        def __enter__(self) -> Connection:
            return self

        def __exit__(self, *error: object) -> None:
            told.append("closed")

        def members(self) -> dict[str, str]:
            return {"tcp://b:2": "b", "tcp://c:3": "c"}

        def tell(self, address: str, task: Callable[[], None]) -> None:
            told.append(address)
            task()

    monkeypatch.setattr("tiler.cluster.engine.Engine", Connection)
    tasks.begin(lambda: done.append("bench") or Bench(Budget("1GB"), {}), 10**9)
    for where in (None, "local:2", "listen"):
        run.wake(RenderRequest(prompt="x", cluster=where, insecure=True))
    assert not told and not tasks.has_worked()
    run.wake(RenderRequest(prompt="x", cluster="tcp://a:1", insecure=True))
    assert told == ["tcp://b:2", "tcp://c:3", "closed"] and done == ["bench"] and tasks.has_worked()


def test_a_job_is_read_without_a_copy_of_the_whole(job: SharedJob) -> None:
    large = {text: Prompt(torch.rand(1, 1000, 1000), torch.rand(1, 10)) for text in ("a boat", None)}
    data = np.frombuffer(replace(job, texts=large).to_bytes(), np.uint8)
    tracemalloc.start()
    try:
        found = SharedJob.from_bytes(data.data)
        assert data.nbytes < tracemalloc.get_traced_memory()[1] < 1.2 * data.nbytes
    finally:
        tracemalloc.stop()
    assert (found.name, found.texts.keys()) == (job.name, large.keys())
    for text, prompt in large.items():
        same = zip(found.texts[text], prompt, strict=True)
        assert all(one is not None and other is not None and torch.equal(one, other) for one, other in same)


def test_a_decoder_gives_way_to_a_canvas_and_stays_for_its_job(job: SharedJob, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = FakeDecoder.opened = list[FakeDecoder]()
    monkeypatch.setattr("tiler.cluster.bench.BandDecoder", FakeDecoder)

    def decoder(name: str, value: float = 0.0) -> Greeting:
        latents = np.full((1, 4, 8, 8), value, np.float32)
        said = Greeting.from_json(tasks.open_decoder(replace(job, name=name).to_bytes(), 1, (8, 8)))
        if said.refusal:
            return said
        return Greeting.from_json(tasks.hello_decoder(name, np.zeros(1, np.uint8), latents))

    with Budget(10**9) as budget:
        bench = Bench(budget, {})
        tasks.begin(lambda: bench, 10**9)
        try:
            assert not decoder("a").refusal and not decoder("a").refusal and decoder("b").is_taken
            assert Greeting.from_json(
                tasks.open_slabs(replace(job, name="b").to_bytes(), "decode", Decode.EXACT.value, (8, 8))
            ).is_taken
            assert tasks.run_slab("a", 0, Fetch()).is_closed, "it decodes bands"
            assert [one.is_open for one in opened] == [True]
            opened[0].is_under_way = True  # a slab: with it, all other slabs would be lost
            assert hello(job).is_taken and opened[0].is_open
            opened[0].is_under_way = False
            assert not hello(job).refusal and [one.is_open for one in opened] == [False] and decoder("b").is_taken
            tasks.close(job.name)
            assert decoder("b", 1.0).refusal == "no memory" and not opened[-1].is_open
            assert not decoder("c").refusal
            tasks.close("c")
            assert not opened[-1].is_open
        finally:
            bench.close()


def test_a_denoiser_is_set_aside_while_its_render_encodes(job: SharedJob, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = FakeDecoder.opened = list[FakeDecoder]()
    monkeypatch.setattr("tiler.cluster.bench.SlabCoder", FakeDecoder)
    family = families.open_family(ask(Path(job.request.model)))
    tile = Tile(torch.ones(1, 4, 8, 8), plan_tiling(job.request, family).canvas_steps[0][0])

    def encoder(canvas: str) -> Greeting:
        sent = replace(job, name=f"encoder of {canvas}").to_bytes()
        return Greeting.from_json(tasks.open_slabs(sent, "encode", Decode.EXACT.value, (8, 8), canvas))

    with Budget(read_rss().now + 2_000_000_000) as budget:
        bench = Bench(budget, {})
        tasks.begin(lambda: bench, budget.max_bytes)
        try:
            assert not hello(job).refusal
            before = tasks.predict("job", 0, [window_of(tile)], tile.latents.numpy())
            assert encoder("another").is_taken and bench._streamer is not None
            assert not encoder("job").refusal and bench._streamer is None and opened[0].is_open
            after = tasks.predict("job", 0, [window_of(tile)], tile.latents.numpy())
            assert before.predictions is not None and after.predictions is not None, after.error
            assert np.array_equal(before.predictions, after.predictions) and not opened[0].is_open
            assert not hello(replace(job, name="b")).refusal and encoder("job").is_taken, "another render works too"
        finally:
            bench.close()


def test_a_worker_writes_into_its_own_folder_or_one_that_is_here(
    job: SharedJob, tmp_path: Path, in_process: Callable[..., Ran]
) -> None:
    sent = replace(job, request=replace(job.request, scratch=Path("/none/of/this/machine")))
    with Budget(10**9) as budget:
        assert Bench(budget, {}, tmp_path)._of_here(sent).scratch_folder == tmp_path
        assert Bench(budget, {})._of_here(sent).scratch_folder == default_cache().parent
        here = replace(job, request=replace(job.request, scratch=tmp_path))
        assert Bench(budget, {})._of_here(here).scratch_folder == tmp_path
    ran = in_process("worker", "tcp://127.0.0.1:1", "--insecure", "--scratch", tmp_path / "none")
    assert ran.code == 2 and "--scratch" in ran.err and len(ran.err.splitlines()) == 1


def test_a_share_below_the_floor_is_refused_with_the_number_that_fits(tiny: Path, tmp_path: Path) -> None:
    floor = read_rss().now + 150_000_000  # of one more process like this one
    run = start(ask(tiny, output=tmp_path / "x.png"), Budget(int(3.5 * floor)), lambda event: None)
    share = ceilings.share_of(run, 1)
    with pytest.raises(BudgetRefused, match=r"local:[12] fits; 9 need --max-ram \d+MB") as refused:
        ceilings.share_of(run, 9)
    assert refused.value.exit_code == 4
    fits = int(str(refused.value).split("local:")[2].split()[0])
    assert ceilings.share_of(run, fits) <= share
    with pytest.raises(BudgetRefused):
        ceilings.share_of(run, fits + 1)


def test_a_preview_takes_its_memory_beside_the_workers(tiny: Path, tmp_path: Path) -> None:
    """The process of the canvas has no activations whose place it could take; workers make no previews."""
    make_checkpoint.make("taesd", tmp_path)
    said = {"preview": tmp_path / "p.png", "tiny_vae": str(tmp_path / "taesd"), "output": tmp_path / "x.png"}
    run = start(ask(tiny, **said), Budget("8GB"), lambda event: None)
    assert run.plan.preview_bytes > 10**6 and not ceilings.plan_of_worker(run, 10**9).preview_bytes
    without = replace(run, plan=replace(run.plan, preview_bytes=0))
    assert ceilings.share_of(without, 1) - ceilings.share_of(run, 1) == run.plan.preview_bytes


def test_the_connection_is_in_the_plan_of_every_phase(tiny: Path, tmp_path: Path) -> None:
    """Workers elsewhere open the model while prompts are encoded, and get the prompts while the guide is made."""
    said = {"output": tmp_path / "x.png", "guide": True, "insecure": True}
    sent, smallest = list[int](), list[int]()

    def counted(where: str) -> dict[str, int]:
        run = start(ask(tiny, cluster=where, **said), Budget("8GB"), lambda event: None)
        terms = {(phase.name, term.name): term.nbytes for phase in run.plan.memory.phases for term in phase.terms}
        prompts = terms["encode prompts", "prompts"]
        sent[:], smallest[:] = [SENT_PROMPTS * prompts], [run.plan.memory.smallest_bytes]
        (canvas,) = ceilings.plan_of_worker(run, 8 * 10**9).memory.phases
        (of_worker,) = (term.nbytes for term in canvas.terms if term.name == "prompts")
        assert of_worker == terms["canvas", "prompts"] + prompts, "as they arrived, and as they are used"
        return {name: nbytes for (name, what), nbytes in terms.items() if what == "cluster"}

    alone = start(ask(tiny, **said), Budget("8GB"), lambda event: None).plan.memory
    found = counted("listen:127.0.0.1:9")
    assert smallest[0] - alone.smallest_bytes >= CONNECTIONS_BYTES, "what a plan and a refusal name"
    assert set(found) == {"encode prompts", "guide", "guide picture", "canvas", "decode"}
    assert found["decode"] == CONNECTIONS_BYTES
    assert found["encode prompts"] == JOINED_BYTES
    assert found["guide"] == found["guide picture"] == JOINED_BYTES + sent[0]
    assert set(counted("local:1")) == {"canvas"}


def test_a_queue_divides_its_ceiling(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many canvases as fit, up to three; what is over goes to all alike, and nothing is promised twice."""
    run = start(ask(tiny, output=tmp_path / "x.png"), Budget("8GB"), lambda event: None)
    each = run.plan.memory.smallest_bytes + ceilings._SLACK
    plan = ceilings.plan_of_worker(run, 10**9)
    monkeypatch.setattr(ceilings, "plan_of_worker", lambda run, most: plan)  # it measures this process, which changes
    worker = plan.memory.smallest_bytes + ceilings._SLACK
    for text, workers, hosted in (
        ("tls://a:1", 0, 0),
        ("listen", 0, ceilings.HOST_BYTES + 100 * ceilings.EACH_BYTES),
        ("local:2", 2, ceilings.HOST_BYTES + 2 * ceilings.EACH_BYTES),
    ):
        least = each + workers * worker + hosted
        for ceiling, most in ((least + 1000, 1), (least + each + 1000, 2), (least + 9 * each, 3)):
            shares = ceilings.shares_of_queue(run, parse_cluster(text), ceiling)
            assert shares.most == most and shares.is_hosted == bool(hosted)
            assert shares.room_bytes >= most * each and shares.worker_bytes >= (worker if workers else 0)
            assert shares.room_bytes + workers * shares.worker_bytes + hosted <= ceiling
        with pytest.raises(BudgetRefused, match="the smallest --max-ram that works is"):
            ceilings.shares_of_queue(run, parse_cluster(text), least - 1000)


def test_what_a_user_may_type_wrong(in_process: Callable[..., Ran], tmp_path: Path) -> None:
    for words, code, said in (
        (("worker", "tls://a:1"), 2, "needs --keys FOLDER"),
        (("worker", "local:2"), 2, "is not a scheduler's address"),
        (("worker", "tcp://127.0.0.1:1", "--model", "x"), 2, "write NAME=PATH"),
        (("worker", "tcp://127.0.0.1:1"), 2, "take tls:// with --keys FOLDER"),
        (("cluster", "status", "tcp://127.0.0.1:1", "--keys", tmp_path), 2, "--keys works only with tls://"),
        (("render", "x", "--cluster", "nowhere"), 2, "is none of local:N, listen"),
        (("render", "x", "--cluster", "listen", "--keys", tmp_path), 2, "no such file; `tiler cluster keys"),
        (("cluster", "status", f"file:{tmp_path}/none.json"), 11, "holds no scheduler's address"),
    ):
        ran = in_process(*words)
        assert ran.code == code and said in ran.err, (words, ran)
    assert in_process("cluster", "keys", tmp_path / "keys").code == 0
    assert json.dumps(sorted(p.name for p in (tmp_path / "keys").iterdir())) == '["cert.pem", "key.pem"]'


def test_several_pictures_of_one_command_are_a_queue_of_the_cluster(
    in_process: Callable[..., Ran], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of `tiler batch` are: several are drawn at a time."""
    specs: list[supervise.Spec] = []
    monkeypatch.setattr(supervise, "run", lambda spec: specs.append(spec) or os.close(spec.rows) or 0)
    words = ("--model", tiny, "--cluster", "local:2", "--threads", 2, "--insecure")
    for several in (("--count", 2), ("--seed", "3,4")):
        assert in_process("render", "a boat", *words, *several).code == 0
    assert [(s.cluster, s.keys, s.insecure, s.threads) for s in specs] == 2 * [("local:2", "", True, 2)]


def test_connections_remember_no_tiles() -> None:
    """By default each of dask's connections remembers its last 1,000 messages: 320 MB for a worker with five tiles per
    task."""
    from distributed.batched import BatchedSend

    assert BatchedSend(interval=1).recent_message_log.maxlen == 1


def test_a_scheduler_remembers_no_task(tmp_path: Path) -> None:
    """A computation of dask's keeps a record of each task until none is left, and a queue may never be idle; by default
    100,000 keys are remembered with what they begin with."""
    make_keys(tmp_path / "keys")
    with Engine(Cluster(where=Where.LISTEN, host="127.0.0.1", port=0), tmp_path / "keys") as engine:
        scheduler = engine._scheduler
        assert (scheduler.computations.maxlen, scheduler.transition_log.maxlen) == (0, 1)
    for module in (distributed.scheduler, distributed.client, distributed.worker_state_machine):
        if (split := getattr(module, "key_split", None)) is not None:
            assert split.cache_info().maxsize == 100
    assert distributed.scheduler.key_split("tiler-Client-1a2b3c4d-7") == "tiler-Client"
