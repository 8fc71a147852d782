"""Requirements on the UNet and AutoencoderKL of a checkpoint that do not depend on its text encoders; SD and SDXL share
them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tiler.errors import ModelError
from tiler.models import bounds
from tiler.models.kinds import check_inputs
from tiler.models.required import check_factor
from tiler.weights.checkpoint import Checkpoint

Config = Mapping[str, Any]
_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D", "UNetMidBlock2DCrossAttn", None)
_FOREIGN = (
    "class_embed_type", "addition_embed_type", "time_cond_proj_dim", "encoder_hid_dim_type", "dual_cross_attention",
    "center_input_sample", "time_embedding_act_fn", "attention_type", "only_cross_attention", "resnet_time_scale_shift",
    "resnet_skip_time_act", "encoder_hid_dim", "num_class_embeds", "class_embeddings_concat", "cross_attention_norm",
    "mid_block_only_cross_attention", "timestep_post_act", "time_embedding_type",
    "reverse_transformer_layers_per_block",
)  # fmt: skip


def check_channels(checkpoint: Checkpoint, unet: Config, vae: Config) -> None:
    """Check that UNet and VAE fit together and generate pictures from text alone. Raises ModelError."""
    latent, channels = vae.get("latent_channels", 4), unet.get("in_channels", 4)
    others = f"the VAE's have {latent}; these parts do not belong together"
    check_inputs(checkpoint.name, channels, unet.get("out_channels", 4), latent, others)
    check_factor(checkpoint, vae)
    bounds.check_prediction(f"{checkpoint.folder / 'unet'}/config.json", unet)


def check_unet_kind(where: str, unet: Config, supported: str, **own: object) -> None:
    """Refuse options of a UNet that `models/unet.py` does not compute, since a silently wrong picture helps nobody.
    `supported` names the models whose UNets are supported, `own` holds their config values that are refused in other
    families. Raises ModelError."""
    blocks = [*unet.get("down_block_types", []), *unet.get("up_block_types", []), unet.get("mid_block_type")]
    for block in blocks:
        if block not in _BLOCKS:
            raise ModelError(f"{where}: blocks of type {block!r} are not supported; tiler supports {supported}")
    for key in _FOREIGN:
        if unet.get(key) not in (None, False, "default", "positional", own.get(key)):
            raise ModelError(f"{where}: {key} = {unet[key]!r} is not supported; tiler supports {supported}")
