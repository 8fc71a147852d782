"""Every model family at full width: predicted against measured peak of a 2048² poster, and one call of the denoiser
against diffusers' own, resident in fp32, in CPU seconds of the user.

    python scripts/bench.py families                                   # of all: minutes for each on two cores
    python scripts/bench_families.py peaks wide-lumina --precision int8
    python scripts/bench_families.py peaks wide-sd3 --phase guide
    python scripts/bench_families.py calls wide-sd3 pixart --rounds 3  # one call on a native tile, by both
    python scripts/bench_families.py text                              # two prompts by T5-XXL, against its products
    python scripts/bench_families.py waits wide-sdxl                   # share of a call that waits for warm weights

Checkpoints are those of make_checkpoint.py: wide ones have few blocks, and depth does not show in a peak. Nor does the
number of passes: `peaks` plans the whole poster, and stops the canvas after `--reads` reads of the denoiser's weights,
each of which serves one group of tiles. The autoencoder's phases are those of `bench.py decode` and `bench.py large`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import make_checkpoint

KINDS = ("wide-sdxl", "pixart", "wide-sd3", "wide-flux", "wide-auraflow", "wide-hunyuandit", "wide-lumina")
RESIDENT = ("wide-sdxl", "pixart", "wide-sd3")  # whose fp32 weights fit this machine's memory
WARM = 32  # latents along a side of a first call, which is not counted
ROOT = Path(__file__).resolve().parents[1]


def peaks(kind: str, size: int, ceiling: int, precision: str, reads: int = 2, phase: str = "canvas") -> dict[str, Any]:
    """The canvas of `size`² without guidance, or its guide with the family's guidance, stopped after so many reads of
    the weights: what was planned for it, and the kernel's own mark (VmHWM) of a process that encoded the prompts
    before."""
    from bench import program

    model = make_checkpoint.make(kind)
    asked = (
        "a lighthouse", "--model", model, "--size", size, "--seed", 1, "--max-ram", ceiling, "--precision", precision,
        *(("--steps", 2) if phase == "guide" else ("--steps", 1, "--no-guide", "--guidance-scale", 1)),
    )  # fmt: skip
    said = subprocess.run(program("plan", *asked, "--json"), cwd=ROOT, check=True, capture_output=True).stdout
    planned = json.loads(said)
    predicted = max(p["peak_bytes"] for p in planned["phases"] if p["name"] in ("encode prompts", phase))
    with tempfile.TemporaryDirectory() as folder:
        command = program("render", *asked, "--log-json", "-o", Path(folder) / "x.png")
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        measured, last = 0, ""
        for last in process.stderr:
            event = json.loads(last) if last.startswith("{") else {}
            if event.get("event") in ("phase_done", "progress"):  # the mark begins anew with each phase
                measured = max(measured, event.get("peak_rss_bytes", 0), mark_of(process.pid))
            over = event.get("event") == "phase_done" or event.get("done", 0) >= reads * planned["samples_per_pass"]
            if event.get("name") == phase and over:
                break
        else:
            raise SystemExit(f"{' '.join(command[3:])} ended early: {last}")
        process.terminate()
        process.communicate()
    what = f"{kind} {precision} {size}² {phase} under {ceiling // 10**6} MB"
    return {"what": what, "predicted": predicted, "measured": measured}


def mark_of(pid: int) -> int:
    """VmHWM of a process, in bytes."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def alternated(what: str, kind: str, other: str, rounds: int = 1, precision: str = "fp32") -> dict[str, float]:
    """User CPU seconds of `what`, a call on a native tile or encoding prompts, by tiler in fp32 or bf16 and by the
    `other` in fp32: medians of alternating processes."""
    command = [sys.executable, __file__, what, str(make_checkpoint.make(kind)), "--precision", precision]
    took: dict[str, list[float]] = {"tiler": [], other: []}
    for _ in range(rounds):
        for by, seconds in took.items():
            done = subprocess.run(
                [*command[:4], by, *command[4:]], cwd=ROOT, check=True, capture_output=True, text=True
            )
            seconds.append(float(done.stdout))
    return {by: statistics.median(seconds) for by, seconds in took.items()}


def user_seconds() -> float:
    """User CPU seconds of this process so far."""
    return os.times().user


def call(model: str, by: str, precision: str = "fp32", clock: Callable[[], float] = user_seconds) -> float:
    """Seconds, user CPU's by default, of one call in this process, after a small one that reads the same weights."""
    import torch

    from tiler.models.family import Options, Role, read_family
    from tiler.models.samples import Prompt
    from tiler.planning.peaks import bf16_keys
    from tiler.request import Precision
    from tiler.run import streamed
    from tiler.weights.checkpoint import resolve

    torch.manual_seed(0)
    family = read_family(resolve(model))
    part, side = family.part(Role.DENOISER), family.native
    (example,) = family.example([0], (side, side))
    made = [None if shape is None else torch.randn(shape.shape) for shape in example.prompt]
    assert made[0] is not None
    prompt = Prompt(made[0], made[1])
    inputs = [torch.randn(1, family.latent_channels, n, n) for n in (WARM, side)]
    if by == "diffusers":
        return _call_diffusers(model, part.name, inputs, prompt)
    module, timesteps = part.build(), torch.tensor([500.0])
    weights, halves = family.checkpoint.weights(part.name), bf16_keys(part, module, Precision(precision))
    options: dict[str, Any] = {"arena_bytes": part.arena_bytes, "bf16_keys": halves, "transform": True}
    with torch.no_grad(), streamed(module, weights, part.aliases, **options) as streamer:
        prepared = family.prepare(module, streamer, timesteps, [prompt], Options(guidance=(1.0,)))
        for latents in inputs:
            begin = clock()
            family.predict(module, streamer, [example._replace(latents=latents, prompt=prompt)], 0, prepared)
        return clock() - begin


