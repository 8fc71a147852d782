"""Stable Diffusion 3's layout: two CLIPs with projections, T5, a transformer of joint blocks, and a VAE of 16 channels.

tiny: 128-px tiles, blocks of 256 channels. wide: 3.5 large's width, two blocks, T5-XXL's width, two layers: 2.7 GB.
full: SD 3 medium's configs, 2.028 B parameters in the transformer, no T5: 5.9 GB.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from checkpoints import _t5
from checkpoints._files import write_weights
from make_checkpoint import clip_tokenizer, write_json

TRANSFORMER: dict[str, Any] = {
    "_class_name": "SD3Transformer2DModel", "_diffusers_version": "0.29.0.dev0", "attention_head_dim": 64,
    "caption_projection_dim": 1536, "in_channels": 16, "joint_attention_dim": 4096, "num_attention_heads": 24,
    "num_layers": 24, "out_channels": 16, "patch_size": 2, "pooled_projection_dim": 2048, "pos_embed_max_size": 192,
    "sample_size": 128,
}  # fmt: skip
LARGE: dict[str, Any] = {
    "caption_projection_dim": 2432, "num_attention_heads": 38, "num_layers": 38, "qk_norm": "rms_norm",
    "dual_attention_layers": [],
}  # fmt: skip
VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL", "_diffusers_version": "0.29.0.dev0", "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4, "force_upcast": True,
    "in_channels": 3, "latent_channels": 16, "latents_mean": None, "latents_std": None, "layers_per_block": 2,
    "norm_num_groups": 32, "out_channels": 3, "sample_size": 1024, "scaling_factor": 1.5305, "shift_factor": 0.0609,
    "up_block_types": ["UpDecoderBlock2D"] * 4, "use_post_quant_conv": False, "use_quant_conv": False,
}  # fmt: skip
CLIP_L: dict[str, Any] = {
    "architectures": ["CLIPTextModelWithProjection"], "attention_dropout": 0.0, "bos_token_id": 0, "dropout": 0.0,
    "eos_token_id": 2, "hidden_act": "quick_gelu", "hidden_size": 768, "initializer_factor": 1.0,
    "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-05, "max_position_embeddings": 77,
    "model_type": "clip_text_model", "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 1,
    "projection_dim": 768, "torch_dtype": "float16", "vocab_size": 49408,
}  # fmt: skip
BIG_G: dict[str, Any] = CLIP_L | {
    "hidden_act": "gelu", "hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20,
    "num_hidden_layers": 32, "projection_dim": 1280,
}  # fmt: skip
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler", "_diffusers_version": "0.29.0.dev0", "num_train_timesteps": 1000,
    "shift": 3.0,
}  # fmt: skip
INDEX: dict[str, Any] = {
    "_class_name": "StableDiffusion3Pipeline", "_diffusers_version": "0.29.0.dev0",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_3": ["transformers", "T5EncoderModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"], "tokenizer_3": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "SD3Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}  # fmt: skip
_TEXT = {"num_attention_heads": 2, "num_hidden_layers": 3, "intermediate_size": 64, "vocab_size": 5000}
_CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    "tiny": {
        "transformer": {
            "attention_head_dim": 64, "num_attention_heads": 4, "caption_projection_dim": 256, "num_layers": 3,
            "joint_attention_dim": 256, "pooled_projection_dim": 32 + 24, "pos_embed_max_size": 24, "sample_size": 16,
        },
        "vae": {"block_out_channels": [8, 16, 16, 16], "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 128},
        "text_encoder": _TEXT | {"hidden_size": 32, "projection_dim": 32},
        "text_encoder_2": _TEXT | {"hidden_size": 48, "projection_dim": 24},
    },
    "wide": {
        "transformer": LARGE | {"num_layers": 2},
        "text_encoder": {"num_hidden_layers": 2},
        "text_encoder_2": {"num_hidden_layers": 2},
    },
    "full": {},
}  # fmt: skip


def write(folder: Path, size: str, *, t5: bool = True, sparse: bool = False, **transformer: Any) -> None:
    """A checkpoint in diffusers layout, with `t5` or without; `sparse` files are holes, which read as zeros;
    `transformer`: values of its config that are to be others."""
    parts = {"transformer": TRANSFORMER, "vae": VAE, "text_encoder": CLIP_L, "text_encoder_2": BIG_G}
    if t5 and size != "full":
        parts["text_encoder_3"] = _t5.config(**(_t5.XXL | {"num_layers": 2} if size == "wide" else _t5.TINY))
        _t5.write_tokenizer(folder / "tokenizer_3")
    parts = {name: config | _CHANGES[size].get(name, {}) for name, config in parts.items()}
    parts["transformer"] |= transformer
    absent = {} if "text_encoder_3" in parts else {key: [None, None] for key in ("text_encoder_3", "tokenizer_3")}
    write_json(folder / "model_index.json", INDEX | absent)
    write_json(folder / "scheduler/scheduler_config.json", SCHEDULER)
    for tokenizer, part in (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")):
        clip_tokenizer(folder / tokenizer, parts[part]["vocab_size"])
    for seed, (part, config) in enumerate(parts.items()):
        write_json(folder / part / "config.json", config)
        shapes = {name: tensor.shape for name, tensor in _on_meta(part, config).state_dict().items()}
        if part == "transformer":
            side = config["pos_embed_max_size"]
            width = config["num_attention_heads"] * config["attention_head_dim"]
            shapes["pos_embed.pos_embed"] = torch.Size([1, side * side, width])
        shapes.pop("encoder.embed_tokens.weight", None)  # of T5: the same as `shared`
        text = part.startswith("text")
        bare = text and "text_projection.weight" in shapes and not next(iter(shapes)).startswith("text_model.")
        prefix = {name: "text_model." if bare and not name.startswith("text_projection") else "" for name in shapes}
        stem = "model" if text else "diffusion_pytorch_model"
        shapes = {prefix[name] + name: shape for name, shape in shapes.items()}
        write_weights(
            folder / part / f"{stem}.fp16.safetensors",
            shapes,
            seed=seed,
            sparse=sparse,
            spreads={"pos_embed.pos_embed": 0.5},
        )


def _on_meta(part: str, config: dict[str, Any]) -> torch.nn.Module:
    from diffusers import AutoencoderKL, SD3Transformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    builds: dict[str, Callable[[], Any]] = {
        "transformer": lambda: SD3Transformer2DModel.from_config(config | {"pos_embed_max_size": 1}),
        "vae": lambda: AutoencoderKL.from_config(config),
        "text_encoder_3": lambda: T5EncoderModel(T5Config(**config)),
    }
    with torch.device("meta"):
        return builds.get(part, lambda: CLIPTextModelWithProjection(CLIPTextConfig(**config)))()
