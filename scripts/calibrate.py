"""Measure again what tiler/compute/tuning.py and tiler/memory/tuning.py state.

    python scripts/calibrate.py kernels     # each kernel on fixed shapes: the table's rows that this processor can give
    python scripts/calibrate.py precisions  # passes of three denoisers in fp32, int8 and bf16: how much each gains
    python scripts/calibrate.py memory      # what the libraries take, and the plan beside the measured peak (SD 1.5)

`kernels` and `precisions` run once for each instruction set (or for those that are named), in a process whose torch,
oneDNN, MKL and library of tiler's are limited to it, and count the processor's time of one thread, so that another
program beside it changes little. `memory` renders with the generated checkpoint of make_checkpoint.py: the difference
between planned and measured is what the slack constants have to cover.
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

import torch

from tiler.compute import cpu
from tiler.compute.cpu import Isa
from tiler.compute.measure import TABLE_SHAPES, table_row, timings
from tiler.compute.precisions import arithmetic
from tiler.compute.tuning import INT8_CHANNELS
from tiler.models.built import Models
from tiler.models.family import Options, Role, plain_names, read_family
from tiler.models.samples import Prompt
from tiler.native import library
from tiler.packing import packed_weights
from tiler.planning.peaks import bf16_keys
from tiler.request import Precision
from tiler.run import streamed
from tiler.weights.checkpoint import resolve
from tiler.weights.packed import default_cache


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
            "OMP_NUM_THREADS": "1",
            **({"TILER_ISA": self.tiler} if self.tiler else {}),  # where tiler need not be limited, it may be set
        }


LIMITS = {
    Isa.AVX512_VNNI: Limit(("avx2", "avx512f", "avx512_vnni"), "avx512", "AVX512_CORE_VNNI", "AVX512", ""),
    Isa.AVX512: Limit(("avx2", "avx512f"), "avx512", "AVX512_CORE", "AVX512", "v3"),
    Isa.AVX2_VNNI: Limit(("avx2", "avx_vnni"), "avx2", "AVX2_VNNI", "AVX2", "v3-vnni"),
    Isa.AVX2: Limit(("avx2",), "avx2", "AVX2", "AVX2", "v3"),
}


def each_row(what: str, rows: list[Isa]) -> None:
    """Run `calibrate.py WHAT ISA` for every row that this processor can give."""
    for isa in rows or Isa:
        limit = LIMITS.get(isa)
        if limit is None:
            print(f"Isa.{isa.name}: no processor can be limited to it; fp32 alone is known to work", flush=True)
        elif missing := [flag for flag in limit.flags if flag not in cpu.flags()]:
            print(f"Isa.{isa.name}: cannot be measured here, this processor has no {', '.join(missing)}", flush=True)
        else:
            environment = {**os.environ, **limit.environment}
            subprocess.run([sys.executable, __file__, what, isa], env=environment, check=True)


def limit_to(isa: Isa) -> None:
    """Make tiler's table believe in a processor to which this process's libraries are limited already."""
    flags = LIMITS[isa].flags
    cpu.flags = lambda: flags  # type: ignore[assignment]


def row(isa: Isa) -> None:
    """The row for one instruction set, to which this process is limited already."""
    limit_to(isa)
    found = [timings(shape, clock=time.thread_time) for shape in TABLE_SHAPES]
    for shape, times in zip(TABLE_SHAPES, found, strict=True):
        speed = shape.op().flops(shape.x) / 1e9
        said = ", ".join(f"{name} {1e3 * t:.2f} ms ({speed / t:.0f} GF/s)" for name, t in times.items())
        print(f"Isa.{isa.name}: {shape.label:32}{said}")
    for kind, order in table_row(isa, found).items():
        print(f"Isa.{isa.name}: {kind}: {order}", flush=True)


def passes(isa: Isa, rounds: int = 2) -> None:
    """Denoisers' passes in each precision."""
    import make_checkpoint

    limit_to(isa)
    here, kernels = arithmetic(), library.library()
    print(f"Isa.{isa.name}: tiler's library: {kernels.isa if kernels else 'none'}", flush=True)
    for model in ("mini", str(make_checkpoint.make("sd15")), str(make_checkpoint.make("wide-sd3"))):
        models = Models(read_family(resolve(model)))
        runs = ["fp32", *(["int8"] if here.int8.products else []), *(["bf16"] if here.bf16 else [])]
        took = {precision: [one_pass(models, Precision(precision)) for _ in range(rounds)] for precision in runs}
        best = {precision: min(some) for precision, some in took.items()}
        said = ", ".join(f"{name} {seconds:.2f} s ({best['fp32'] / seconds:.2f}×)" for name, seconds in best.items())
        print(
            f"Isa.{isa.name}: {Path(model).name}, {models.family.traits.width} channels, {here.isa}: {said}", flush=True
        )


def one_pass(models: Models, precision: Precision) -> float:
    """Seconds of the user's processor time, for two samples, or as many of a narrow model as a read serves easily:
    weights are prepared once for all."""
    family, part = models.family, models.family.part(Role.DENOISER)
    module, generator = models.module(part), torch.Generator().manual_seed(1)

    def filled(meta: torch.Tensor) -> torch.Tensor:
        return torch.randn(meta.shape, generator=generator)

    tiles = 1 if family.traits.width >= INT8_CHANNELS else 8
    examples = family.example([i // 2 for i in range(2 * tiles)], (family.native, family.native))
    latents = [filled(e.latents) for e in examples[::2]]
    given = [example.prompt for example in examples]
    prompts = [Prompt(filled(p.tokens), None if p.pooled is None else filled(p.pooled)) for p in given]
    samples = [e._replace(latents=latents[i // 2], prompt=prompts[i]) for i, e in enumerate(examples)]
    weights, names = family.checkpoint.weights(part.name), part.aliases
    if precision is Precision.INT8:
        weights, names = packed_weights(models, default_cache(), lambda share, why: None), plain_names
    keys = bf16_keys(part, module, precision)
    with (
        torch.no_grad(),
        streamed(module, weights, names, bf16_keys=keys, arena_bytes=part.arena_bytes, transform=True) as streamer,
    ):
        times = torch.tensor([500.0]) if family.traits.flow else torch.tensor([500])
        prepared = family.prepare(module, streamer, times, prompts, Options(guidance=(1.0,)))
        begin, count = os.times().user, 0
        while os.times().user - begin < 1:  # whose clock ticks a hundred times a second
            family.predict(module, streamer, samples, 0, prepared)
            count += 1
        return (os.times().user - begin) / count


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
    inner = {"row": row, "passes": passes}
    parser.add_argument(
        "what", choices=["kernels", "precisions", "memory", *inner], metavar="kernels|precisions|memory"
    )
    parser.add_argument("isa", nargs="*", type=Isa, help="rows of the table (default: all), as avx2")
    args = parser.parse_args()
    if args.what in inner:
        inner[args.what](*args.isa)
    elif args.what == "memory":
        memory()
    else:
        each_row("row" if args.what == "kernels" else "passes", args.isa)


if __name__ == "__main__":
    main()
