"""`tiler doctor`: what this machine has, and how tiler uses it."""

from __future__ import annotations

import itertools
import platform
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tiler.cli import options as o
from tiler.cli.terminal import wrapped
from tiler.memory.budget import format_mb
from tiler.memory.tuning import HUGE_PAGES_FROM
from tiler.request import DoctorRequest
from tiler.version import versions

if TYPE_CHECKING:
    from tiler.native.library import Library

Measure = Annotated[
    bool,
    typer.Option(
        "--measure", help="Time the kernels that can run here, and say where another one beats tiler's choice."
    ),
]


def run(request: DoctorRequest, *, measure: Measure = False, json_output: o.Json = False) -> None:
    """Show memory, limits, cores, CPU flags, data types, versions and free disk; with --model, inspect a model.

    Of a model it shows: the family and the kind of prediction, where each part comes from and how it is stored, which
    choices were made and why, and what is missing.
    """
    if request.model or request.diffusion_model:
        _show_model(request if request.model else replace(request, model="mini"), json_output)
        return
    _show_machine(measure, json_output)


command = o.command_of(DoctorRequest, run)


def _show_model(request: DoctorRequest, json_output: bool) -> None:
    o.prepare_process(None)
    from tiler.models.diagnosis import diagnose

    facts, error = diagnose(request)
    _print(facts, json_output)
    if error is not None:
        raise error


def _show_machine(measure: bool, json_output: bool) -> None:
    import psutil

    from tiler.compute import cpu
    from tiler.memory.limits import available_ram, cgroup_limit, usable_cpus
    from tiler.memory.process import prepare_huge_pages
    from tiler.native import library
    from tiler.weights.places import hub_cache

    available, total = available_ram()
    limit = cgroup_limit()
    facts = {
        "ram": f"{format_mb(available)} available of {format_mb(total)}",
        "cgroup limit": "none" if limit is None else format_mb(limit),
        "huge pages": _huge_pages(able=prepare_huge_pages()),
        "swap": format_mb(psutil.swap_memory().total),
        "cores": f"{psutil.cpu_count(logical=False)} physical, {usable_cpus()} usable",
        "cpu": f"{platform.machine()}: {', '.join(cpu.flags()) or 'no known flags'}",
        "storage dtype": "as in the checkpoint (fp16, bf16 or fp32); weights are cast when they are used",
        "instruction set": f"{cpu.isa()}, which decides the kernels",
        "kernels": _kernels(library.library(), library.fault()),
        "compute dtype": _compute_dtype(
            int8_runs=cpu.int8().products, bf16_runs=library.has_bf16(), bf16_is_slow=cpu.bf16_is_slow()
        ),
        "--precision int8": cpu.int8().why,
        "--precision bf16": _bf16(library.library(), is_slow=cpu.bf16_is_slow()),
        "--precision auto": _auto(),
        "accumulation dtype": "fp32 canvas, fp64 mask sums",
        "free disk": f"{format_mb(shutil.disk_usage(Path.cwd()).free)} in {Path.cwd()}",
        "hub cache": str(hub_cache()),
        "torch": _torch_build(Path(str(find_spec("torch").origin)).with_name("lib")),  # type: ignore[union-attr]
        "versions": ", ".join(
            [
                f"python {platform.python_version()}",
                *(" ".join(of) for of in versions("torch", "diffusers", "transformers", "safetensors").items()),
            ]
        ),
    }
    if measure:
        from tiler.compute.measure import compare

        facts |= {f"kernels {number}": sentence for number, sentence in enumerate(compare(), 1)}
    _print(facts, json_output)


def _torch_build(libraries: Path) -> str:
    """The devices that torch is built for, by the files in its folder of libraries."""
    for device, file in (("CUDA", "libtorch_cuda.so"), ("ROCm", "libtorch_hip.so")):
        if (libraries / file).exists():
            return f"built for {device}, which tiler does not use; the CPU build takes at least 77 MB less memory (README.md)"
    return "built for processors"


def _print(facts: dict[str, str], json_output: bool) -> None:
    if json_output:
        o.tell(facts)
        return
    for name, value in facts.items():
        typer.echo(wrapped(f"{name:20}{value}", 20))


def _huge_pages(*, able: bool) -> str:
    """Where they are used."""
    if not able:
        return "not used: this system cannot limit them to tensors and arrays"
    return f"for pictures that are decoded under ceilings of {format_mb(HUGE_PAGES_FROM)} and more"


def _kernels(library: Library | None, fault: str) -> str:
    """Which library computes."""
    if library is None:
        return f"torch's; tiler's own library: {fault}"
    return f"tiler's own library for {library.isa}; torch's for the rest"


def _bf16(library: Library | None, *, is_slow: bool) -> str:
    """Whether `--precision bf16` can be asked for."""
    if library is None:
        return "not without tiler's own library"
    if is_slow:
        return "not unless TILER_ISA=v4-bf16 is set: on this processor, bf16 products take longer than fp32's"
    return "bf16 products, fp32 sums" if library.has_bf16 else "not on this machine: it has no kernels for bf16"


def _auto() -> str:
    """What `--precision auto` takes, by the number of a denoiser's channels."""
    from tiler.compute.precisions import arithmetic
    from tiler.compute.tuning import SPEEDUPS_OF
    from tiler.planning.precision import choose_precision
    from tiler.request import Precision

    here = arithmetic()
    chosen = {least: choose_precision(Precision.AUTO, least, here)[0] for least in SPEEDUPS_OF[here.isa]}
    changes = [
        f"{precision} for models with {least} channels and more"
        for (_, last), (least, precision) in itertools.pairwise(chosen.items())
        if precision is not last
    ]
    return ", ".join([str(chosen[0]), *changes])


def _compute_dtype(*, int8_runs: bool, bf16_runs: bool, bf16_is_slow: bool) -> str:
    """The dtype of arithmetic on this processor, and the reason."""
    others = "fp32 for the VAE, the prompt and the outermost layers" if int8_runs else "fp32"
    if int8_runs:
        others = f"int8 products in the denoiser where --precision allows it; {others}"
    if bf16_runs:
        return f"{others}; this processor has bf16 instructions, which attention and the VAE beside int8 weights use, and --precision bf16"
    if bf16_is_slow:
        return f"{others}; this processor takes longer for bf16 products than for fp32's"
    return f"{others}; tiler has no products of bf16 here, and half precision without them is slower than fp32"
