"""The options that commands share, and how they become a RenderRequest."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from tiler.errors import UsageError
from tiler.output.paper import parse_length, sheet_pixels
from tiler.request import (
    PRESETS,
    Decode,
    GuideUpscale,
    Layout,
    Mask,
    Precision,
    Preset,
    Region,
    RenderRequest,
    ScratchDtype,
    Wrap,
    check_dpi,
    parse_interval,
    parse_scheduler,
    read_regions,
)

Prompt = Annotated[str | None, typer.Argument(help="What to draw.", show_default=False)]
Output = Annotated[Path, typer.Option("--output", "-o", help="The picture to write: .png, .pdf, .tif or .tiff.")]
Model = Annotated[
    str, typer.Option("--model", "-m", help="`mini`, a folder in diffusers layout, or a hub id like org/name.")
]
Variant = Annotated[
    str | None,
    typer.Option(
        help="Flavour of the weight files, as in NAME.fp16.safetensors.  [default: fp16 if there, else plain]"
    ),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
Size = Annotated[int | None, typer.Option(help="Width and height in pixels.  [default: 2048]", show_default=False)]
Width = Annotated[
    int | None, typer.Option("--width", "-W", help="Width in pixels; overrides --size.", show_default=False)
]
Height = Annotated[
    int | None, typer.Option("--height", "-H", help="Height in pixels; overrides --size.", show_default=False)
]
Paper = Annotated[
    str | None,
    typer.Option(
        help="Render for a sheet: A0–A10, B0–B10, letter, legal, tabloid, or 60x40cm; the size follows from --dpi.",
        show_default=False,
    ),
]
Landscape = Annotated[bool, typer.Option("--landscape", help="Lay the sheet on its long side.")]
Dpi = Annotated[
    float | None,
    typer.Option(help="Pixels an inch, kept in the file.  [default: 300 with a paper]", show_default=False),
]
Bleed = Annotated[str, typer.Option(help="Picture beyond each edge of the sheet, to be cut off; like 3mm.")]
Negative = Annotated[str, typer.Option("--negative-prompt", "-n", help="What not to draw.")]
PresetName = Annotated[
    Preset,
    typer.Option(
        help="quality: the defaults; balanced: --layout shift, guidance in 0-0.6 of the schedule; fast: also 10 steps, strength 0.4, "
        "guidance in 0-0.5. Options given beside it win; `tiler plan` shows what each takes."
    ),
]
Steps = Annotated[
    int | None, typer.Option("--steps", help="Sampling steps, 1–1000.  [default: 20]", show_default=False)
]
Guidance = Annotated[
    float,
    typer.Option(
        "--guidance-scale",
        "--cfg-scale",
        help="How strictly to follow the prompt; 1 or less runs no unconditional half.",
    ),
]
Interval = Annotated[
    str | None,
    typer.Option(
        "--guidance-interval",
        help="The share of the schedule in which guidance works, like 0.2-0.8; elsewhere no unconditional half runs.  [default: 0-1]",
        show_default=False,
    ),
]
TileLayout = Annotated[
    Layout | None,
    typer.Option(
        help="grid: overlapping tiles; shift: side by side, elsewhere at every step but the last, which is a grid: at 2048² 16 "
        "tiles a step instead of 25.  [default: grid]",
        show_default=False,
    ),
]
AttentionWindow = Annotated[
    int | None,
    typer.Option(
        "--attention-window",
        help="Self-attention of the highest resolution looks only inside windows of N×N latents, elsewhere at every step.",
        metavar="N",
        show_default=False,
    ),
]
PrecisionKind = Annotated[
    Precision,
    typer.Option(
        "--precision",
        help="What the UNet computes in. int8 is faster and reads half the bytes, from a file that is made once in --cache-dir; "
        "auto takes it on CPUs with 8-bit dot products, fp32 on others.",
    ),
]
CacheDir = Annotated[
    Path | None,
    typer.Option(help="Folder of int8 weights.  [default: ~/.cache/tiler/packed]", show_default=False),
]
Seed = Annotated[int, typer.Option("--seed", "-s", help="The same seed gives the same picture; -1 draws one.")]
Strength = Annotated[
    float | None,
    typer.Option(
        help="Denoising strength, 0–1: the share of the schedule that the canvas denoises after the guide.  [default: 0.5]",
        show_default=False,
    ),
]
SchedulerName = Annotated[
    str,
    typer.Option(
        "--scheduler",
        "--sampling-method",
        help="auto (the model's own), DDIM, Euler, Euler a, DPM++ 2M, DPM++ 2M Karras, UniPC, LCM.",
    ),
]
Guide = Annotated[
    Path | None,
    typer.Option(help="A picture to use as the guide instead of a low-resolution pass.", show_default=False),
]
UpscaleKind = Annotated[
    GuideUpscale,
    typer.Option(
        "--guide-upscale",
        help="How the guide comes to the canvas's size. pixel: decoded, resized, encoded; latent: its latents resized, no autoencoder.",
    ),
]
NoGuide = Annotated[bool, typer.Option("--no-guide", help="Start the canvas from pure noise.")]
Overlap = Annotated[
    int | None,
    typer.Option(
        help="Least overlap of neighbouring tiles in pixels.  [default: a quarter of a tile]", show_default=False
    ),
]
MaskKind = Annotated[Mask, typer.Option("--mask", help="How a tile's prediction is weighted over its area.")]
WrapAxes = Annotated[
    Wrap,
    typer.Option(
        "--wrap", help="Make a picture whose copies join without a seam, side by side (x), stacked (y), or both."
    ),
]
RegionsFile = Annotated[
    Path | None,
    typer.Option(
        help="TOML file with [[region]] tables: prompt, rows = [0, 512], cols = [384, 896], ….", show_default=False
    ),
]
MaxRam = Annotated[
    str, typer.Option("--max-ram", "--budget", help="The ceiling for the whole process's resident memory.")
]
Threads = Annotated[
    int | None, typer.Option("--threads", "-t", help="CPU threads.  [default: all cores]", show_default=False)
]
DecodeKind = Annotated[
    Decode,
    typer.Option(
        "--decode",
        help="exact: as a whole, through scratch files; sampled: the same, but attention sees at most 16,384 evenly spaced tokens; "
        "frozen: row by row with held statistics, little disk space, any size; auto: exact while the whole picture's attention "
        "is a small part of the work, then sampled, frozen without the disk space or beyond 4,096 pixels of width; "
        "tiny: a fast approximation by --tiny-vae.",
    ),
]
TinyVae = Annotated[
    str | None,
    typer.Option(
        help="An AutoencoderTiny for --decode tiny: a folder or a hub id like madebyollin/taesd.", show_default=False
    ),
]
ScratchFolder = Annotated[
    Path | None,
    typer.Option("--scratch", help="Folder for the decoder's files.  [default: the output's]", show_default=False),
]
ScratchKind = Annotated[
    ScratchDtype,
    typer.Option("--scratch-dtype", help="How they are stored; fp16 is half the bytes, about 70 dB from fp32."),
]
Latents = Annotated[
    Path | None, typer.Option("--save-latents", help="Also write the final latents (safetensors).", show_default=False)
]
Report = Annotated[
    Path | None, typer.Option("--report", help="Write peak memory, times and counts as JSON.", show_default=False)
]
Force = Annotated[bool, typer.Option("--force", "-f", help="Replace existing output files.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress; errors only.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def request_from(given: Mapping[str, Any]) -> RenderRequest:
    """The request of a command line: `given` holds the options of `render` by their parameters' names. Raises UsageError."""
    prompt, regions, seed = given["prompt"], tuple[Region, ...](), given["seed"]
    if given["regions"] is not None:
        file_prompt, regions = read_regions(given["regions"])
        prompt = file_prompt if prompt is None else prompt
    if seed < -1:
        raise UsageError(f"seed = {seed} is out of range: 0–{2**63 - 1}, or -1 for a random one")
    bleed_mm = parse_length(given["bleed"])
    width, height, dpi = _sheet(given, bleed_mm)
    same = (
        "output", "model", "variant", "revision", "negative_prompt", "guidance_scale", "guide_upscale", "attention_window",
        "precision", "cache_dir", "overlap", "mask", "wrap", "decode", "scratch", "scratch_dtype", "tiny_vae", "save_latents", "force",
    )  # fmt: skip
    interval = given["guidance_interval"]
    own = {
        "num_inference_steps": given["steps"], "strength": given["strength"], "layout": given["layout"],
        "guidance_interval": None if interval is None else parse_interval(interval),
    }  # fmt: skip
    chosen = dict(PRESETS[given["preset"]])
    if regions or given["overlap"] is not None:
        chosen.pop("layout", None)  # such tiles cannot shift
    chosen |= {name: value for name, value in own.items() if value is not None}
    return RenderRequest(
        prompt=prompt, regions=regions, seed=secrets.randbelow(2**32) if seed == -1 else seed, width=width, height=height,
        dpi=dpi, bleed_mm=bleed_mm, scheduler=parse_scheduler(given["scheduler"]), guide=not given["no_guide"],
        guide_image=given["guide"], **chosen, **{name: given[name] for name in same},
    )  # fmt: skip


