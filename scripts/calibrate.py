"""Measure again what tiler/compute/tuning.py and tiler/memory/tuning.py state.

    python scripts/calibrate.py kernels  # each kernel on fixed shapes: the table's rows that this processor can give
    python scripts/calibrate.py memory   # what the libraries take, and the plan beside the measured peak (SD 1.5)

`kernels` runs once for each instruction set, in a process whose torch, oneDNN, MKL and library of tiler's are limited
to it, and counts the processor's time of one thread, so that another program beside it changes little. `memory` renders
with the generated checkpoint of make_checkpoint.py: the difference between planned and measured is what the slack
constants have to cover.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tiler.compute import cpu
from tiler.compute.cpu import Isa
from tiler.compute.measure import TABLE_SHAPES, table_row, timings


class Limit(NamedTuple):
    """The flags of a processor of that instruction set, and what makes torch, oneDNN, MKL and tiler's library
    believe in it."""

    flags: tuple[str, ...]
    aten: str
    onednn: str
    mkl: str
    tiler: str

    @property
    def environment(self) -> dict[str, str]:
        return {
            "ATEN_CPU_CAPABILITY": self.aten,
            "ONEDNN_MAX_CPU_ISA": self.onednn,
            "MKL_ENABLE_INSTRUCTIONS": self.mkl,
            "TILER_ISA": self.tiler,
            "OMP_NUM_THREADS": "1",
        }


LIMITS = {
    Isa.AVX512_VNNI: Limit(("avx2", "avx512f", "avx512_vnni"), "avx512", "AVX512_CORE_VNNI", "AVX512", "v4"),
    Isa.AVX512: Limit(("avx2", "avx512f"), "avx512", "AVX512_CORE", "AVX512", "v3"),
    Isa.AVX2_VNNI: Limit(("avx2", "avx_vnni"), "avx2", "AVX2_VNNI", "AVX2", "v3-vnni"),
    Isa.AVX2: Limit(("avx2",), "avx2", "AVX2", "AVX2", "v3"),
}


def kernels() -> None:
    for isa in Isa:
        limit = LIMITS.get(isa)
        if limit is None:
            print(f"Isa.{isa.name}: no processor can be limited to it; fp32 alone is known to work", flush=True)
        elif missing := [flag for flag in limit.flags if flag not in cpu.flags()]:
            print(f"Isa.{isa.name}: cannot be measured here, this processor has no {', '.join(missing)}", flush=True)
        else:
            environment = {**os.environ, **limit.environment}
            subprocess.run([sys.executable, __file__, "row", isa], env=environment, check=True)


def row(isa: Isa) -> None:
    """The row for one instruction set, to which this process is limited already."""
    flags = LIMITS[isa].flags
    cpu.flags = lambda: flags  # type: ignore[assignment]
    found = [timings(shape, clock=time.thread_time) for shape in TABLE_SHAPES]
    for shape, times in zip(TABLE_SHAPES, found, strict=True):
        speed = shape.op().flops(shape.x) / 1e9
        said = ", ".join(f"{name} {1e3 * t:.2f} ms ({speed / t:.0f} GF/s)" for name, t in times.items())
        print(f"Isa.{isa.name}: {shape.label:32}{said}")
    for kind, order in table_row(isa, found).items():
        print(f"Isa.{isa.name}: {kind}: {order}", flush=True)


def memory() -> None:
    import make_checkpoint

    model = make_checkpoint.make("sd15")
    for options in ([], ["--precision", "int8"], ["--max-ram", "640MB"]):
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.json"
            command = [
                sys.executable,
                "-c",
                "from tiler.cli.main import main; main()",
                "render",
                "x",
                "-m",
                str(model),
                "--size",
                "1024",
            ]
            subprocess.run(
                [*command, "--steps", "1", "-o", f"{folder}/x.png", "--report", str(report), *options], check=True
            )
            told = json.loads(report.read_text())
        planned, peak = told["predicted_peak_bytes"], told["peak_rss_bytes"]
        print(f"{' '.join(options) or 'fp32':24}planned {planned / 1e6:.0f} MB, measured {peak / 1e6:.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["kernels", "memory", "row"], metavar="kernels|memory")
    parser.add_argument("isa", nargs="?", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.what == "row":
        row(Isa(args.isa))
    else:
        {"kernels": kernels, "memory": memory}[args.what]()


if __name__ == "__main__":
    main()
