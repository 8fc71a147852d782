"""Renders with worker processes on the loopback interface: equal bytes, ceilings, refused connections, and recovery
when something breaks."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

from tests.cluster.conftest import CEILING, Drawn, Fleet, draw
from tests.conftest import Ran
from tiler import events
from tiler.cluster.status import workers
from tiler.request import Lora, Precision
from tiler.request.cluster import Cluster, Where


@pytest.fixture(scope="module")
def alone(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    """The render of a single process."""
    return draw(tiny, tmp_path_factory.mktemp("alone"))


def test_two_workers_make_the_picture_of_one_process(fleet: Fleet, tiny: Path, tmp_path: Path, alone: Drawn) -> None:
    drawn = draw(tiny, tmp_path, **fleet.through)
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


def test_two_renders_at_once_share_the_workers(fleet: Fleet, tiny: Path, tmp_path: Path, alone: Drawn) -> None:
    words = [
        "render", "a boat", "--model", tiny, "--size", 160, "--steps", 3, "--seed", 11, "--no-guide", "--json", "-o",
        tmp_path / "other.png", "--save-latents", tmp_path / "other.safetensors", "--no-metadata", "--quiet",
        "--cluster", fleet.address, "--keys", fleet.keys, "--max-ram", "2GB", "--cluster-only",
    ]  # fmt: skip
    command = [sys.executable, "-m", "tiler", *map(str, words)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    other: list[subprocess.Popen[bytes]] = []

    def begin(event: events.Progress) -> None:
        """Start the other render while this one runs, and wait until it has started."""
        if not other:
            other.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE))
            for _ in range(600):
                found = workers(Cluster(where=Where.CONNECT, address=fleet.address), fleet.keys, insecure=False)
                if any(len(worker["job"].split()) == 2 for worker in found):
                    return
                time.sleep(0.1)
            raise AssertionError("no worker has two jobs")

    drawn = draw(tiny, tmp_path / "one", begin, **fleet.through)
    told, _ = other[0].communicate(timeout=300)
    assert torch.equal(drawn.latents, alone.latents) and drawn.picture == alone.picture
    assert (tmp_path / "other.png").read_bytes() == alone.picture
    assert drawn.workers and json.loads(told)["workers"]
    assert not [note for note in drawn.notes if "left out" in note]


def test_nobody_listens_where_nobody_was_asked_to(fleet: Fleet) -> None:
    def listening(process: psutil.Process) -> list[str]:
        return [c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]

    assert listening(psutil.Process()) == ["127.0.0.1"], "the scheduler's port, and no dashboard"
    for process in fleet.processes.values():
        assert listening(psutil.Process(process.pid)) == ["127.0.0.1"]


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
        tmp_path / "x.png", "--save-latents", tmp_path / "x.safetensors", "--no-metadata", "--cluster", "local:2",
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
    assert len(workers) == 2 and not [worker for worker in workers if worker.is_running()]
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


def test_a_plan_of_local_workers_tells_what_each_would_do(tiny: Path, in_process: Callable[..., Ran]) -> None:
    ran = in_process(
        "plan", "a boat", "--model", tiny, "--size", 160, "--no-guide", "--cluster", "local:2", env={"COLUMNS": "80"}
    )
    assert ran.code == 0, ran.err
    lines = ran.out.splitlines()
    assert re.fullmatch(r" +local-2 +\d+\.\d s a tile, \d+ tiles?, idle \d+%", next(x for x in lines if "local-2" in x))
    assert "two canvases at the same time: " in ran.out and max(map(len, lines)) <= 80
