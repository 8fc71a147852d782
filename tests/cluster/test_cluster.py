"""Renders with worker processes on the loopback interface: equal bytes, ceilings, refused connections, and recovery
when something breaks."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import dask
import numpy as np
import psutil
import pytest
import torch
from diffusers import UNet2DConditionModel
from distributed.utils import LoopRunner
from PIL import Image
from safetensors.torch import save_file

from tests.cluster.conftest import CEILING, Drawn, Fleet, draw, free_port, open_fleet, wait_for_port
from tests.conftest import Ran
from tiler import events, phases
from tiler.cli import supervise
from tiler.cluster import ceilings, slabs
from tiler.cluster.engine import Engine
from tiler.cluster.run import Greeted
from tiler.cluster.shared import Estimate
from tiler.cluster.status import workers
from tiler.decoding import frozen, lockstep
from tiler.decoding.messages import Orders, Report
from tiler.denoiser import open_denoiser
from tiler.diffusion.prompts import Prompts
from tiler.errors import TilerError
from tiler.render_run import RenderRun
from tiler.request import Decode, Lora, Precision
from tiler.request.cluster import Cluster, Where


@pytest.fixture(scope="module")
def alone(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    """The render of a single process."""
    return draw(tiny, tmp_path_factory.mktemp("alone"))


def test_two_workers_make_the_picture_of_one_process(
    fleet: Fleet, tiny: Path, tmp_path: Path, alone: Drawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them is a plain dask worker with the preload module. Both open the model before the prompts are encoded,
    and are greeted before the guide is made."""
    encode, guide = phases.encode_prompts, phases.make_guide

    def wait(until: Callable[[dict[str, Any]], object]) -> list[dict[str, Any]]:
        for _ in range(200):
            found = workers(Cluster(where=Where.CONNECT, address=fleet.address), fleet.keys, insecure=False)
            if all(map(until, found)):
                return found
            time.sleep(0.2)  # each question connects anew
        raise AssertionError(found)

    def encoding(run: RenderRun) -> Prompts:
        assert len(wait(lambda one: one["job"])) == 2
        return encode(run)

    def guiding(run: RenderRun, prompts: Prompts) -> torch.Tensor | None:
        wait(lambda one: one["digest"])
        return guide(run, prompts)

    monkeypatch.setattr(phases, "encode_prompts", encoding)
    monkeypatch.setattr(phases, "make_guide", guiding)
    drawn = draw(tiny, tmp_path, **fleet.through)
    idle = wait(lambda one: not one["job"])
    assert all(one["rss_bytes"] < 250_000_000 for one in idle), "about 210 MB, as `tiler worker --help` says"
    assert torch.equal(drawn.latents, alone.latents) and drawn.picture == alone.picture
    assert set(drawn.workers) == {"a", "b"}
    assert sum(worker["tiles"] for worker in drawn.workers.values()) >= 3 * drawn.report["tiles"]
    assert all(0 < worker["peak_rss_bytes"] < CEILING for worker in drawn.workers.values())


def test_in_int8_and_with_a_lora_too(fleet: Fleet, tiny: Path, tmp_path: Path) -> None:
    weight = "unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    stored = UNet2DConditionModel.from_pretrained(tiny / "unet", variant="fp16", torch_dtype=torch.float32)
    layer = stored.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q.weight
    generator = torch.Generator().manual_seed(3)
    lora = {
        f"lora_{weight}.lora_down.weight": torch.randn(4, layer.shape[1], generator=generator),
        f"lora_{weight}.lora_up.weight": torch.randn(layer.shape[0], 4, generator=generator),
    }
    save_file(lora, tmp_path / "ink.safetensors")
    loras = (Lora(file=tmp_path / "ink.safetensors", strength=0.5),)
    values = {"precision": Precision.INT8, "cache_dir": tmp_path / "packed", "loras": loras}
    (tmp_path / "packed").mkdir()
    one, many = draw(tiny, tmp_path / "1", **values), draw(tiny, tmp_path / "2", **values, **fleet.through)
    assert torch.equal(one.latents, many.latents) and many.workers
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) == 1, "all take the file that is there"


def test_they_also_draw_the_smaller_pictures_that_come_first(fleet: Fleet, tiny: Path, tmp_path: Path) -> None:
    values = {"guide": True, "guide_upscale": "progressive", "size": 176, "num_inference_steps": 2}
    one, many = draw(tiny, tmp_path / "1", **values), draw(tiny, tmp_path / "2", **values, **fleet.through)
    assert torch.equal(one.latents, many.latents) and one.picture == many.picture and many.workers
    assert [phase["name"] for phase in many.report["phases"]].count("canvas") == 2


