"""Measure what the README claims, on one full-size checkpoint.

    python scripts/bench.py unet              streamed pass under the ceiling against diffusers' resident fp32, alternating
    python scripts/bench.py memory            predicted against measured peaks at several ceilings and sizes
    python scripts/bench.py render            a whole 2048×2048 render with its report
    python scripts/bench.py unet render --json FILE

Every measurement runs in a fresh process that reads its own VmHWM. Times on shared machines are noisy: look at the
ratio, a median over `--rounds` alternations. `memory` runs one UNet pass at the planned batch and size and the whole
autoencoder pass, not all steps: peaks repeat from pass to pass.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import make_checkpoint

ROOT = Path(__file__).parents[1]

# A worker does one pass for each line on its standard input, so that two kinds of worker can alternate.
STREAMED = """
import sys, time, json
from pathlib import Path
from tiler.memory import process
process.frugal_allocator()
from tiler.models.family import read_family, build_unet, plain_names
from tiler.models.unet import predict_noise
from tiler.memory.budget import Budget
from tiler.pipeline import at_layer, streamed
from tiler.planner import plan_render
from tiler.request import RenderRequest
from tiler.weights.checkpoint import resolve
import torch
torch.set_grad_enabled(False)
family = read_family(resolve({model!r}))
plan = plan_render(RenderRequest(prompt="x", output=Path("x.png"), width={size}, height={size}), family, {ceiling})
unet, n, budget = build_unet(family), family.native, Budget("1000GB")
with streamed(unet, family, "unet", plain_names, plan.resident["canvas"]) as streamer:
    tiles = [torch.randn(1, family.latent_channels, n, n) for _ in range((plan.batch + 1) // 2)]
    x = [tile for tile in tiles for _ in range(2)][:plan.batch]
    c = [torch.randn(1, 77, family.text["hidden_size"]) for _ in x]
    for line in sys.stdin:
        before, start = streamer.store.bytes_read, time.perf_counter()
        predict_noise(unet, streamer, x, torch.tensor(500), c, at_layer(budget))
        seconds = time.perf_counter() - start
        canvas = next(p for p in plan.memory.phases if p.name == "canvas")
        print(json.dumps({{"seconds_per_sample": seconds / plan.batch, "batch": plan.batch, "bytes_read": streamer.store.bytes_read - before,
              "peak": process.read_rss().peak, "predicted": canvas.peak_bytes}}), flush=True)
"""
RESIDENT = """
import sys, time, json
import torch
from diffusers import UNet2DConditionModel
torch.set_grad_enabled(False)
unet = UNet2DConditionModel.from_pretrained({model!r}, subfolder="unet", variant="fp16", torch_dtype=torch.float32).eval()
n = unet.config.sample_size
x, c = torch.cat([torch.randn(1, unet.config.in_channels, n, n)] * 2), torch.randn(2, 77, unet.config.cross_attention_dim)
for line in sys.stdin:
    start = time.perf_counter()
    unet(x, torch.tensor(500), c)
    seconds = time.perf_counter() - start
    peak = int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
    print(json.dumps({{"seconds_per_sample": seconds / 2, "batch": 2, "peak": peak}}), flush=True)
"""
AUTOENCODER = """
import json
from tiler.memory import process
process.frugal_allocator()
import torch
from tiler.memory.budget import Budget
from tiler.models.family import read_family, build_vae, vae_names
from tiler.pipeline import decode_pixels, streamed
from tiler.planner import plan_decode
from tiler.weights.checkpoint import resolve
torch.set_grad_enabled(False)
family = read_family(resolve({model!r}))
plan = plan_decode(family, ({size} // 8, {size} // 8), 10**12)
vae = build_vae(family)
with Budget("1000GB") as budget, streamed(vae, family, "vae", vae_names):
    decode_pixels(vae, torch.randn(1, family.latent_channels, {size} // 8, {size} // 8), budget, lambda done, total: None)
print(json.dumps({{"peak": budget.peak_rss_bytes, "predicted": plan.peak_bytes}}))
"""


class Worker:
    """A fresh process that does one measurement whenever it is asked."""

    def __init__(self, code: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def measure(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())  # type: ignore[no-any-return]

    def close(self) -> None:
        self.process.communicate()


def bench_unet(model: str, ceiling: int, rounds: int) -> dict[str, Any]:
    """Alternate streamed and resident passes; the first of each warms up and is not counted."""
    ours, theirs = (
        Worker(STREAMED.format(model=model, ceiling=ceiling, size=2048)),
        Worker(RESIDENT.format(model=model)),
    )
    runs = [(ours.measure(), theirs.measure()) for _ in range(rounds + 1)]
    ours.close()
    theirs.close()
    streamed_s = statistics.median(o["seconds_per_sample"] for o, _ in runs[1:])
    resident_s = statistics.median(t["seconds_per_sample"] for _, t in runs[1:])
    return {
        "streamed_seconds_per_sample": streamed_s, "resident_seconds_per_sample": resident_s,
        "ratio": statistics.median(o["seconds_per_sample"] / t["seconds_per_sample"] for o, t in runs[1:]), "samples_per_read": runs[-1][0]["batch"],
        "weight_bytes_per_pass": runs[-1][0]["bytes_read"], "streamed_peak_bytes": runs[-1][0]["peak"], "resident_peak_bytes": runs[-1][1]["peak"],
    }  # fmt: skip


def bench_memory(model: str, ceilings: list[int], sizes: list[int]) -> list[dict[str, Any]]:
    """Predicted against measured peak of the canvas phase for each ceiling, and of decoding for each size."""
    rows = []
    for ceiling in ceilings:
        worker = Worker(STREAMED.format(model=model, ceiling=ceiling, size=2048))
        worker.measure()
        result = worker.measure()
        worker.close()
        rows.append(
            {
                "what": f"canvas under {ceiling // 10**6} MB",
                "predicted": result["predicted"],
                "measured": result["peak"],
            }
        )
    for size in sizes:
        done = subprocess.run(
            [sys.executable, "-c", AUTOENCODER.format(model=model, size=size)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        result = json.loads(done.stdout.splitlines()[-1])
        rows.append({"what": f"decode {size}²", "predicted": result["predicted"], "measured": result["peak"]})
    return rows


def bench_render(model: str, ceiling: int, steps: int) -> dict[str, Any]:
    """A whole render in a fresh process: its report."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "r.json"
        command = [sys.executable, "-c", "from tiler.cli.main import main; main()", "render", "a lighthouse", "--model", model, "--size", "2048", "--steps", str(steps),
                   "--seed", "1", "--max-ram", str(ceiling), "-o", str(Path(folder) / "x.png"), "--report", str(report)]  # fmt: skip
        subprocess.run(command, check=True)
        return json.loads(report.read_text())  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=["unet", "memory", "render"])
    parser.add_argument("--model", help="a folder; default: the generated sd15")
    parser.add_argument("--ceiling", type=int, default=800_000_000, help="bytes")
    parser.add_argument(
        "--ceilings", type=int, nargs="+", default=[600_000_000, 800_000_000, 1_500_000_000], help="bytes, for memory"
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048], help="pixels, for memory")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write all results here")
    args = parser.parse_args()
    model = args.model or str(make_checkpoint.make("sd15"))
    results: dict[str, Any] = {}
    if "unet" in args.what:
        results["unet"] = bench_unet(model, args.ceiling, args.rounds)
        for name, value in results["unet"].items():
            print(f"{name:32}{value:,.3f}" if isinstance(value, float) else f"{name:32}{value:,}")
    if "memory" in args.what:
        results["memory"] = bench_memory(model, args.ceilings, args.sizes)
        for row in results["memory"]:
            off = row["predicted"] / row["measured"] - 1
            print(
                f"{row['what']:24} predicted {row['predicted'] / 1e6:6.0f} MB  measured {row['measured'] / 1e6:6.0f} MB  {off:+.1%}"
            )
    if "render" in args.what:
        results["render"] = bench_render(model, args.ceiling, args.steps)
        for phase in results["render"]["phases"]:
            print(f"{phase['name']:16}{phase['seconds']:8.1f} s  peak {phase['peak_rss_bytes'] / 1e6:5.0f} MB")
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
