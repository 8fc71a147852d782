"""The surroundings of a run: signals, closed and broken streams, terminals that lack characters."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = [sys.executable, "-m", "tiler"]


def run(command: list[str], cwd: Path, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=300, **options)  # type: ignore[call-overload]


INTERRUPTED = """
import os, signal, sys
from tiler.cli import main, render
import tiler.pipeline
def render(request, budget, printer):
    from tiler.files import atomic
    for name in {names!r}:
        with atomic(__import__("pathlib").Path(name)) as file:
            file.write(b"1")
    os.kill(os.getpid(), {number})
    raise AssertionError
tiler.pipeline.render = render
sys.argv = ["tiler", "render", "x", "--size", "512", "-q"]
main.main()
"""


@pytest.mark.parametrize(
    ("number", "names"),
    [
        (signal.SIGINT, []), (signal.SIGINT, ["z.safetensors"]), (signal.SIGTERM, ["a.json", "b.png"]), (signal.SIGHUP, []),
    ],
)  # fmt: skip
def test_an_interruption_says_what_was_written(tmp_path: Path, number: int, names: list[str]) -> None:
    ran = run([sys.executable, "-c", INTERRUPTED.format(names=names, number=int(number))], tmp_path)
    assert ran.returncode == 128 + number, ran.stderr
    want = f"written: {', '.join(names)}" if names else "nothing was written"
    assert ran.stderr == f"tiler: interrupted; {want}\n"


def test_signals_that_were_ignored_stay_ignored(tmp_path: Path) -> None:
    code = (
        "from tiler.cli.terminal import *; prepare_signals(); print(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN)"
    )
    assert run(["sh", "-c", f"trap '' HUP; exec {sys.executable} -c '{code}'"], tmp_path).stdout == "True\n"


def test_a_second_interruption_ends_the_saving(tmp_path: Path) -> None:
    code = """
import os, signal
from tiler.cli.terminal import *
prepare_signals()
try:
    os.kill(os.getpid(), signal.SIGTERM)
except BaseException:
    os.kill(os.getpid(), signal.SIGHUP)  # a terminal that closes says so more than once
    print("saving", flush=True)
    os.kill(os.getpid(), {number})
    print("still here")
"""
    for number in (signal.SIGINT, signal.SIGTERM):
        ran = run([sys.executable, "-c", code.format(number=int(number))], tmp_path)
        assert (ran.returncode, ran.stdout) == (-number, "saving\n")


@pytest.mark.parametrize("command", ["doctor", "doctor --json", "--help", "render --help", "--version"])
def test_a_reader_that_leaves_is_no_fault(tmp_path: Path, command: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    ran = subprocess.run(
        [*PROGRAM, *command.split()], cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert (ran.returncode, ran.stderr) == (0, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux's full device")
def test_a_full_stdout_is_exit_6(tmp_path: Path) -> None:
    ran = run(["sh", "-c", f"{sys.executable} -m tiler doctor > /dev/full"], tmp_path)
    assert ran.returncode == 6
    assert ran.stderr.startswith("tiler: standard output: No space left")
    assert len(ran.stderr.splitlines()) == 1


@pytest.mark.parametrize("closed", ["2>&-", "1>&-", "0<&- 1>&- 2>&-"])
def test_closed_streams_do_not_end_a_run(tiny: Path, tmp_path: Path, closed: str) -> None:
    command = (
        f"{' '.join(PROGRAM)} render x --model {tiny} --size 64 --steps 1 --no-guide -o x.png --report r.json {closed}"
    )
    ran = run(["sh", "-c", command], tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "r.json").read_text())["width"] == 64


@pytest.mark.parametrize(("encoding", "name"), [("ascii", b"caf\xe9 \xff.png"), ("latin-1", "海.png".encode())])
def test_names_and_terminals_of_other_alphabets(tiny: Path, tmp_path: Path, encoding: str, name: bytes) -> None:
    command = [os.fsencode(word) for word in (*PROGRAM, "render", "a bôat", "--model", str(tiny))]
    command += [*b"--size 64 --steps 1 --no-guide --report r.json -o".split(), name]
    env = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, env=env, check=False)
    assert ran.returncode == 0, ran.stderr
    assert (Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))).exists()
    shown = ran.stdout.decode(
        "utf-8" if encoding == "ascii" else encoding, errors="replace"
    )  # typer's choice for ascii
    assert "64×64" in shown
    refused = subprocess.run(command, cwd=tmp_path, capture_output=True, env=env, check=False)
    assert refused.returncode == 2
    assert b"--force" in refused.stderr and len(refused.stderr.splitlines()) == 1


def test_a_fault_of_ours_is_one_line_without_debug(tmp_path: Path) -> None:
    code = "import sys; from tiler.cli import main, doctor; import tiler.memory.limits as limits; limits.available_ram = None; main.main()"
    ran = run([sys.executable, "-c", code, "doctor"], tmp_path)
    assert ran.returncode == 1
    assert "TypeError" in ran.stderr and len(ran.stderr.splitlines()) == 1
    assert "Traceback" in run([sys.executable, "-c", code, "--debug", "doctor"], tmp_path).stderr


def test_a_byte_order_mark_in_a_regions_file(tmp_path: Path) -> None:
    from tiler.request import read_regions

    text = 'prompt = "sea"\n[[region]]\nprompt = "bôat"\nrows = [0, 64]\ncols = [64, 128]\n'
    for mark in (b"", b"\xef\xbb\xbf"):
        (tmp_path / "r.toml").write_bytes(mark + text.encode())
        prompt, regions = read_regions(tmp_path / "r.toml")
        assert (prompt, regions[0].prompt) == ("sea", "bôat")


def test_the_time_of_a_shell_that_became_this_program_does_not_count() -> None:
    code = (
        "import time; from tiler.cli import age; time.sleep(0.2); now = age()\n"
        "started = int(open('/proc/self/stat').read().rpartition(')')[2].split()[19]) / os.sysconf('SC_CLK_TCK')\n"
        "print(now, time.clock_gettime(time.CLOCK_BOOTTIME) - started)"
    )
    command = ["sh", "-c", 'sleep 0.5; exec "$0" -c "$1"', sys.executable, f"import os; {code}"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    own, of_the_process = map(float, ran.stdout.split())
    assert 0.2 <= own <= of_the_process - 0.49
