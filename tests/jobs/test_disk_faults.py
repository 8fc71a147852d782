"""A disk that fails or fills up at any call, and a control group that kills: finished work is not lost, and the render
continues with the same bytes."""

from __future__ import annotations

import errno
import io
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.jobs.test_folder import ask, roomy
from tiler import files, render
from tiler.errors import StorageError
from tiler.jobs import folder

VALUES: dict[str, Any] = {"guide": False, "num_inference_steps": 2, "width": 64}
CALLS = ("fsync", "fdatasync", "replace", "link", "mkdir", "truncate", "write")


class Disk:
    """Counts the calls that change the disk, those of os and writes to opened files, and fails the `number`th."""

    def __init__(self) -> None:
        self.count = self.number = 0

    def call(self) -> None:
        self.count += 1
        if self.count == self.number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def failing(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def failing(*args: Any, **options: Any) -> Any:
            self.call()
            return real(*args, **options)

        return failing

    def open(self, path: Any, mode: str = "r", **options: Any) -> Any:
        if mode != "wb":
            return open(path, mode, **options)
        disk = self

        class Raw(io.FileIO):
            def write(self, data: Any) -> int:
                disk.call()
                return super().write(data)

        return io.BufferedWriter(Raw(path, "wb"))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder.Job, "due", lambda job: job._begun)


def test_38_whichever_call_of_a_render_fails(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every thirteenth call: the picture is complete or absent, only the job is left, and the same command finishes
    it."""
    render(ask(tiny, tmp_path / "whole.png", **VALUES), roomy())
    whole, disk = (tmp_path / "whole.png").read_bytes(), Disk()
    (tmp_path / "whole.png").unlink()
    for name in CALLS:
        monkeypatch.setattr(os, name, disk.failing(getattr(os, name)))
    monkeypatch.setattr(files, "open", disk.open, raising=False)
    asked, path, failed = ask(tiny, tmp_path / "x.png", **VALUES), tmp_path / "x.png", 0
    for number in range(1, 200, 13):
        disk.count, disk.number = 0, number
        try:
            render(asked, roomy())
        except StorageError:
            failed += 1
            assert not path.exists()
            assert {each.name for each in tmp_path.iterdir()} <= {"x.png.tiler"}, number
            disk.number = 0
            render(asked, roomy())
        assert path.read_bytes() == whole, number
        assert [each.name for each in tmp_path.iterdir()] == ["x.png"], number
        path.unlink()
        if disk.number and disk.count < number:
            break
    assert number > 30 and failed > 1


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    """Limit the size of files, which resembles a full disk for one file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_37_wherever_the_disk_is_full(tiny: Path, tmp_path: Path) -> None:
    """Scratch, states, the picture itself: the exit code is that of the disk, and a larger disk gives the same
    picture."""
    render(ask(tiny, tmp_path / "whole.png", **VALUES), roomy())
    size = (tmp_path / "whole.png").stat().st_size
    codes = []
    for nbytes in (0, size // 2, 10**7):
        path = tmp_path / "x.png"
        try:
            with largest_file(nbytes):
                render(ask(tiny, path, **VALUES), roomy())
            codes.append(0)
        except StorageError as error:
            codes.append(error.exit_code)
        if codes[-1]:
            assert not path.exists()
            render(ask(tiny, path, **VALUES), roomy())
        assert (tmp_path / "x.png").read_bytes() == (tmp_path / "whole.png").read_bytes()
        assert {path.name for path in tmp_path.iterdir()} == {"whole.png", "x.png"}
        (tmp_path / "x.png").unlink()
    assert codes[0] == 6 and codes[-1] == 0


@contextmanager
def memory_group(nbytes: int) -> Iterator[Path]:
    """A control group, below this process's own, with a memory limit; a process joins by writing to the file."""
    rows = [line.split(":") for line in Path("/proc/self/cgroup").read_text().splitlines()]
    base, limit = Path("/sys/fs/cgroup"), "memory.max"
    own = next((base / path.lstrip("/") for number, kinds, path in rows if (number, kinds) == ("0", "")), base)
    for _, kinds, path in rows:
        if "memory" in kinds.split(","):
            own, limit = base / "memory" / path.lstrip("/"), "memory.limit_in_bytes"
    group = own / f"tiler-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / limit).write_text(str(nbytes))
    except OSError as error:
        if group.is_dir():
            group.rmdir()
        pytest.skip(f"no control groups can be made here ({error.strerror})")
    try:
        yield group / "cgroup.procs"
    finally:
        group.rmdir()


@pytest.mark.parametrize("share", [1.0, 0.9, 0.5])
def test_35_killed_by_a_control_group(tiny: Path, tmp_path: Path, share: float) -> None:
    """With the requested ceiling as the limit, the render ends well; with less it is killed, and continues with the
    same bytes."""
    need = 300_000_000
    command = [sys.executable, "-m", "tiler", "render", "a boat", "--model", str(tiny), "--size", "64", "--steps", "1"]
    command += ["--no-guide", "--seed", "5", "-q", "-o", "x.png", f"--max-ram={need}"]
    with memory_group(int(share * need)) as join:
        ran = subprocess.run(
            command, cwd=tmp_path, check=False, stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: join.write_text(str(os.getpid())),
        )  # fmt: skip
    # At 0.9 it depends on which pages of libraries count for this group.
    codes = {1.0: (0,), 0.9: (0, -signal.SIGKILL, 5), 0.5: (-signal.SIGKILL, 5)}
    assert ran.returncode in codes[share], ran.stderr
    values = VALUES | {"num_inference_steps": 1}
    render(ask(tiny, tmp_path / "whole.png", **values), roomy())
    if ran.returncode:
        assert not (tmp_path / "x.png").exists()
        render(ask(tiny, tmp_path / "x.png", **values), roomy())
    assert (tmp_path / "x.png").read_bytes() == (tmp_path / "whole.png").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"whole.png", "x.png"}
