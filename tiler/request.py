"""What to render: `RenderRequest` and `Region`, validated, from keywords or TOML. Knows nothing of models or memory."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from tiler.errors import UsageError

MAX_SIDE = 65_536  # px
MAX_STEPS = 1_000
MAX_SEED = 2**63 - 1


class Mask(StrEnum):
    """How a tile's noise prediction is weighted over its area (Jiménez 2023, arXiv:2302.02412, section 4)."""

    CONSTANT = "constant"
    GAUSSIAN = "gaussian"
    QUARTIC = "quartic"


class Scheduler(StrEnum):
    """Samplers by their AUTOMATIC1111 names; AUTO takes the checkpoint's own when it is one of these, else DPM++ 2M Karras."""

    AUTO = "auto"
    DDIM = "DDIM"
    EULER = "Euler"
    EULER_A = "Euler a"
    DPMPP_2M = "DPM++ 2M"
    DPMPP_2M_KARRAS = "DPM++ 2M Karras"
    UNIPC = "UniPC"
    LCM = "LCM"


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
    """Where tiles lie: overlapping in one place, or side by side and elsewhere at every step (SpotDiffusion)."""

    GRID = "grid"
    SHIFT = "shift"


class GuideUpscale(StrEnum):
    """How the guide comes to the canvas's size: its latents by bicubic interpolation, or its picture by Lanczos, encoded."""

    PIXEL = "pixel"
    LATENT = "latent"


class Decode(StrEnum):
    """How latents become a picture: as a whole through scratch files, the same with attention to some tokens, row by row with
    held statistics, or by a tiny autoencoder trained to give about the same."""

    AUTO = "auto"
    EXACT = "exact"
    SAMPLED = "sampled"
    FROZEN = "frozen"
    TINY = "tiny"


class Precision(StrEnum):
    """What the UNet's layers are computed in; AUTO takes int8 where the processor has dot products of 8-bit integers, and the
    UNet is not so narrow that they save nothing."""

    FP32 = "fp32"
    INT8 = "int8"
    AUTO = "auto"


class Preset(StrEnum):
    """Bundles of settings; whatever is given beside one replaces its part."""

    QUALITY = "quality"
    BALANCED = "balanced"
    FAST = "fast"


class ScratchDtype(StrEnum):
    """How the exact decoder stores activations on disk."""

    FP16 = "fp16"
    FP32 = "fp32"


# What a preset changes in a RenderRequest; `quality` is its defaults.
PRESETS: Mapping[Preset, Mapping[str, Any]] = {
    Preset.QUALITY: {},
    Preset.BALANCED: {"guidance_interval": (0.0, 0.6), "layout": Layout.SHIFT},
    Preset.FAST: {
        "num_inference_steps": 10, "strength": 0.4, "guidance_interval": (0.0, 0.5), "layout": Layout.SHIFT,
    },
}  # fmt: skip

_DIFFUSERS_NAMES = {
    "ddimscheduler": Scheduler.DDIM,
    "eulerdiscretescheduler": Scheduler.EULER,
    "eulerancestraldiscretescheduler": Scheduler.EULER_A,
    "dpmsolvermultistepscheduler": Scheduler.DPMPP_2M,
    "unipcmultistepscheduler": Scheduler.UNIPC,
    "lcmscheduler": Scheduler.LCM,
}


def parse_scheduler(name: str) -> Scheduler:
    """An AUTOMATIC1111 or diffusers name in any case → Scheduler. Raises UsageError."""
    folded = " ".join(name.lower().replace("_", " ").split())
    for scheduler in Scheduler:
        if folded == scheduler.value.lower():
            return scheduler
    if (known := _DIFFUSERS_NAMES.get(folded.replace(" ", ""))) is not None:
        return known
    raise UsageError(f"unknown scheduler {name!r}; choose one of {', '.join(s.value for s in Scheduler)}")


def check_decode(decode: Decode, tiny_vae: str | None) -> None:
    """Raises UsageError when the two options contradict each other."""
    if (decode is Decode.TINY) != (tiny_vae is not None):
        raise UsageError(
            "--decode tiny and --tiny-vae FOLDER go together; give both (taesd is made for SD 1.x and 2.x)"
        )


def check_dpi(dpi: float | None) -> None:
    """Raises UsageError."""
    if dpi is not None:
        _within("dpi", dpi, 1, 10_000)


