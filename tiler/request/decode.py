"""Requests of the smaller commands: encode prompts, decode saved latents, quantise a model ahead of its first render."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tiler.errors import UsageError
from tiler.request import shared
from tiler.request.choices import Decode, ScratchDtype, Wrap, check_decode, check_text, within
from tiler.request.options import Option, Panel, argument, coerce, option


@dataclass(frozen=True, kw_only=True)
class DecodeRequest:
    """Decode saved latents into a picture with a model's autoencoder. Raises UsageError.

    `latents` is a safetensors file with a tensor `latents`, (1, C, height/8, width/8), scaled as the scheduler left it.
    """

    latents: Path = argument(
        Option(
            "safetensors file with a tensor `latents`, [1, C, height/8, width/8], scaled.",
            Panel.PICTURE,
            (),
            metavar="LATENTS",
        )
    )
    output: Path | None = option(None, shared.OUTPUT)
    model: str = option("mini", shared.MODEL)
    variant: str | None = option(None, shared.VARIANT)
    revision: str | None = option(None, shared.REVISION)
    wrap: Wrap = option(Wrap.NONE, shared.WRAP)
    dpi: float | None = option(None, shared.DPI._replace(default=None))
    decode: Decode = option(Decode.AUTO, shared.DECODE)
    scratch: Path | None = option(None, shared.SCRATCH)
    scratch_dtype: ScratchDtype = option(ScratchDtype.FP16, shared.SCRATCH_DTYPE)
    tiny_vae: str | None = option(None, shared.TINY_VAE)
    force: bool = option(False, shared.FORCE)

    def __post_init__(self) -> None:
        coerce(self)
        check_decode(self.decode, self.tiny_vae)
        within("dpi", self.dpi, 1, 10_000)


@dataclass(frozen=True, kw_only=True)
class EncodeRequest:
    """Encode prompts into a file for `render --prompt-embeds`. Raises UsageError.

    The file also holds the negative prompt that was not given, so that any of the prompts can be drawn without one.
    """

    prompts: tuple[str, ...] = argument(
        Option("What to draw; several prompts make one file.", Panel.PICTURE, (), metavar="PROMPT")
    )
    negative_prompts: tuple[str, ...] = option(
        (), Option("What not to draw; may be given several times.", Panel.PICTURE, ("--negative-prompt", "-n"))
    )
    model: str = option("mini", shared.MODEL)
    variant: str | None = option(None, shared.VARIANT)
    revision: str | None = option(None, shared.REVISION)
    cache_dir: Path | None = option(None, shared.RENDER_CACHE_DIR)
    output: Path | None = option(
        None, Option("The file to write.", Panel.OUTPUT, ("--output", "-o"), default="words.safetensors")
    )
    force: bool = option(False, shared.FORCE)

    def __post_init__(self) -> None:
        coerce(self)
        for text in (*self.prompts, *self.negative_prompts):
            check_text(text)
        if not self.prompts:
            raise UsageError("there is nothing to encode: give one or more prompts")


@dataclass(frozen=True, kw_only=True)
class QuantizeRequest:
    """Write a model's int8 weights into `cache_dir` (None: the user's cache folder) ahead of its first render."""

    model: str = argument(shared.MODEL._replace(names=(), metavar="MODEL"))
    variant: str | None = option(None, shared.VARIANT)
    revision: str | None = option(None, shared.REVISION)
    cache_dir: Path | None = option(
        None, shared.CACHE_DIR._replace(names=("--output", "-o", "--cache-dir"), panel=Panel.OUTPUT)
    )

    def __post_init__(self) -> None:
        coerce(self)
