"""`-o -` writes a picture to standard output, whatever that is."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tiler.errors import StorageError
from tiler.output.picture import write_picture

COMMON = ("a boat", "--size", 64, "--steps", 1, "--seed", 1)


@contextmanager
def stdout_is(handle: int) -> Iterator[None]:
    """Make `handle`, which is closed afterwards, this process's standard output."""
    before = os.dup(1)
    os.dup2(handle, 1)
    os.close(handle)
    try:
        yield
    finally:
        os.dup2(before, 1)
        os.close(before)


def unread() -> int:
    """The writing end of a pipe without a reader."""
    read, write = os.pipe()
    os.close(read)
    return write


def opened(path: Path) -> int:
    return os.open(path, os.O_CREAT | os.O_WRONLY)


def test_a_picture_on_standard_output_is_the_file_and_nothing_else(in_process, tiny: Path, tmp_path: Path) -> None:
    assert in_process("render", *COMMON, "--model", tiny, "-o", "a.png", "--save-latents", "z.safetensors").code == 0
    with stdout_is(opened(tmp_path / "piped.png")):
        ran = in_process("render", *COMMON, "--model", tiny, "-o", "-", "--on-done", "echo $TILER_OUTPUT ended")
    assert ran.code == 0, ran.err
    assert (tmp_path / "piped.png").read_bytes() == (tmp_path / "a.png").read_bytes()
    assert "has no job folder" in ran.err
    assert "standard output: 64×64, seed 1, peak" in ran.err
    assert "- ended" in ran.err
    assert {p.name for p in tmp_path.iterdir()} == {"a.png", "piped.png", "z.safetensors"}

    assert in_process("decode", "z.safetensors", "--model", tiny, "-o", "a.pdf").code == 0
    with stdout_is(opened(tmp_path / "piped.pdf")):
        ran = in_process("decode", "z.safetensors", "--model", tiny, "-o", "-", "--format", "pdf", "--quiet")
    assert (ran.code, ran.err) == (0, "")
    assert (tmp_path / "piped.pdf").read_bytes() == (tmp_path / "a.pdf").read_bytes()


def test_a_reader_who_is_gone_is_noticed_before_any_work(in_process, tiny: Path) -> None:
    with stdout_is(unread()):
        ran = in_process("render", *COMMON, "--model", tiny, "-o", "-")
    assert ran.code == 6
    assert "behind the pipe has ended" in ran.err and "note: seed" not in ran.err


def test_a_reader_who_goes_is_an_error_and_not_silence() -> None:
    read, write = os.pipe()

    def rows() -> Iterator[np.ndarray]:
        noise = np.random.default_rng(0).integers(0, 256, (8, 4096, 3), dtype=np.uint8)
        yield noise[:1]  # less than a pipe takes before somebody reads
        os.close(read)
        while True:
            yield noise

    with stdout_is(write), pytest.raises(StorageError, match="behind the pipe has ended"):
        write_picture(Path("-"), rows(), 4096, 4096, {}, force=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("-o", "-", "--json"), "--report FILE"),
        (("-o", "-", "--keep-job"), "--keep-job"),
        (("-o", "-", "--count", 2), "takes one picture"),
        (("-o", "x.png", "--format", "pdf"), "--format pdf is for standard output"),
        (("--format", "png"), "--format png is for standard output"),
    ],
)
def test_what_does_not_go_with_a_pipe_is_exit_2(in_process, options: tuple[str, ...], message: str) -> None:
    ran = in_process("render", *COMMON, *options)
    assert ran.code == 2, ran.err
    assert message in ran.err


def test_a_terminal_gets_no_picture(in_process) -> None:
    other, terminal = os.openpty()
    with stdout_is(terminal):
        ran = in_process("decode", "z.safetensors", "-o", "-")
    os.close(other)
    assert ran.code == 2
    assert "is a terminal" in ran.err


def test_a_standard_output_that_is_closed_is_said_before_any_work(tmp_path: Path) -> None:
    command = f"{sys.executable} -m tiler render x --size 64 -o - >&-"
    ran = subprocess.run(command, shell=True, cwd=tmp_path, stderr=subprocess.PIPE, text=True, check=False)
    assert ran.returncode == 6 and ran.stderr.count("\n") == 1 and "which is closed" in ran.stderr