def test_a_queue_draws_several_pictures_at_a_time(
    fleet: Fleet, tiny: Path, tmp_path: Path, alone: Drawn, in_process: Callable[..., Ran]
) -> None:
    """From one pool of tiles; a bad row stops none, and what is done is not drawn again."""
    rows = [{"seed": 11, "output": "one.png"}, {"size": 0}, {"seed": 11, "output": "two.png"}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps({"prompt": "a boat"} | row) + "\n" for row in rows))
    words = [
        "batch", tmp_path / "q.jsonl", "--model", tiny, "--size", 160, "--steps", 3, "--no-guide", "--no-metadata",
        "--cluster", fleet.address, "--keys", fleet.keys, "--cluster-only", "--max-ram", "2GB", "--nice", 0,
        "--threads", 1,
    ]  # fmt: skip
    ran = in_process(*words)
    assert (ran.code, ran.out.splitlines()[0]) == (2, "2 done, 1 failed (row 2)"), ran.err
    assert all((tmp_path / name).read_bytes() == alone.picture for name in ("one.png", "two.png"))
    assert "row 1: note: seed 11" in ran.err and "left out" not in ran.err
    results = [json.loads(line) for line in (tmp_path / "q.jsonl.results.jsonl").read_text().splitlines()]
    drawn = [line for line in results if line["status"] == "done"]
    assert drawn[0]["seconds"] + drawn[1]["seconds"] > 1.5 * max(line["seconds"] for line in drawn)
    assert abs(int(drawn[0]["started"][-3:-1]) - int(drawn[1]["started"][-3:-1])) % 60 in (0, 1, 59), (
        "one after another"
    )
    again = in_process(*words)
    assert (again.code, again.out.splitlines()[0]) == (2, "2 skipped, 1 failed (row 2)"), again.err


def test_a_queue_has_a_scheduler_and_workers_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For local:N and listen; they end with it, and an idle worker is small."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    asked = {"cluster": "local:1", "keys": "", "insecure": False, "folder": str(tmp_path), "worker_bytes": CEILING}
    with supervise._asking("tiler.cli.host", asked | {"threads": 1}) as process:
        host = supervise._answer(process)
        with Engine(Cluster(where=Where.CONNECT, address=host["address"]), Path(host["keys"])) as engine:
            while "local-1" not in (engine.members() or {}).values():
                time.sleep(0.05)
            (worker,) = psutil.Process(process.pid).children()
            assert psutil.Process(process.pid).memory_info().rss < ceilings.HOST_BYTES
            assert worker.memory_info().rss < 70_000_000, "before its first job"
    assert process.returncode == 0 and not worker.is_running()
    taken = asked | {"cluster": "listen:127.0.0.1:1", "threads": 1}
    with supervise._asking("tiler.cli.host", taken) as process, pytest.raises(TilerError, match="--keys"):
        supervise._answer(process)


def test_workers_over_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SSHCluster starts them with the options of a plain dask worker."""
    asyncssh = pytest.importorskip("asyncssh")
    server = shutil.which("sshd") or "/usr/sbin/sshd"
    if not Path(server).exists():
        pytest.skip("no sshd to start workers with")
    from distributed.deploy.ssh import Worker

    for name in ("host", "user"):
        key = asyncssh.generate_private_key("ssh-ed25519")
        key.write_private_key(str(tmp_path / name))
        key.write_public_key(str(tmp_path / f"{name}.pub"))
        (tmp_path / name).chmod(0o600)
    port = free_port()
    settings = {
        "Port": port, "ListenAddress": "127.0.0.1", "HostKey": tmp_path / "host", "StrictModes": "no", "UsePAM": "no",
        "AuthorizedKeysFile": tmp_path / "user.pub", "PidFile": "none", "PasswordAuthentication": "no",
    }  # fmt: skip
    (tmp_path / "sshd_config").write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
    with suppress(OSError):  # a server that root starts wants it
        Path("/run/sshd").mkdir(exist_ok=True)
    with open_fleet(tmp_path) as fleet:
        fleet.run("sshd", [server, "-D", "-e", "-f", str(tmp_path / "sshd_config")])
        pair = {"cert": str(fleet.keys / "cert.pem"), "key": str(fleet.keys / "key.pem")}
        with dask.config.set({
            "distributed.comm.require-encryption": True, "distributed.comm.tls.ca-file": pair["cert"],
            "distributed.comm.tls.worker": pair,
        }):  # fmt: skip
            worker = Worker(
                fleet.address, "127.0.0.1",
                {"port": port, "known_hosts": None, "client_keys": [str(tmp_path / "user")]},
                {"nthreads": 1, "memory_limit": 0, "name": "far", "preload": ["tiler.cluster.preload"],
                 "preload_argv": [["--max-ram", "700MB", "--threads", "1"]], "dashboard": False},
                worker_class="distributed.Worker",
                remote_python=f"env PYTHONPATH={Path(__file__).parents[2]} {sys.executable}",
            )  # fmt: skip
            wait_for_port(port)
            loop = LoopRunner()
            loop.start()
            try:
                loop.run_sync(worker.start)
                fleet.wait(lambda joined: "far" in joined)
                (facts,) = workers(Cluster(where=Where.CONNECT, address=fleet.address), fleet.keys, insecure=False)
                assert (facts["name"], facts["max_ram_bytes"], facts["error"]) == ("far", 700_000_000, "")
                loop.run_sync(worker.close)
            finally:
                loop.stop()


def test_idle_workers_decode_bands(fleet: Fleet, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a picture that is wider than one; the coordinator writes them in order."""
    monkeypatch.setattr(frozen, "BAND", 50)  # latents
    values = {"decode": Decode.FROZEN, "size": None, "width": 640, "height": 96, "num_inference_steps": 1}
    one, many = draw(tiny, tmp_path / "1", **values), draw(tiny, tmp_path / "2", **values, **fleet.through)
    assert many.picture == one.picture and not one.report["decoders"]
    decoded = many.report["decoders"]
    assert sum(worker["rows"] for worker in decoded) == 96 * len(frozen.bands(80)) == 96 * 4
    assert all(0 < worker["peak_rss_bytes"] < CEILING for worker in decoded)


