"""Write files atomically: each is written under another name in its folder, flushed, and then renamed."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from tiler.errors import NameTaken, StorageError, UsageError

# What a full or failing disk answers to fsync. Other answers mean that the file system knows no fsync (SMB, FUSE).
_LOST = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_TEMPORARY = ".tiler-"  # how the names of temporary files begin

_written: list[Path] = []


def written() -> tuple[Path, ...]:
    """The files that this process has finished so far, under the names that were asked for; those of caches are left
    out."""
    return tuple(_written)


def named(folder: Path | None) -> str:
    """How messages name a folder."""
    return "the current folder" if folder == Path() else str(folder)


def sha256_of(path: Path) -> str:
    """The sha256 of a file's content in hexadecimal. Raises OSError."""
    import hashlib  # not for a queue's process, in which it would take 4 MB

    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_own_folder(folder: Path, *, parents: bool = False) -> None:
    """Make a folder that only this user can read, or use an existing one. Raises OSError, also if the path is a link or
    another user's folder, whose owner could replace the files in it."""
    folder.mkdir(mode=0o700, parents=parents, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
        raise PermissionError(errno.EPERM, "it belongs to another user")


def check_writable(path: Path, *, force: bool, option: str = "--output") -> None:
    """Check before any work that the file can be written, by creating a file of another name in its folder. Raises
    UsageError or StorageError."""
    try:
        target = _target(path)
        if target.is_dir():
            raise UsageError(f"{path} is a folder; {option} takes a file name")
        if os.path.lexists(target):
            if not stat.S_ISREG(os.stat(target).st_mode):
                raise UsageError(f"{path} is a device or a pipe; {option} takes the name of a file")
            if not force:
                raise UsageError(f"{path} exists; give --force to replace it, or another {option}")
        if not target.parent.is_dir():
            what = "is a file, not a folder" if target.parent.exists() else "does not exist; create it first"
            raise UsageError(f"{target.parent} {what}")
        _try_name(target)
        probe = _beside(target)
        with _hidden(target) as file:
            file.write(b"tiler")
            source = _linked(file, target)
            try:
                _name(source, probe, replace=True)
            finally:
                for path in (source, probe):
                    with suppress(OSError):
                        os.unlink(path)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror}); choose another place") from error
    except ValueError as error:
        raise UsageError(f"{str(path)!r} is not a file name ({error}); give another {option}") from error


def replace_file(path: Path, parts: Iterable[bytes | memoryview], *, durable: bool) -> None:
    """Write a file of which no reader sees a part; if `durable`, power cuts leave its old or its new content too.
    Writers of one file do not disturb each other, no link under a temporary name is followed, and a killed writer
    leaves nothing behind, but for the moment of naming (`_hidden`). Raises StorageError."""
    try:
        with _hidden(path) as file:
            for part in parts:
                file.write(part)
            source = _linked(file, path, durable=durable)
            try:
                os.replace(source, path)
            finally:
                with suppress(OSError):
                    os.unlink(source)
    except OSError as error:
        raise _failed(path, error) from error
    if durable:
        sync_folder(path.parent)


def leftovers(folder: Path) -> Iterator[Path]:
    """The temporary files that a killed run has left in a folder of its own, on a system without files that have no
    name."""
    return folder.glob(f"{_TEMPORARY}*")


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk; not every system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def atomic(
    path: Path,
    *,
    replace: bool = True,
    in_cache: bool = False,
    on_whole: Callable[[os.stat_result], None] = lambda whole: None,
) -> Iterator[BinaryIO]:
    """A binary file that gets its name only when the context ends without an error. A symbolic link is kept, and its
    target is replaced. `on_whole` is called with the complete file on disk, just before it is renamed. Without
    `replace`, a file that has appeared under the name in the meantime is kept. If anything prevents the rename, the
    finished file stays under a similar name, which NameTaken reports. `written` leaves out what is `in_cache`. Raises
    StorageError."""
    try:
        target = _target(path)
        with _hidden(target) as file:
            yield file
            source = _linked(file, target)
            on_whole(os.stat(source))
            try:
                _name(source, target, replace=replace)
            except OSError as error:
                other = _spare_name(source, target)
                why = "has appeared meanwhile" if isinstance(error, FileExistsError) else str(error.strerror)
                _written.append(other)
                raise NameTaken(f"{path}: not replaced ({why}); the finished file is {other}", other) from error
            finally:
                with suppress(OSError):
                    os.unlink(source)
        if not in_cache:
            _written.append(path)
    except OSError as error:
        raise _failed(path, error) from error


