"""Requests of the smaller commands: decode saved latents, quantise a model ahead of its first render."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tiler.request import shared
from tiler.request.choices import Decode, ScratchDtype, Wrap, check_decode, within
from tiler.request.model import ModelOptions
from tiler.request.options import Option, Panel, argument, coerce, option


@dataclass(frozen=True, kw_only=True)
class DecodeRequest(ModelOptions):
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
class QuantizeRequest(ModelOptions):
    """Write a model's int8 weights into `cache_dir` (None: the user's cache folder) ahead of its first render."""

    model: str = argument(shared.MODEL._replace(names=(), metavar="MODEL"))
    cache_dir: Path | None = option(
        None, shared.CACHE_DIR._replace(names=("--output", "-o", "--cache-dir"), panel=Panel.OUTPUT)
    )

    def __post_init__(self) -> None:
        coerce(self)


@dataclass(frozen=True, kw_only=True)
class DoctorRequest(ModelOptions):
    """Look into a model; without one, at the machine alone."""

    model: str = option("", shared.MODEL._replace(default="the machine alone is looked at"))

    def __post_init__(self) -> None:
        coerce(self)
