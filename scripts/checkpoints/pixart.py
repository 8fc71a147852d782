"""PixArt-Σ, or α, of 1024 px: transformer, T5 and the VAE of SDXL (α: of Stable Diffusion), laid out as the published
repositories. The transformer is whole in size `full`; T5-XXL has two blocks of its 24 there, too: 1 GB instead of
9.5."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import make_checkpoint as common
import torch
from checkpoints import _t5
from checkpoints._files import write_weights

_TRANSFORMER = {
    "_class_name": "Transformer2DModel", "_diffusers_version": "0.28.0.dev0", "activation_fn": "gelu-approximate",
    "attention_bias": True, "attention_head_dim": 72, "attention_type": "default", "caption_channels": 4096,
    "cross_attention_dim": 1152, "double_self_attention": False, "dropout": 0.0, "in_channels": 4,
    "interpolation_scale": 2, "norm_elementwise_affine": False, "norm_eps": 1e-06, "norm_num_groups": 32,
    "norm_type": "ada_norm_single", "num_attention_heads": 16, "num_embeds_ada_norm": 1000, "num_layers": 28,
    "num_vector_embeds": None, "only_cross_attention": False, "out_channels": 8, "patch_size": 2, "sample_size": 128,
    "upcast_attention": False, "use_additional_conditions": False, "use_linear_projection": False,
}  # fmt: skip
_VAE = {
    "_class_name": "AutoencoderKL", "_diffusers_version": "0.28.0.dev0", "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4, "force_upcast": False,
    "in_channels": 3, "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32, "out_channels": 3,
    "sample_size": 1024, "scaling_factor": 0.13025, "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
_SCHEDULER = {
    "_class_name": "DPMSolverMultistepScheduler", "_diffusers_version": "0.28.0.dev0", "algorithm_type": "dpmsolver++",
    "beta_end": 0.02, "beta_schedule": "linear", "beta_start": 0.0001, "dynamic_thresholding_ratio": 0.995,
    "euler_at_final": False, "lambda_min_clipped": float("-inf"), "lower_order_final": True,
    "num_train_timesteps": 1000, "prediction_type": "epsilon", "sample_max_value": 1.0, "solver_order": 2,
    "solver_type": "midpoint", "steps_offset": 0, "thresholding": False, "timestep_spacing": "linspace",
    "trained_betas": None, "use_karras_sigmas": False, "variance_type": None,
}  # fmt: skip
_INDEX = {
    "_diffusers_version": "0.28.0.dev0", "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
    "text_encoder": ["transformers", "T5EncoderModel"], "tokenizer": ["transformers", "T5Tokenizer"],
    "transformer": ["diffusers", "Transformer2DModel"], "vae": ["diffusers", "AutoencoderKL"],
}  # fmt: skip
_SMALL: dict[str, dict[str, Any]] = {
    "tiny": {
        "transformer": {
            "attention_head_dim": 72, "num_attention_heads": 4, "cross_attention_dim": 288, "num_layers": 2,
            "caption_channels": 256, "sample_size": 16,
        },
        "vae": {
            "block_out_channels": [8, 16, 16, 16], "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 128,
        },
        "text_encoder": {},
    },
    "wide": {"transformer": {"num_layers": 2}, "text_encoder": _t5.XXL | {"num_layers": 2}},
    "full": {"text_encoder": _t5.XXL | {"num_layers": 2}},
}  # fmt: skip


def write(folder: Path, size: str, *, alpha: bool = False, sample_size: int | None = None) -> None:
    """A checkpoint in `folder`: tiny, wide (two blocks) or full. `alpha` has its micro-conditions; `sample_size` is the
    side of a native tile in latents, where it differs."""
    parts = {"transformer": _TRANSFORMER, "vae": _VAE, "text_encoder": _t5.config()}
    parts = {name: config | _SMALL[size].get(name, {}) for name, config in parts.items()}
    if alpha:
        parts["transformer"] |= {"use_additional_conditions": True, "interpolation_scale": None}
        parts["vae"] |= {"scaling_factor": 0.18215}
    if sample_size is not None:
        parts["transformer"] |= {"sample_size": sample_size}
    kind = "PixArtAlphaPipeline" if alpha else "PixArtSigmaPipeline"
    common.write_json(folder / "model_index.json", {"_class_name": kind} | _INDEX)
    common.write_json(folder / "scheduler/scheduler_config.json", _SCHEDULER)
    _t5.write_tokenizer(folder / "tokenizer")
    _t5.write_encoder(folder / "text_encoder", parts["text_encoder"], seed=1)
    for seed, name in enumerate(("transformer", "vae"), 2):
        common.write_json(folder / name / "config.json", parts[name])
        shapes = {key: value.shape for key, value in _model(name, parts[name]).named_parameters()}
        write_weights(folder / name / "diffusion_pytorch_model.safetensors", shapes, seed=seed)


def _model(name: str, config: dict[str, Any]) -> torch.nn.Module:
    from diffusers import AutoencoderKL, PixArtTransformer2DModel

    with torch.device("meta"):
        return (AutoencoderKL if name == "vae" else PixArtTransformer2DModel).from_config(config)
