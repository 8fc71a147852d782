"""The options that select a model, and the files that replace its parts. Every command that opens a model has them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from tiler.errors import UsageError
from tiler.request import shared
from tiler.request.options import Option, Panel, option


class Prediction(StrEnum):
    """The prediction of a UNet: the noise, or the velocity v (Salimans and Ho 2022, arXiv:2202.00512)."""

    EPSILON = "epsilon"
    V = "v"


_PREDICTIONS = {
    "eps": Prediction.EPSILON, "epsilon": Prediction.EPSILON, "v": Prediction.V, "v_prediction": Prediction.V,
    "v-prediction": Prediction.V,
}  # fmt: skip


def parse_prediction(text: str) -> Prediction:
    """Parse `epsilon`, `v`, or another common name for either. Raises UsageError."""
    if (found := _PREDICTIONS.get(text.strip().lower())) is None:
        raise UsageError(f"--prediction {text!r} is neither epsilon nor v")
    return found


def parse_folders(text: str) -> tuple[Path, ...]:
    """Split a list of folders at colons (semicolons on Windows)."""
    return tuple(Path(part).expanduser() for part in text.split(os.pathsep) if part)


_TEXT = "A file or folder with {}."


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """A model by name, and files that replace its parts. `variant` and `revision` choose among the files of a folder or
    repository; names are looked up in `model_dirs`. Raises UsageError."""

    model: str = option("mini", shared.MODEL)
    variant: str | None = option(None, shared.VARIANT)
    revision: str | None = option(None, shared.REVISION)
    diffusion_model: str | None = option(
        None,
        Option(
            "A file with only a denoiser, as most files of Flux are; the other parts come from --model if given, the "
            "flags below, or the folders of --model-dir.",
            Panel.MODEL, ("--diffusion-model",), metavar="FILE",
        ),
    )  # fmt: skip
    vae: str | None = option(
        None,
        Option(
            "A file or folder with an autoencoder that replaces the model's own.",
            Panel.MODEL,
            ("--vae",),
            metavar="PATH",
        ),
    )
    text_encoder: str | None = option(
        None,
        Option(
            "A file or folder with a text encoder; its width decides which one it replaces.",
            Panel.MODEL,
            ("--text-encoder",),
            metavar="PATH",
        ),
    )
    clip_l: str | None = option(
        None, Option(_TEXT.format("CLIP-L"), Panel.MODEL, ("--clip_l", "--clip-l"), metavar="PATH")
    )
    clip_g: str | None = option(
        None, Option(_TEXT.format("OpenCLIP-bigG"), Panel.MODEL, ("--clip_g", "--clip-g"), metavar="PATH")
    )
    t5xxl: str | None = option(None, Option(_TEXT.format("T5"), Panel.MODEL, ("--t5xxl",), metavar="PATH"))
    prediction: Prediction | None = option(
        None,
        Option(
            "What the UNet predicts, epsilon or v, if the model's files are silent or wrong.",
            Panel.MODEL, ("--prediction",), parse=parse_prediction, metavar="epsilon|v", default="as the model says",
        ),
    )  # fmt: skip
    model_dirs: tuple[Path, ...] = option(
        (),
        Option(
            "Folders in which models are found by name, separated by colons; for AUTOMATIC1111 or ComfyUI, its root "
            "folder is enough.",
            Panel.MODEL, ("--model-dir",), parse=parse_folders, metavar="PATHS",
            default="model_dirs of `tiler config`, $TILER_MODEL_DIRS",
        ),
    )  # fmt: skip

    def replaced(self) -> dict[str, str]:
        """The files given for single parts, by their flags."""
        given = {
            "--vae": self.vae, "--text-encoder": self.text_encoder, "--clip_l": self.clip_l, "--clip_g": self.clip_g,
            "--t5xxl": self.t5xxl,
        }  # fmt: skip
        return {flag: value for flag, value in given.items() if value is not None}
