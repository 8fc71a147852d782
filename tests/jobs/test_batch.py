"""Queues: what their files may contain, where pictures may go, and that a bad row does not stop the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tiler.cli import failure, render
from tiler.cli.queues import Checker, parser
from tiler.errors import Interrupted, UsageError
from tiler.jobs.drawing import BESIDE
from tiler.jobs.queue import Queue
from tiler.jobs.rows import NAME, Row, read_rows

parse = parser(render.run)


def rows(tmp_path: Path, name: str, text: str) -> list[Row]:
    (tmp_path / name).write_text(text)
    return list(read_rows(tmp_path / name))


def output_of(row: Row, root: Path) -> Path:
    checker = Checker(root=root, defaults=(), parse=parse, name=NAME)
    return checker.output_of(row, checker.ask(row))


def test_a_toml_queue(tmp_path: Path) -> None:
    text = """
        [defaults]
        steps = 3
        no-metadata = true
        [[image]]
        prompt = "a lighthouse, at night"
        cfg_scale = 5.5
        [[image]]
        prompt = "b"
        seed = 7
        count = 2
        output = "sub/{seed}-{index}.png"
    """
    one, two, three = rows(tmp_path, "jobs.toml", text)
    assert one.words == ("--steps=3", "--no-metadata", "--cfg-scale=5.5")
    assert output_of(one, tmp_path) == tmp_path / "001-a-lighthouse-at-night.png"
    assert [output_of(row, tmp_path).name for row in (two, three)] == ["7-2.png", "8-3.png"]


def test_only_rows_that_workers_can_serve_together_are_drawn_at_a_time(tmp_path: Path) -> None:
    checker = Checker(root=tmp_path, defaults=(), parse=parse, name=NAME)

    def denoiser(*words: str, prompt: str = "a boat") -> int:
        return checker.check(Row(index=1, prompt=prompt, words=words, output=None)).denoiser

    alike = {
        denoiser(), denoiser(prompt="a cat"), denoiser("--steps=3", "--seed=5", "--size=512", "--cfg-scale=3"),
        denoiser("--negative-prompt=rain", "--force", "--job-dir=jobs"),
    }  # fmt: skip
    others = [
        denoiser(prompt="a boat <lora:ink:0.8>"), denoiser(prompt="a boat <lora:ink:0.7>"),
        denoiser("--canvas-prompt=waves <lora:oil:1>"), denoiser("--lora=ink.safetensors"),
        denoiser(f"--lora-dir={tmp_path}"),
        denoiser("--model=other"), denoiser("--diffusion-model=x.gguf"), denoiser("--variant=fp16"),
        denoiser("--revision=v2"), denoiser("--prediction=v"), denoiser("--vae=x.safetensors"),
        denoiser("--tile-size=256"), denoiser("--scheduler=heun"), denoiser("--precision=bf16"),
    ]  # fmt: skip
    assert len(alike) == 1 and len({*alike, *others}) == 1 + len(others)
    assert denoiser(prompt="a cat <lora:ink:0.8>") == others[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("= x", "not valid TOML"),
        ("[[image]]\ncolour = 1", "unknown key 'colour'"),
        ("other = 1", "nothing else"),
        ("[[image]]\nlayout = 'ring'", "ring"),
        ("[[image]]\nsize = 0", "row 1: --size 0"),
        ("[[image]]\nprompt = 3", "prompt must be a text, not 3"),
        ("[[image]]\ncount = 0", "out of range"),
        ("image = [1]", "not an [[image]]"),
    ],
)
def test_a_toml_queue_is_right_as_a_whole(in_process, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "jobs.toml").write_text(text)
    ran = in_process("batch", "jobs.toml")
    assert (ran.code, message in ran.err) == (2, True), ran.err
    assert [path.name for path in tmp_path.iterdir()] == ["jobs.toml"]


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (b"\x89PNG\r\n\x1a\n", (), "not a text file"),
        (b"a\0b\n", (), "not a text file"),
        (b"\n \n", (), "no rows"),
        (b"a\n", ("--count", 2), "--count does not go with"),
        (b"a\n", ("--report", "r.json"), "--report names a file of one picture"),
        (b"a\n", ("--save-latents=x.safetensors",), "--save-latents names a file of one picture"),
        (b"a\n", ("--output-dir", "no/new"), "no does not exist"),
    ],
)
def test_what_no_batch_can_be_is_refused_before_any_work(
    in_process, tmp_path: Path, data: bytes, options: tuple[object, ...], message: str
) -> None:
    (tmp_path / "x.txt").write_bytes(data)
    ran = in_process("batch", "x.txt", *options)
    assert (ran.code, message in ran.err) == (2, True), ran.err
    assert [path.name for path in tmp_path.iterdir()] == ["x.txt"]


def test_quiet_keeps_what_failed(in_process, tmp_path: Path) -> None:
    lines = ['{"size": 0}', '{"prompt": "a" "b"}', '{"seed": [1, 2], "size": 0}', '{"steps": [1, 2]}']
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    ran = in_process("batch", "x.jsonl", "--quiet", "--output-dir", "new")
    first, second, fifth, alike = ran.err.splitlines()
    assert (ran.code, ran.out) == (2, "") and first.startswith("row 1: failed with exit code 2: --size 0 is out of")
    assert second.startswith("row 2:") and "not valid JSON: expecting ',' delimiter at column 16" in second
    assert fifth.startswith("row 5:") and "steps takes one value, not [1, 2]" in fifth
    assert alike == "row 1: 2 more rows failed for the same reason"
    assert (tmp_path / "new").is_dir()


def test_an_interrupted_queue_speaks_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The queue says what becomes of its pictures; their processes leave it to the queue."""
    monkeypatch.setattr("tiler.files._written", [])  # other tests wrote files in this process
    stop = Interrupted(2)
    stop.add_note("1 done, 1 interrupted; the same command continues")
    with pytest.raises(SystemExit):
        failure.end(stop)
    assert capsys.readouterr().err == "tiler: interrupted; 1 done, 1 interrupted; the same command continues\n"
    monkeypatch.setenv(BESIDE, "0")
    with pytest.raises(SystemExit, match="130"):
        failure.end(stop)
    assert capsys.readouterr().err == ""


