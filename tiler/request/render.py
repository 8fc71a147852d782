"""The request of a render: the options that the user gave, and the same request with all gaps filled."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from tiler.errors import UsageError
from tiler.request import shared
from tiler.request.choices import (
    MAX_CLIP_SKIP,
    MAX_SCALE,
    MAX_SEED,
    MAX_SHARPEN,
    MAX_SIDE,
    MAX_STEPS,
    PIXEL_STEP,
    STDOUT,
    Decode,
    DecodePrecision,
    Emphasis,
    Format,
    GuideUpscale,
    Layout,
    Mask,
    Precision,
    Preset,
    Scheduler,
    ScheduleType,
    ScratchDtype,
    TileConditioning,
    Wrap,
    check_decode,
    check_format,
    check_tensors,
    check_text,
    parse_interval,
    parse_schedule_type,
    parse_scheduler,
    within,
)
from tiler.request.cluster import ClusterOptions
from tiler.request.loras import Lora, read_loras
from tiler.request.model import ModelOptions
from tiler.request.options import Option, Panel, coerce, option
from tiler.request.regions import Region
from tiler.request.sheet import check_repaint, check_sheet

# Fields that say where and how a picture is made. All others determine its bytes.
OF_THE_MACHINE = (
    "output", "format", "save_latents", "cache_dir", "preview", "preview_interval", "prompt_embeds", "scratch", "force",
    "restart", "keep_job", "job_dir", "preview_vae", "cluster", "cluster_only", "keys", "insecure",
)  # fmt: skip
# Fields that renders must have alike for a worker of a cluster to serve them with one open denoiser.
OF_THE_DENOISER = ("model", "precision", "cache_dir", "attention_window", "tile_conditioning", "loras")
# The same as far as the options say it, before any file is read. The LoRA tags of the prompts come to it.
OF_THE_WORKERS = (
    *OF_THE_DENOISER, *(f.name for f in fields(ModelOptions) if f.name not in OF_THE_DENOISER), "lora_dir", "tile_size",
    "scheduler",
)  # fmt: skip
OF_THE_RUN = (*OF_THE_MACHINE, "metadata", "embd_dir", "lora_dir", "model_dirs")  # never written into a picture


@dataclass(frozen=True, kw_only=True)
class RenderRequest(ModelOptions, ClusterOptions):
    """The options given for a picture; None where an option was not given.

    `tiler.planning.resolve` fills the gaps from, in this order: the preset, the model folder's tiler.toml, the model
    family. Lengths are in pixels unless another unit is named. `guidance_interval` holds two shares of the schedule,
    from 0 (pure noise) to 1 (the finished picture); `attention_window` is in latents. Raises UsageError for a value
    that no model accepts.
    """

    prompt: str | None = option(
        None,
        Option(
            "What to draw. As in A1111: (more:1.3), [less], [from:to:0.5], [a|b], BREAK, AND; \\( is a bracket.",
            Panel.PICTURE, (), metavar="PROMPT", default="the model's own, if it has any",
        ),
    )  # fmt: skip
    negative_prompt: str | None = option(None, Option("What not to draw.", Panel.PICTURE, ("--negative-prompt", "-n")))
    prompt_embeds: Path | None = option(
        None,
        Option(
            "Prompts from `tiler encode`: the model's text encoders are not needed. Without a PROMPT, the file's first "
            "one is drawn.",
            Panel.PICTURE, ("--prompt-embeds",), metavar="FILE",
        ),
    )  # fmt: skip
    canvas_prompt: str | None = option(
        None,
        Option(
            "What to draw in the tiles, after a guide of PROMPT; leave out the subject, so that no tile repeats it.",
            Panel.PICTURE, ("--canvas-prompt",), metavar="TEXT",
        ),
    )  # fmt: skip
    emphasis: Emphasis = option(Emphasis.ORIGINAL, shared.EMPHASIS)
    regions: tuple[Region, ...] = option(
        (),
        Option(
            "TOML file with regions that have prompts of their own: [[region]] tables with prompt, rows = [0, 512], "
            "cols = [384, 896].",
            Panel.PICTURE, ("--regions",), metavar="FILE",
        ),
    )  # fmt: skip
    size: int | None = option(None, Option("Width and height in pixels.", Panel.PICTURE, ("--size",), default="2048"))
    width: int | None = option(None, Option("Width in pixels; overrides --size.", Panel.PICTURE, ("--width", "-W")))
    height: int | None = option(None, Option("Height in pixels; overrides --size.", Panel.PICTURE, ("--height", "-H")))
    paper: str | None = option(
        None,
        Option(
            "Render for a sheet: A0–A10, B0–B10, letter, legal, tabloid, or a size like 60x40cm; --dpi decides the pixels.",
            Panel.PICTURE,
            ("--paper",),
        ),
    )
    landscape: bool = option(False, Option("Lay the sheet on its long side.", Panel.PICTURE, ("--landscape",)))
    bleed: str | None = option(
        None,
        Option("Extra picture beyond each edge of the sheet, to be cut off; like 3mm.", Panel.PICTURE, ("--bleed",)),
    )
    dpi: float | None = option(None, shared.DPI)
    wrap: Wrap = option(Wrap.NONE, shared.WRAP)
    seed: int | None = option(
        None,
        Option("The same seed gives the same picture; -1 draws one at random.", Panel.PICTURE, ("--seed", "-s"),
               default="random"),
    )  # fmt: skip

    tiny_vae: str | None = option(None, shared.TINY_VAE)

    loras: tuple[Lora, ...] = option((), shared.LORA)
    lora_dir: Path | None = option(None, shared.LORA_DIR)

    preset: Preset | None = option(
        None,
        Option(
            "quality: the model's defaults; balanced: --layout shift and guidance in 0-0.6 of the schedule; fast: also 10 steps, "
            "strength 0.4, guidance in 0-0.5 and --guide-upscale pixel. Options given beside a preset win.",
            Panel.SAMPLING,
            ("--preset",),
            default="quality",
        ),
    )
    num_inference_steps: int | None = option(
        None, Option("Sampling steps, 1–1000.", Panel.SAMPLING, ("--steps",), default="the model's, mostly 20")
    )
    guidance_scale: float | None = option(
        None,
        Option(
            "Classifier-free guidance; values ≤ 1 turn it off and halve the work.",
            Panel.SAMPLING, ("--guidance-scale", "--cfg-scale"), default="the model's, mostly 7.5",
        ),
    )  # fmt: skip
    guidance_interval: tuple[float, float] | None = option(
        None,
        Option(
            "Share of the schedule with guidance, like 0.2-0.8; steps outside it take half the work.",
            Panel.SAMPLING, ("--guidance-interval",), parse=parse_interval, metavar="A-B", default="0-1",
        ),
    )  # fmt: skip
    strength: float | None = option(
        None,
        Option(
            "Denoising strength, 0–1: the share of the schedule that the canvas denoises after the guide.",
            Panel.SAMPLING, ("--strength",), default="the model's, mostly 0.5",
        ),
    )  # fmt: skip
    embd_dir: Path | None = option(None, shared.EMBD_DIR)
    clip_skip: int | None = option(None, shared.CLIP_SKIP)
    scheduler: Scheduler | None = option(
        None,
        Option(
            "DDIM, Euler, Euler a, Heun (which takes twice the work), DPM++ 2M, DPM++ 2M Karras, DPM++ 2M SDE, "
            "DPM++ SDE, UniPC, LCM, or auto: the model's own, or DPM++ 2M Karras if that is none of these.",
            Panel.SAMPLING,
            ("--scheduler", "--sampling-method"),
            parse=parse_scheduler,
            metavar="NAME",
            default="auto",
        ),
    )
    schedule_type: ScheduleType | None = option(
        None,
        Option(
            "How noise levels are spread over the steps: karras, exponential, beta, sgm_uniform or simple.",
            Panel.SAMPLING, ("--schedule-type",), parse=parse_schedule_type, metavar="NAME", default="the scheduler's",
        ),
    )  # fmt: skip
    guide_image: Path | None = option(
        None, Option("A picture to use as the guide instead of a low-resolution pass.", Panel.SAMPLING, ("--guide",))
    )
    scale: float | None = option(None, shared.SCALE)
    repaint: Path | None = option(None, shared.REPAINT)
    guide: bool = option(True, Option("Start the canvas from pure noise.", Panel.SAMPLING, ("--no-guide",), off=True))
    guide_upscale: GuideUpscale | None = option(
        None,
        Option(
            "How the guide is enlarged to the canvas's size. pixel: decoded, resized, encoded; latent: only its latents are "
            "resized, which is faster and rougher; progressive: through smaller pictures, each the guide of one at most "
            "twice as large, which keeps outlines and takes a third to a half longer.",
            Panel.SAMPLING,
            ("--guide-upscale",),
            default="the model's, mostly pixel",
        ),
    )
    guide_sharpen: int | None = option(None, shared.GUIDE_SHARPEN)
    layout: Layout | None = option(
        None,
        Option(
            "grid: overlapping tiles; shift: tiles side by side, moved at every step except the last: 16 tiles a step instead of "
            "25 at 2048²; jitter: overlapping tiles, moved at every step: 36, and their borders show least.",
            Panel.SAMPLING,
            ("--layout",),
            default="the model's, mostly grid",
        ),
    )
    tile_size: int | None = option(
        None,
        Option("Side of a tile, and of a square guide, in pixels; smaller tiles take less memory.", Panel.SAMPLING,
               ("--tile-size",), metavar="PX", default="the model's own"),
    )  # fmt: skip
    overlap: int | None = option(
        None,
        Option("Least overlap of neighbouring tiles in pixels.", Panel.SAMPLING, ("--overlap",),
               default="a quarter of a tile"),
    )  # fmt: skip
    mask: Mask = option(
        Mask.GAUSSIAN,
        Option(
            "Weight of a tile's prediction over its area: gaussian, quartic or constant.", Panel.SAMPLING, ("--mask",)
        ),
    )
    attention_window: int | None = option(
        None,
        Option(
            "Limit self-attention at the highest resolution to windows of N×N latents, which move at every step.",
            Panel.SAMPLING, ("--attention-window",), metavar="N", default="none",
        ),
    )  # fmt: skip
    tile_conditioning: TileConditioning = option(
        TileConditioning.PLACE,
        Option(
            "What SDXL learns about a tile. place: which crop of the canvas it is; none: the whole picture's size and "
            "no crop, as in A1111.",
            Panel.SAMPLING, ("--tile-conditioning",),
        ),
    )  # fmt: skip

    precision: Precision = option(
        Precision.AUTO,
        Option(
            "Arithmetic of the denoiser. int8 is fastest and reads half the bytes, from a file that is made once in --cache-dir; "
            "bf16 is closer to fp32 and makes no file, but needs bf16 instructions that are fast (see `tiler doctor`); auto is int8, else bf16, if it is "
            "at least 1.3 times as fast as fp32 on this processor for models of that width, else fp32.",
            Panel.MEMORY,
            ("--precision",),
        ),
    )
    cache_dir: Path | None = option(None, shared.RENDER_CACHE_DIR)
    decode: Decode = option(Decode.AUTO, shared.DECODE)
    decode_precision: DecodePrecision = option(DecodePrecision.AUTO, shared.DECODE_PRECISION)
    scratch: Path | None = option(None, shared.SCRATCH)
    scratch_dtype: ScratchDtype = option(ScratchDtype.FP16, shared.SCRATCH_DTYPE)

    output: Path | None = option(None, shared.OUTPUT)
    format: Format | None = option(None, shared.FORMAT)
    quality: int | None = option(None, shared.QUALITY)
    save_latents: Path | None = option(
        None, Option("Also write the final latents (safetensors).", Panel.OUTPUT, ("--save-latents",))
    )
    preview: Path | None = option(None, shared.PREVIEW)
    preview_interval: int = option(1, shared.PREVIEW_INTERVAL)
    metadata: bool = option(True, shared.METADATA)
    force: bool = option(False, shared.FORCE)
    restart: bool = option(False, shared.RESTART)
    keep_job: bool = option(False, shared.KEEP_JOB)
    job_dir: Path | None = option(None, shared.JOB_DIR)

    def __post_init__(self) -> None:
        coerce(self)
        object.__setattr__(self, "loras", read_loras(self.loras))
        if self.seed == -1:  # as on the command line: a random seed
            object.__setattr__(self, "seed", None)
        for flag, side in (("--size", self.size), ("--width", self.width), ("--height", self.height)):
            within(flag, side, PIXEL_STEP, MAX_SIDE, "pixels")
        within("--steps", self.num_inference_steps, 1, MAX_STEPS)
        within("--guidance-scale", self.guidance_scale, 0, 100)
        within("--strength", self.strength, 0, 1)
        within("--seed", self.seed, 0, MAX_SEED)
        within("--dpi", self.dpi, 1, 10_000)
        within("--quality", self.quality, 1, 100)
        within("--guide-sharpen", self.guide_sharpen, 0, MAX_SHARPEN, "percent")
        within("--scale", self.scale, 1, MAX_SCALE)
        within("--preview-interval", self.preview_interval, 1, MAX_STEPS)
        within("--clip-skip", self.clip_skip, 1, MAX_CLIP_SKIP)
        within("--tile-size", self.tile_size, PIXEL_STEP, MAX_SIDE, "pixels")
        within("--attention-window", self.attention_window, 4, MAX_SIDE, "latents")
        if self.overlap is not None and (self.overlap < 0 or self.overlap % PIXEL_STEP):
            raise UsageError(f"--overlap {self.overlap} must be a multiple of {PIXEL_STEP} pixels, 0 or more")
        if self.guidance_interval is not None:
            low, high = self.guidance_interval
            if not 0 <= low < high <= 1:
                raise UsageError(
                    f"--guidance-interval {low}-{high} must be two rising shares of the schedule between 0 and 1, like 0.2-0.8"
                )
        self._check_combinations()
        taken: dict[Path, str] = {}
        preview = None if self.preview == STDOUT else self.preview
        outputs = ("--output", self.output), ("--save-latents", self.save_latents), ("--preview", preview)
        for flag, path in outputs:
            if path is not None and taken.setdefault(path.absolute(), flag) != flag:
                first = taken[path.absolute()]
                raise UsageError(f"{path}: {first} and {flag} name the same file; give another name")
        check_tensors("--save-latents", self.save_latents)
        said = self.prompt, self.negative_prompt, self.canvas_prompt
        texts = (*said, *(t for r in self.regions for t in (r.prompt, r.negative_prompt)))
        for text in texts:
            check_text(text or "")

    def _check_combinations(self) -> None:
        check_decode(self.decode, self.tiny_vae, previews=self.preview is not None)
        self.check_cluster()
        check_format(self.output, self.format)
        if self.output == STDOUT and (self.restart or self.keep_job):
            raise UsageError(
                f"a picture on standard output has no job that could continue; leave out --{'restart' if self.restart else 'keep-job'}"
            )
        if self.prompt_embeds is not None and self.embd_dir is not None:
            raise UsageError("the prompts of --prompt-embeds are encoded already: give --embd-dir to `tiler encode`")
        self._check_sheet()
        check_repaint(self)
        if self.layout is Layout.SHIFT and (self.overlap is not None or self.regions):
            raise UsageError(
                "--layout shift lays tiles side by side, for one prompt; leave out "
                + ("--regions" if self.regions else "--overlap")
            )
        if self.layout is Layout.JITTER and self.regions:
            raise UsageError("--layout jitter moves the tiles of one prompt; leave out --regions")
        if self.guide_image is not None and self.guide_upscale not in (None, GuideUpscale.PIXEL):
            raise UsageError(
                f"--guide-upscale {self.guide_upscale} is for the guide that tiler makes; leave it out with --guide"
            )
        if self.guide_image is not None and not self.guide:
            raise UsageError("--guide does not go with --no-guide; give one of them")

    def _check_sheet(self) -> None:
        check_sheet(self)


@dataclass(frozen=True, kw_only=True)
class ResolvedRequest(RenderRequest):
    """A request without gaps: all values that determine the picture. `negative_prompt` stays None if none was given,
    since some model families distinguish that from an empty one. `bleed_mm` is the width that a PDF marks to be cut off
    at each edge. `preview_vae` is the tiny autoencoder for previews; `tiny_vae` remains only if it decodes the picture.
    Raises UsageError."""

    width: int
    height: int
    bleed_mm: float
    seed: int
    num_inference_steps: int
    guidance_scale: float
    guidance_interval: tuple[float, float]
    strength: float
    scheduler: Scheduler
    layout: Layout
    guide_upscale: GuideUpscale
    guide_sharpen: int
    output: Path
    preview_vae: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for flag, side in (("--width", self.width), ("--height", self.height)):
            within(flag, side, PIXEL_STEP, MAX_SIDE, "pixels")
        for side, wraps in zip((self.height, self.width), self.wrap.axes, strict=True):
            if wraps and side % PIXEL_STEP:
                raise UsageError(
                    f"--wrap {self.wrap} needs sides that are multiples of {PIXEL_STEP}; {side} is none, take "
                    f"{-(-side // PIXEL_STEP) * PIXEL_STEP}"
                )
        if self.prompt is None and not self.regions:
            raise UsageError("there is nothing to draw: give a prompt, or a --regions file with prompts")
        if self.prompt is None and self.canvas_prompt is not None:
            raise UsageError("--canvas-prompt is for the tiles after a guide drawn from the PROMPT; give a PROMPT too")
        for region in self.regions:
            if region.rows[1] > self.height or region.cols[1] > self.width:
                raise UsageError(
                    f"region {region.prompt!r}: rows {list(region.rows)}, cols {list(region.cols)} reach outside the "
                    f"{self.width}×{self.height} canvas; keep rows within 0–{self.height} and cols within 0–{self.width}"
                )

    def _check_sheet(self) -> None:
        pass  # width and height are already those of the sheet

    @property
    def scratch_folder(self) -> Path:
        return self.scratch or self.output.parent
