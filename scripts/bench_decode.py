"""Decoders against diffusers' own AutoencoderKL on the same latents, in one run.

    python scripts/bench_decode.py exact   error, time and work of `exact` at 512², 1024² and 1536×640, beside
                                           diffusers' enable_tiling; SD 1.5 size with random weights, and mini
    python scripts/bench_decode.py frozen  error and seams of `frozen` at 2048² on --count rendered pictures (mini)
    python scripts/bench_decode.py ways    decoding and encoding 2048² by `exact`, `sampled` and `frozen`: seconds, and
                                           the error of the others against `exact`; SD 1.5 size with random weights
    python scripts/bench_decode.py exact frozen --json FILE
    python scripts/bench_decode.py exact --decode-precision bf16   in bf16, as beside a denoiser in int8 or bf16

Peaks under the ceiling are measured by `bench.py decode`, in processes of their own: diffusers' part needs gigabytes
here.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import make_checkpoint
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor

from tiler import RenderRequest, render
from tiler.compute.shapes import MetaMeter
from tiler.decoding import exact, frozen
from tiler.decoding import method as method
from tiler.decoding.directions import DECODER
from tiler.decoding.method import ScratchSpace
from tiler.decoding.rows import Pixels, strip_rows
from tiler.decoding.scratch import Scratch, free_bytes
from tiler.decoding.statistics import Frame
from tiler.diffusion import guide
from tiler.models import family as families
from tiler.models.built import Models
from tiler.models.family import VaeSpec
from tiler.planning.peaks import VaePeaks, vae_streaming
from tiler.request import Decode, Precision, Wrap
from tiler.run import measure, streamed
from tiler.weights.checkpoint import resolve

PROMPTS = [
    "mountains by a lake at dusk, pines in front",
    "misty mountains in indigo blue, a small sun on the left",
    "a desert at sunset, a big sun",
    "hills in autumn, woods in front",
    "the sea at night, a full moon",
    "mountains in winter, snow",
    "northern lights over mountains at night",
    "the sea at sunset, a big sun in the middle, clouds",
]


def psnr(a: Tensor, b: Tensor) -> float:
    """dB between pictures in [-1, 1], clipped as they are written."""
    mse = float((a.clamp(-1, 1) - b.clamp(-1, 1)).double().square().mean())
    return 10 * math.log10(4 / mse) if mse else math.inf


def numbers(sizes: list[str]) -> list[tuple[int, int]]:
    """`WxH` as (width, height)."""
    return [(int(w), int(h)) for w, h in (size.split("x") for size in sizes)]


def timed(work: Callable[[], Tensor]) -> tuple[Tensor, float]:
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


def reference(model: str) -> AutoencoderKL:
    """diffusers' own, resident, fp32."""
    folder = resolve(model).folder / "vae"
    variant = "fp16" if any(folder.glob("*.fp16.safetensors")) else None
    return AutoencoderKL.from_pretrained(folder, variant=variant, torch_dtype=torch.float32).eval()


def decode(kind: VaeSpec, latents: Tensor, dtype: torch.dtype | None, precision: Precision) -> Tensor:
    """By `exact` with scratch of `dtype`, or by `frozen` when there is none."""
    vae = families.build_vae(kind)
    options = vae_streaming(kind, vae, precision)._asdict()
    with (
        streamed(vae, kind.weights, families.vae_names, **options) as streamer,
        tempfile.TemporaryDirectory() as folder,
    ):
        scratch = Scratch(Path(folder), dtype or torch.float16)
        by_rows = frozen.decode if dtype is None else exact.decode
        strips = by_rows(vae, latents, scratch, hold=streamer.hold_transformed, check=lambda where: None)
        return torch.cat(list(strips), dim=1)


def work_factor(kind: VaeSpec, height: int, width: int) -> float:
    """Arithmetic of the convolutions in `exact` over that of one whole-image decode."""
    vae = families.build_vae(kind)
    with MetaMeter() as meter:
        vae.decode(torch.empty(1, vae.config.latent_channels, height, width, device="meta"))
    whole = meter.flops
    vae = families.build_vae(kind)
    stages = DECODER.stages(vae)
    with MetaMeter() as meter:
        latents = torch.empty(1, vae.config.latent_channels, height, width, device="meta")
        for _ in exact.stream(stages, DECODER.source(latents), Frame(height, width), Scratch(None)):
            pass
    return meter.flops / whole