def test_a_list_of_seeds_is_a_row_each(tmp_path: Path) -> None:
    one, two, bad = rows(tmp_path, "x.jsonl", '{"seed": [7, 3]}\n{"seed": [7, 3], "count": 2}')
    assert [row.words for row in (one, two)] == [("--seed=7",), ("--seed=3",)]
    assert bad.problem == "count does not go with a list of seeds"


def test_duplicate_outputs_are_refused(in_process, tmp_path: Path) -> None:
    (tmp_path / "jobs.toml").write_text('[[image]]\noutput = "x.png"\n[[image]]\noutput = "./x.png"\n')
    ran = in_process("batch", "jobs.toml")
    assert ran.code == 2 and "rows 1 and 2 have the same output" in ran.err


def test_lines_of_prompts_as_automatic1111_reads_them(tmp_path: Path) -> None:
    text = (
        "  a plain prompt\n\n"
        '--prompt "photo of sunset" --negative_prompt orange, pink --width 1024 --sampler_name "DPM++ 2M Karras" --steps 10 '
        "--batch_size 2 --cfg_scale 3 --seed 9\n"
        "--tiling true --outpath_samples /home/me/walls --prompt --restore_faces true\n"
        "--colour red\n"
    )
    plain, one, two, tiled, bad = rows(tmp_path, "prompts.txt", text)
    assert (plain.prompt, plain.words) == ("a plain prompt", ())
    assert one.prompt == "photo of sunset"
    assert one.words == (
        "--negative-prompt=orange, pink",
        "--width=1024",
        "--scheduler=DPM++ 2M Karras",
        "--steps=10",
        "--cfg-scale=3",
        "--seed=9",
    )
    assert two.words == (*one.words, "--seed=10")
    assert tiled.words == ("--wrap=xy",) and output_of(tiled, tmp_path).parent == tmp_path / "walls"
    assert any("walls" in note for note in tiled.notes) and any("restore_faces" in note for note in tiled.notes)
    assert bad.problem == "unknown tag --colour"


