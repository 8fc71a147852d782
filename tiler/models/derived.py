"""Derive the configs of parts that have none from the shapes of their tensors, under diffusers' or transformers' names.
Values that shapes do not determine are in kinds.py."""

from __future__ import annotations

import math
from typing import Any

from tiler.errors import ModelError
from tiler.models.contents import Kind, Shapes, count
from tiler.models.kinds import Encoder, FamilyRow, text_width

Config = dict[str, Any]


def denoiser_config(shapes: Shapes, row: FamilyRow, where: str) -> Config:
    """The config of a denoiser of that family. Raises ModelError, also if a tensor is missing that determines a
    field."""
    derive = {
        Kind.UNET: _unet,
        Kind.SD3: _sd3,
        Kind.FLUX: _flux,
        Kind.PIXART: _pixart,
        Kind.AURAFLOW: _auraflow,
        Kind.HUNYUANDIT: _hunyuandit,
        Kind.LUMINA: _lumina,
    }[row.kind]
    return dict(row.denoiser) | derive(_Known(shapes, where), row)


class _Known(dict[str, tuple[int, ...]]):
    """Shapes by name; a missing name raises ModelError about the file."""

    def __init__(self, shapes: Shapes, where: str) -> None:
        super().__init__(shapes)
        self.where = where

    def __missing__(self, name: str) -> tuple[int, ...]:
        raise ModelError(f"{self.where}: tensor {name!r} (as diffusers calls it) is missing; download the file again")


