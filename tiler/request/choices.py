"""The values that options accept, under the names that users know, and checks that several requests share."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from tiler.errors import UsageError

PIXEL_STEP = 8  # px: sides of a canvas and of its regions are multiples of this
MAX_SIDE = 131_072  # px
MAX_STEPS = 1_000
MAX_SCALE = 64
MAX_SHARPEN = 500  # percent
MAX_CLIP_SKIP = 64  # above the layers of any CLIP
MAX_SEED = 2**64 - 1
STDOUT = Path("-")  # as an output, standard output


class Mask(StrEnum):
    """The weight of a tile's noise prediction over its area (Jiménez 2023, arXiv:2302.02412, section 4)."""

    CONSTANT = "constant"
    GAUSSIAN = "gaussian"
    QUARTIC = "quartic"


class Scheduler(StrEnum):
    """Samplers by their AUTOMATIC1111 names. AUTO uses the checkpoint's own sampler if it is one of these, else DPM++
    2M Karras."""

    AUTO = "auto"
    DDIM = "DDIM"
    EULER = "Euler"
    EULER_A = "Euler a"
    HEUN = "Heun"
    DPMPP_2M = "DPM++ 2M"
    DPMPP_2M_KARRAS = "DPM++ 2M Karras"
    DPMPP_2M_SDE = "DPM++ 2M SDE"
    DPMPP_SDE = "DPM++ SDE"
    UNIPC = "UniPC"
    LCM = "LCM"

    @property
    def order(self) -> int:
        """Denoiser calls a step."""
        return 2 if self is Scheduler.HEUN else 1


class ScheduleType(StrEnum):
    """The spacing of noise levels over the steps, by AUTOMATIC1111's names. The last two mean the same: steps of equal
    length that end at the last trained timestep."""

    KARRAS = "karras"
    EXPONENTIAL = "exponential"
    BETA = "beta"
    SGM_UNIFORM = "sgm_uniform"
    SIMPLE = "simple"


class Wrap(StrEnum):
    """The axes along which copies of the picture can be laid side by side without a seam."""

    NONE = "none"
    X = "x"
    Y = "y"
    XY = "xy"

    @property
    def axes(self) -> tuple[bool, bool]:
        """(vertical, horizontal), in the order of (height, width)."""
        return "y" in self, "x" in self


class Layout(StrEnum):
    """The placement of tiles: overlapping at fixed positions, side by side at positions that change every step
    (SpotDiffusion), or overlapping at positions that change."""

    GRID = "grid"
    SHIFT = "shift"
    JITTER = "jitter"


class GuideUpscale(StrEnum):
    """How the guide is enlarged to the canvas: its latents by bicubic interpolation; its picture by Lanczos and then
    encoded; or so in several steps, with a canvas denoised after each."""

    PIXEL = "pixel"
    LATENT = "latent"
    PROGRESSIVE = "progressive"


class Decode(StrEnum):
    """How latents are decoded: as a whole through scratch files; the same with attention to a sample of the tokens; row
    by row with statistics measured beforehand; or by a tiny autoencoder that approximates the full one."""

    AUTO = "auto"
    EXACT = "exact"
    SAMPLED = "sampled"
    FROZEN = "frozen"
    TINY = "tiny"


class Weights(StrEnum):
    """The formats in which `tiler quantize` stores weights: optimum-quanto's qint8, qfloat8 and qint4."""

    INT8 = "int8"
    FP8 = "fp8"
    INT4 = "int4"


class Precision(StrEnum):
    """The arithmetic of the denoiser's layers. AUTO takes int8, or else bf16, if a denoiser of that width is at least
    1.3 times as fast in it on such a processor."""

    FP32 = "fp32"
    INT8 = "int8"
    BF16 = "bf16"
    AUTO = "auto"


class DecodePrecision(StrEnum):
    """The arithmetic of an autoencoder's layers. AUTO takes bf16 beside a denoiser in int8 or bf16, if this processor
    computes faster in it."""

    FP32 = "fp32"
    BF16 = "bf16"
    AUTO = "auto"


class Format(StrEnum):
    """The format of a picture's file."""

    PNG = "png"
    JPEG = "jpeg"
    WEBP = "webp"
    AVIF = "avif"
    PDF = "pdf"
    TIFF = "tiff"


FORMATS = {f".{format}": format for format in Format} | {".jpg": Format.JPEG, ".tif": Format.TIFF}
"""The format by a file name's ending."""
LOSSY = (Format.JPEG, Format.WEBP, Format.AVIF)


class Preset(StrEnum):
    """Bundles of settings. An option that is given beside a preset replaces the preset's value."""

    QUALITY = "quality"
    BALANCED = "balanced"
    FAST = "fast"


class Emphasis(StrEnum):
    """The effect of weights like (word:1.3): scale the encodings and restore their mean; only scale them; ignore the
    weights and remove the syntax; or treat brackets as text."""

    ORIGINAL = "original"
    NO_NORM = "no-norm"
    IGNORE = "ignore"
    NONE = "none"


class TileConditioning(StrEnum):
    """The sizes that are passed to a model conditioned on size for each tile: the tile's own place on the canvas, or
    the whole canvas as in A1111."""

    PLACE = "place"
    NONE = "none"


class ScratchDtype(StrEnum):
    """The dtype in which the exact decoder stores activations on disk."""

    FP16 = "fp16"
    FP32 = "fp32"