def _sheet(given: Mapping[str, Any], bleed_mm: float) -> tuple[int, int, float | None]:
    """What the options of size and paper say together: width, height, dpi."""
    size, width, height, paper, dpi = (given[name] for name in ("size", "width", "height", "paper", "dpi"))
    check_dpi(dpi)
    if paper is None:
        if given["landscape"] or bleed_mm:
            raise UsageError("--landscape and --bleed belong to a --paper; give one, like --paper A2")
        side = 2048 if size is None else size
        return side if width is None else width, side if height is None else height, dpi
    if any(side is not None for side in (size, width, height)):
        raise UsageError("--paper and --size, --width or --height exclude each other; give one of them")
    dpi = dpi or 300
    return *sheet_pixels(paper, dpi, landscape=given["landscape"], bleed_mm=bleed_mm), dpi


def prepare_process(threads: int | None) -> None:
    """What must be set before torch is imported: allocator, threads, quiet libraries. Then torch is."""
    from tiler.memory.lean_imports import lean_torch
    from tiler.memory.limits import check_user_limits, limited_cpus
    from tiler.memory.process import frugal_allocator

    if threads is not None and not 1 <= threads <= 1024:
        raise UsageError(f"threads = {threads} is out of range: 1–1024")
    check_user_limits()
    frugal_allocator()
    threads = threads or (None if "OMP_NUM_THREADS" in os.environ else limited_cpus())
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    lean_torch()


def write_report(path: Path | None, report: dict[str, Any]) -> None:
    """Write --report's JSON file, when one was asked for. Raises StorageError."""
    if path is not None:
        from tiler.files import atomic

        with atomic(path) as file:
            file.write((json.dumps(report, indent=2) + "\n").encode())