def bench_exact(model: str, sizes: list[tuple[int, int]], precision: Precision) -> list[dict[str, Any]]:
    """Latents are noise of unit variance around a slope, so that tiles differ in tone."""
    theirs, family = reference(model), families.read_family(resolve(model))
    kind, rows = family.autoencoder, []
    for width, height in sizes:
        generator = torch.Generator().manual_seed(1)
        scaled = torch.randn(1, family.latent_channels, height // 8, width // 8, generator=generator)
        latents = kind.unscale_(scaled + torch.linspace(-1, 1, width // 8))
        want, their_seconds = timed(lambda latents=latents: theirs.decode(latents).sample[0])
        fp16, our_seconds = timed(lambda latents=latents: decode(kind, latents, torch.float16, precision))
        fp32 = decode(kind, latents, torch.float32, precision)
        theirs.enable_tiling()
        cut = max(latents.shape[2:]) > theirs.tile_latent_min_size  # else diffusers decodes in one tile
        tiled = psnr(theirs.decode(latents).sample[0], want) if cut else None
        theirs.disable_tiling()
        rows.append(
            {
                "model": family.checkpoint.name,
                "size": f"{width}×{height}",
                "precision": precision.value,
                "fp32_max_of_255": 127.5 * float((fp32.clamp(-1, 1) - want.clamp(-1, 1)).abs().max()),
                "fp32_psnr": psnr(fp32, want),
                "fp16_psnr": psnr(fp16, want),
                "enable_tiling_psnr": tiled,
                "seconds": our_seconds,
                "diffusers_seconds": their_seconds,
                "work_factor": work_factor(kind, height // 8, width // 8),
            }
        )
        r = rows[-1]
        print(
            f"exact {Path(r['model']).name} {r['size']} in {precision}: scratch of fp32 {r['fp32_psnr']:.1f} dB (max {r['fp32_max_of_255']:.3f}/255), fp16 {r['fp16_psnr']:.1f} dB, "
            f"enable_tiling {'one tile' if tiled is None else f'{tiled:.0f} dB'}; {our_seconds:.1f} s, diffusers {their_seconds:.1f} s "
            f"({our_seconds / their_seconds:.2f}×), work factor {r['work_factor']:.3f}",
            flush=True,
        )
    return rows


def rendered_latents(model: str, size: int, count: int, folder: Path) -> list[Tensor]:
    """Scaled latents of `count` pictures, kept in `folder` for the next run."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for i in range(count):
        path = folder / f"{Path(model).name}-{size}-{i}.safetensors"
        if not path.exists():
            request = RenderRequest(
                prompt=PROMPTS[i % len(PROMPTS)], model=model, output=path.with_suffix(".png"), width=size, height=size,
                num_inference_steps=10, seed=i, save_latents=path, force=True,
            )  # fmt: skip
            render(request)
        found.append(load_file(path)["latents"])
    return found


def seam_score(picture: Tensor, step: int) -> float:
    """Mean gradient down the picture across every `step`-th row over that across others of the same phase in 8."""
    gradient = (picture[:, 8::8] - picture[:, 7:-1:8]).abs().mean(dim=(0, 2))
    at = torch.arange(1, len(gradient) + 1) * 8 % step == 0
    return float(gradient[at].mean() / gradient[~at].mean())


def bench_frozen(model: str, size: int, count: int, folder: Path, precision: Precision) -> list[dict[str, Any]]:
    kind, theirs = families.read_family(resolve(model)).autoencoder, reference(model)
    rows = []
    for i, scaled in enumerate(rendered_latents(model, size, count, folder)):
        latents = kind.unscale_(scaled)
        got, want = decode(kind, latents, None, precision), theirs.decode(latents).sample[0]
        step = 8 * strip_rows(latents.shape[3])
        rows.append({"picture": i, "psnr": psnr(got, want), "seams": seam_score(got, step) / seam_score(want, step)})
        print(
            f"frozen {Path(model).name} {size}² picture {i}: {rows[-1]['psnr']:.1f} dB, seams {rows[-1]['seams']:.3f}",
            flush=True,
        )
    return rows


def bench_ways(model: str, sizes: list[tuple[int, int]], precision: Precision) -> list[dict[str, Any]]:
    """Latents as in `bench_exact`; pixels are noise of 32×32, enlarged, as a guide is."""
    models, rows = Models(families.read_family(resolve(model))), []
    kind = models.decoder
    models.vae(kind)
    planning = VaePeaks(models, kind, measure(Path(tempfile.gettempdir())), precision)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randint(256, (32, 32, 3), generator=generator, dtype=torch.uint8).numpy()
    for width, height in sizes:
        latents = torch.randn(1, 4, height // 8, width // 8, generator=generator) + torch.linspace(-1, 1, width // 8)
        latents, pixels = kind.unscale_(latents), guide.crop_to_aspect(noise, height, width)
        for encoding in False, True:
            want: Tensor | None = None
            for way in Decode.EXACT, Decode.SAMPLED, Decode.FROZEN:
                with tempfile.TemporaryDirectory() as folder:
                    space, size = ScratchSpace(Path(folder), free_bytes(Path(folder))), (height // 8, width // 8)
                    how = planning.choose(way, size, space, encoding=encoding, wrap=Wrap.NONE)
                    got, seconds = timed(partial(go, how, kind, latents, pixels))
                want = got if want is None else want
                error = float((got - want).norm() / want.norm())
                row = {
                    "size": f"{width}×{height}",
                    "encoding": encoding,
                    "way": way.value,
                    "seconds": seconds,
                    "error": error,
                    "psnr": psnr(got, want),
                    "scratch_bytes": how.scratch_bytes,
                    "written_bytes": how.written_bytes,
                }
                rows.append(row)
                print(
                    f"{'encode' if encoding else 'decode'} {row['size']} {way.value:8}{seconds:6.0f} s, scratch {how.scratch_bytes / 1e9:.1f} GB, "
                    f"written {how.written_bytes / 1e9:.0f} GB, error {error:.2%}"
                    + ("" if encoding else f", {row['psnr']:.0f} dB"),
                    flush=True,
                )
    return rows


def go(how: method.DecodePlan, kind: VaeSpec, latents: Tensor, pixels: Pixels) -> Tensor:
    """The picture of `latents`, or the latents of `pixels`."""
    vae, quiet = families.build_vae(kind), {"check": lambda where: None, "progress": lambda share: None}
    options = vae_streaming(kind, vae, how.precision)._asdict()
    with streamed(vae, kind.weights, families.vae_names, **options) as streamer:
        if how.encoding:
            return method.encode(how, vae, streamer, pixels, **quiet)
        return torch.cat(list(method.decode(how, vae, streamer, latents, **quiet)), dim=1)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=["exact", "frozen", "ways"])
    parser.add_argument(
        "--models", nargs="+", help="default: the generated sd15 and mini for exact, mini for frozen, sd15 for ways"
    )
    parser.add_argument(
        "--sizes", nargs="+", help="for exact (default: 512x512 1024x1024 1536x640) and ways (2048x2048)"
    )
    parser.add_argument("--count", type=int, default=8, help="pictures, for frozen")
    parser.add_argument("--folder", type=Path, default=Path.home() / ".cache/tiler/latents", help="where they are kept")
    parser.add_argument(
        "--decode-precision", type=Precision, choices=[Precision.FP32, Precision.BF16], default=Precision.FP32
    )
    parser.add_argument("--json", type=Path, help="also write all results here")
    args = parser.parse_args()
    results: dict[str, Any] = {}
    precision: Precision = args.decode_precision
    if "exact" in args.what:
        sizes = numbers(args.sizes or ["512x512", "1024x1024", "1536x640"])
        models = args.models or [str(make_checkpoint.make("sd15")), "mini"]
        results["exact"] = [row for model in models for row in bench_exact(model, sizes, precision)]
    if "frozen" in args.what:
        results["frozen"] = [
            row for m in args.models or ["mini"] for row in bench_frozen(m, 2048, args.count, args.folder, precision)
        ]
    if "ways" in args.what:
        sizes = numbers(args.sizes or ["2048x2048"])
        results["ways"] = [
            row for m in args.models or [str(make_checkpoint.make("sd15"))] for row in bench_ways(m, sizes, precision)
        ]
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