# The values that each preset sets in a RenderRequest; `quality` sets none.
PRESETS: Mapping[Preset, Mapping[str, Any]] = {
    Preset.QUALITY: {},
    Preset.BALANCED: {"guidance_interval": (0.0, 0.6), "layout": Layout.SHIFT},
    Preset.FAST: {
        "num_inference_steps": 10, "strength": 0.4, "guidance_interval": (0.0, 0.5), "layout": Layout.SHIFT,
        "guide_upscale": GuideUpscale.PIXEL,
    },
}  # fmt: skip

_OTHER_NAMES = {
    "eulerancestral": Scheduler.EULER_A,
    "dpm++2mk": Scheduler.DPMPP_2M_KARRAS,
    "ddimscheduler": Scheduler.DDIM,
    "eulerdiscretescheduler": Scheduler.EULER,
    "eulerancestraldiscretescheduler": Scheduler.EULER_A,
    "heundiscretescheduler": Scheduler.HEUN,
    "dpmsolvermultistepscheduler": Scheduler.DPMPP_2M,
    "unipcmultistepscheduler": Scheduler.UNIPC,
    "lcmscheduler": Scheduler.LCM,
}


def parse_scheduler(name: str) -> Scheduler:
    """Parse the name of a sampler as AUTOMATIC1111, ComfyUI, InvokeAI or diffusers write it, in any case: `DPM++ 2M` is
    also `dpmpp_2m`. Raises UsageError."""
    folded = " ".join(name.lower().replace("_", " ").split())
    joined = folded.replace(" ", "").replace("dpmpp", "dpm++").removeprefix("k")  # InvokeAI's `k_euler_a`
    for scheduler in Scheduler:
        if joined == scheduler.value.lower().replace(" ", ""):
            return scheduler
    if (known := _OTHER_NAMES.get(joined)) is not None:
        return known
    for scheduler, kind in itertools.product(Scheduler, ScheduleType):
        if joined == (scheduler.value + kind).lower().replace(" ", "").replace("_", ""):
            raise UsageError(f"unknown scheduler {name!r}; write {scheduler.value!r} and --schedule-type {kind}")
    raise UsageError(f"unknown scheduler {name!r}; choose one of {', '.join(s.value for s in Scheduler)}")


def parse_schedule_type(name: str) -> ScheduleType:
    """Parse a name like `SGM Uniform`, in any case. Raises UsageError."""
    folded = "_".join(name.lower().split())
    if folded in tuple(ScheduleType):
        return ScheduleType(folded)
    raise UsageError(f"unknown schedule type {name!r}; choose one of {', '.join(ScheduleType)}")


def check_tensors(flag: str, path: Path | None) -> None:
    """Raise UsageError if a file of tensors has the name of a picture."""
    if path is not None and path.suffix.lower() in FORMATS:
        raise UsageError(f"{flag} {path}: this file holds no picture; give it a name like {path.stem}.safetensors")


def check_decode(decode: Decode, tiny_vae: str | None, *, previews: bool = False) -> None:
    """Raise UsageError if --decode and --tiny-vae contradict each other. With `previews`, --tiny-vae may be meant for
    them alone."""
    if (decode is Decode.TINY) != (tiny_vae is not None) and not (previews and tiny_vae is not None):
        raise UsageError(
            "--decode tiny and --tiny-vae FOLDER go together; give both (taesd is made for SD 1.x and 2.x)"
        )


def parse_format(name: str) -> Format:
    """A format's name in any case, or its file ending. Raises UsageError."""
    if (format := FORMATS.get("." + name.lower().removeprefix("."))) is None:
        raise UsageError(f"unknown format {name!r}; choose one of {', '.join(Format)}")
    return format


def check_format(output: Path | None, format: Format | None) -> None:
    """Raise UsageError for --format together with a file name, whose ending already decides the format."""
    if format is not None and output != STDOUT:
        raise UsageError(f"--format {format} is for standard output (-o -); a file's ending decides its format")
    if format is Format.TIFF:
        raise UsageError("a TIFF cannot be written to a pipe; write a .tif file, or take --format png")


def check_text(text: str) -> None:
    """Raise UsageError for a prompt with characters that no tokenizer accepts."""
    if "\0" in text or any(0xD800 <= ord(c) <= 0xDFFF for c in text):
        raise UsageError("a prompt contains a NUL character or half a surrogate pair; remove it")


def parse_interval(text: str) -> tuple[float, float]:
    """Parse `0.2-0.8` → (0.2, 0.8), shares of the schedule. Raises UsageError."""
    try:
        low, high = (float(part) for part in text.replace("–", "-").split("-"))
    except ValueError:
        raise UsageError(
            f"--guidance-interval {text!r} is not two shares of the schedule; write it like 0.2-0.8"
        ) from None
    return low, high


def within(name: str, value: float | None, low: float, high: float, unit: str = "") -> None:
    """Raise UsageError if `value` is given (not None) and lies outside [low, high]. `name` is an option like
    --steps, or a key of a file."""
    if value is None:
        return
    if not (math.isfinite(value) and low <= value <= high):
        equals = " " if name.startswith("--") else " = "
        raise UsageError(f"{name}{equals}{value} is out of range: {low}–{high}{' ' + unit if unit else ''}")
