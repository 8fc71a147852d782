"""AutoencoderTiny (TAESD): checked against the family whose latents it decodes."""

from __future__ import annotations

from tiler.errors import ModelError
from tiler.models import bounds
from tiler.models.family import Family, VaeSpec
from tiler.weights.checkpoint import Checkpoint, resolve_part
from tiler.weights.places import expand


def open_tiny(given: str, family: Family) -> VaeSpec:
    """Open an AutoencoderTiny for `family` from a file, a folder or a hub id. Raises ModelError, OfflineError,
    StorageError."""
    if not expand(given).is_file():
        return read_tiny(resolve_part(given), family)
    from tiler.models.single_file import tiny_of_file

    return read_tiny(tiny_of_file(expand(given)), family)


def read_tiny(checkpoint: Checkpoint, family: Family) -> VaeSpec:
    """Read an AutoencoderTiny in TAESD's layout for `family`. Raises ModelError."""
    config, where = checkpoint.config(""), str(checkpoint.file or f"{checkpoint.folder}/config.json")
    if config.get("_class_name") != "AutoencoderTiny":
        raise ModelError(f"{where}: the class is {config.get('_class_name')!r}; --tiny-vae takes an AutoencoderTiny")
    wanted = {
        "latent_channels": (family.latent_channels, 4),
        "act_fn": ("relu", "relu"),
        "upsample_fn": ("nearest", "nearest"),
        "upsampling_scaling_factor": (2, 2),
    }
    for key, (want, default) in wanted.items():
        if config.get(key, default) != want:
            raise ModelError(
                f"{where}: {key} = {config.get(key)!r}, {family.checkpoint.name} needs {want!r}; use another --tiny-vae"
            )
    bounds.check_tiny(where, config)
    return VaeSpec(checkpoint=checkpoint, part="", config=config, tiny=True)
