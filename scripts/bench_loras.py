"""What a LoRA costs: user CPU seconds of a denoiser pass, which a busy machine changes little, and peaks, of equal
passes with a LoRA of random factors and without one.

    python scripts/bench_loras.py                              rank 32 at SD 1.5's size under 800 MB, fp32 and int8
    python scripts/bench_loras.py --model FOLDER --rank 128 --convs
    python scripts/bench_loras.py --precision fp32 --side 8    the seconds of the LoRA alone: in fp32 they are those of
                                                               reading the weights, whatever the size of a picture

A pass is that of the plan at 2048²: as many samples as share a read there, or fewer with --samples, which makes the
LoRA's share larger than it is in a render. Both workers take the batch and the resident
weights of the plan without the LoRA, so that nothing else tells them apart; the last column is what the smallest
ceiling of the plan grows by.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import make_checkpoint
import torch
from bench import Worker
from safetensors.torch import save_file
from torch import nn

from tiler.models import family as families
from tiler.models.built import Models
from tiler.models.family import Role
from tiler.weights import checkpoint

PASS = """
import json, resource, sys
from dataclasses import replace
from pathlib import Path
from tiler.memory import process
from tiler.memory import lean_imports as imports
process.frugal_allocator()
imports.lean_torch()
from tiler import packing
from tiler.memory.budget import Budget
from tiler.memory.policy import at_layer
from tiler.models.built import Models
from tiler.models.family import Options, Role, read_family
from tiler.models.loras import apply_loras
from tiler.phases import make_plan
from tiler.planning.resolve import fill
from tiler.request import Precision, RenderRequest
from tiler.request.loras import Lora
from tiler.run import streamed
from tiler.weights.checkpoint import resolve
from tiler.weights.packed import default_cache
import torch
torch.set_grad_enabled(False)
precision = Precision({precision!r})
request = fill(RenderRequest(prompt="x", size=2048, precision=precision))
family = read_family(resolve({model!r}))
plain, models = Models(family), Models(family)
if {lora!r}:
    models.loras = apply_loras([Lora(file=Path({lora!r}))], models)
plan = make_plan(request, plain, {ceiling})
smallest = make_plan(request, models, {ceiling}).memory.smallest_bytes
part = family.part(Role.DENOISER)
module, files, changes = models.module(part), family.checkpoint.weights(part.name), models.changes(part)
names = part.aliases
if precision is Precision.INT8:
    files = packing.packed_weights(models, default_cache(), lambda share, why: None)
    names, changes = packing.packed_names(part), packing.beside_packed(models, part)
made = {{}}
def real(tensor):
    if id(tensor) not in made:
        made[id(tensor)] = tensor, torch.randn(tensor.shape)
    return made[id(tensor)][1]
samples = []
side = {side} or family.native
for one in family.example([i // 2 for i in range({samples} or plan.batch)], (side, side)):
    prompt = one.prompt._replace(tokens=real(one.prompt.tokens), pooled=None if one.prompt.pooled is None else real(one.prompt.pooled))
    samples.append(one._replace(latents=real(one.latents), prompt=prompt))
check = at_layer(Budget({ceiling} * 2), plan.memory.peak_of("canvas"), plan.memory.heap_of("canvas"))
held = dict(changes=changes, arena_bytes=plan.arena_bytes, transform=True)
torch.set_num_threads(1)  # threads that wait take the processor's time too
with streamed(module, files, names, plan.resident["canvas"], **held) as streamer:
    prepared = family.prepare(module, streamer, torch.tensor([500.0]), [sample.prompt for sample in samples], Options())
    process.reset_peak()
    for line in sys.stdin:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
        family.predict(module, streamer, samples, 0, prepared, check)
        seconds = resource.getrusage(resource.RUSAGE_SELF).ru_utime - before
        print(json.dumps(dict(seconds=seconds, samples=len(samples), peak=process.read_rss().peak, smallest=smallest)), flush=True)
"""


def lora_file(model: str, rank: int, folder: Path, *, convs: bool) -> Path:
    """Random factors in fp16 for the layers that kohya's trainer changes: the Linear and Conv2d layers of transformers
    and their in and out projections, and with `convs` those of resnets and samplers too."""
    family = families.read_family(checkpoint.resolve(model))
    module = Models(family).module(family.part(Role.DENOISER))
    tensors = {}
    for path, layer in module.named_modules():
        inner = "attentions" in path or "transformer_blocks" in path
        if not isinstance(layer, nn.Linear | nn.Conv2d) or not (inner or (convs and "blocks" in path)):
            continue
        out, inputs, *taps = layer.weight.shape
        name = f"lora_unet_{path.replace('.', '_')}"
        tensors[f"{name}.lora_down.weight"] = torch.randn(rank, inputs, *taps).half() / 100
        tensors[f"{name}.lora_up.weight"] = torch.randn(out, rank, *(1 for _ in taps)).half() / 100
        tensors[f"{name}.alpha"] = torch.tensor(float(rank)).half()
    path = folder / f"rank{rank}.safetensors"
    save_file(tensors, path)
    print(f"{len(tensors) // 3} modules of rank {rank}, {path.stat().st_size / 1e6:.0f} MB")
    return path


def bench(model: str, lora: Path, ceiling: int, precision: str, rounds: int, side: int, samples: int) -> dict[str, Any]:
    """Passes with and without the LoRA by turns; the first of each is not counted."""
    told = {"model": model, "ceiling": ceiling, "precision": precision, "side": side, "samples": samples}
    codes = {name: PASS.format(**told, lora=file) for name, file in (("plain", ""), ("lora", str(lora)))}
    workers = {}
    for name, code in codes.items():
        workers[name] = Worker(sys.executable, code)
        workers[name].measure()
    runs = [{name: worker.measure() for name, worker in workers.items()} for _ in range(rounds)]
    for worker in workers.values():
        worker.close()
    last = runs[-1]
    return {
        "samples": last["plain"]["samples"],
        "seconds": statistics.median(run["plain"]["seconds"] for run in runs),
        "longer": statistics.median(run["lora"]["seconds"] - run["plain"]["seconds"] for run in runs),
        "peak": last["plain"]["peak"],
        "more": last["lora"]["peak"] - last["plain"]["peak"],
        "planned": last["lora"]["smallest"] - last["plain"]["smallest"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder; default: the generated sd15")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--convs", action="store_true", help="a LoCon: convolutions too")
    parser.add_argument("--ceiling", type=int, default=800_000_000, help="bytes")
    parser.add_argument("--precision", nargs="+", choices=["fp32", "int8"], default=["fp32", "int8"])
    parser.add_argument(
        "--side", type=int, default=0, help="latents of a sample's side; default: the model's native size"
    )
    parser.add_argument("--samples", type=int, default=0, help="of a pass; default: the plan's")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    model = args.model or str(make_checkpoint.make("sd15"))
    with tempfile.TemporaryDirectory() as folder:
        lora = lora_file(model, args.rank, Path(folder), convs=args.convs)
        for precision in args.precision:
            row = bench(model, lora, args.ceiling, precision, args.rounds, args.side, args.samples)
            print(
                f"{precision}: a pass of {row['samples']} samples takes {row['seconds']:.1f} s, with the LoRA "
                f"{row['longer']:+.2f} s ({row['longer'] / row['seconds']:+.1%}); peak {row['peak'] / 1e6:.0f} MB, with it {row['more'] / 1e6:+.1f} MB; smallest "
                f"ceiling {row['planned'] / 1e6:+.0f} MB"
            )


if __name__ == "__main__":
    main()
