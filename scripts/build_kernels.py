"""Compile tiler/native/*.c into the library that lies beside them: `python scripts/build_kernels.py`, with ziglang
installed.

clang, from the `ziglang` wheel: no compiler is needed on the machine, and what it makes runs on any glibc since 2.17.
GCC 12 spills the kernels' sums: its library would be half as fast or less.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
NATIVE = ROOT / "tiler" / "native"
FLAGS = ("-std=c11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")


class BuildError(Exception):
    """Why the library cannot be built here, in a line."""


def _instructions() -> ModuleType:
    """tiler/native/instructions.py by itself: what tiler imports may not be installed yet."""
    spec = importlib.util.spec_from_file_location("instructions", NATIVE / "instructions.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def target() -> str:
    """What the compiler calls this kind of machine. Raises BuildError where nothing is known to work."""
    machine = _instructions().machine_of(platform.machine())
    systems = {"linux": f"{machine}-linux-gnu.2.17", "darwin": f"{machine}-macos"}
    if machine not in ("x86_64", "aarch64") or sys.platform not in systems or sys.maxsize < 2**32:
        raise BuildError(f"there are none for {machine} {sys.platform}")
    if sys.platform == "linux" and platform.libc_ver()[0] != "glibc":
        return f"{machine}-linux-musl"
    return systems[sys.platform]


def library_path() -> Path:
    """Where the library lies."""
    return NATIVE / ("kernels.dylib" if sys.platform == "darwin" else "kernels.so")


def build() -> Path:
    """The library; the old one is replaced when the new one is whole. Raises BuildError."""
    if importlib.util.find_spec("ziglang") is None:
        raise BuildError("the compiler is missing (pip install ziglang)")
    aim, machine, library = target(), _instructions().machine_of(platform.machine()), library_path()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        objects = []
        for isa in _instructions().SETS:
            if isa.machine == machine:
                names = (f"-DSET={isa.symbol}", f'-DSET_NAME="{isa.name}"', f"-mcpu={isa.cpu}")
                objects.append(_compiled("kernels.c", work / f"{isa.symbol}.o", aim, work, *names))
        objects += [_compiled(name, work / f"{name}.o", aim, work) for name in ("library.c", "pool.c")]
        made = work / library.name
        _zig(work, "-target", aim, "-shared", "-s", "-o", str(made), *map(str, objects), "-lpthread", "-lm")
        partial = library.with_suffix(".partial")
        partial.write_bytes(made.read_bytes())
        os.replace(partial, library)
    return library


def _compiled(source: str, made: Path, aim: str, work: Path, *more: str) -> Path:
    _zig(work, "-target", aim, *FLAGS, *more, "-c", str(NATIVE / source), "-o", str(made))
    return made


def _zig(work: Path, *arguments: str) -> None:
    # Its caches would stay behind in the home folder: 100 MB for a few seconds saved.
    own = {"ZIG_GLOBAL_CACHE_DIR": str(work / "zig"), "ZIG_LOCAL_CACHE_DIR": str(work / "zig")}
    command = [sys.executable, "-m", "ziglang", "cc", *arguments]
    try:
        done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(str(error)) from error
    if done.returncode:
        lines = (
            [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["no message"]
        )
        raise BuildError(lines[0])


def try_build() -> Path | None:
    """The library, or None after a line that says why there is none: an install goes on without it, and without an old
    one."""
    try:
        if os.environ.get("TILER_KERNELS") != "0":
            return build()
    except (BuildError, OSError) as error:
        print(f"tiler: kernels were not built, torch computes instead: {error}", file=sys.stderr)
    library_path().unlink(missing_ok=True)
    return None


if __name__ == "__main__":
    sys.exit(try_build() is None)