def waits(model: str) -> float:
    """The share of a call during which it waits for weights, none of which stay in memory. The system has the files in
    its cache from the first call."""
    import torch

    from tiler.weights.store import Piece, WeightStore

    waited, marks = 0.0, list[float]()
    take = WeightStore._take

    def timed(self: WeightStore, piece: Piece) -> torch.Tensor:
        nonlocal waited
        begin = time.perf_counter()
        found = take(self, piece)
        waited += time.perf_counter() - begin
        return found

    def clock() -> float:
        marks.append(waited)
        return time.perf_counter()

    WeightStore._take = timed  # type: ignore[method-assign]
    took = call(model, "tiler", clock=clock)
    return (marks[-1] - marks[-2]) / took


def _call_diffusers(model: str, part: str, inputs: Any, prompt: Any) -> float:
    import diffusers
    import torch

    classes = {
        "unet": diffusers.UNet2DConditionModel,
        "PixArt": diffusers.PixArtTransformer2DModel,
        "SD3": diffusers.SD3Transformer2DModel,
    }
    where = Path(model) / part
    kind = "unet" if part == "unet" else "SD3" if "SD3" in (where / "config.json").read_text() else "PixArt"
    variant = "fp16" if any(where.glob("*.fp16.*")) else None
    module = classes[kind].from_pretrained(where, torch_dtype=torch.float32, variant=variant)
    given: dict[str, Any] = {"encoder_hidden_states": prompt.tokens, "timestep": torch.tensor([500.0])}
    if kind == "unet":
        given["added_cond_kwargs"] = {"text_embeds": prompt.pooled, "time_ids": torch.full((1, 6), 1024.0)}
    elif kind == "SD3":
        given["pooled_projections"] = prompt.pooled
    else:
        given["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    with torch.no_grad():
        for latents in inputs:
            begin = os.times().user
            module(latents, **given)
    return os.times().user - begin


def text(model: str, by: str) -> float:
    """User CPU seconds in this process of T5-XXL's layers on the longest prompts that share a pass, which for Flux are
    two: by tiler, from the file; or those of the same products with weights in memory."""
    import torch
    import torch.nn.functional as F

    from tiler.compute.layers import streamed_layers
    from tiler.models.family import read_family
    from tiler.models.together import GROUP_TOKENS
    from tiler.run import streamed
    from tiler.weights.checkpoint import resolve

    family = read_family(resolve(model))
    part = family.encoders[-1]
    assert part.example is not None
    module, weights = part.build(), family.checkpoint.weights(part.name)
    with torch.no_grad(), streamed(module, weights, part.aliases, arena_bytes=part.arena_bytes):
        shapes = [layer.weight.shape for layer in streamed_layers(module) if isinstance(layer, torch.nn.Linear)]
        if by == "tiler":
            begin = os.times().user
            part.example(module)
            return os.times().user - begin
        took = 0.0
        for outputs, inputs in shapes:
            x, weight = torch.randn(GROUP_TOKENS, inputs), torch.randn(outputs, inputs)
            begin = os.times().user
            F.linear(x, weight)
            took += os.times().user - begin
        return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["peaks", "calls", "text", "waits", "call", "encode"])
    parser.add_argument("kinds", nargs="*", help="default: all; for `call` a folder, and tiler or another")
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--phase", choices=["canvas", "guide"], default="canvas", help="for peaks")
    parser.add_argument("--reads", type=int, default=2, help="of the denoiser's weights, for peaks")
    parser.add_argument("--rounds", type=int, default=1, help="for calls and text")
    parser.add_argument("--ceiling", type=int, default=800_000_000, help="bytes")
    parser.add_argument("--precision", choices=["fp32", "bf16", "int8"], default="fp32")
    args = parser.parse_args()
    if args.what == "calls" and args.precision == "int8":
        parser.error("calls are in fp32 or bf16")
    if args.what in ("call", "encode"):
        model, by = args.kinds
        print(call(model, by, args.precision) if args.what == "call" else text(model, by))
    elif args.what == "waits":
        for kind in args.kinds or KINDS:
            print(f"{kind:16}{waits(str(make_checkpoint.make(kind))):.1%} of a call waits for weights", flush=True)
    elif args.what in ("calls", "text"):
        for kind in args.kinds or (RESIDENT if args.what == "calls" else ("wide-flux",)):
            what, other = ("call", "diffusers") if args.what == "calls" else ("encode", "products")
            took = alternated(what, kind, other, args.rounds, args.precision)
            (own, ours), (other, theirs) = took.items()
            print(f"{kind:16}{own} {ours:.1f} s, {other} {theirs:.1f} s of user CPU: {ours / theirs:.2f}×", flush=True)
    else:
        for kind in args.kinds or KINDS:
            row = peaks(kind, args.size, args.ceiling, args.precision, args.reads, args.phase)
            off = row["predicted"] / row["measured"] - 1
            print(
                f"{row['what']:52} predicted {row['predicted'] / 1e6:.0f}, measured {row['measured'] / 1e6:.0f} MB, {off:+.1%}"
            )


if __name__ == "__main__":
    main()
