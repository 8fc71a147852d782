"""Measure again what tiler/compute/tuning.py and tiler/memory/tuning.py state.

    python scripts/calibrate.py kernels     # each kernel on fixed shapes, and the row of the table for this processor
    python scripts/calibrate.py memory      # what the libraries take, and the plan beside the measured peak of SD 1.5's size
    ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 ATEN_CPU_CAPABILITY=avx2 python scripts/calibrate.py kernels

Times mean something on a quiet machine only. `memory` renders with the generated checkpoint of make_checkpoint.py: the difference
between planned and measured is what the slack constants have to cover.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from tiler.compute import cpu
from tiler.compute.measure import TABLE_SHAPES, table_row, timings


def kernels() -> None:
    isa = cpu.isa()
    for shape in TABLE_SHAPES:
        times = timings(shape)
        found = ", ".join(f"{name} {1e3 * seconds:.2f} ms" for name, seconds in times.items())
        print(f"{shape.label:32}{found}", flush=True)
    for kind, order in table_row(isa).items():
        print(f"Isa.{isa.name}: {kind}: {order}")


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
    parser.add_argument("what", choices=["kernels", "memory"])
    {"kernels": kernels, "memory": memory}[parser.parse_args().what]()


if __name__ == "__main__":
    main()
