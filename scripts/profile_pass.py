"""Where the seconds of one UNet pass go: arithmetic by kind, waiting for weights, casting them, and the rest.

    python scripts/profile_pass.py                          SD 1.5's size under 800 MB, fp32
    python scripts/profile_pass.py --precision int8 --ceiling 600000000 --model mini

The second of two passes is looked at, by torch's own profiler; what it does not see on this thread is Python.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import make_checkpoint
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from tiler.compute import winograd
from tiler.memory import process
from tiler.memory.budget import Budget
from tiler.memory.policy import at_layer
from tiler.models.built import Models
from tiler.models.family import Role, plain_names, read_family
from tiler.models.unet import predict_noise
from tiler.native.library import Library
from tiler.packing import packed_weights
from tiler.phases import make_plan
from tiler.planning.peaks import bf16_keys
from tiler.planning.resolve import fill
from tiler.request import Precision, RenderRequest
from tiler.run import streamed
from tiler.weights import store
from tiler.weights.checkpoint import resolve
from tiler.weights.packed import default_cache

# Functions of tiler's own library, which torch's profiler does not see.
_NATIVE = {
    "product": "products by tiler's library",
    "winograd": "convolution, transformed",
    "attention": "attention",
    "pack": "packing weights",
    "rows": "norms and casts before products",
    "image": "norms and casts before products",
}
_OPERATORS = {
    "convolution": ("convolution",),
    "linear": ("addmm", "::mm"),
    "attention": ("attention",),
    "norms": ("norm",),
    "activation functions": ("silu", "gelu", "sigmoid"),
    "copies": ("copy_", "::cat", "upsample", "fill_"),
}


class Unchecked(Budget):
    """What the profiler itself remembers counts under no ceiling."""

    def check(self, where: str) -> None:
        pass


def named(owner: Any, name: str, kind: str) -> None:
    """Count all that a function does as `kind`."""
    inner: Callable[..., Any] = getattr(owner, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with record_function(f"tiler: {kind}"):
            return inner(*args, **kwargs)

    setattr(owner, name, wrapper)


def kind_of(event: Any) -> str:
    """The nearest named function around an operation, else the operation's own kind; blending lies outside the pass."""
    around = event
    while around is not None and not around.name.startswith("tiler: "):
        around = around.cpu_parent
    if around is None:
        return "blending"
    if around.name != "tiler: pass":
        return str(around.name.removeprefix("tiler: "))
    return next((kind for kind, parts in _OPERATORS.items() if any(p in event.name for p in parts)), "other operators")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or `mini`; default: the generated sd15")
    parser.add_argument("--ceiling", type=int, default=800_000_000, help="bytes")
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--precision", choices=["fp32", "bf16", "int8"], default="fp32")
    args = parser.parse_args()
    process.frugal_allocator()
    family = read_family(resolve(args.model or str(make_checkpoint.make("sd15"))))
    precision = Precision(args.precision)
    request = fill(RenderRequest(prompt="x", size=args.size, precision=precision))
    models = Models(family)
    plan = make_plan(request, models, args.ceiling)
    weights = family.checkpoint.weights("unet")
    if precision is Precision.INT8:
        weights = packed_weights(models, default_cache(), lambda share, why: None)
    named(store.WeightStore, "_take", "waiting for weights")
    named(store.WeightStore, "_cast", "casting weights")
    named(winograd, "transform", "transforming weights")
    named(winograd, "conv2d", "convolution, transformed")
    named(process, "release_heap", "giving memory back")
    for name, kind in _NATIVE.items():
        named(Library, name, kind)
    budget, samples, part = Unchecked(args.ceiling), plan.batch, family.part(Role.DENOISER)
    unet = models.module(part)
    check = at_layer(budget, plan.memory.peak_of("canvas"), plan.memory.heap_of("canvas"))
    with streamed(
        unet, weights, plain_names, plan.resident["canvas"], bf16_keys=bf16_keys(part, unet, precision),
        arena_bytes=plan.arena_bytes, transform=True, short=lambda: budget.short(plan.sample_bytes),
    ) as streamer:  # fmt: skip
        side = family.native
        halves = [[torch.randn(1, family.latent_channels, side, side)] * 2 for _ in range(-(-samples // 2))]
        latents = [half for tile in halves for half in tile][:samples]
        texts = torch.randn(2, 1, 77, family.part(Role.TEXT_ENCODER).config["hidden_size"])

        def one_pass() -> Tensor:
            with record_function("tiler: pass"):
                embeds = [texts[i % 2] for i in range(samples)]
                return predict_noise(unet, streamer, latents, torch.tensor(500), embeds, check)

        one_pass()
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            start = time.perf_counter()
            one_pass()
            wall = time.perf_counter() - start
    seconds: Counter[str] = Counter()
    main_thread = next(e.thread for e in seen.events() if "conv" in e.name)
    for event in seen.events():
        if event.thread == main_thread:
            seconds[kind_of(event)] += event.self_cpu_time_total / 1e6
    seconds["Python"] = wall - sum(seconds.values())
    print(
        f"{samples} samples in {wall:.1f} s, {wall / samples:.2f} s each; peak {process.read_rss().peak / 1e6:.0f} MB"
    )
    for kind, value in seconds.most_common():
        print(f"{kind:33}{value:8.2f} s {value / wall:6.1%}")


if __name__ == "__main__":
    main()
