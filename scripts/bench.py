"""Measure what the README claims, on one full-size checkpoint.

    python scripts/bench.py unet     streamed passes under the ceiling, fp32, int8 and (where there are kernels for it)
                                     bf16, against diffusers' resident fp32, alternating; with --peers also against
                                     accelerate's disk_offload, OpenVINO (--openvino PYTHON, where openvino, nncf, torch
                                     and diffusers are) and stable-diffusion.cpp (--sdcpp PYTHON, with
                                     stable-diffusion-cpp-python)
    python scripts/bench.py memory   predicted against measured peaks of renders at several ceilings and sizes
    python scripts/bench.py families the same for every model family at full width (--model KIND: for one), and one call
                                     against diffusers where that fits
    python scripts/bench.py large    the same for each phase of 4096×4096 (--sizes), each stopped after --minutes
    python scripts/bench.py decode   the same, and seconds, for exact and frozen decoding at several sizes
    python scripts/bench.py render   a whole 2048×2048 render with its report
    python scripts/bench.py start    seconds before the first step of `tiler render` on mini at 512×512
    python scripts/bench.py unet render --json FILE

Every measurement runs in a fresh process that reads its own VmHWM. Times on shared machines are noisy: look at the
ratio, a median over `--rounds` alternations. `memory` runs two steps, not twenty: peaks repeat from pass to pass. So
they do inside a phase, and `large` reads the kernel's mark of a process that it then stops: the whole takes hours.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import bench_families
import make_checkpoint

from tiler.native.library import has_bf16

ROOT = Path(__file__).parents[1]

# A worker does one pass for each line on its standard input, so that two kinds of worker can alternate.
STREAMED = """
import sys, time, json
from pathlib import Path
from tiler.memory import process
from tiler.memory import lean_imports as imports
process.frugal_allocator()
imports.lean_torch()
from tiler.models.built import Models
from tiler.models.family import Role, read_family, plain_names
from tiler.models.unet import predict_noise
from tiler.memory.budget import Budget
from tiler.memory.policy import at_layer
from tiler.phases import make_plan
from tiler.run import streamed
from tiler.packing import packed_weights
from tiler.weights.packed import default_cache
from tiler.planning.peaks import bf16_keys
from tiler.planning.resolve import fill
from tiler.request import Precision, RenderRequest
from tiler.weights.checkpoint import resolve
import torch
torch.set_grad_enabled(False)
family = read_family(resolve({model!r}))
precision = Precision({precision!r})
models = Models(family)
plan = make_plan(fill(RenderRequest(prompt="x", size={size}, precision=precision)), models, {ceiling})
files = packed_weights(models, default_cache(), lambda share, why: None) if precision is Precision.INT8 else family.checkpoint.weights("unet")
process.reset_peak()
unet, n, budget = models.module(family.part(Role.DENOISER)), family.native, Budget({ceiling})
peak = plan.memory.peak_of("canvas")
check = at_layer(budget, peak, plan.memory.heap_of("canvas"))
halves = bf16_keys(family.part(Role.DENOISER), unet, precision)
options = dict(bf16_keys=halves, arena_bytes=plan.arena_bytes, transform=True, short=lambda: budget.short(plan.sample_bytes))
with streamed(unet, files, plain_names, plan.resident["canvas"], **options) as streamer:
    tiles = [torch.randn(1, family.latent_channels, n, n) for _ in range((plan.batch + 1) // 2)]
    x = [tile for tile in tiles for _ in range(2)][:plan.batch]
    c = [torch.randn(1, 77, family.part(Role.TEXT_ENCODER).config["hidden_size"]) for _ in x]
    for line in sys.stdin:
        before, start = streamer.store.bytes_read, time.perf_counter()
        predict_noise(unet, streamer, x, torch.tensor(500), c, check)
        seconds = time.perf_counter() - start
        print(json.dumps({{"seconds_per_sample": seconds / plan.batch, "batch": plan.batch, "bytes_read": streamer.store.bytes_read - before,
              "peak": process.read_rss().peak, "predicted": peak}}), flush=True)
"""
RESIDENT = """
import sys, time
import torch
from diffusers import UNet2DConditionModel
torch.set_grad_enabled(False)
unet = UNet2DConditionModel.from_pretrained({model!r}, subfolder="unet", variant="fp16", torch_dtype=torch.float32).eval()
n, channels, width = (unet.config[k] for k in ("sample_size", "in_channels", "cross_attention_dim"))
values = torch.cat([torch.randn(1, channels, n, n)] * 2), torch.tensor(500), torch.randn(2, 77, width)
"""
# accelerate's own way to run with little memory: weights on disk, fetched layer by layer.
OFFLOAD = """
import tempfile
from accelerate import disk_offload
folder = tempfile.TemporaryDirectory()
disk_offload(unet, folder.name, execution_device=torch.device("cpu"))
open("/proc/self/clear_refs", "w").write("5")
"""
# OpenVINO's own graphs of the same UNet. int8: weights and activations where NNCF says so, calibrated on one input,
# which is enough as far as time is concerned.
OPENVINO_EXPORT = """
from pathlib import Path
import nncf, openvino, torch
from diffusers import UNet2DConditionModel
class Plain(torch.nn.Module):
    def forward(self, x, t, c):
        return self.unet(x, t, c, return_dict=False)[0]
plain = Plain().eval()
plain.unet = UNet2DConditionModel.from_pretrained({model!r}, subfolder="unet", variant="fp16", torch_dtype=torch.float32).requires_grad_(False)
n, channels, width = (plain.unet.config[k] for k in ("sample_size", "in_channels", "cross_attention_dim"))
values = torch.randn(2, channels, n, n), torch.tensor(500), torch.randn(2, 77, width)
graph = openvino.convert_model(plain, example_input=values, input=[list(v.shape) for v in values])
del plain
openvino.save_model(graph, {folder!r} + "/fp32.xml")
some = nncf.Dataset([[v.numpy() for v in values]])
fast = nncf.AdvancedQuantizationParameters(disable_bias_correction=True)
graph = nncf.quantize(graph, some, model_type=nncf.ModelType.TRANSFORMER, subset_size=1, advanced_parameters=fast)
openvino.save_model(graph, {folder!r} + "/int8.xml")
"""
# By default OpenVINO takes bf16 for all that is not int8, where the processor has it. Its fp32 graph at its default
# would be one more process of 4 GB beside the others.
F32 = {"INFERENCE_PRECISION_HINT": "f32"}
OPENVINO_WAYS = {"int8": ("int8", {}), "int8, f32 hint": ("int8", F32), "fp32": ("fp32", F32)}
OPENVINO = """
import sys, time
import numpy, openvino
unet = openvino.Core().compile_model({graph!r}, "CPU", {hints!r})
rng = numpy.random.default_rng(1)
values = [rng.standard_normal(list(i.shape)).astype("float32") if len(i.shape) else numpy.array(500) for i in unet.inputs]
unet = lambda *values, compiled=unet: compiled(values)
"""
# The beginning of every peer's loop. stable-diffusion.cpp silences standard output while it draws: hence a copy of it.
REPORT = """
import json, os
out = os.fdopen(os.dup(1), "w")
def report(seconds, batch):
    peak = int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
    print(json.dumps({"seconds_per_sample": seconds / batch, "batch": batch, "peak": peak}), file=out, flush=True)
"""
# stable-diffusion.cpp has no call for the UNet alone: two steps of a picture without guidance are one sample each, and
# it says itself how long the second took.
SDCPP = """
import sys, tempfile
from pathlib import Path
from stable_diffusion_cpp import StableDiffusion
folder = tempfile.TemporaryDirectory()
for part in ("unet", "vae", "text_encoder"):
    file = next(Path({model!r}, part).glob("*.safetensors"))
    Path(folder.name, part).mkdir()
    Path(folder.name, part, file.name.replace(".fp16", "")).symlink_to(file)
Path(folder.name, "model_index.json").write_text("{{}}")
model, side = StableDiffusion(model_path=folder.name, verbose=False), 8 * {native}
def done(step, steps, seconds):
    if step == steps:
        report(seconds, 1)
for line in sys.stdin:
    model.generate_image(prompt="x", width=side, height=side, sample_steps=2, cfg_scale=1.0, progress_callback=done)
"""
# The end of every other peer's worker: `unet(*values)` are two samples.
PASSES = (
    REPORT
    + """
for line in sys.stdin:
    start = time.perf_counter()
    unet(*values)
    report(time.perf_counter() - start, 2)
"""
)


def openvino_graphs(model: str, python: str) -> Path:
    """The folder of fp32.xml and int8.xml, made once by an interpreter that has openvino and nncf: 15 GB of memory."""
    folder = Path.home() / ".cache/tiler/openvino" / Path(model).name
    if not (folder / "int8.xml").exists():
        folder.mkdir(parents=True, exist_ok=True)
        code = OPENVINO_EXPORT.format(model=model, folder=str(folder))
        subprocess.run([python, "-c", code], check=True, stdout=sys.stderr)
    return folder


class Worker:
    """A fresh process that does one measurement whenever it is asked."""

    def __init__(self, python: str, code: str) -> None:
        self.process = subprocess.Popen(
            [python, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def measure(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())  # type: ignore[no-any-return]

    def close(self) -> None:
        self.process.communicate()


def bench_unet(
    model: str,
    ceiling: int,
    rounds: int,
    *,
    peers: bool = False,
    openvino: str | None = None,
    sdcpp: str | None = None,
    only: str = "",
) -> dict[str, dict[str, Any]]:
    """Alternate passes of tiler and of others over the same checkpoint; the first of each is not counted. `only`: the
    names that match this regular expression, and diffusers, which all are compared with."""
    resident = RESIDENT.format(model=model)
    commands = {
        f"tiler {p}": (sys.executable, STREAMED.format(model=model, ceiling=ceiling, size=2048, precision=p))
        for p in (("fp32", "bf16", "int8") if has_bf16() else ("fp32", "int8"))
    }
    commands["diffusers fp32, resident"] = sys.executable, resident + PASSES
    if peers and find_spec("accelerate"):
        commands["accelerate disk_offload"] = sys.executable, resident + OFFLOAD + PASSES
    elif peers:
        print("accelerate is not installed here: pip install accelerate")
    if openvino is not None:
        folder = openvino_graphs(model, openvino)
        for name, (kind, hints) in OPENVINO_WAYS.items():
            graph = f"{folder}/{kind}.xml"
            commands[f"OpenVINO {name}"] = openvino, OPENVINO.format(graph=graph, hints=hints) + PASSES
    if sdcpp is not None:
        native = json.loads(Path(model, "unet/config.json").read_text())["sample_size"]
        commands["stable-diffusion.cpp fp16"] = sdcpp, REPORT + SDCPP.format(model=model, native=native)
    base, workers = "diffusers fp32, resident", dict[str, Worker]()
    for name, command in commands.items():  # one after another: each reads its weights into the page cache undisturbed
        if name != base and not re.search(only, name):
            continue
        workers[name] = Worker(*command)
        workers[name].measure()
    runs = [{name: worker.measure() for name, worker in workers.items()} for _ in range(rounds)]
    for worker in workers.values():
        worker.close()

    def median(name: str, against: str | None = None) -> float:
        return statistics.median(
            run[name]["seconds_per_sample"] / (1 if against is None else run[against]["seconds_per_sample"])
            for run in runs
        )

    return {
        name: {
            "seconds_per_sample": median(name),
            "ratio": median(name, base),
            "peak_bytes": runs[-1][name]["peak"],
            "samples_per_read": runs[-1][name]["batch"],
        }
        for name in workers
    }


def program(*arguments: object) -> list[str]:
    """The command line of `tiler`, also where it is not installed."""
    return [sys.executable, "-c", "from tiler.cli.main import main; main()", *map(str, arguments)]


def tiler(*arguments: object) -> dict[str, Any]:
    """Run the program in a fresh process: its report."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "r.json"
        command = program(*arguments, "-o", Path(folder) / "x.png", "--report", report)
        subprocess.run(command, cwd=ROOT, check=True)
        return json.loads(report.read_text())  # type: ignore[no-any-return]


def bench_memory(model: str, ceilings: list[int], sizes: list[int], steps: int, precision: str) -> list[dict[str, Any]]:
    """Predicted against measured peak of a whole render for each ceiling and size. 4096² takes hours on two cores."""
    rows = []
    for size in sizes:
        for ceiling in ceilings:
            report = tiler(
                "render", "x", "--model", model, "--size", size, "--steps", steps, "--seed", 1, "--max-ram", ceiling,
                "--precision", precision,
            )  # fmt: skip
            rows.append(
                {
                    "what": f"{size}² under {ceiling // 10**6} MB",
                    "predicted": report["predicted_peak_bytes"],
                    "measured": report["peak_rss_bytes"],
                }
            )
    return rows


def peak_within(seconds: float, *arguments: object) -> int:
    """VmHWM of the program after `seconds`, or at its end if that comes first."""
    with tempfile.TemporaryDirectory() as folder:
        command = program(*arguments, "--quiet", "-o", Path(folder) / "x.png")
        process = subprocess.Popen(command, cwd=ROOT)
        peak, end = 0, time.monotonic() + seconds
        while process.poll() is None and time.monotonic() < end:
            marks = [line for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if "VmHWM" in line]
            peak = max([peak, *(1024 * int(mark.split()[1]) for mark in marks)])
            time.sleep(0.2)
        if process.poll() is None:
            process.terminate()
        elif process.returncode:
            raise SystemExit(f"{' '.join(command[3:])} ended with exit {process.returncode}")
        process.wait()
        return peak


def bench_large(model: str, size: int, ceiling: int, seconds: float) -> list[dict[str, Any]]:
    """Predicted against measured peak of a large picture's phases, each begun in a process of its own."""
    import torch
    from PIL import Image
    from safetensors.torch import save_file

    channels = json.loads((Path(model) / "vae/config.json").read_text())["latent_channels"]
    common = "--model", model, "--max-ram", ceiling
    render = "render", "x", *common, "--size", size, "--steps", 2, "--seed", 1
    with tempfile.TemporaryDirectory() as folder:
        latents, picture = Path(folder) / "latents.safetensors", Path(folder) / "guide.png"
        save_file({"latents": torch.randn(1, channels, size // 8, size // 8)}, latents)
        Image.effect_noise((512, 512), 80).save(picture)
        runs = {
            "canvas": (*render, "--no-guide"),
            "guide picture": (*render, "--guide", picture),
            "decode": ("decode", latents, *common),
        }
        command = program("plan", *render[1:], "--json")
        planned = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout)
        phases = {p["name"]: p["peak_bytes"] for p in planned["phases"]}
        return [
            {"what": f"{size}² {name}", "predicted": phases[name], "measured": peak_within(seconds, *arguments)}
            for name, arguments in runs.items()
        ]


def bench_decode(model: str, sizes: list[tuple[int, int]], modes: list[str], ceiling: int) -> list[dict[str, Any]]:
    """Predicted against measured peak, and seconds, of decoding random latents."""
    import torch
    from safetensors.torch import save_file

    from tiler.weights.checkpoint import resolve

    channels = json.loads((resolve(model).folder / "vae/config.json").read_text())["latent_channels"]
    taesd, rows = "taesd" if channels == 4 else f"taesd{channels}", []
    for width, height in sizes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "latents.safetensors"
            save_file({"latents": torch.randn(1, channels, height // 8, width // 8)}, path)
            for mode in modes:
                own = ("--tiny-vae", make_checkpoint.make(taesd)) if mode == "tiny" else ()
                report = tiler("decode", path, "--model", model, "--decode", mode, *own, "--max-ram", ceiling)
                rows.append(
                    {
                        "what": f"{mode} decode {width}×{height}, {report['phases'][-1]['seconds']:.0f} s",
                        "predicted": report["predicted_peak_bytes"],
                        "measured": report["peak_rss_bytes"],
                    }
                )
    return rows


def bench_render(model: str, ceiling: int, steps: int, precision: str) -> dict[str, Any]:
    """A whole 2048² render: its report."""
    return tiler(
        "render", "a lighthouse", "--model", model, "--size", 2048, "--steps", steps, "--seed", 1, "--max-ram", ceiling,
        "--precision", precision,
    )  # fmt: skip


def bench_start(rounds: int) -> float:
    """Seconds of a render of `mini` that belong to no phase but the prompt's, the process's end included; median."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        report = tiler("render", "a lighthouse", "--size", 512, "--steps", 4, "--seed", 1, "--quiet")
        phases = (p["seconds"] for p in report["phases"] if p["name"] != "encode prompts")
        times.append(time.perf_counter() - start - sum(phases))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=["unet", "memory", "families", "large", "decode", "render", "start"])
    parser.add_argument("--model", help="a folder; default: the generated sd15")
    parser.add_argument("--ceiling", type=int, default=800_000_000, help="bytes")
    parser.add_argument(
        "--ceilings", type=int, nargs="+", default=[600_000_000, 800_000_000, 1_500_000_000], help="bytes, for memory"
    )
    parser.add_argument(
        "--sizes", nargs="+", help="pixels; default 1024 2048, for large 4096; for decode also 1536x640"
    )
    parser.add_argument("--modes", nargs="+", default=["exact", "frozen"], help="for decode; also tiny")
    parser.add_argument("--minutes", type=float, default=5, help="for large")
    parser.add_argument("--peers", action="store_true", help="for unet: also accelerate's disk_offload, if installed")
    parser.add_argument("--openvino", metavar="PYTHON", help="for unet: an interpreter with openvino and nncf")
    parser.add_argument("--sdcpp", metavar="PYTHON", help="for unet: one with stable-diffusion-cpp-python")
    parser.add_argument("--only", default="", help="for unet: workers whose names match, beside diffusers: int8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--precision", choices=["fp32", "bf16", "int8"], default="fp32", help="for memory and render")
    parser.add_argument("--json", type=Path, help="also write all results here")
    args = parser.parse_args()
    model = args.model or str(make_checkpoint.make("sd15"))  # for families a kind of make_checkpoint.py
    results: dict[str, Any] = {}
    sides = [(int(size.split("x")[0]), int(size.split("x")[-1])) for size in args.sizes or []]
    squares = [width for width, _ in sides]
    if "unet" in args.what:
        results["unet"] = bench_unet(
            model,
            args.ceiling,
            args.rounds,
            peers=args.peers,
            openvino=args.openvino,
            sdcpp=args.sdcpp,
            only=args.only,
        )
        for name, row in results["unet"].items():
            print(
                f"{name:28}{row['seconds_per_sample']:7.2f} s a sample, {row['ratio']:.2f}× diffusers, peak "
                f"{row['peak_bytes'] / 1e6:5.0f} MB, {row['samples_per_read']} samples a read"
            )
    if "memory" in args.what:
        results["memory"] = bench_memory(model, args.ceilings, squares or [1024, 2048], args.steps, args.precision)
    if "families" in args.what:
        kinds = [args.model] if args.model else bench_families.KINDS
        results["families"] = [
            bench_families.peaks(kind, size, args.ceiling, args.precision, reads=2)
            for kind in kinds
            for size in squares or [2048]
        ]
        results["calls"] = {
            kind: bench_families.alternated("call", kind, "diffusers", args.rounds)
            for kind in bench_families.RESIDENT
            if kind in kinds
        }
        for kind, took in results["calls"].items():
            print(f"{kind:16}{took['tiler']:7.1f} s of user CPU, diffusers {took['diffusers']:.1f} s")
    if "large" in args.what:
        results["large"] = [
            row for size in squares or [4096] for row in bench_large(model, size, args.ceiling, 60 * args.minutes)
        ]
    if "decode" in args.what:
        results["decode"] = bench_decode(model, sides or [(1024, 1024), (2048, 2048)], args.modes, args.ceiling)
    for row in [row for what in ("memory", "families", "large", "decode") for row in results.get(what, [])]:
        off = row["predicted"] / row["measured"] - 1
        print(
            f"{row['what']:32} predicted {row['predicted'] / 1e6:5.0f} MB  measured {row['measured'] / 1e6:5.0f} MB  {off:+.1%}"
        )
    if "render" in args.what:
        results["render"] = bench_render(model, args.ceiling, args.steps, args.precision)
        for phase in results["render"]["phases"]:
            print(f"{phase['name']:16}{phase['seconds']:8.1f} s  peak {phase['peak_rss_bytes'] / 1e6:5.0f} MB")
    if "start" in args.what:
        results["start"] = bench_start(args.rounds)
        print(f"{results['start']:.1f} s before the first step")
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