LAYERS: dict[str, Any] = {"size": 512, "num_inference_steps": 1, "decode": Decode.EXACT, "precision": Precision.FP32}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    """A picture that is decoded layer by layer, by one process."""
    return draw(Path("mini"), tmp_path_factory.mktemp("whole"), **LAYERS)


def test_three_idle_workers_decode_slabs(
    fleet: Fleet, whole: Drawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the memory that is planned for their messages, each of which is held as it comes and as it is sent."""
    monkeypatch.setattr(slabs, "_WORTH", 0.0)  # however slow they are at the moment
    monkeypatch.setattr(lockstep, "LEAST_ROWS", 16)  # of latents: the picture has a slab for each
    monkeypatch.setattr(slabs, "FEWEST", 3)
    held, teams = list[int](), list[set[str]]()

    def counting(tell: str) -> Callable[..., Any]:
        original = getattr(slabs.Slabs, tell)

        def told(self: slabs.Slabs, said: Sequence[Any]) -> list[Report]:
            reports: list[Report] = original(self, said)
            held.extend(sum(len(pickle.dumps(each)) for each in messages) for messages in (said, reports))
            teams.append({member.name for member in self._team})
            return reports

        return told

    for tell in ("begin", "go_on"):
        monkeypatch.setattr(slabs.Slabs, tell, counting(tell))
    fleet.start("c")
    many = draw(Path("mini"), tmp_path, **LAYERS, **fleet.through)
    fleet.end("c")
    assert many.picture == whole.picture and not whole.report["decoders"]
    assert all(team == {"a", "b", "c"} for team in teams)
    decoded = many.report["decoders"]
    assert len(decoded) > 1 and sum(worker["rows"] for worker in decoded) == 512
    assert all(0 < worker["peak_rss_bytes"] < CEILING for worker in decoded)
    assert max(now + before for now, before in pairwise(held)) <= lockstep.held_bytes(3)
    fleet.wait(lambda joined: joined == {"a", "b"})


NARROW: dict[str, Any] = LAYERS | {"size": None, "width": 128, "height": 512}


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    """A quarter of such a picture: two slabs, though all rows of the last pass are in one."""
    return draw(Path("mini"), tmp_path_factory.mktemp("narrow"), **NARROW)


def test_a_row_of_a_queue_is_decoded_by_its_workers(
    fleet: Fleet, narrow: Drawn, tmp_path: Path, in_process: Callable[..., Ran]
) -> None:
    (tmp_path / "q.jsonl").write_text(json.dumps({"prompt": "a boat", "seed": 11, "output": "one.png"}) + "\n")
    ran = in_process(
        "batch", tmp_path / "q.jsonl", "--model", "mini", "--width", 128, "--height", 512, "--steps", 1, "--no-guide",
        "--no-metadata", "--decode", "exact", "--precision", "fp32", "--cluster", fleet.address, "--keys", fleet.keys,
        "--max-ram", "2GB", "--nice", 0, "--threads", 1,
    )  # fmt: skip
    assert ran.code == 0 and (tmp_path / "one.png").read_bytes() == narrow.picture, ran.err
    # Both decode, unless other programs make them slower together than one process.
    assert all(ran.err.count(f"note: worker {name} has joined") == 2 for name in "ab"), ran.err
    assert "fewer than two workers" not in ran.err


def test_workers_of_a_render_that_listens_decode(
    fleet: Fleet, narrow: Drawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They come late: it does not ask for them before."""
    monkeypatch.setattr(
        "tiler.cluster.run.workers_of", lambda run: nullcontext(lambda prompts: nullcontext(Greeted(open_denoiser)))
    )
    monkeypatch.setattr(slabs, "_WORTH", 0.0)  # however slow they are at the moment
    port = free_port()
    for name in ("d", "e"):
        command = [sys.executable, "-m", "tiler", "worker", f"tls://127.0.0.1:{port}", "--keys", str(fleet.keys)]
        fleet.run(name, [*command, "--name", name, "--max-ram", str(CEILING), "--threads", "1", "--quiet"])
    many = draw(Path("mini"), tmp_path, **NARROW, cluster=f"listen:127.0.0.1:{port}", keys=fleet.keys)
    assert many.picture == narrow.picture and many.report["decoders"]
    assert all(any(note.startswith(f"worker {name} has joined") for note in many.notes) for name in "de")
    for name in ("d", "e"):
        fleet.end(name)


def kill_in_tenth_pass(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the worker with the first slab be killed; its name is the first of those returned, once it is known."""
    go_on, seen = slabs.Slabs.go_on, list[str]()

    def killing(self: slabs.Slabs, orders: Sequence[Orders]) -> list[Report]:
        seen.append(self._team[0].name)
        if len(seen) == 10:
            fleet.end(seen[0])
        return go_on(self, orders)

    monkeypatch.setattr(slabs.Slabs, "go_on", killing)
    return seen


def test_a_worker_that_is_killed_while_it_decodes_changes_no_byte(
    fleet: Fleet, whole: Drawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This process decodes the picture, since one worker alone does not decode faster."""
    monkeypatch.setattr(slabs, "_WORTH", 0.0)  # however slow they are at the moment
    seen = kill_in_tenth_pass(fleet, monkeypatch)
    many = draw(Path("mini"), tmp_path, **LAYERS, **fleet.through)
    assert many.picture == whole.picture and f"worker {seen[0]} is gone" in many.notes
    assert any(note.startswith("fewer than two workers are ready") for note in many.notes)
    fleet.start(seen[0])


@pytest.fixture(scope="module")
def guided(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The options of a render that begins with a user's picture, enlarged."""
    picture = tmp_path_factory.mktemp("guide") / "guide.png"
    colours = np.random.default_rng(0).integers(0, 255, (20, 6, 3), np.uint8)
    Image.fromarray(colours).resize((48, 160)).save(picture)
    guide = {"guide": True, "guide_image": picture, "strength": 0.5, "num_inference_steps": 2}
    return guide | {"size": None, "width": 96, "height": 512, "decode": Decode.EXACT}


@pytest.fixture(scope="module")
def guided_alone(tiny: Path, guided: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    return draw(tiny, tmp_path_factory.mktemp("guided"), **guided)


@pytest.fixture
def worthwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers encode however slow they are at the moment."""
    monkeypatch.setattr(slabs, "_WORTH", 0.0)
    monkeypatch.setattr(slabs, "slab_seconds", lambda *asked: -60.0)


def test_workers_encode_the_picture_of_the_guide_and_then_predict_tiles(
    fleet: Fleet, tiny: Path, guided: dict[str, Any], guided_alone: Drawn, tmp_path: Path, worthwhile: None
) -> None:
    """Their denoisers are set aside meanwhile."""
    many = draw(tiny, tmp_path, **guided, **fleet.through)
    assert torch.equal(many.latents, guided_alone.latents) and many.picture == guided_alone.picture
    encoded = many.report["encoders"]
    assert not guided_alone.report["encoders"]
    assert {worker["name"] for worker in encoded} == {"a", "b"}
    assert all(100 < worker["rows"] < 400 for worker in encoded)
    assert all(0 < worker["peak_rss_bytes"] < CEILING for worker in encoded)
    assert many.workers and not [note for note in many.notes if "left out" in note]


def test_a_worker_that_is_killed_while_it_encodes_changes_no_byte(
    fleet: Fleet, tiny: Path, guided: dict[str, Any], guided_alone: Drawn, tmp_path: Path, worthwhile: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The other one, which had set its denoiser aside, predicts tiles."""
    seen = kill_in_tenth_pass(fleet, monkeypatch)
    many = draw(tiny, tmp_path, **guided, **fleet.through)
    assert torch.equal(many.latents, guided_alone.latents) and many.picture == guided_alone.picture
    assert not many.report["encoders"] and set(many.workers) == {"a", "b"} - {seen[0]}
    assert any(note.endswith("had a part of the picture; this process encodes alone") for note in many.notes)
    fleet.start(seen[0])


def test_nobody_listens_where_nobody_was_asked_to(fleet: Fleet) -> None:
    def listening(process: psutil.Process) -> list[str]:
        return [c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]

    assert listening(psutil.Process()) == ["127.0.0.1"], "the scheduler's port, and no dashboard"
    assert listening(psutil.Process(fleet.processes["a"].pid)) == ["127.0.0.1"]


def test_a_worker_that_is_killed_changes_no_byte(fleet: Fleet, tiny: Path, tmp_path: Path, alone: Drawn) -> None:
    def kill(event: events.Progress) -> None:
        if event.done > event.total // 3 and "b" in fleet.processes:
            fleet.end("b")

    drawn = draw(tiny, tmp_path, kill, **fleet.through)
    assert torch.equal(drawn.latents, alone.latents)
    assert "worker b is gone" in drawn.notes


def test_ctrl_c_ends_all_processes_and_the_job_goes_on_without_a_cluster(
    tiny: Path, tmp_path: Path, alone: Drawn
) -> None:
    words = [
        "render", "a boat", "--model", tiny, "--size", 160, "--steps", 3, "--seed", 11, "--no-guide", "-f", "-o",
        tmp_path / "x.png", "--save-latents", tmp_path / "x.safetensors", "--no-metadata", "--cluster", "local:1",
        "--max-ram", "1.5GB", "--log-json",
    ]  # fmt: skip
    command = [sys.executable, "-m", "tiler", *map(str, words)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while '"name": "canvas", "done": ' not in (line := process.stderr.readline()):
            assert line, "the render has ended"
        workers = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(60) == 130, rest
    assert len(workers) == 1 and not [worker for worker in workers if worker.is_running()]
    assert "the job is saved at canvas step" in rest
    drawn = draw(tiny, tmp_path)
    assert any(note.startswith("continuing at canvas step") for note in drawn.notes)
    assert torch.equal(drawn.latents, alone.latents)


def test_a_plan_asks_the_workers_how_fast_they_would_be(
    fleet: Fleet, tiny: Path, in_process: Callable[..., Ran]
) -> None:
    words = ("plan", "a boat", "--model", tiny, "--size", 160, "--steps", 3, "--no-guide")
    facts = in_process(*words, "--cluster", fleet.engine.address, "--keys", fleet.keys, "--json").json
    found = {worker["name"]: worker for worker in facts["cluster"]["workers"]}
    assert set(found) == set(fleet.processes) and not any(worker["problem"] for worker in found.values())
    assert sum(worker["tiles"] for worker in found.values()) == 3 * facts["tiles"]
    assert all(0 < worker["seconds_per_tile"] < 10 and 0 <= worker["idle"] < 1 for worker in found.values())
    assert facts["cluster"]["pair_seconds"] <= 2.001 * facts["cluster"]["canvas_seconds"]


def test_a_plan_says_how_long_workers_would_encode_and_decode(
    fleet: Fleet, in_process: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = {name: Estimate(seconds=1e-6, instructions="x") for name in "ab"}
    monkeypatch.setattr("tiler.cluster.outlook._asked", lambda *asked: fast)
    words = ("plan", "a boat", "--model", "mini", "--size", 2048, "--decode", "exact", "--steps", 2)
    ran = in_process(*words, "--cluster", fleet.address, "--keys", fleet.keys)
    said = r"; encoding the guide 1 s, or \d+ (s|min); decoding 3 s, or \d+ (s|min)\b"
    assert re.search(said, " ".join(ran.out.split())), ran


def test_a_plan_of_local_workers_tells_what_each_would_do(tiny: Path, in_process: Callable[..., Ran]) -> None:
    ran = in_process(
        "plan", "a boat", "--model", tiny, "--size", 160, "--no-guide", "--cluster", "local:2", env={"COLUMNS": "80"}
    )
    assert ran.code == 0, ran.err
    lines = ran.out.splitlines()
    assert re.fullmatch(r" +local-2 +\d+\.\d s a tile, \d+ tiles?, idle \d+%", next(x for x in lines if "local-2" in x))
    assert "two canvases at the same time: " in ran.out and max(map(len, lines)) <= 80