def test_lines_that_begin_with_a_number_sign_are_comments(tmp_path: Path) -> None:
    """In a file of prompts alone; a prompt that begins so follows --prompt there."""
    text = "\ufeff# my prompts\na mug\n#\n--prompt '# 1' --steps 3\na #2 mug\n"
    found = rows(tmp_path, "prompts.txt", text)
    assert [(row.index, row.prompt) for row in found] == [(1, "a mug"), (2, "# 1"), (3, "a #2 mug")]
    (drawn,) = rows(tmp_path, "rows.jsonl", '{"prompt": "# 1"}\n')
    assert drawn.prompt == "# 1"


def test_30_bombs_and_broken_lines_are_their_rows_problem(tmp_path: Path) -> None:
    text = (
        '{"prompt": "a"}\n'
        + "x" * 2_500_000
        + '\n{"prompt": "b"}\nnot json\n[1]\n{"nonsense": 1}\n'
        + "[" * 100_000
        + "\n"
    )
    found = rows(tmp_path, "jobs.jsonl", text)
    assert [row.prompt for row in found] == ["a", None, "b", None, None, None, None]
    assert [row.problem is None for row in found] == [True, False, True, False, False, False, False]
    assert [row.index for row in found] == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    "output",
    [
        "../../x.png",
        "/etc/x.png",
        "..\\x.png",
        "a/../../x.png",
        "link/x.png",
        "x\0.png",
        "CON",
        "nul.png",
        "C:x.png",
        "",
        "{0}",
        "{index.real.__class__}.{nothing}",
        "{index:999999999}.png",
        "{seed}.png",
        "-",
    ],
)
def test_29_no_output_leaves_the_folder(tmp_path: Path, output: str) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root/link").symlink_to("..")
    with pytest.raises(UsageError):
        output_of(Row(1, "x", (), output or "/"), tmp_path / "root")


@pytest.mark.parametrize(
    "key", ["cluster", "insecure", "keys", "save-latents", "preview", "force", "scratch", "cache_dir"]
)
def test_a_row_says_neither_where_things_are_written_nor_who_draws(tmp_path: Path, key: str) -> None:
    (row,) = rows(tmp_path, "jobs.jsonl", json.dumps({"prompt": "a", key: "x"}))
    assert row.problem is not None and "give it to tiler batch" in row.problem


NEITHER = "--preview - goes neither with --cluster nor with --log-json"


@pytest.mark.parametrize(
    ("options", "why"),
    [(["--log-json"], NEITHER), (["--cluster=local:1"], NEITHER), ([], "--preview - needs a terminal on standard error")],
)  # fmt: skip
def test_a_preview_that_no_terminal_would_show_is_refused_before_any_work(
    in_process, tmp_path: Path, options: list[str], why: str
) -> None:
    (tmp_path / "q.txt").write_text("a\n")
    ran = in_process("batch", tmp_path / "q.txt", "--preview", "-", *options)
    assert ran.code == 2 and why in ran.err
    assert [path.name for path in tmp_path.iterdir()] == ["q.txt"]


