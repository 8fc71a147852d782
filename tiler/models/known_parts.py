"""Find parts that a model lacks in the user's folders. A part is used if exactly one file fits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tiler.errors import ModelError
from tiler.models.contents import Kind, look
from tiler.models.kinds import Encoder, FamilyRow, text_width
from tiler.weights.flavours import names_in
from tiler.weights.folders import WEIGHTS, model_files
from tiler.weights.headers import shapes_of
from tiler.weights.places import hub_cache

_T5_FILES = "spiece.model", "tokenizer.json"


class KnownPart(NamedTuple):
    """A file with a single part; `width` is the number of latent channels of an autoencoder, or the width of a text
    encoder's states."""

    path: Path
    kind: Kind
    width: int | None


def known_parts(given: Sequence[Path] = ()) -> list[KnownPart]:
    """The files in the user's folders, or in those `given`, that contain only an autoencoder or a text encoder. Reads
    every header once."""
    found = []
    for path in model_files(given):
        if path.suffix not in WEIGHTS:
            continue
        try:
            parts = look(shapes_of(path), str(path)).parts
        except ModelError:
            continue
        if len(parts) == 1 and parts[0].kind in (Kind.VAE, Kind.CLIP, Kind.T5):
            part, name = parts[0], "decoder.conv_in.weight"
            is_vae = part.kind is Kind.VAE
            width = part.shapes.get(name, (0, 0))[1] if is_vae else text_width(part.shapes)
            found.append(KnownPart(path, part.kind, width))
    return found


def find_vae(known: Sequence[KnownPart], row: FamilyRow, model: str) -> Path:
    """The only file with an autoencoder for that family. Raises ModelError if there are none or several. SDXL's
    autoencoder has the shapes of Stable Diffusion's but another scale, so its name must identify it, as all published
    names do."""

    def fits(part: KnownPart) -> bool:
        if part.kind is not Kind.VAE or part.width != row.channels:
            return False
        xl = any(word in part.path.name.lower() for word in ("xl", "sigma", "aura"))
        return row.channels != 4 or xl is (row.scaling_factor != 0.18215)

    found = [part.path for part in known if fits(part)]
    if len(found) != 1:
        raise _missing(model, "autoencoder", "--vae", f"hf download {row.others} --include 'vae/*'", found)
    return found[0]


def find_encoder(known: Sequence[KnownPart], encoder: Encoder, row: FamilyRow, model: str, part: str) -> Path | None:
    """The only file with that text encoder; None if an optional one is missing. Raises ModelError."""
    found = [other.path for other in known if (other.kind, other.width) == (encoder.kind, encoder.width)]
    if not found and encoder.optional:
        return None
    if len(found) != 1:
        command = f"hf download {row.others} --include '{part}/*'"
        raise _missing(model, f"text encoder {encoder.title}", encoder.flag, command, found)
    return found[0]


def _missing(model: str, what: str, flag: str, command: str, found: Sequence[Path]) -> ModelError:
    if found:
        listed = ", ".join(map(str, found))
        return ModelError(
            f"{model}: this file has no {what}, and several files would fit; choose one with {flag}: {listed}"
        )
    return ModelError(f"{model}: this file has no {what}; give {flag} FILE or FOLDER (run: {command})")


def t5_tokenizer(path: Path, row: FamilyRow) -> Path:
    """A folder with the tokenizer of the T5 encoder in the file `path`, from the hub's cache. Raises ModelError, naming
    the file that is missing."""
    own = row.encoders[-1].title.startswith("Pile")
    repositories = (row.others,) if own else (row.others, *_T5_REPOSITORIES)
    for repository in repositories:
        for folder in sorted((hub_cache() / f"models--{repository.replace('/', '--')}" / "snapshots").glob("*")):
            for inner in ("tokenizer_3", "tokenizer_2", "tokenizer", "."):
                names = names_in(folder / inner)
                if any(name in names for name in _T5_FILES) and "merges.txt" not in names:
                    return folder / inner
    if own:
        command = f"hf download {row.others} --include 'tokenizer/*', then put tokenizer.json there"
    else:
        command = f"hf download google/t5-v1_1-xxl spiece.model --local-dir {path.parent}"
    raise ModelError(
        f"{path}: its tokenizer is not beside it: {path.parent / _T5_FILES[own]} is missing; run: {command}"
    )


_T5_REPOSITORIES = (
    "google/t5-v1_1-xxl", "black-forest-labs/FLUX.1-schnell", "black-forest-labs/FLUX.1-dev",
    "stabilityai/stable-diffusion-3.5-medium", "stabilityai/stable-diffusion-3.5-large",
    "stabilityai/stable-diffusion-3-medium-diffusers", "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers",
    "PixArt-alpha/PixArt-XL-2-1024-MS",
)  # fmt: skip
