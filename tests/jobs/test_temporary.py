"""Folders of killed processes: the next process removes them, and no others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tiler.jobs.temporary import own_folder

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
WAITS = """
import sys
from pathlib import Path
from tiler.jobs.temporary import own_folder
with own_folder("tiler-test-", Path(sys.argv[1])) as folder:
    (folder / "data").mkdir()
    print(folder, flush=True)
    sys.stdin.read()
"""
MAKES_MANY = """
import sys
from pathlib import Path
from tiler.jobs.temporary import own_folder
for _ in range(200):
    with own_folder("tiler-test-", Path(sys.argv[1])) as folder:
        (folder / "data").mkdir()
    assert not folder.exists()
"""


def begin(program: str, place: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, str(place)]
    return subprocess.Popen(command, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_only_folders_of_ended_processes_are_removed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "lock").touch()
    (tmp_path / "tiler-test-link").symlink_to(elsewhere)
    (tmp_path / "tiler-test-other").mkdir()  # without a lock: of who knows what
    with begin(WAITS, tmp_path) as lives, begin(WAITS, tmp_path) as killed:
        assert lives.stdout is not None and killed.stdout is not None
        living, left = (Path(process.stdout.readline().strip()) for process in (lives, killed) if process.stdout)
        killed.kill()
        killed.wait()
        with own_folder("tiler-test-", tmp_path) as folder:
            assert living.exists() and folder.exists() and not left.exists()
            assert (tmp_path / "tiler-test-other").exists() and (elsewhere / "lock").exists()
        lives.communicate("")
        assert not living.exists() and not folder.exists()


def test_processes_that_begin_together_leave_each_other_alone(tmp_path: Path) -> None:
    processes = [begin(MAKES_MANY, tmp_path) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert not list(tmp_path.iterdir())
