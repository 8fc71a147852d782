"""HunyuanDiT 1.2, or 1.1 with its sizes and style: transformer, BERT, multilingual T5 and the VAE of SDXL, laid out as
the published repositories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import make_checkpoint as common
import torch
from checkpoints import _t5
from checkpoints._files import write_weights

_TRANSFORMER = {
    "_class_name": "HunyuanDiT2DModel", "_diffusers_version": "0.29.0.dev0", "activation_fn": "gelu-approximate",
    "attention_head_dim": 88, "cross_attention_dim": 1024, "cross_attention_dim_t5": 2048, "hidden_size": 1408,
    "in_channels": 4, "learn_sigma": True, "mlp_ratio": 4.3637, "norm_type": "layer_norm", "num_attention_heads": 16,
    "num_layers": 40, "patch_size": 2, "pooled_projection_dim": 1024, "sample_size": 128, "text_len": 77,
    "text_len_t5": 256, "use_style_cond_and_image_meta_size": False,
}  # fmt: skip
_VAE = {
    "_class_name": "AutoencoderKL", "_diffusers_version": "0.29.0.dev0", "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4, "force_upcast": False,
    "in_channels": 3, "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32, "out_channels": 3,
    "sample_size": 512, "scaling_factor": 0.13025, "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
_BERT = {
    "architectures": ["BertModel"], "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1, "hidden_size": 1024, "intermediate_size": 4096, "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512, "model_type": "bert", "num_attention_heads": 16, "num_hidden_layers": 24,
    "pad_token_id": 0, "torch_dtype": "float32", "type_vocab_size": 2, "vocab_size": 47020,
}  # fmt: skip
_MT5 = {"d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_heads": 32, "num_layers": 24, "vocab_size": 250112}
_SCHEDULER = {
    "_class_name": "DDPMScheduler", "_diffusers_version": "0.29.0.dev0", "beta_end": 0.03,
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": False, "num_train_timesteps": 1000,
    "prediction_type": "v_prediction", "steps_offset": 1, "timestep_spacing": "leading", "trained_betas": None,
    "variance_type": "fixed_small",
}  # fmt: skip
_INDEX = {
    "_class_name": "HunyuanDiTPipeline", "_diffusers_version": "0.29.0.dev0", "feature_extractor": [None, None],
    "requires_safety_checker": False, "safety_checker": [None, None], "scheduler": ["diffusers", "DDPMScheduler"],
    "text_encoder": ["transformers", "BertModel"], "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "BertTokenizer"], "tokenizer_2": ["transformers", "T5Tokenizer"],
    "transformer": ["diffusers", "HunyuanDiT2DModel"], "vae": ["diffusers", "AutoencoderKL"],
}  # fmt: skip
_SMALL: dict[str, dict[str, Any]] = {
    "tiny": {
        "transformer": {
            "attention_head_dim": 88, "num_attention_heads": 3, "hidden_size": 264, "num_layers": 6,
            "cross_attention_dim": 256, "cross_attention_dim_t5": 264, "pooled_projection_dim": 128, "sample_size": 16,
        },
        "vae": {
            "block_out_channels": [8, 16, 16, 16], "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 128,
        },
        "text_encoder": {
            "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_hidden_layers": 2,
            "vocab_size": 400,
        },
        "text_encoder_2": {"d_model": 264},
    },
    "wide": {
        "transformer": {"num_layers": 6}, "text_encoder": {"num_hidden_layers": 2},
        "text_encoder_2": _MT5 | {"num_layers": 2},
    },
    "full": {"text_encoder_2": _MT5},
}  # fmt: skip


def write(folder: Path, size: str, *, told_sizes: bool = False) -> None:
    """A checkpoint in `folder`: tiny, wide (six blocks, of which two have skips) or full. `told_sizes`: as version
    1.1."""
    parts = {"transformer": _TRANSFORMER, "vae": _VAE, "text_encoder": _BERT, "text_encoder_2": _t5.config()}
    parts = {name: config | _SMALL[size].get(name, {}) for name, config in parts.items()}
    parts["transformer"] |= {"use_style_cond_and_image_meta_size": told_sizes}
    common.write_json(folder / "model_index.json", _INDEX)
    common.write_json(folder / "scheduler/scheduler_config.json", _SCHEDULER)
    _write_words(folder / "tokenizer")
    _t5.write_tokenizer(folder / "tokenizer_2")
    _t5.write_encoder(folder / "text_encoder_2", parts["text_encoder_2"], seed=1)
    for seed, name in enumerate(("transformer", "vae", "text_encoder"), 2):
        common.write_json(folder / name / "config.json", parts[name])
        shapes = {key: value.shape for key, value in _model(name, parts[name]).named_parameters()}
        stem = "model" if name == "text_encoder" else "diffusion_pytorch_model"
        write_weights(folder / name / f"{stem}.safetensors", shapes, seed=seed)


def _model(name: str, config: dict[str, Any]) -> torch.nn.Module:
    from diffusers import AutoencoderKL, HunyuanDiT2DModel
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        if name == "text_encoder":
            return BertModel(BertConfig(**config))
        return (AutoencoderKL if name == "vae" else HunyuanDiT2DModel).from_config(config)


def _write_words(folder: Path) -> None:
    """A WordPiece vocabulary of the words of a few sentences, of letters and of two Chinese characters."""
    words = sorted({word.strip(",") for word in _t5.TEXT.split()})
    letters = [f"{prefix}{chr(code)}" for code in range(ord("a"), ord("z") + 1) for prefix in ("", "##")]
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys([*specials, *words, *letters, ",", "船", "湖"])) + "\n")
    settings = {"do_lower_case": True, "model_max_length": 77, "tokenizer_class": "BertTokenizer"}
    common.write_json(folder / "tokenizer_config.json", settings)
