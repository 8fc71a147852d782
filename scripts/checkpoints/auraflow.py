"""AuraFlow's layout: Pile-T5 (UMT5) with LLaMA's tokenizer, a transformer of joint and single blocks, and SDXL's VAE.

tiny: 128-px tiles, blocks of 256 channels. wide: version 0.3's width, one joint and two single blocks, two layers of
Pile-T5-XL: 1.8 GB. full: version 0.3's configs, 6.859 B parameters in the transformer, as sparse files.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from checkpoints import _t5
from checkpoints._files import write_weights
from make_checkpoint import write_json

TRANSFORMER: dict[str, Any] = {
    "_class_name": "AuraFlowTransformer2DModel", "_diffusers_version": "0.30.0.dev0", "attention_head_dim": 256,
    "caption_projection_dim": 3072, "in_channels": 4, "joint_attention_dim": 2048, "num_attention_heads": 12,
    "num_mmdit_layers": 4, "num_single_dit_layers": 32, "out_channels": 4, "patch_size": 2, "pos_embed_max_size": 9216,
    "sample_size": 64,
}  # fmt: skip
VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL", "_diffusers_version": "0.30.0.dev0", "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4, "force_upcast": True,
    "in_channels": 3, "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32, "out_channels": 3,
    "sample_size": 1024, "scaling_factor": 0.13025, "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
PILE_T5_XL: dict[str, Any] = {
    "model_type": "umt5", "architectures": ["UMT5EncoderModel"], "d_model": 2048, "d_kv": 64, "d_ff": 5120,
    "num_heads": 32, "num_layers": 24, "vocab_size": 32128,
}  # fmt: skip
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler", "_diffusers_version": "0.30.0.dev0", "num_train_timesteps": 1000,
    "shift": 1.73,
}  # fmt: skip
INDEX: dict[str, Any] = {
    "_class_name": "AuraFlowPipeline", "_diffusers_version": "0.30.0.dev0",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"], "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "LlamaTokenizerFast"], "transformer": ["diffusers", "AuraFlowTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}  # fmt: skip
_CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    "tiny": {
        "transformer": {
            "attention_head_dim": 64, "num_attention_heads": 4, "caption_projection_dim": 256, "num_mmdit_layers": 1,
            "num_single_dit_layers": 2, "joint_attention_dim": 256, "pos_embed_max_size": 24 * 24, "sample_size": 8,
        },
        "vae": {"block_out_channels": [8, 16, 16, 16], "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 128},
        "text_encoder": _t5.TINY,
    },
    "wide": {
        "transformer": {"num_mmdit_layers": 1, "num_single_dit_layers": 2}, "text_encoder": {"num_layers": 2},
    },
    "full": {},
}  # fmt: skip


def write(folder: Path, size: str, *, sparse: bool = False, **transformer: Any) -> None:
    """A checkpoint in diffusers layout; `sparse` files are holes, which read as zeros; `transformer`: values of its
    config that are to be others."""
    parts = {"transformer": TRANSFORMER, "vae": VAE, "text_encoder": _t5.config(**PILE_T5_XL)}
    parts = {name: config | _CHANGES[size].get(name, {}) for name, config in parts.items()}
    parts["transformer"] |= transformer
    write_json(folder / "model_index.json", INDEX)
    write_json(folder / "scheduler/scheduler_config.json", SCHEDULER)
    llama_tokenizer(folder / "tokenizer")
    for seed, (part, config) in enumerate(parts.items()):
        write_json(folder / part / "config.json", config)
        shapes = {name: tensor.shape for name, tensor in _on_meta(part, config).state_dict().items()}
        shapes.pop("encoder.embed_tokens.weight", None)  # of UMT5: the same as `shared`
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        spreads = {"pos_embed.pos_embed": 0.5, "register_tokens": 0.5}
        path = folder / part / f"{stem}.fp16.safetensors"
        write_weights(path, shapes, seed=seed, sparse=sparse or size == "full", spreads=spreads)


def llama_tokenizer(folder: Path) -> None:
    """LLaMA's kind of tokenizer.json: byte-pair pieces of a few sentences, an end mark and no begin mark."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    marks = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=marks, show_progress=False)
    tokenizer.train_from_iterator(_t5.TEXT.splitlines(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "add_bos_token": False, "add_eos_token": True, "bos_token": "<s>", "eos_token": "</s>",
        "model_max_length": 2048, "pad_token": "</s>", "padding_side": "right", "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
    }  # fmt: skip
    write_json(folder / "tokenizer_config.json", settings)


def _on_meta(part: str, config: dict[str, Any]) -> torch.nn.Module:
    from diffusers import AuraFlowTransformer2DModel, AutoencoderKL
    from transformers import UMT5Config, UMT5EncoderModel

    builds: dict[str, Callable[[], Any]] = {
        "transformer": lambda: AuraFlowTransformer2DModel.from_config(config),
        "vae": lambda: AutoencoderKL.from_config(config),
        "text_encoder": lambda: UMT5EncoderModel(UMT5Config(**config)),
    }
    with torch.device("meta"):
        return builds[part]()
