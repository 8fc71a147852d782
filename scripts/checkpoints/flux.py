"""Flux.1 dev, or schnell: transformer, CLIP-L, T5-XXL and a VAE of 16 channels, laid out as the published
repositories."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import make_checkpoint as common
import torch
from checkpoints._files import write_weights
from checkpoints._t5 import write_tokenizer

_TRANSFORMER = {
    "_class_name": "FluxTransformer2DModel", "_diffusers_version": "0.30.0.dev0", "attention_head_dim": 128,
    "guidance_embeds": True, "in_channels": 64, "joint_attention_dim": 4096, "num_attention_heads": 24,
    "num_layers": 19, "num_single_layers": 38, "patch_size": 1, "pooled_projection_dim": 768,
}  # fmt: skip
_VAE = {
    "_class_name": "AutoencoderKL", "_diffusers_version": "0.30.0.dev0", "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4, "force_upcast": True,
    "in_channels": 3, "latent_channels": 16, "latents_mean": None, "latents_std": None, "layers_per_block": 2,
    "mid_block_add_attention": True, "norm_num_groups": 32, "out_channels": 3, "sample_size": 1024,
    "scaling_factor": 0.3611, "shift_factor": 0.1159, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "use_post_quant_conv": False, "use_quant_conv": False,
}  # fmt: skip
_T5 = {
    "architectures": ["T5EncoderModel"], "classifier_dropout": 0.0, "d_ff": 10240, "d_kv": 64, "d_model": 4096,
    "decoder_start_token_id": 0, "dense_act_fn": "gelu_new", "dropout_rate": 0.1, "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu", "initializer_factor": 1.0, "is_encoder_decoder": True, "is_gated_act": True,
    "layer_norm_epsilon": 1e-06, "model_type": "t5", "num_decoder_layers": 24, "num_heads": 64, "num_layers": 24,
    "output_past": True, "pad_token_id": 0, "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
    "vocab_size": 32128,
}  # fmt: skip
_SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler", "_diffusers_version": "0.30.0.dev0", "base_image_seq_len": 256,
    "base_shift": 0.5, "max_image_seq_len": 4096, "max_shift": 1.15, "num_train_timesteps": 1000, "shift": 3.0,
    "use_dynamic_shifting": True,
}  # fmt: skip
_INDEX = {
    "_class_name": "FluxPipeline", "_diffusers_version": "0.30.0.dev0",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"], "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"], "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}  # fmt: skip
_SMALL: dict[str, dict[str, Any]] = {
    "tiny": {
        "transformer": {
            "attention_head_dim": 80, "num_attention_heads": 4, "axes_dims_rope": [16, 32, 32], "num_layers": 1,
            "num_single_layers": 1, "joint_attention_dim": 64, "pooled_projection_dim": 32, "sample_size": 16,
        },
        "vae": {
            "block_out_channels": [8, 16, 16, 16], "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 128,
        },
        "text_encoder": {
            "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2,
            "vocab_size": 5000, "projection_dim": 32,
        },
        "text_encoder_2": {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_heads": 4, "num_layers": 2, "vocab_size": 500},
    },
    "wide": {"transformer": {"num_layers": 2, "num_single_layers": 2}, "text_encoder_2": {"num_layers": 2}},
    "full": {},
}  # fmt: skip


def write(folder: Path, size: str, *, schnell: bool = False) -> None:
    """A checkpoint in `folder`: tiny, wide (two blocks of each kind and of T5) or full, whose files are sparse."""
    parts = {
        "transformer": _TRANSFORMER,
        "vae": _VAE,
        "text_encoder": common.configs("sd15")["text_encoder"],
        "text_encoder_2": _T5,
    }
    parts = {name: config | _SMALL[size].get(name, {}) for name, config in parts.items()}
    scheduler = _SCHEDULER
    if schnell:
        parts["transformer"] |= {"guidance_embeds": False}
        scheduler = _SCHEDULER | {"shift": 1.0, "use_dynamic_shifting": False}
    common.write_json(folder / "model_index.json", _INDEX)
    common.write_json(folder / "scheduler/scheduler_config.json", scheduler)
    common.clip_tokenizer(folder / "tokenizer", parts["text_encoder"]["vocab_size"])
    write_tokenizer(folder / "tokenizer_2")
    for seed, (name, config) in enumerate(parts.items()):
        common.write_json(folder / name / "config.json", config)
        with torch.device("meta"):
            state = _MODELS[name](config).state_dict()
        shapes = {key: value.shape for key, value in state.items() if key != "encoder.embed_tokens.weight"}  # `shared`
        stem = "model" if name.startswith("text") else "diffusion_pytorch_model"
        write_weights(folder / name / f"{stem}.safetensors", shapes, sparse=size == "full", seed=seed)


def _transformer(config: dict[str, Any]) -> torch.nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel.from_config(config)


def _vae(config: dict[str, Any]) -> torch.nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_config(config)


def _clip(config: dict[str, Any]) -> torch.nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(**config))


def _t5(config: dict[str, Any]) -> torch.nn.Module:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(**config))


_MODELS: dict[str, Callable[[dict[str, Any]], torch.nn.Module]] = {
    "transformer": _transformer, "vae": _vae, "text_encoder": _clip, "text_encoder_2": _t5,
}  # fmt: skip