def _unet(shapes: _Known, row: FamilyRow) -> Config:
    levels = count(shapes, r"down_blocks\.(\d+)\.")
    widths = [shapes[f"down_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(levels)]
    attends = [f"down_blocks.{i}.attentions.0.proj_in.weight" in shapes for i in range(levels)]
    depths = [
        max(1, count(shapes, rf"down_blocks\.{i}\.attentions\.0\.transformer_blocks\.(\d+)\.")) for i in range(levels)
    ]
    found: Config = {
        "_class_name": "UNet2DConditionModel",
        "in_channels": shapes["conv_in.weight"][1],
        "out_channels": shapes["conv_out.weight"][0],
        "block_out_channels": widths,
        "layers_per_block": count(shapes, r"down_blocks\.0\.resnets\.(\d+)\."),
        "down_block_types": ["CrossAttnDownBlock2D" if some else "DownBlock2D" for some in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if some else "UpBlock2D" for some in reversed(attends)],
        "cross_attention_dim": sum(encoder.width for encoder in row.encoders),
        "use_linear_projection": len(shapes["mid_block.attentions.0.proj_in.weight"]) == 2,
    }
    if "attention_head_dim" not in row.denoiser:  # diffusers' name for the number of heads
        found["attention_head_dim"] = [max(1, width // 64) for width in widths]
    if "add_embedding.linear_1.weight" in shapes:
        pooled = row.encoders[-1].width
        numbers = shapes["add_embedding.linear_1.weight"][1] - pooled
        found |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": numbers // 6,
            "projection_class_embeddings_input_dim": numbers + pooled,
            "transformer_layers_per_block": depths,
        }
    _check_depths(shapes, depths, attends)
    return found | {"sample_size": 128 if len(row.encoders) > 1 else 64}


def _check_depths(shapes: _Known, depths: list[int], attends: list[bool]) -> None:
    """Refuse distilled models that leave out some blocks. Raises ModelError."""
    last = len(depths) - 1
    places = [(f"down_blocks.{i}.", depth) for i, depth in enumerate(depths) if attends[i]]
    places += [(f"up_blocks.{last - i}.", depth) for i, depth in enumerate(depths) if attends[i]]
    for place, depth in [*places, ("mid_block.", depths[-1])]:
        for i in range(count(shapes, rf"{place}attentions\.(\d+)\.")):
            if count(shapes, rf"{place}attentions\.{i}\.transformer_blocks\.(\d+)\.") != depth:
                raise ModelError(
                    f"{shapes.where}: the blocks of this UNet differ in depth, as those of distilled models do (SSD-1B, Segmind "
                    "Vega, KOALA), or one is missing; tiler does not read such single files"
                )


def _sd3(shapes: _Known, row: FamilyRow) -> Config:
    width, channels = shapes["pos_embed.proj.weight"][:2]
    text, pooled = shapes["context_embedder.weight"], shapes["time_text_embed.text_embedder.linear_1.weight"]
    twice = sorted({int(name.split(".")[1]) for name in shapes if ".attn2.to_q.weight" in name})
    return {
        "_class_name": "SD3Transformer2DModel",
        "attention_head_dim": 64,
        "num_attention_heads": width // 64,
        "caption_projection_dim": text[0],
        "joint_attention_dim": text[1],
        "pooled_projection_dim": pooled[1],
        "in_channels": channels,
        "out_channels": shapes["proj_out.weight"][0] // 4,
        "patch_size": 2,
        "num_layers": count(shapes, r"transformer_blocks\.(\d+)\."),
        "pos_embed_max_size": math.isqrt(shapes["pos_embed.pos_embed"][-2]),
        "qk_norm": "rms_norm" if "transformer_blocks.0.attn.norm_q.weight" in shapes else None,
        "dual_attention_layers": twice,
    }


def _flux(shapes: _Known, row: FamilyRow) -> Config:
    width, channels = shapes["x_embedder.weight"]
    return {
        "_class_name": "FluxTransformer2DModel",
        "attention_head_dim": 128,
        "num_attention_heads": width // 128,
        "in_channels": channels,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        "patch_size": 1,
        "num_layers": count(shapes, r"transformer_blocks\.(\d+)\."),
        "num_single_layers": count(shapes, r"single_transformer_blocks\.(\d+)\."),
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in shapes,
    }


def _pixart(shapes: _Known, row: FamilyRow) -> Config:
    width, channels = shapes["pos_embed.proj.weight"][:2]
    found: Config = {
        "_class_name": "PixArtTransformer2DModel",
        "attention_head_dim": 72,
        "num_attention_heads": width // 72,
        "cross_attention_dim": width,
        "in_channels": channels,
        "out_channels": shapes["proj_out.weight"][0] // 4,
        "num_layers": count(shapes, r"transformer_blocks\.(\d+)\."),
        "patch_size": 2,
        "norm_type": "ada_norm_single",
        "caption_channels": shapes["caption_projection.linear_1.weight"][1],
        "sample_size": 128,
        "use_additional_conditions": "adaln_single.emb.resolution_embedder.linear_1.weight" in shapes,
    }
    if "pos_embed.pos_embed" in shapes:
        found["sample_size"] = 2 * math.isqrt(shapes["pos_embed.pos_embed"][-2])
    return found


def _auraflow(shapes: _Known, row: FamilyRow) -> Config:
    width, (text, given) = shapes["pos_embed.proj.weight"], shapes["context_embedder.weight"]
    channels = width[1] // 4
    return {
        "_class_name": "AuraFlowTransformer2DModel",
        "attention_head_dim": 256,
        "num_attention_heads": max(1, text // 256),
        "caption_projection_dim": text,
        "joint_attention_dim": given,
        "in_channels": channels,
        "out_channels": shapes["proj_out.weight"][0] // 4,
        "patch_size": 2,
        "num_mmdit_layers": count(shapes, r"joint_transformer_blocks\.(\d+)\."),
        "num_single_dit_layers": count(shapes, r"single_transformer_blocks\.(\d+)\."),
        "pos_embed_max_size": shapes["pos_embed.pos_embed"][-2],
    }


def _hunyuandit(shapes: _Known, row: FamilyRow) -> Config:
    """What differs between versions; the rest is the folder's."""
    return {
        "num_layers": count(shapes, r"blocks\.(\d+)\."),
        "use_style_cond_and_image_meta_size": "time_extra_emb.style_embedder.weight" in shapes,
    }


def _lumina(shapes: _Known, row: FamilyRow) -> Config:
    return {"num_layers": count(shapes, r"layers\.(\d+)\.")}


def vae_config(shapes: Shapes, row: FamilyRow, where: str) -> Config:
    """The config of an AutoencoderKL for that family, which must be given because files of SD 1.x and SDXL have the
    same shapes. Raises ModelError."""
    known = _Known(shapes, where)
    levels = count(shapes, r"encoder\.down_blocks\.(\d+)\.")
    if not levels:
        raise ModelError(f"{where}: the autoencoder has no encoder; tiler needs both halves")
    channels = known["decoder.conv_in.weight"][1]
    if channels != row.channels:
        raise ModelError(
            f"{where}: the autoencoder's latents have {channels} channels, those of {row.title} "
            f"{row.channels}; give another --vae"
        )
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": channels,
        "block_out_channels": [known[f"encoder.down_blocks.{i}.resnets.0.conv2.weight"][0] for i in range(levels)],
        "layers_per_block": count(shapes, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "scaling_factor": row.scaling_factor,
        "shift_factor": row.shift_factor,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


def tiny_config(shapes: Shapes, where: str) -> Config:
    """The config of an AutoencoderTiny, derived from its decoder. Raises ModelError."""
    width, channels = _Known(shapes, where)["decoder.layers.0.weight"][:2]
    widths = [width] * 4
    return {
        "_class_name": "AutoencoderTiny",
        "latent_channels": channels,
        "decoder_block_out_channels": widths,
        "encoder_block_out_channels": widths,
    }


def text_config(shapes: Shapes, encoder: Encoder, where: str) -> Config:
    """The config of a text encoder. Raises ModelError."""
    return _clip(_Known(shapes, where), encoder) if encoder.kind is Kind.CLIP else _t5(_Known(shapes, where))


def _clip(shapes: _Known, encoder: Encoder) -> Config:
    rows, width = shapes["embeddings.token_embedding.weight"]
    layers = count(shapes, r"encoder\.layers\.(\d+)\.")
    projected = shapes["text_projection.weight"][0] if "text_projection.weight" in shapes else None
    return {
        "model_type": "clip_text_model",
        "hidden_size": width,
        "vocab_size": rows,
        "max_position_embeddings": 77,
        "intermediate_size": shapes["encoder.layers.0.mlp.fc1.weight"][0],
        "hidden_act": encoder.hidden_act,
        "num_hidden_layers": min(layers, encoder.layers or layers),
        "num_attention_heads": max(1, width // 64),
        # Without a projection the pooled vector stays as it is.
        "architectures": ["CLIPTextModel" if projected is None else "CLIPTextModelWithProjection"],
        "projection_dim": projected or width,
        "eos_token_id": 49407,
    }


def _t5(shapes: _Known) -> Config:
    layers = count(shapes, r"encoder\.block\.(\d+)\.")
    block = "encoder.block.0.layer.0.SelfAttention."
    buckets, heads = shapes[f"{block}relative_attention_bias.weight"]
    inner, width = shapes[f"{block}q.weight"]
    own = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight" in shapes  # each block's: UMT5
    return {
        "model_type": "umt5" if own else "t5",
        "d_model": text_width(shapes) or width,
        "d_kv": inner // heads,
        "d_ff": shapes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0],
        "num_heads": heads,
        "num_layers": layers,
        "vocab_size": (shapes["shared.weight"] if "shared.weight" in shapes else shapes["encoder.embed_tokens.weight"])[
            0
        ],
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": 128,
        "dropout_rate": 0.0,
        "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": 1e-6,
        "is_encoder_decoder": False,
        "use_cache": False,
        "tie_word_embeddings": False,
    }
