"""The kernels of ARM against fp64, cross-compiled and run by an emulator: no such processor is needed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import build_kernels
import pytest

from tests.native.driving import DRIVER, NATIVE, write
from tests.native.kernel_cases import (
    LIBRARIES,
    attentions,
    needs_library,
    others,
    products,
    transforms,
    weights,
)  # fmt: skip
from tiler.native.instructions import SETS

QEMU = shutil.which("qemu-aarch64")
ARM = [s for s in SETS if s.machine == "aarch64"]
pytestmark = [
    needs_library,
    pytest.mark.skipif("TILER_TEST_ARM" not in os.environ, reason="set TILER_TEST_ARM=1: compiling takes a minute"),
    pytest.mark.skipif(QEMU is None, reason="qemu-aarch64 is not installed (apt-get install qemu-user)"),
    pytest.mark.skipif(find_spec("ziglang") is None, reason="ziglang is not installed"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The driver for ARM, and the cases, which any of this machine's libraries can lay out."""
    work = tmp_path_factory.mktemp("arm")
    zig = [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-musl"]
    caches = {"ZIG_GLOBAL_CACHE_DIR": str(work / "zig"), "ZIG_LOCAL_CACHE_DIR": str(work / "zig")}
    jobs = [
        [
            str(NATIVE / "kernels.c"), f"-DSET={s.symbol}", f'-DSET_NAME="{s.name}"', f"-mcpu={s.cpu}", "-o",
            f"{s.symbol}.o",
        ]
        for s in ARM
    ]  # fmt: skip
    jobs += [[str(path), "-o", f"{path.name}.o"] for path in (NATIVE / "library.c", NATIVE / "pool.c", DRIVER)]
    commands = [[*zig, *build_kernels.FLAGS, "-c", *job] for job in jobs]
    commands.append([*zig, "-static", "-s", *(job[-1] for job in jobs), "-o", "driver", "-lpthread", "-lm"])
    for command in commands:
        subprocess.run(command, cwd=work, env=os.environ | caches, check=True)
    lib = LIBRARIES[0]
    made = (*products(lib), *others(), *attentions(lib), *weights(lib), *transforms(lib))
    for number, case in enumerate(made):
        write(case, work / f"case-{number}")
    return work


@pytest.mark.parametrize("name", [s.name for s in ARM])
def test_results_are_those_of_fp64(name: str, folder: Path) -> None:
    cases = sorted(path.name for path in folder.glob("case-*"))
    command = [str(QEMU), "./driver", name, "2", *cases]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_a_processor_runs_the_sets_that_it_has(folder: Path) -> None:
    """A Cortex-A53 (Raspberry Pi 3) has neither dot products nor i8mm, a Neoverse N1 the former."""
    ran = {
        (cpu, s.name): subprocess.run(
            [str(QEMU), "-cpu", cpu, "./driver", s.name, "1", "case-0"], cwd=folder, check=False
        )
        for cpu in ("cortex-a53", "neoverse-n1")
        for s in ARM
    }
    runs = {key for key, done in ran.items() if done.returncode == 0}
    assert runs == {("cortex-a53", "neon"), ("neoverse-n1", "neon"), ("neoverse-n1", "dotprod")}
