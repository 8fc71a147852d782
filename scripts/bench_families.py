"""Every model family at full width: predicted against measured peak of a 2048² poster, and one call of the denoiser
against diffusers' own, resident in fp32, in CPU seconds of the user.

    python scripts/bench.py families                                   # of all: hours on two cores
    python scripts/bench_families.py calls wide-sd3 wide-pixart        # one call on a native tile, by both
    python scripts/bench_families.py peaks wide-lumina --size 1024 --precision int8

Checkpoints are those of make_checkpoint.py: wide ones have few blocks, and depth does not show in a peak.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import make_checkpoint

KINDS = ("wide-sdxl", "pixart", "wide-sd3", "wide-flux", "wide-auraflow", "wide-hunyuandit", "wide-lumina")
RESIDENT = ("wide-sdxl", "pixart", "wide-sd3")  # whose fp32 weights fit this machine's memory
ROOT = Path(__file__).resolve().parents[1]


def peaks(kind: str, size: int, steps: int, ceiling: int, precision: str) -> dict[str, Any]:
    """A render of `size`² in few steps without guidance: what was planned, and what it took."""
    from bench import tiler

    model = make_checkpoint.make(kind)
    report = tiler(
        "render", "a lighthouse", "--model", model, "--size", size, "--steps", steps, "--guidance-scale", 1,
        "--seed", 1, "--max-ram", ceiling, "--precision", precision,
    )  # fmt: skip
    what = f"{kind} {precision} {size}² under {ceiling // 10**6} MB"
    return {"what": what, "predicted": report["predicted_peak_bytes"], "measured": report["peak_rss_bytes"]}


def calls(kind: str) -> dict[str, float]:
    """User CPU seconds of one call on a native tile by tiler, streamed in fp32, and by diffusers."""
    model = str(make_checkpoint.make(kind))
    command = [sys.executable, __file__, "call", model]
    return {
        by: float(subprocess.run([*command, by], cwd=ROOT, check=True, capture_output=True, text=True).stdout)
        for by in ("tiler", "diffusers")
    }


def call(model: str, by: str) -> float:
    """One call in this process."""
    import torch

    from tiler.models.family import Options, Role, read_family
    from tiler.models.samples import Prompt
    from tiler.run import streamed
    from tiler.weights.checkpoint import resolve

    torch.manual_seed(0)
    family = read_family(resolve(model))
    part, side = family.part(Role.DENOISER), family.native
    (example,) = family.example([0], (side, side))
    made = [None if shape is None else torch.randn(shape.shape) for shape in example.prompt]
    assert made[0] is not None
    prompt = Prompt(made[0], made[1])
    latents = torch.randn(example.latents.shape)
    if by == "diffusers":
        return _call_diffusers(model, part.name, latents, prompt)
    module, timesteps = part.build(), torch.tensor([500.0])
    weights = family.checkpoint.weights(part.name)
    with (
        torch.no_grad(),
        streamed(module, weights, part.aliases, arena_bytes=part.arena_bytes, transform=True) as streamer,
    ):
        prepared = family.prepare(module, streamer, timesteps, [prompt], Options(guidance=(1.0,)))
        begin = os.times().user
        family.predict(module, streamer, [example._replace(latents=latents, prompt=prompt)], 0, prepared)
        return os.times().user - begin


def _call_diffusers(model: str, part: str, latents: Any, prompt: Any) -> float:
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
    begin = os.times().user
    with torch.no_grad():
        module(latents, **given)
    return os.times().user - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["peaks", "calls", "call"])
    parser.add_argument("kinds", nargs="*", help="default: all; for `call` a folder, and tiler or diffusers")
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--ceiling", type=int, default=800_000_000, help="bytes")
    parser.add_argument("--precision", choices=["fp32", "bf16", "int8"], default="fp32")
    args = parser.parse_args()
    if args.what == "call":
        print(call(*args.kinds))
    elif args.what == "calls":
        for kind in args.kinds or RESIDENT:
            took = calls(kind)
            ratio = took["tiler"] / took["diffusers"]
            print(f"{kind:16}{took['tiler']:7.1f} s, diffusers {took['diffusers']:.1f} s of user CPU: {ratio:.2f}×")
    else:
        for kind in args.kinds or KINDS:
            row = peaks(kind, args.size, args.steps, args.ceiling, args.precision)
            off = row["predicted"] / row["measured"] - 1
            print(
                f"{row['what']:44} predicted {row['predicted'] / 1e6:.0f}, measured {row['measured'] / 1e6:.0f} MB, {off:+.1%}"
            )


if __name__ == "__main__":
    main()
