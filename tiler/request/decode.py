"""Requests of the smaller commands: encode prompts, decode saved latents, quantise a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tiler.errors import UsageError
from tiler.request import shared
from tiler.request.choices import (
    MAX_CLIP_SKIP,
    Decode,
    DecodePrecision,
    Emphasis,
    Format,
    ScratchDtype,
    Weights,
    Wrap,
    check_decode,
    check_format,
    check_tensors,
    check_text,
    within,
)
from tiler.request.loras import Lora, read_loras
from tiler.request.model import ModelOptions
from tiler.request.options import Option, Panel, argument, coerce, option


@dataclass(frozen=True, kw_only=True)
class DecodeRequest(ModelOptions):
    """Decode saved latents into a picture with a model's autoencoder. `latents` is a safetensors file with a tensor
    `latents`, (1, C, height/8, width/8), scaled as the scheduler left it. Raises UsageError."""

    latents: Path = argument(
        Option(
            "safetensors file with a tensor `latents`, [1, C, height/8, width/8], scaled.",
            Panel.PICTURE,
            (),
            metavar="LATENTS",
        )
    )
    output: Path | None = option(None, shared.OUTPUT)
    format: Format | None = option(None, shared.FORMAT)
    quality: int | None = option(None, shared.QUALITY)
    wrap: Wrap = option(Wrap.NONE, shared.WRAP)
    dpi: float | None = option(None, shared.DPI._replace(default=None))
    decode: Decode = option(Decode.AUTO, shared.DECODE)
    decode_precision: DecodePrecision = option(
        DecodePrecision.AUTO,
        shared.DECODE_PRECISION._replace(
            help=shared.DECODE_PRECISION.help.split("; auto")[0]
            + "; auto is the precision of the render that saved the latents, or fp32 if they do not name one."
        ),
    )
    scratch: Path | None = option(None, shared.SCRATCH)
    scratch_dtype: ScratchDtype = option(ScratchDtype.FP16, shared.SCRATCH_DTYPE)
    tiny_vae: str | None = option(None, shared.TINY_VAE)
    force: bool = option(False, shared.FORCE)

    def __post_init__(self) -> None:
        coerce(self)
        check_decode(self.decode, self.tiny_vae)
        check_format(self.output, self.format)
        within("--dpi", self.dpi, 1, 10_000)
        within("--quality", self.quality, 1, 100)


@dataclass(frozen=True, kw_only=True)
class EncodeRequest(ModelOptions):
    """Encode prompts into a file for `render --prompt-embeds`. The file also holds the encoding for an absent negative
    prompt, so that each prompt can be rendered without one. Raises UsageError."""

    prompts: tuple[str, ...] = argument(
        Option("What to draw; several prompts make one file.", Panel.PICTURE, (), metavar="PROMPT")
    )
    negative_prompts: tuple[str, ...] = option(
        (), Option("What not to draw; may be given several times.", Panel.PICTURE, ("--negative-prompt", "-n"))
    )
    emphasis: Emphasis = option(Emphasis.ORIGINAL, shared.EMPHASIS)
    embd_dir: Path | None = option(None, shared.EMBD_DIR)
    loras: tuple[Lora, ...] = option((), shared.LORA)
    lora_dir: Path | None = option(None, shared.LORA_DIR)
    clip_skip: int | None = option(None, shared.CLIP_SKIP)
    cache_dir: Path | None = option(None, shared.RENDER_CACHE_DIR)
    output: Path | None = option(
        None, Option("The file to write.", Panel.OUTPUT, ("--output", "-o"), default="words.safetensors")
    )
    force: bool = option(False, shared.FORCE)

    def __post_init__(self) -> None:
        coerce(self)
        object.__setattr__(self, "loras", read_loras(self.loras))
        within("--clip-skip", self.clip_skip, 1, MAX_CLIP_SKIP)
        check_tensors("--output", self.output)
        for text in (*self.prompts, *self.negative_prompts):
            check_text(text)
        if not self.prompts:
            raise UsageError("there is nothing to encode: give one or more prompts")


@dataclass(frozen=True, kw_only=True)
class QuantizeRequest(ModelOptions):
    """Write a copy of a model with fewer bits per weight into the folder `output`. Without `weights`, write its int8
    weights into `cache_dir` (None: the user's cache folder) ahead of its first render. Raises UsageError."""

    model: str = argument(shared.MODEL._replace(names=(), metavar="MODEL"))
    weights: Weights | None = option(
        None,
        Option(
            "Write a folder for --model with the denoiser's weights in this format, in optimum-quanto's layout; the "
            "autoencoder stays as it is, and so do embedders, norms and the last projection.",
            Panel.MODEL, ("--weights",), metavar="int8|fp8|int4", default="fill the cache of int8 weights",
        ),
    )  # fmt: skip
    text_encoder_weights: str | None = option(
        None,
        Option(
            "Also the text encoders': int8, fp8 or int4 for all that tolerate it, or by number, like 1=int8,3=int4.",
            Panel.MODEL, ("--text-encoder-weights",), default="as they are stored",
        ),
    )  # fmt: skip
    exclude: str | None = option(
        None,
        Option(
            "Layers that stay as they are stored: patterns separated by commas, like '*.to_k,*.to_v'.",
            Panel.MODEL, ("--exclude",), metavar="PATTERNS",
        ),
    )  # fmt: skip
    output: Path | None = option(
        None, Option("The folder to write with --weights.", Panel.OUTPUT, ("--output", "-o"), metavar="FOLDER")
    )
    force: bool = option(False, shared.FORCE._replace(help="Replace the model in that folder."))
    cache_dir: Path | None = option(None, shared.CACHE_DIR._replace(panel=Panel.OUTPUT))

    def __post_init__(self) -> None:
        coerce(self)
        if self.weights is None and (self.output is not None or self.text_encoder_weights or self.exclude):
            raise UsageError(
                "--output, --text-encoder-weights and --exclude belong to --weights int8, fp8 or int4; the folder of int8 "
                "weights for renders is --cache-dir"
            )
        if self.weights is not None and self.output is None:
            raise UsageError("--weights writes a folder; name it with --output")
        _ = self.encoder_weights

    @property
    def encoder_weights(self) -> dict[int, Weights]:
        """The weight formats by number of the text encoder, from 1; 0 stands for all others. Raises UsageError."""
        found: dict[int, Weights] = {}
        for word in (self.text_encoder_weights or "").split(",") if self.text_encoder_weights else ():
            number, _, kind = word.strip().rpartition("=")
            if kind not in list(Weights) or not (number == "" or (number.isdecimal() and int(number) > 0)):
                raise UsageError(f"--text-encoder-weights: {word.strip()!r} is neither int8, fp8, int4 nor like 1=int8")
            found[int(number or 0)] = Weights(kind)
        return found

    @property
    def exclusions(self) -> tuple[str, ...]:
        return tuple(pattern for word in (self.exclude or "").split(",") if (pattern := word.strip()))


@dataclass(frozen=True, kw_only=True)
class DoctorRequest(ModelOptions):
    """Examine a model, or only the machine if no model is given."""

    model: str = option("", shared.MODEL._replace(default="the machine alone is looked at"))

    def __post_init__(self) -> None:
        coerce(self)
