"""The process of a queue: its memory, the rows that it leaves to other machines, and the rows that count as done."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from tests.jobs.test_folder import ask, roomy
from tiler import events, render
from tiler.ahead import encode_ahead
from tiler.cli import queues, supervise
from tiler.cli import render as cli_render
from tiler.cli.listening import Listener
from tiler.cli.terminal import prepare_signals
from tiler.errors import BudgetExceeded, BudgetRefused
from tiler.jobs import claims
from tiler.jobs.checked import Checked, Tally
from tiler.jobs.drawing import BESIDE, Drawings, Ended
from tiler.jobs.queue import NoCluster, Queue, Together
from tiler.jobs.results import Results, file_of
from tiler.jobs.rows import Row
from tiler.memory.budget import Budget
from tiler.weights.encoders import has_large_encoder

COMMON = ("--size", 64, "--steps", 1, "--nice", 0, "--max-ram", "1GB")


def queue_of(folder: Path, **values: Any) -> Queue:
    results = Results(folder / "q.jsonl.results.jsonl", "q.jsonl", shared=bool(values.get("shared")))
    return Queue(root=folder, results=results, max_ram_bytes=1, **values)


def row(folder: Path, number: int, **values: Any) -> Checked:
    name = f"{number}.png"
    return Checked(row=number, words=(), output=name, job=str(folder / f"{name}.tiler"), digest=number, **values)


def test_the_process_of_a_queue_stays_small(tmp_path: Path) -> None:
    """At most 20 MB for any number of rows: it imports neither the code that reads options nor the code that draws."""
    (tmp_path / "q.jsonl").write_text('{"prompt": "a", "size": 0}\n' * 600)
    reader = {"file": "q.jsonl", "root": ".", "defaults": [], "name": "{index}.png"}
    spec = supervise.Spec(root=".", results="r.jsonl", file="q.jsonl", max_ram_bytes=10**9, reader=reader, silent=True)
    program = (
        "import sys, json; from tiler.cli import supervise\n"
        "code = supervise.run(supervise.Spec(**json.loads(sys.argv[1])))\n"
        "mark = next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1]\n"
        "print(code, int(mark) * 1024, sorted({'typer', 'torch', 'hashlib', 'psutil'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", program, json.dumps(asdict(spec))]
    told = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, check=True)
    code, peak, imported = told.stdout.split(maxsplit=2)
    assert (code, imported.strip()) == ("2", "[]") and int(peak) < 20_000_000
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 600


def test_a_picture_that_has_its_name_but_no_line_is_done(in_process: Any, tiny: Path, tmp_path: Path) -> None:
    """As a kill between the two leaves it. The queue's own process is started as a user starts it."""
    (tmp_path / "q.txt").write_text("a boat\n")
    common = ["--model", tiny, *COMMON]
    drawn = in_process("render", "a boat", "-o", "001-a-boat.png", "--seed", 3, "--keep-job", *common[:6])
    assert drawn.code == 0, drawn.err
    made = (tmp_path / "001-a-boat.png").stat().st_mtime_ns
    ran = subprocess.run(
        [sys.executable, "-m", "tiler", "batch", "q.txt", "--seed", "3", *map(str, common)],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (ran.returncode, ran.stdout.splitlines()[0]) == (0, "1 done"), ran.stderr
    assert (tmp_path / "001-a-boat.png").stat().st_mtime_ns == made
    assert {path.name for path in tmp_path.iterdir()} == {"q.txt", "q.txt.results.jsonl", "001-a-boat.png"}
    assert json.loads((tmp_path / "q.txt.results.jsonl").read_text())["seed"] == 3


def test_a_row_that_is_appended_while_others_are_drawn_is_drawn_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row that cannot be drawn is reported before any other is drawn."""
    file, drawn = tmp_path / "q.txt", list[int]()
    file.write_text("a\n--nonsense\n")

    def draw(queue: Queue, turn: Any) -> None:
        assert queue.tally.failed == [2]
        drawn.append(turn.row.row)
        if len(drawn) < 3:
            with file.open("a") as more:
                more.write("b\n")

    monkeypatch.setattr(Queue, "_draw", draw)
    reader = {"file": str(file), "root": str(tmp_path), "defaults": [], "name": "{index}.png"}
    spec = supervise.Spec(
        root=str(tmp_path), results=str(file_of(file)), file="q.txt", max_ram_bytes=10**9, reader=reader
    )
    assert supervise.run(spec) == 2 and drawn == [1, 3, 4]


def test_seeds_that_were_drawn_are_found_again(
    in_process: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command continues with the same pictures; another command draws other seeds."""
    outputs: list[list[str]] = []

    def stopped(spec: supervise.Spec) -> int:
        with os.fdopen(spec.rows, "rb") as file:
            file.seek(0)
            outputs.append([json.loads(line)["output"] for line in file])
        return 130

    monkeypatch.setattr(supervise, "run", stopped)
    command = ["render", "a boat", "--size", 64, "-o", "x-{seed}.png"]
    for count in (3, 3, 2):
        assert in_process(*command, "--count", count).code == 130
    assert outputs[0] == outputs[1] and len(set(outputs[0])) == 3
    assert not set(outputs[2]) & set(outputs[0])


def test_advice_on_the_ceiling_counts_the_process_of_the_queue(in_process: Any, tiny: Path, tmp_path: Path) -> None:
    def smallest(env: dict[str, str]) -> int:
        ran = in_process("render", "x", "--model", tiny, "--size", 64, "--max-ram", "30MB", env=env)
        assert ran.code == 4, ran.err
        return int(ran.err.split("smallest --max-ram that works is ")[1].split("MB")[0])

    alone = smallest({})
    assert abs(smallest({BESIDE: "20000000"}) - alone - 20) <= 8  # what the tests' process takes meanwhile


def test_a_refused_row_names_the_ceiling_that_was_given(in_process: Any, tiny: Path) -> None:
    """Its process leaves the error to the process of the queue."""
    command = ["render", "x", "--model", tiny, "--size", 64, "--max-ram", "30MB", "--json"]
    ran = in_process(*command, env={BESIDE: "20000000"})
    assert ran.code == 4 and "phase " not in ran.err and "tiler:" not in ran.err
    named = "97% of 10 MB (the ceiling of 30 MB less 20 MB for the queue's other processes); the smallest"
    assert named in ran.json["error"] and "\n" not in ran.json["error"] and ran.json["smallest_bytes"] > 10**7
    ran = in_process(*command)
    _, *table, last = ran.err.splitlines()  # a note comes first
    assert ran.code == 4 and table[0].startswith("phase ") and last == f"tiler: {ran.json['error']}"
    with (
        pytest.raises(BudgetExceeded, match=r"^20 MB \(the ceiling of 30 MB less 10 MB"),
        Budget("30MB", beside_bytes=10**7) as b,
    ):
        b.check("canvas")


def test_a_row_belongs_to_one_machine(tmp_path: Path) -> None:
    job = tmp_path / "x.png.tiler"
    assert claims.claim(job) and not claims.claim(job)
    old = time.time() - 16 * 60
    os.utime(job / claims.OWNER, (old, old))
    claims.touch(job)
    assert not claims.claim(job)  # its owner is at work
    os.utime(job / claims.OWNER, (old, old))
    assert claims.claim(job) and not claims.claim(job)
    (job / "state-0.safetensors").write_text("x")
    claims.release(job)
    assert [path.name for path in job.iterdir()] == ["state-0.safetensors"]
    assert claims.claim(job)  # what another machine has saved goes on here


def test_a_shared_queue_leaves_to_others_what_they_draw(
    in_process: Any, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 1 is being drawn by another machine, row 2 has been drawn by it, row 3 is left."""
    (tmp_path / "q.txt").write_text("a\nb\nc\n")
    command = ["batch", tmp_path / "q.txt", "--share", "--model", tiny, *COMMON, "-o", "{index}.png"]
    assert claims.claim(tmp_path / "1.png.tiler")
    monkeypatch.chdir(tmp_path)
    checker = queues.Checker(
        root=Path(), name="{index}.png", parse=queues.parser(cli_render.run),
        defaults=("--model", str(tiny), "--size", "64", "--steps", "1"),
    )  # fmt: skip
    other = Results(file_of(tmp_path / "q.txt", "other"), "q.txt", shared=False)
    digest = checker.check(Row(2, "b", (), None)).digest
    other.note({"row": 2, "digest": f"{digest:016x}", "status": "done"})
    (tmp_path / "2.png").write_text("drawn there")
    ran = in_process(*command)
    assert ran.code == 0 and ran.out.startswith("1 done, 1 skipped, 1 left to other machines"), ran.out + ran.err
    assert (tmp_path / "2.png").read_text() == "drawn there" and (tmp_path / "3.png").exists()
    assert not (tmp_path / "1.png").exists() and not (tmp_path / "3.png.tiler").exists()
    assert in_process(*command, "--force").code == 2


def test_prompts_of_rows_with_a_large_encoder_are_encoded_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 rows at a time; rows without a large encoder do not wait for each other."""
    order: list[str] = []
    monkeypatch.setattr(Queue, "_draw", lambda queue, turn: order.append(f"draw {turn.row.row}"))
    queue = queue_of(tmp_path, encode=lambda rows: order.append(f"encode {len(rows)}"))
    rows = [row(tmp_path, number, wants_encoder=number <= 70) for number in range(1, 72)]
    queue.run([rows])
    assert order[0] == "encode 64" and order[64:66] == ["draw 64", "encode 6"] and order[-1] == "draw 71"


def test_a_large_encoder_is_told_by_its_size(tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "big/text_encoder_2").mkdir(parents=True)
    with (tmp_path / "big/text_encoder_2/model.safetensors").open("wb") as file:
        file.truncate(2 * 10**9)
    output = tmp_path / "x.png"
    assert has_large_encoder(ask(tmp_path / "big", output))
    assert not has_large_encoder(ask(tiny, output)) and not has_large_encoder(ask(tmp_path / "none", output))


def test_encoding_ahead_fills_the_cache(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = "<hypernet:x:1> e", "a", "b [c|d]", "a", "<lora:gone> f", "<lora:gone> g"  # three of them cannot be drawn
    requests = [ask(tiny, tmp_path / "x.png", prompt=prompt, cache_dir=tmp_path) for prompt in prompts]
    assert encode_ahead(requests, roomy()) == 0  # by their size, not worth it
    monkeypatch.setattr("tiler.ahead.LARGE", 0)
    assert encode_ahead(requests, roomy()) == 4  # a, b c, b d, and no negative prompt
    assert encode_ahead(requests, roomy()) == 0

    def encode(run: object, weights: object, texts: list[str], reading: object) -> dict[str, object]:
        assert not texts
        return {}

    monkeypatch.setattr("tiler.encoding._encode", encode)
    render(
        ask(tiny, tmp_path / "x.png", prompt="b [c|d]", cache_dir=tmp_path, guide=False, num_inference_steps=2), roomy()
    )


def test_other_programs_go_first(in_process: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As much as --nice says; a batch has a default of its own."""
    (tmp_path / "q.txt").write_text("a\n")
    asked: list[int] = []
    monkeypatch.setattr(os, "nice", asked.append)
    monkeypatch.setattr(supervise, "run", lambda spec: 0)
    for words in (["batch", "q.txt"], ["batch", "q.txt", "--nice", 3], ["render", "x", "--model", "gone", "--nice", 4]):
        in_process(*words)
    assert asked == [10, 3, 4]


def test_a_signal_saves_a_render_that_goes_on(tiny: Path, tmp_path: Path) -> None:
    """SIGUSR1 saves once, at the next tile."""
    before, saved = signal.getsignal(signal.SIGUSR1), list[str]()
    prepare = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    prepare_signals()

    def told(event: events.Event) -> None:
        if isinstance(event, events.Progress) and event.name == "canvas" and event.done == 2:
            signal.raise_signal(signal.SIGUSR1)
        if isinstance(event, events.Saved):
            saved.append(event.where)

    try:
        render(ask(tiny, tmp_path / "x.png", guide=False), roomy(), told)
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), prepare, strict=True):
            signal.signal(number, handler)
        signal.signal(signal.SIGUSR1, before)
    assert sum(where.startswith("canvas step 1/4") or where.startswith("canvas step 2/4") for where in saved) == 1, (
        saved
    )


class Played(Drawings):
    """In place of processes: each row ends as `codes` says, in the order in which they began; `smallest` is the ceiling
    that each needs."""

    def __init__(self, codes: dict[int, list[int]] | None = None, smallest: dict[int, int] | None = None) -> None:
        super().__init__()
        self.codes, self.smallest = codes or {}, smallest or {}
        self.order: list[int] = []
        self.shares: list[int] = []
        self.under_way: dict[int, int] = {}
        self.most: list[set[int]] = []

    def begin(self, row: int, command: list[str], beside_bytes: int) -> None:
        self.order.append(row)
        self.shares.append(CEILING - beside_bytes)
        self.under_way[row] = CEILING - beside_bytes
        self.most.append(set(self.under_way))

    def next_ended(self, seconds: float | None = None) -> Ended:
        row, share = next(iter(self.under_way.items()))
        del self.under_way[row]
        code = self.codes.get(row, [0]).pop(0) if self.codes.get(row) else 0
        facts: dict[str, object] = {"error": "full", "seed": 1, "peak_rss_bytes": 1, "versions": {}, "sha256": ""}
        if share < self.smallest.get(row, 0):
            code, facts = 4, {"error": "too little", "smallest_bytes": self.smallest[row]}
        return Ended(row, code, json.dumps(facts).encode())

    def end(self, number: int) -> Any:
        while self.under_way:
            row, _ = self.under_way.popitem()
            yield Ended(row, 128 + number, b"")


CEILING = 10**9


def play(played: Played, folder: Path, rows: list[Checked], monkeypatch: pytest.MonkeyPatch, **values: Any) -> Any:
    monkeypatch.setattr("tiler.jobs.queue.Drawings", lambda hear: played)
    results = Results(folder / "q.jsonl.results.jsonl", "q.jsonl", shared=False)
    queue = Queue(root=folder, results=results, max_ram_bytes=CEILING, **values)
    return queue.run([rows])


def test_a_row_for_which_the_disk_has_no_room_waits_for_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tried again at the end."""
    played = Played({1: [6, 0]})
    tally = play(played, tmp_path, [row(tmp_path, 1), row(tmp_path, 2)], monkeypatch)
    assert played.order == [1, 2, 1] and str(tally) == "2 done" and tally.exit_code == 0
    assert all(len(together) == 1 for together in played.most)


def test_with_a_cluster_several_rows_are_drawn_at_a_time_under_one_ceiling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row that needs more than its share waits until so much is free; rows of another model wait for all others."""
    played = Played(smallest={2: 500})
    rows = [row(tmp_path, number, denoiser=number // 6) for number in range(1, 8)]
    limits = lambda first: Together(3, 900, ["--cluster=tls://here:1"])  # noqa: E731
    assert str(play(played, tmp_path, rows, monkeypatch, together=limits)) == "7 done"
    assert played.order[:3] == [1, 2, 3] and played.shares[:3] == [300] * 3
    assert played.shares[played.order.index(2, 3)] == 500 == max(played.shares)
    assert not any(together & {6, 7} and together - {6, 7} for together in played.most)
    assert {6, 7} not in played.most, "from now on every row gets what the second needed"


def test_what_ends_a_queue_saves_all_that_is_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row(tmp_path, number) for number in range(1, 6)]
    limits = lambda first: Together(3, 900)  # noqa: E731
    tally = play(Played({1: [7]}), tmp_path, rows, monkeypatch, together=limits, fail_fast=True)
    assert tally.exit_code == 7 and dict(tally.statuses) == {"failed": 1, "interrupted": 2}
    lines = [json.loads(line) for line in (tmp_path / "q.jsonl.results.jsonl").read_text().splitlines()]
    assert [(line["row"], line["status"], line["exit_code"]) for line in lines[1:]] == [
        (3, "interrupted", 143), (2, "interrupted", 143),
    ]  # fmt: skip


def test_a_row_that_cannot_be_planned_leaves_the_cluster_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def limits(first: Checked) -> Together:
        if first.row == 1:
            raise BudgetRefused("too little")
        return Together(2, 900)

    played = Played()
    tally = play(played, tmp_path, [row(tmp_path, n) for n in (1, 2, 3)], monkeypatch, together=limits)
    assert (tally.exit_code, str(tally), played.order) == (4, "2 done, 1 failed (row 1)", [2, 3])


def test_a_scheduler_that_cannot_start_ends_the_queue_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is started before the first row is planned, and told of the plan."""
    begun, ended, told = list[str](), list[str](), list[tuple[str, int]]()

    @contextmanager
    def asking(module: str, asked: dict[str, Any] | None = None) -> Iterator[str]:
        begun.append(module)
        yield module
        ended.append(module)

    def answer(module: str) -> dict[str, Any]:
        if module == "tiler.cli.shares":
            return {"most": 2, "room_bytes": 900, "worker_bytes": 7, "is_hosted": True}
        assert list((tmp_path / "t").iterdir())
        raise supervise._Refused("the port is in use", 12)

    (tmp_path / "t").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "t"))
    monkeypatch.setattr(supervise, "_asking", asking)
    monkeypatch.setattr(supervise, "_answer", answer)
    monkeypatch.setattr(supervise, "_ask", lambda module, asked: told.append((module, asked["worker_bytes"])))
    spec = supervise.Spec(root=".", results="r", file="q", max_ram_bytes=CEILING, cluster="listen:127.0.0.1:1")
    played = Played()
    with ExitStack() as stack:
        together = partial(supervise._together, spec, stack, lambda text: None)
        with pytest.raises(NoCluster, match="the port is in use") as caught:
            play(played, tmp_path, [row(tmp_path, 1), row(tmp_path, 2)], monkeypatch, together=together)
        assert not list((tmp_path / "t").iterdir())
    assert (caught.value.exit_code, played.order, ended) == (12, [], ["tiler.cli.shares"])
    assert begun == ["tiler.cli.host", "tiler.cli.shares"] and told == [("tiler.cli.host", 7)]


def test_what_no_picture_of_a_command_can_have_ends_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of `--count` differ in their seeds alone; rows of a batch may differ in size."""

    @contextmanager
    def asking(module: str, asked: dict[str, Any] | None = None) -> Iterator[str]:
        yield module

    def refuse(module: str) -> dict[str, Any]:
        raise supervise._Refused("a picture needs 357 MB", 4)

    monkeypatch.setattr(supervise, "_asking", asking)
    monkeypatch.setattr(supervise, "_answer", refuse)
    rows = [row(tmp_path, 1), row(tmp_path, 2)]

    def together(*, is_batch: bool) -> Any:
        spec = supervise.Spec(root=".", results="r", file="q", max_ram_bytes=9, cluster="local:2", is_batch=is_batch)
        return partial(supervise._together, spec, ExitStack(), lambda text: None)

    with pytest.raises(NoCluster, match="a picture needs 357 MB") as caught:
        play(Played(), tmp_path, rows, monkeypatch, together=together(is_batch=False))
    assert caught.value.exit_code == 4
    assert str(play(Played(), tmp_path, rows, monkeypatch, together=together(is_batch=True))).startswith("2 failed")


def test_a_finished_picture_is_told_with_the_whole_ceiling_and_the_time() -> None:
    report = {"output": "a.png", "width": 64, "height": 8, "seed": 3, "peak_rss_bytes": 335e6, "seconds": 75.3}
    said = supervise.sentence(report | {"max_ram_bytes": 780_000_000}, 800_000_000)
    assert said == "a.png: 64×8, seed 3, peak 335 MB of 800 MB, in 1 min 15 s"
    said = supervise.sentence(report | {"max_ram_bytes": 390_000_000}, 800_000_000, shares=True)
    assert said == "a.png: 64×8, seed 3, peak 335 MB of 390 MB, its share of 800 MB, in 1 min 15 s"


def test_rows_that_fail_for_the_same_reason_say_so_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warned = list[str]()
    played = Played({1: [3], 2: [0], 3: [3], 4: [3], 5: [7]})
    rows = [row(tmp_path, number) for number in range(1, 7)]
    tally = play(played, tmp_path, [*rows, rows[0]], monkeypatch, warn=warned.append)
    assert warned == [
        "row 1: failed with exit code 3: full",
        f"row 1: failed with exit code 2: {tmp_path / '1.png'} is the output of another row too",
        "row 1: 3 more rows failed for the same reason",
    ]
    assert str(tally) == "2 done, 5 failed (rows 1, 3, 4, 5, 1)" and tally.exit_code == 1
    assert list(Tally(noun="picture", _alike={"x": [2, 1]}).repeated()) == [
        "picture 2: 1 more picture failed for the same reason"
    ]
    noted = [json.loads(line) for line in (tmp_path / "q.jsonl.results.jsonl").read_text().splitlines()]
    assert [each["exit_code"] for each in noted if each["row"] == 5] == [7]  # each row has its own line there


def test_processes_are_heard_line_by_line_and_end_with_their_words() -> None:
    heard: list[tuple[int, bytes]] = []
    drawings = Drawings(lambda row, line: heard.append((row, line)))
    drawings.begin(1, ["sh", "-c", "printf 'a\\nb' >&2; sleep 0.2; printf done"], 5)
    drawings.begin(2, ["sh", "-c", f"printf ${BESIDE}; exit 3"], 7)
    assert drawings.next_ended() == Ended(2, 3, b"7")
    assert drawings.next_ended() == Ended(1, 0, b"done") and heard == [(1, b"a"), (1, b"b")]
    drawings.begin(3, ["sleep", "60"], 0)
    assert drawings.next_ended(0.01) is None
    assert list(drawings.end(signal.SIGTERM)) == [Ended(3, -signal.SIGTERM, b"")]


def test_an_interrupted_wait_for_a_process_loses_it_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C between the end of a picture's output and the end of its process."""
    monkeypatch.setattr("tiler.jobs.drawing._PATIENCE", 5.0)
    drawings = Drawings()
    drawings.begin(1, ["sh", "-c", "exec >&-; exec sleep 60"], 0)
    with monkeypatch.context() as patch:
        patch.setattr(subprocess.Popen, "wait", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            drawings.next_ended()
    assert list(drawings.end(signal.SIGTERM)) == [Ended(1, -signal.SIGTERM, b"")]


def test_claims_are_touched_though_other_rows_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touched = set[str]()
    monkeypatch.setattr(claims, "TOUCH_EVERY", 0.0)
    monkeypatch.setattr(claims, "touch", lambda folder: touched.add(folder.name))
    rows = [row(tmp_path, number) for number in (1, 2, 3)]
    assert str(play(Played(), tmp_path, rows, monkeypatch, shared=True)) == "3 done"
    assert touched == {"1.png.tiler", "2.png.tiler", "3.png.tiler"}


def test_a_queue_translates_what_its_pictures_tell() -> None:
    said, told = list[str](), list[str]()
    listener = Listener(said.append, silent=False)
    quiet = Listener(said.append, silent=True)
    note, done = (
        json.dumps({"event": "note", "text": "seed 3"}).encode(),
        json.dumps({"event": "phase_done", "name": "canvas", "seconds": 1.25, "peak_rss_bytes": 3 * 10**8}).encode(),
    )
    for line in (note, done, b"", b'{"event": "saved"}', b"[1]"):
        listener.hear(4, line)
        quiet.hear(4, line)
    quiet.hear(5, b"tiler: no such model")
    Listener(told.append, silent=False, as_json=True).hear(6, note)
    assert json.loads(told[0]) == {"row": 6, "event": "note", "text": "seed 3"}
    assert said[0] == "row 4: note: seed 3" and said[1] == "row 4: canvas: done in 1.2 s, peak 300 MB"
    assert said[-1] == "row 5: tiler: no such model" and said.count("row 4: note: seed 3") == 1