def parse_interval(text: str) -> tuple[float, float]:
    """`0.2-0.8` → (0.2, 0.8), shares of the schedule. Raises UsageError."""
    try:
        low, high = (float(part) for part in text.replace("–", "-").split("-"))
    except ValueError:
        raise UsageError(
            f"guidance-interval = {text!r} is not two shares of the schedule; write it like 0.2-0.8"
        ) from None
    return low, high


@dataclass(frozen=True, kw_only=True)
class Region:
    """A rectangle of the canvas with a prompt of its own. `rows` and `cols` are (first, past-the-last) canvas pixels."""

    prompt: str
    rows: tuple[int, int]
    cols: tuple[int, int]
    negative_prompt: str | None = None
    guidance_scale: float | None = None
    seed: int | None = None
    mask: Mask | None = None
    mask_weight: float = 1.0

    def __post_init__(self) -> None:
        for name, span in (("rows", self.rows), ("cols", self.cols)):
            if len(span) != 2 or not all(type(v) is int for v in span) or not 0 <= span[0] < span[1]:
                raise UsageError(
                    f"region {self.prompt!r}: {name} = {list(span)} is not [first, last] in canvas pixels with first < last"
                )
            if span[0] % 8 or span[1] % 8:
                raise UsageError(f"region {self.prompt!r}: {name} = {list(span)} must be multiples of 8 pixels")
        if self.guidance_scale is not None:
            _within("guidance_scale", self.guidance_scale, 0, 100)
        if self.seed is not None:
            _within("seed", self.seed, 0, MAX_SEED)
        if not (math.isfinite(self.mask_weight) and self.mask_weight > 0):
            raise UsageError(f"region {self.prompt!r}: mask_weight = {self.mask_weight} must be a positive number")


