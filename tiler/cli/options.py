"""The options that commands share, and how they become a RenderRequest."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from tiler.errors import UsageError
from tiler.request import Decode, Mask, Region, RenderRequest, ScratchDtype, parse_scheduler, read_regions

Prompt = Annotated[str | None, typer.Argument(help="What to draw.", show_default=False)]
Output = Annotated[Path, typer.Option("--output", "-o", help="The picture to write: .png, .tif or .tiff.")]
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
    typer.Option(help="Pixels an inch, kept in the file.  [default: 300 with --paper]", show_default=False),
]
Bleed = Annotated[str, typer.Option(help="Picture beyond each edge of the sheet, to be cut off; like 3mm.")]
Negative = Annotated[str, typer.Option("--negative-prompt", "-n", help="What not to draw.")]
Steps = Annotated[int, typer.Option("--steps", help="Sampling steps, 1–1000.")]
Guidance = Annotated[
    float,
    typer.Option(
        "--guidance-scale",
        "--cfg-scale",
        help="How strictly to follow the prompt; 1 or less runs no unconditional half.",
    ),
]
Seed = Annotated[int, typer.Option("--seed", "-s", help="The same seed gives the same picture; -1 draws one.")]
Strength = Annotated[
    float,
    typer.Option(help="Denoising strength, 0–1: the share of the schedule that the canvas denoises after the guide."),
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
NoGuide = Annotated[bool, typer.Option("--no-guide", help="Start the canvas from pure noise.")]
Overlap = Annotated[
    int | None,
    typer.Option(
        help="Least overlap of neighbouring tiles in pixels.  [default: a quarter of a tile]", show_default=False
    ),
]
MaskKind = Annotated[Mask, typer.Option("--mask", help="How a tile's prediction is weighted over its area.")]
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
        help="exact: as a whole, through scratch files; frozen: row by row with held statistics, any size; auto: exact while "
        "there is disk space and the whole picture's attention is a small part of the work; tiny: a fast approximation "
        "by --tiny-vae.",
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
    typer.Option(
        "--scratch", help="Folder for the exact decoder's files.  [default: the output's]", show_default=False
    ),
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


class Sheet(NamedTuple):
    """What the options of size and paper say together."""

    width: int
    height: int
    dpi: float | None


def sheet_from(
    size: int | None,
    width: int | None,
    height: int | None,
    paper: str | None,
    landscape: bool,
    dpi: float | None,
    bleed: str,
) -> Sheet:
    """Raises UsageError when they contradict each other."""
    from tiler.output.paper import parse_length, sheet_pixels

    if dpi is not None and not 1 <= dpi <= 10_000:
        raise UsageError(f"dpi = {dpi:g} is out of range: 1–10000")
    if paper is None:
        if landscape or parse_length(bleed):
            raise UsageError("--landscape and --bleed belong to a --paper; give one, like --paper A2")
        side = 2048 if size is None else size
        return Sheet(side if width is None else width, side if height is None else height, dpi)
    if any(side is not None for side in (size, width, height)):
        raise UsageError("--paper and --size, --width or --height exclude each other; give one of them")
    return Sheet(*sheet_pixels(paper, dpi or 300, landscape=landscape, bleed=bleed), dpi or 300)


def request_from(
    prompt: str | None, output: Path, model: str, variant: str | None, revision: str | None, sheet: Sheet, negative_prompt: str, steps: int, guidance_scale: float, seed: int, strength: float, scheduler: str,
    guide: Path | None, no_guide: bool, overlap: int | None, mask: Mask, regions: Path | None,
    decode: Decode, scratch: Path | None, scratch_dtype: ScratchDtype, tiny_vae: str | None, save_latents: Path | None, force: bool,
) -> RenderRequest:  # fmt: skip
    """The request of a command line. Raises UsageError."""
    tables: tuple[Region, ...] = ()
    if regions is not None:
        file_prompt, tables = read_regions(regions)
        prompt = file_prompt if prompt is None else prompt
    if seed < -1:
        raise UsageError(f"seed = {seed} is out of range: 0–{2**63 - 1}, or -1 for a random one")
    return RenderRequest(
        prompt=prompt, output=output, model=model, variant=variant, revision=revision,
        width=sheet.width, height=sheet.height, dpi=sheet.dpi, negative_prompt=negative_prompt,
        num_inference_steps=steps, guidance_scale=guidance_scale, seed=secrets.randbelow(2**32) if seed == -1 else seed,
        strength=strength, scheduler=parse_scheduler(scheduler), guide=not no_guide, guide_image=guide, overlap=overlap,
        mask=mask, regions=tables, decode=decode, scratch=scratch, scratch_dtype=scratch_dtype, tiny_vae=tiny_vae, save_latents=save_latents, force=force,
    )  # fmt: skip


def prepare_process(threads: int | None) -> None:
    """What must be set before torch is imported: allocator, threads, quiet libraries."""
    from tiler.memory.process import frugal_allocator

    if threads is not None and not 1 <= threads <= 1024:
        raise UsageError(f"threads = {threads} is out of range: 1–1024")
    frugal_allocator()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)


def write_report(path: Path | None, report: dict[str, Any]) -> None:
    """Write --report's JSON file, when one was asked for. Raises StorageError."""
    if path is not None:
        from tiler.output.files import atomic

        with atomic(path) as file:
            file.write((json.dumps(report, indent=2) + "\n").encode())
