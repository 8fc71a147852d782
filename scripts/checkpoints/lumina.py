"""Lumina-Next-SFT: transformer, Gemma and the VAE of SDXL, laid out as the published repository."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import make_checkpoint as common
import torch
from checkpoints import _t5
from checkpoints._files import write_weights

_TRANSFORMER = {
    "_class_name": "LuminaNextDiT2DModel", "_diffusers_version": "0.30.0.dev0", "cross_attention_dim": 2048,
    "ffn_dim_multiplier": None, "hidden_size": 2304, "in_channels": 4, "learn_sigma": True, "multiple_of": 256,
    "norm_eps": 1e-05, "num_attention_heads": 32, "num_kv_heads": 8, "num_layers": 24, "patch_size": 2,
    "qk_norm": True, "sample_size": 128, "scaling_factor": 1.0,
}  # fmt: skip
_VAE = {
    "_class_name": "AutoencoderKL", "_diffusers_version": "0.30.0.dev0", "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4, "force_upcast": False,
    "in_channels": 3, "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32, "out_channels": 3,
    "sample_size": 1024, "scaling_factor": 0.13025, "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
_GEMMA = {
    "architectures": ["GemmaModel"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 2,
    "eos_token_id": 1, "head_dim": 256, "hidden_act": "gelu", "hidden_size": 2048, "intermediate_size": 16384,
    "max_position_embeddings": 8192, "model_type": "gemma", "num_attention_heads": 8, "num_hidden_layers": 18,
    "num_key_value_heads": 1, "pad_token_id": 0, "rms_norm_eps": 1e-06, "rope_theta": 10000.0,
    "torch_dtype": "float32", "vocab_size": 256000,
}  # fmt: skip
_SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler", "_diffusers_version": "0.30.0.dev0", "num_train_timesteps": 1000,
    "shift": 1.0,
}  # fmt: skip
_INDEX = {
    "_class_name": "LuminaPipeline", "_diffusers_version": "0.30.0.dev0",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"], "text_encoder": ["transformers", "GemmaModel"],
    "tokenizer": ["transformers", "GemmaTokenizer"], "transformer": ["diffusers", "LuminaNextDiT2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}  # fmt: skip
_SMALL: dict[str, dict[str, Any]] = {
    "tiny": {
        "transformer": {
            "hidden_size": 288, "num_attention_heads": 4, "num_kv_heads": 2, "num_layers": 2,
            "cross_attention_dim": 256, "sample_size": 16,
        },
        "vae": {
            "block_out_channels": [8, 16, 16, 16], "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 128,
        },
        "text_encoder": {
            "head_dim": 64, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4,
            "num_hidden_layers": 3, "num_key_value_heads": 2, "vocab_size": 600,
        },
    },
    "wide": {"transformer": {"num_layers": 2}, "text_encoder": {"num_hidden_layers": 3}},
    "full": {},
}  # fmt: skip


def write(folder: Path, size: str) -> None:
    """A checkpoint in `folder`: tiny, wide (two blocks) or full."""
    parts = {"transformer": _TRANSFORMER, "vae": _VAE, "text_encoder": _GEMMA}
    parts = {name: config | _SMALL[size].get(name, {}) for name, config in parts.items()}
    common.write_json(folder / "model_index.json", _INDEX)
    common.write_json(folder / "scheduler/scheduler_config.json", _SCHEDULER)
    _write_tokenizer(folder / "tokenizer")
    for seed, name in enumerate(parts, 1):
        common.write_json(folder / name / "config.json", parts[name])
        shapes = {key: value.shape for key, value in _model(name, parts[name]).named_parameters()}
        stem = "model" if name == "text_encoder" else "diffusion_pytorch_model"
        # Gemma multiplies its states by √width.
        spreads = {"embed_tokens.weight": 0.02}
        write_weights(folder / name / f"{stem}.safetensors", shapes, seed=seed, spreads=spreads)


def _model(name: str, config: dict[str, Any]) -> torch.nn.Module:
    from diffusers import AutoencoderKL, LuminaNextDiT2DModel
    from transformers import GemmaConfig, GemmaModel

    with torch.device("meta"):
        if name == "text_encoder":
            return GemmaModel(GemmaConfig(**config))
        return (AutoencoderKL if name == "vae" else LuminaNextDiT2DModel).from_config(config)


def _write_tokenizer(folder: Path) -> None:
    """Gemma's kind of tokenizer.json: byte-pair pieces of a few sentences behind a begin mark, and no end mark."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    marks = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=marks, show_progress=False)
    tokenizer.train_from_iterator(_t5.TEXT.splitlines(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "add_bos_token": True, "add_eos_token": False, "bos_token": "<bos>", "eos_token": "<eos>",
        "model_max_length": 8192, "pad_token": "<pad>", "tokenizer_class": "GemmaTokenizer", "unk_token": "<unk>",
    }  # fmt: skip
    common.write_json(folder / "tokenizer_config.json", settings)
