"""Writing files: on disks that fail at some call, behind links, and under names that others take meanwhile."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from tiler import files
from tiler.errors import NameTaken, StorageError, UsageError
from tiler.files import atomic, check_writable, replace_file

REFUSALS = ["chmod", "fsync", "link", "O_TMPFILE", "link and fsync", "everything"]


def refuse(monkeypatch: pytest.MonkeyPatch, what: str, number: int) -> None:
    """Make system calls fail as they do on disks mounted by SMB or FUSE."""
    names = ["chmod", "fsync", "link", "O_TMPFILE"] if what == "everything" else what.split(" and ")
    real = os.open

    def refused(*args: Any, **options: Any) -> Any:
        raise OSError(number, os.strerror(number))

    def open_named(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            refused()
        return real(path, flags, *args, **options)

    for name in names:
        monkeypatch.setattr(os, "open" if name == "O_TMPFILE" else name, open_named if name == "O_TMPFILE" else refused)


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
@pytest.mark.parametrize("what", REFUSALS)
def test_a_disk_that_refuses_a_call_gets_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, number: int
) -> None:
    refuse(monkeypatch, what, number)
    for replace in (True, False):
        path = tmp_path / f"{replace}.bin"
        check_writable(path, force=replace)
        with atomic(path, replace=replace) as file:
            file.write(b"whole")
        assert path.read_bytes() == b"whole"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["False.bin", "True.bin"]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_full_or_failing_disk_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    refuse(monkeypatch, "fsync", number)
    with pytest.raises(StorageError):
        check_writable(tmp_path / "x", force=False)
    with pytest.raises(StorageError), atomic(tmp_path / "x") as file:
        file.write(b"whole")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["nothing", "O_TMPFILE"])
@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("absolute", [False, True])
def test_a_link_stays_and_its_target_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, absolute: bool, exists: bool, what: str
) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "here").mkdir()
    target, middle, link = tmp_path / "disk/real.png", tmp_path / "disk/middle.png", tmp_path / "here/x.png"
    middle.symlink_to(target if absolute else "real.png")
    link.symlink_to(middle if absolute else "../disk/middle.png")
    if exists:
        target.write_bytes(b"old")
    if what != "nothing":
        refuse(monkeypatch, what, errno.EOPNOTSUPP)
    check_writable(link, force=exists)
    with atomic(link, replace=exists) as file:
        file.write(b"new")
    assert link.is_symlink() and middle.is_symlink() and not target.is_symlink()
    assert target.read_bytes() == b"new"
    assert len(list(tmp_path.rglob("*"))) == 5


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="needs a second disk")
def test_a_link_to_another_disk(tmp_path: Path) -> None:
    target = Path(f"/dev/shm/tiler-test-{os.getpid()}.png")
    (tmp_path / "x.png").symlink_to(target)
    try:
        with atomic(tmp_path / "x.png", replace=False) as file:
            file.write(b"new")
        assert target.read_bytes() == b"new"
        with pytest.raises(UsageError, match="exists"):
            check_writable(tmp_path / "x.png", force=False)
    finally:
        target.unlink(missing_ok=True)


def test_writers_of_one_small_file_do_not_disturb_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second one writes while the first one is about to rename. A link under a temporary name is not followed."""
    path, replace = tmp_path / "p.png", os.replace

    def interrupted(source: Path, target: Path) -> None:
        monkeypatch.setattr(files.os, "replace", replace)
        replace_file(path, [b"second"], durable=False)
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", interrupted)
    replace_file(path, [b"first"], durable=True)
    assert path.read_bytes() == b"first" and list(tmp_path.iterdir()) == [path]
    monkeypatch.setattr(files.os, "urandom", lambda size: b"known")
    (tmp_path / f".tiler-{b'known'.hex()}.png").symlink_to(tmp_path / "victim")
    with pytest.raises(StorageError, match="File exists"):
        replace_file(path, [b"third"], durable=False)
    assert path.read_bytes() == b"first" and not (tmp_path / "victim").exists()


def test_links_without_an_end_and_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "gone").symlink_to("no/such/folder/x")
    (tmp_path / "null").symlink_to("/dev/null")
    (tmp_path / "folder").symlink_to(".")
    os.mkfifo(tmp_path / "pipe")
    for name, kind in (
        ("a", StorageError), ("gone", UsageError), ("null", UsageError), ("folder", UsageError), ("pipe", UsageError),
        ("n" * 256, StorageError), ("x\0y", UsageError), ("no/x", UsageError),
    ):  # fmt: skip
        with pytest.raises(kind):
            check_writable(tmp_path / name, force=True)
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)


@pytest.mark.parametrize("what", ["nothing", "O_TMPFILE", "link"])
def test_of_two_runs_to_one_name_both_pictures_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    if what != "nothing":
        refuse(monkeypatch, what, errno.EPERM)
    path = tmp_path / "poster.png"
    for n in range(2):
        with pytest.raises(NameTaken, match=f"poster-{n + 2}.png") as caught, atomic(path, replace=False) as second:  # noqa: PT012
            if not n:
                with atomic(path, replace=False) as first:
                    first.write(b"first")
            second.write(b"late %d" % n)
        assert caught.value.kept.read_bytes() == b"late %d" % n
        assert caught.value.exit_code == 6
    assert path.read_bytes() == b"first"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["poster-2.png", "poster-3.png", "poster.png"]


@pytest.mark.parametrize("number", [errno.EPERM, errno.EBUSY])
def test_a_name_that_cannot_be_replaced_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    path, real = tmp_path / "x.png", os.replace
    path.write_bytes(b"mounted")

    def replace(source: Any, target: Any) -> None:
        if os.path.basename(target) == "x.png":
            raise OSError(number, os.strerror(number))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(NameTaken), atomic(path) as file:
        file.write(b"new")
    assert (path.read_bytes(), (tmp_path / "x-2.png").read_bytes()) == (b"mounted", b"new")
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("what", ["nothing", "O_TMPFILE"])
def test_the_umask_holds_and_finished_files_are_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    if what != "nothing":
        refuse(monkeypatch, what, errno.EOPNOTSUPP)
    before, old = len(files.written()), os.umask(0o027)
    try:
        with atomic(tmp_path / "x") as file:
            file.write(b"1")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640
    with pytest.raises(RuntimeError), atomic(tmp_path / "y"):
        raise RuntimeError
    with atomic(tmp_path / "z", in_cache=True) as file:
        file.write(b"1")
    assert files.written()[before:] == (tmp_path / "x",)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x", "z"]


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    check_writable(path, force=False)
    with atomic(path, replace=False) as file:
        file.write(b"1")
    assert os.listdir(os.fsencode(tmp_path)) == [b"caf\xe9.png"]