@dataclass(frozen=True, kw_only=True)
class RenderRequest:
    """Everything that decides the picture. Sizes are pixels.

    `prompt` may be None when `regions` cover the canvas. `strength` is img2img's denoising strength: the share of the
    schedule that the canvas denoises after the guide. `precision` AUTO is int8 where processor and model gain by it. `guidance_interval` is the share of the schedule, from noise to
    picture, in which guidance works. `attention_window` is in latents, None is all of a tile. `overlap` None is a quarter
    of a tile, `scratch` None the folder of `output`, `cache_dir` None the user's cache folder. `dpi` is what the file says
    of its resolution, `bleed_mm` what a PDF says will be cut off each edge. Raises UsageError.
    """

    prompt: str | None
    output: Path
    model: str = "mini"
    variant: str | None = None
    revision: str | None = None
    width: int = 2048
    height: int = 2048
    dpi: float | None = None
    bleed_mm: float = 0.0
    negative_prompt: str = ""
    num_inference_steps: int = 20
    guidance_scale: float = 7.5
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    seed: int = 0
    strength: float = 0.5
    scheduler: Scheduler = Scheduler.AUTO
    guide: bool = True
    guide_image: Path | None = None
    guide_upscale: GuideUpscale = GuideUpscale.PIXEL
    layout: Layout = Layout.GRID
    attention_window: int | None = None
    precision: Precision = Precision.AUTO
    cache_dir: Path | None = None
    overlap: int | None = None
    mask: Mask = Mask.GAUSSIAN
    wrap: Wrap = Wrap.NONE
    regions: tuple[Region, ...] = ()
    decode: Decode = Decode.AUTO
    scratch: Path | None = None
    scratch_dtype: ScratchDtype = ScratchDtype.FP16
    tiny_vae: str | None = None
    save_latents: Path | None = None
    force: bool = False

    def __post_init__(self) -> None:
        for name, value in (("width", self.width), ("height", self.height)):
            _within(name, value, 8, MAX_SIDE, "pixels")
        _within("steps", self.num_inference_steps, 1, MAX_STEPS)
        _within("guidance-scale", self.guidance_scale, 0, 100)
        _within("strength", self.strength, 0, 1)
        _within("seed", self.seed, 0, MAX_SEED)
        if self.overlap is not None and (self.overlap < 0 or self.overlap % 8):
            raise UsageError(f"overlap = {self.overlap} must be a multiple of 8 pixels, 0 or more")
        low, high = self.guidance_interval
        if not 0 <= low < high <= 1:
            raise UsageError(
                f"guidance-interval = {low}-{high} must be two rising shares of the schedule, 0–1; like 0.2-0.8"
            )
        if self.attention_window is not None:
            _within("attention-window", self.attention_window, 4, MAX_SIDE, "latents")
        if self.layout is Layout.SHIFT and (self.overlap is not None or self.regions):
            raise UsageError(
                "--layout shift lays tiles side by side, for one prompt; leave out "
                + ("--regions" if self.regions else "--overlap")
            )
        check_decode(self.decode, self.tiny_vae)
        check_dpi(self.dpi)
        for side, wraps in zip((self.height, self.width), self.wrap.axes, strict=True):
            if wraps and side % 8:
                raise UsageError(
                    f"--wrap {self.wrap} needs sides that are multiples of 8; {side} is none, take {-(-side // 8) * 8}"
                )
        if self.prompt is None and not self.regions:
            raise UsageError("there is nothing to draw: give a prompt, or a --regions file with prompts")
        if self.guide_image is not None and self.guide_upscale is GuideUpscale.LATENT:
            raise UsageError("--guide-upscale latent is for the guide that tiler makes; leave it out with --guide")
        if self.guide_image is not None and not self.guide:
            raise UsageError("--guide and --no-guide exclude each other; give one of them")
        for text in (self.prompt or "", self.negative_prompt, *(r.prompt for r in self.regions)):
            if "\0" in text or any(0xD800 <= ord(c) <= 0xDFFF for c in text):
                raise UsageError("the prompt holds a NUL or half a surrogate pair; remove it")
        for region in self.regions:
            if region.rows[1] > self.height or region.cols[1] > self.width:
                raise UsageError(
                    f"region {region.prompt!r}: rows {list(region.rows)}, cols {list(region.cols)} reach outside the "
                    f"{self.width}×{self.height} canvas; keep rows within 0–{self.height} and cols within 0–{self.width}"
                )

    @property
    def canvas_size(self) -> tuple[int, int]:
        """(height, width) of the canvas: rounded up to multiples of 8. The picture is cropped to the asked size."""
        return -(-self.height // 8) * 8, -(-self.width // 8) * 8


def _within(name: str, value: float, low: float, high: float, unit: str = "") -> None:
    if not (math.isfinite(value) and low <= value <= high):
        raise UsageError(f"{name} = {value} is out of range: {low}–{high}{' ' + unit if unit else ''}")


def read_regions(path: Path) -> tuple[str | None, tuple[Region, ...]]:
    """The top-level prompt (None when absent) and the [[region]] tables of a TOML file. Raises UsageError."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path}: not valid TOML ({error})") from error
    if unknown := data.keys() - {"prompt", "region"}:
        raise UsageError(f"{path}: unknown key {sorted(unknown)[0]!r}; the file holds `prompt` and [[region]] tables")
    tables, prompt = data.get("region", []), data.get("prompt")
    if not isinstance(tables, list) or not tables or not isinstance(prompt, str | None):
        raise UsageError(f"{path}: no [[region]] table; see `tiler render --help` for an example")
    return prompt, tuple(_region(path, i, table) for i, table in enumerate(tables, 1))


_TYPES: Mapping[str, tuple[type, ...]] = {
    "prompt": (str,), "negative_prompt": (str,), "rows": (list,), "cols": (list,), "guidance_scale": (int, float),
    "seed": (int,), "mask": (str,), "mask_weight": (int, float),
}  # fmt: skip


def _region(path: Path, number: int, table: dict[str, Any]) -> Region:
    known = {f.name for f in fields(Region)}
    for key, value in table.items():
        if key not in known:
            raise UsageError(
                f"{path}: region {number} has an unknown key {key!r}; known are {', '.join(sorted(known))}"
            )
        if not isinstance(value, _TYPES[key]) or isinstance(value, bool):
            raise UsageError(f"{path}: region {number}: {key} = {value!r} has the wrong type")
    if missing := {"prompt", "rows", "cols"} - table.keys():
        raise UsageError(f"{path}: region {number} lacks {sorted(missing)[0]!r}")
    values = dict(table)
    if "mask" in values:
        if values["mask"] not in tuple(Mask):
            raise UsageError(f"{path}: region {number}: mask = {values['mask']!r}; choose {', '.join(Mask)}")
        values["mask"] = Mask(values["mask"])
    try:
        return replace(
            Region(prompt=values.pop("prompt"), rows=tuple(values.pop("rows")), cols=tuple(values.pop("cols"))),
            **values,
        )
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