def test_a_queue_from_the_command_line(in_process, tiny: Path, tmp_path: Path) -> None:
    """One row is drawn, one is bad; the same command again draws nothing twice, and draws a row that was appended."""
    file = tmp_path / "jobs.jsonl"
    lines = ['{"prompt": "a", "seed": 3, "output": "{seed}.png"}', '{"prompt": "b", "size": 0}']
    file.write_text("\n".join(lines) + "\n")
    command = ["batch", file, "--model", tiny, "--size", 64, "--steps", 1, "--nice", 0, "--max-ram", "1GB"]
    ran = in_process(*command)
    assert ran.code == 2 and "1 done, 1 failed (row 2)" in ran.out, ran.err
    told = map(json.loads, (tmp_path / "jobs.jsonl.results.jsonl").read_text().splitlines())
    second, first = told  # the bad row is reported before any work
    assert (first["status"], first["seed"], first["output"]) == ("done", 3, "3.png")
    assert (second["status"], second["exit_code"]) == ("failed", 2) and second["error"].startswith(
        "--size 0 is out of range"
    )
    assert first["peak_rss_bytes"] > 0 and len(first["sha256"]) == 64
    file.write_text(lines[0] + "\n")
    ran = in_process(*command)
    assert (ran.code, ran.out.splitlines()[0]) == (0, "1 skipped"), ran.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--count", 2, "--seed", "1,2"], "does not go with a list of seeds"),
        (["--count", 2, "--report", "r.json"], "--report"),
        (["--seed", "1,b"], "1,2,3"),
        (["--seed", "1,-2"], "--seed -2"),
        (["--count", 2, "-o", "{seed.real}.png"], "{seed}"),
        (["--seed", "1,2", "-o", "c-{sed}.png"], "--output 'c-{sed}.png': the placeholders are {index}"),
        (["--count", 2, "-o", "/none/{index}/x.png"], "placeholders work in the file's name, not in its folders"),
        (["--count", 2, "-o", "same-{prompt}.png"], "pictures 1 and 2 have the same output"),
        (["--output-dir", "none"], "none does not exist"),
        (["--output-dir", ".", "-o", "../x.png"], "is outside the folder"),
        (["--output-dir", ".", "--count", 2, "-o", "../{index}.png"], "is outside the folder"),
    ],
)
def test_several_pictures_are_refused_before_any_work(
    in_process, tmp_path: Path, options: list[object], message: str
) -> None:
    ran = in_process("render", "a boat", "--size", 64, *options)
    assert (ran.code, message in ran.err) == (2, True), ran.err
    assert list(tmp_path.iterdir()) == []


def test_several_pictures_of_one_command(
    in_process, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each picture has the same bytes as alone; finished ones are not drawn again; a single picture can have a template
    too."""
    common = ["render", "a boat", "--model", tiny, "--size", 64, "--steps", 1, "--no-guide"]
    common += ["--max-ram", "1GB", "--output-dir", "."]
    both = *common, "--count", 2, "--seed", 3, "-o", "{seed}/{index:02}.png"
    taken = 'test -z "$TILER_BESIDE" && mkdir -p away; mv "$TILER_OUTPUT" away/; echo finished'
    ran = in_process(*both, "--json", "--on-done", taken)
    assert ran.code == 0, ran.err
    assert [json.loads(line)["seed"] for line in ran.out.splitlines()] == [3, 4]  # whatever the command prints or does
    for name in ("3/01.png", "4/02.png"):
        (tmp_path / "away" / Path(name).name).rename(tmp_path / name)
    (tmp_path / "away").rmdir()
    ran = in_process(*both)
    assert (ran.code, ran.err.splitlines()[-1]) == (0, "2 pictures were finished already: skipped"), ran.err
    ran = in_process(*common, "--seed", 4, "-o", "{prompt}-{seed}.png")
    assert ran.code == 0, ran.err
    assert (tmp_path / "a-boat-4.png").read_bytes() == (tmp_path / "4/02.png").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4", "a-boat-4.png"]
    drawn = list[str]()
    monkeypatch.setattr(Queue, "_draw", lambda queue, turn: drawn.append(turn.row.output))
    (tmp_path / "4/02.png").write_bytes(b"another picture")
    assert in_process(*both).code == 0
    assert drawn == ["4/02.png"]  # the one that was replaced
    assert in_process(*both, "--force").code == 0
    assert in_process(*common, "--seed", "5,6", "-o", "x-{seed}.png").code == 0
    assert drawn[1:] == ["3/01.png", "4/02.png", "x-5.png", "x-6.png"]
