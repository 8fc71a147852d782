"""SDXL's layout: two CLIPs with their tokenizers, a UNet with text and size conditioning, and a VAE of factor 8.

tiny: 128-px tiles, a few channels. plain: small, but all that shapes do not say is as published. wide: full width, one
transformer block where SDXL has up to ten, two layers in each text encoder: 1.8 GB. full: the base model's configs,
2.567 B parameters in the UNet: 7 GB.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from checkpoints._random import on_meta, write_random
from make_checkpoint import clip_tokenizer, write_json

UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.19.0.dev0", "act_fn": "silu",
    "addition_embed_type": "text_time", "addition_embed_type_num_heads": 64, "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20], "block_out_channels": [320, 640, 1280], "center_input_sample": False,
    "class_embed_type": None, "class_embeddings_concat": False, "conv_in_kernel": 3, "conv_out_kernel": 3,
    "cross_attention_dim": 2048, "cross_attention_norm": None,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"], "downsample_padding": 1,
    "dual_cross_attention": False, "encoder_hid_dim": None, "encoder_hid_dim_type": None, "flip_sin_to_cos": True,
    "freq_shift": 0, "in_channels": 4, "layers_per_block": 2, "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1, "mid_block_type": "UNetMidBlock2DCrossAttn", "norm_eps": 1e-05, "norm_num_groups": 32,
    "num_attention_heads": None, "num_class_embeds": None, "only_cross_attention": False, "out_channels": 4,
    "projection_class_embeddings_input_dim": 2816, "resnet_out_scale_factor": 1.0, "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default", "sample_size": 128, "time_cond_proj_dim": None, "time_embedding_act_fn": None,
    "time_embedding_dim": None, "time_embedding_type": "positional", "timestep_post_act": None,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "upcast_attention": None,
    "use_linear_projection": True,
}  # fmt: skip
VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL", "_diffusers_version": "0.20.0.dev0", "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4, "force_upcast": True,
    "in_channels": 3, "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32, "out_channels": 3,
    "sample_size": 1024, "scaling_factor": 0.13025, "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
CLIP_L: dict[str, Any] = {
    "architectures": ["CLIPTextModel"], "attention_dropout": 0.0, "bos_token_id": 0, "dropout": 0.0, "eos_token_id": 2,
    "hidden_act": "quick_gelu", "hidden_size": 768, "initializer_factor": 1.0, "initializer_range": 0.02,
    "intermediate_size": 3072, "layer_norm_eps": 1e-05, "max_position_embeddings": 77, "model_type": "clip_text_model",
    "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 1, "projection_dim": 768,
    "torch_dtype": "float16", "vocab_size": 49408,
}  # fmt: skip
BIG_G: dict[str, Any] = CLIP_L | {
    "architectures": ["CLIPTextModelWithProjection"], "hidden_act": "gelu", "hidden_size": 1280,
    "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32, "projection_dim": 1280,
}  # fmt: skip
SCHEDULER: dict[str, Any] = {
    "_class_name": "EulerDiscreteScheduler", "_diffusers_version": "0.19.0.dev0", "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": False, "interpolation_type": "linear",
    "num_train_timesteps": 1000, "prediction_type": "epsilon", "sample_max_value": 1.0, "set_alpha_to_one": False,
    "skip_prk_steps": True, "steps_offset": 1, "timestep_spacing": "leading", "trained_betas": None,
    "use_karras_sigmas": False,
}  # fmt: skip
INDEX: dict[str, Any] = {
    "_class_name": "StableDiffusionXLPipeline", "_diffusers_version": "0.19.0.dev0",
    "force_zeros_for_empty_prompt": True, "add_watermarker": None,
    "scheduler": ["diffusers", "EulerDiscreteScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"], "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}  # fmt: skip


def configs(size: str) -> dict[str, dict[str, Any]]:
    """The config of every part that has weights."""
    parts = {"unet": UNET, "vae": VAE, "text_encoder": CLIP_L, "text_encoder_2": BIG_G}
    changes: dict[str, dict[str, Any]] = {}
    if size == "wide":
        changes = {"unet": {"transformer_layers_per_block": 1}}
        changes |= {part: {"num_hidden_layers": 2} for part in ("text_encoder", "text_encoder_2")}
    if size == "tiny":
        text = {"num_attention_heads": 2, "num_hidden_layers": 3, "intermediate_size": 64, "vocab_size": 5000}
        changes = {
            "unet": {
                "block_out_channels": [16, 32, 32], "norm_num_groups": 8, "attention_head_dim": [2, 2, 4],
                "transformer_layers_per_block": [1, 1, 2], "cross_attention_dim": 80, "sample_size": 16,
                "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 24,
            },
            "vae": {
                "block_out_channels": [8, 16, 16, 16], "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 128,
            },
            "text_encoder": text | {"hidden_size": 32, "projection_dim": 32},
            "text_encoder_2": text | {"hidden_size": 48, "projection_dim": 24},
        }  # fmt: skip
    if size == "plain":
        text = {"num_hidden_layers": 3, "intermediate_size": 64}
        changes = {
            "unet": {
                "block_out_channels": [32, 64, 64], "attention_head_dim": [1, 1, 1],
                "transformer_layers_per_block": [1, 1, 2],
            },
            "vae": {"block_out_channels": [32] * 4, "layers_per_block": 1},
            "text_encoder": text,
            "text_encoder_2": text,
        }  # fmt: skip
    return {part: config | changes.get(part, {}) for part, config in parts.items()}


def write(folder: Path, size: str) -> None:
    """A checkpoint in diffusers layout."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    parts = configs(size)
    write_json(folder / "model_index.json", INDEX)
    write_json(folder / "scheduler/scheduler_config.json", SCHEDULER)
    for part, config in parts.items():
        write_json(folder / part / "config.json", config)
    for name, part in (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")):
        clip_tokenizer(folder / name, parts[part]["vocab_size"])
    path = folder / "tokenizer_2/tokenizer_config.json"
    write_json(path, json.loads(path.read_text()) | {"pad_token": "!"})
    unet, vae, first, second = (parts[part] for part in ("unet", "vae", "text_encoder", "text_encoder_2"))
    for part, model in (
        ("unet", on_meta(lambda: UNet2DConditionModel.from_config(unet))),
        ("vae", on_meta(lambda: AutoencoderKL.from_config(vae))),
    ):
        write_random(folder / part / "diffusion_pytorch_model.fp16.safetensors", model)
    texts = {
        "text_encoder": on_meta(lambda: CLIPTextModel(CLIPTextConfig(**first))),
        "text_encoder_2": on_meta(lambda: CLIPTextModelWithProjection(CLIPTextConfig(**second))),
    }
    for part, model in texts.items():
        bare = not next(iter(model.state_dict())).startswith("text_model.")
        write_random(folder / part / "model.fp16.safetensors", model, "text_model." if bare else "")
