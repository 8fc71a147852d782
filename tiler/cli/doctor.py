"""`tiler doctor`: what this machine has, and what tiler makes of it."""

from __future__ import annotations

import json
import platform
import shutil
from importlib import metadata
from pathlib import Path

import typer

from tiler.cli import options as o
from tiler.memory.budget import format_mb


def command(json_output: o.Json = False) -> None:
    """Show memory, limits, cores, CPU flags, dtypes and why, versions, free disk."""
    import psutil

    from tiler.compute import cpu
    from tiler.memory.limits import available_ram, cgroup_limit, usable_cpus
    from tiler.weights.places import hub_cache

    available, total = available_ram()
    limit = cgroup_limit()
    facts = {
        "ram": f"{format_mb(available)} available of {format_mb(total)}",
        "cgroup limit": "none" if limit is None else format_mb(limit),
        "swap": format_mb(psutil.swap_memory().total),
        "cores": f"{psutil.cpu_count(logical=False)} physical, {usable_cpus()} usable",
        "cpu": f"{platform.machine()}: {', '.join(cpu.flags()) or 'no known flags'}",
        "storage dtype": "as in the checkpoint (fp16, bf16 or fp32); weights are cast when they are used",
        "compute dtype": "fp32: half-precision arithmetic is slower than fp32 on CPUs without AMX, and overflows in SD's VAE",
        "--precision int8": cpu.int8().why,
        "--precision auto": f"{'int8' if cpu.int8().dot else 'fp32'}: {cpu.int8().auto}",
        "accumulation dtype": "fp32 canvas, fp64 mask sums",
        "free disk": f"{format_mb(shutil.disk_usage(Path.cwd()).free)} in {Path.cwd()}",
        "hub cache": str(hub_cache()),
        "versions": ", ".join([f"python {platform.python_version()}", *(f"{n} {metadata.version(n)}" for n in ("tiler", "torch", "diffusers", "transformers", "safetensors"))]),
    }  # fmt: skip
    if json_output:
        typer.echo(json.dumps(facts))
        return
    for name, value in facts.items():
        typer.echo(f"{name:20}{value}")