def _failed(path: Path, error: OSError) -> StorageError:
    return StorageError(f"{path}: writing failed ({error.strerror}); free some space or choose another place")


def _target(path: Path) -> Path:
    """The path that a name finally refers to, with all links followed. Raises OSError."""
    target = Path(os.path.realpath(path))
    if target.is_symlink():  # realpath gives up on links that go in circles
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    return target


def _try_name(target: Path) -> None:
    """Raise OSError for a name that the file system rejects because of its length or its characters."""
    with suppress(FileNotFoundError):
        os.lstat(target)


def _beside(target: Path) -> Path:
    return target.parent / f"{_TEMPORARY}{os.urandom(6).hex()}{target.suffix[:32]}"


@contextmanager
def _hidden(target: Path) -> Iterator[BinaryIO]:
    """A new temporary file in the folder of `target`: without a name if the system supports that, so that a killed
    process leaves nothing behind, else with a hidden name, which is removed at the end."""
    temp = _beside(target)
    handle = _nameless(target)
    try:
        if handle < 0:
            # The mode is what `open` would give: the umask applies, and no chmod is needed, which some systems refuse.
            os.close(os.open(temp, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        # tifffile wants a file that knows its name.
        with open(temp if handle < 0 else f"/proc/self/fd/{handle}", "wb") as file:
            yield file
    finally:
        if handle >= 0:
            os.close(handle)
        with suppress(OSError):
            os.unlink(temp)


def _nameless(target: Path) -> int:
    """The descriptor of a new file without a name, or -1 if the file system cannot create one or cannot name it
    later."""
    if not hasattr(os, "O_TMPFILE") or not os.path.isdir("/proc/self/fd"):
        return -1
    handles: list[int] = []
    probe = _beside(target)
    try:
        for _ in range(2):
            handles.append(os.open(target.parent, os.O_TMPFILE | os.O_RDWR, 0o666))
        with open(f"/proc/self/fd/{handles[0]}", "wb") as file:
            os.link(file.name, probe, src_dir_fd=file.fileno(), follow_symlinks=True)
        os.unlink(probe)
        return handles.pop()
    except OSError:
        return -1
    finally:
        for handle in handles:
            os.close(handle)


def _linked(file: BinaryIO, target: Path, *, durable: bool = True) -> Path:
    """Finish a file, flushed to disk if `durable`, and return its hidden name. A file without a name gets one here,
    because it can be linked only once."""
    file.flush()
    if durable:
        _sync(file)
    if not str(file.name).startswith("/proc/self/fd/"):
        return Path(file.name)
    temp = _beside(target)
    os.link(file.name, temp, src_dir_fd=file.fileno(), follow_symlinks=True)
    return temp


def _sync(file: BinaryIO) -> None:
    """Flush a file to disk. Raises OSError if the disk lost data."""
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno in _LOST:
            raise


def _name(source: Path, target: Path, *, replace: bool) -> None:
    """Rename a file. Raises FileExistsError if `target` exists and `replace` is false, and OSError; the file then keeps
    its old name."""
    if replace:
        os.replace(source, target)
    else:
        try:
            os.link(source, target)
            os.unlink(source)
        except FileExistsError:
            raise
        except OSError:
            # No links here. Creating the name claims it: of two runs, one fails. The empty file is replaced at once.
            os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            os.replace(source, target)
    sync_folder(target.parent)


def _spare_name(source: Path, target: Path) -> Path:
    """Rename a finished file to a name like `target` with the first free number. Raises OSError."""
    for number in range(2, 1000):
        other = target.with_stem(f"{target.stem}-{number}")
        try:
            _name(source, other, replace=False)
            return other
        except FileExistsError:
            continue
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
