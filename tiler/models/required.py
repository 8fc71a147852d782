"""Check that a checkpoint's folder has the parts that its pipeline needs and that they fit together; say how to get
missing ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tiler.decoding import FACTOR
from tiler.errors import ModelError
from tiler.weights.checkpoint import Checkpoint
from tiler.weights.flavours import COPY


def check_parts(checkpoint: Checkpoint, repository: str, parts: Iterable[str]) -> None:
    """Raise ModelError for the first of these models without a config.json, with the command that fetches it;
    `repository` has it if the checkpoint did not come from the hub."""
    for part in parts:
        if part not in checkpoint.sources and not (checkpoint.folder / part / "config.json").is_file():
            raise ModelError(
                f"{checkpoint.folder / part}/config.json is missing; {fetch_part(checkpoint, repository, part)}"
            )


def read_scheduler(checkpoint: Checkpoint, repository: str) -> dict[str, Any]:
    """The scheduler's config. Raises ModelError, with the command that fetches one that is missing."""
    path = checkpoint.folder / "scheduler" / "scheduler_config.json"
    if "scheduler" not in checkpoint.sources and not path.is_file():
        raise ModelError(f"{path} is missing; {fetch_part(checkpoint, repository, 'scheduler')}")
    return checkpoint.config("scheduler", path.name)


def text_encoders(checkpoint: Checkpoint, parts: Sequence[str]) -> Sequence[str]:
    """The text encoders that a run uses: all of them, or none if they are not needed and not all are present."""
    needed = checkpoint.reads_text or all(checkpoint.has_weights(part) for part in parts)
    return parts if needed else ()


def fetch_part(checkpoint: Checkpoint, repository: str, *parts: str) -> str:
    """How to get missing parts; without a `repository`, none is known that has the right ones."""
    if checkpoint.file is not None:
        return "give a file or folder with it by its flag (--t5xxl, --clip_l, --clip_g, --text-encoder, --vae)"
    if not (checkpoint.repository or repository):
        return COPY
    place = "" if checkpoint.repository else f" --local-dir {checkpoint.folder}"
    revision = f" --revision {checkpoint.revision}" if checkpoint.revision else ""
    patterns = " ".join(f"--include '{part}/*'" for part in parts)
    return f"run: hf download {checkpoint.repository or repository} {patterns}{revision}{place}"


def check_latents(checkpoint: Checkpoint, transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> None:
    """Check that transformer and VAE fit together and generate pictures from text alone. Raises ModelError."""
    latent, taken = vae.get("latent_channels", 4), transformer["in_channels"]
    given = taken if (out := transformer.get("out_channels")) is None else out
    if taken != latent or given != latent:
        raise ModelError(
            f"{checkpoint.name}: the transformer takes {taken} channels and gives {given}, the VAE's latents have {latent}; "
            "tiler needs a text-to-image model whose parts belong together"
        )
    check_factor(checkpoint, vae)


def check_factor(checkpoint: Checkpoint, vae: Mapping[str, Any]) -> None:
    """Check that a latent covers as many pixels as tiler's decoder expects. Raises ModelError."""
    if (factor := 2 ** (len(vae["block_out_channels"]) - 1)) != FACTOR:
        raise ModelError(f"{checkpoint.name}: the VAE's factor is {factor}; tiler supports {FACTOR}")
