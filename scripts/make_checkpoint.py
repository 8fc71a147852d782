"""Write checkpoints with random weights and real architecture into a cache folder, laid out as the published ones.

    python scripts/make_checkpoint.py sd15            # 859.5 M parameter UNet, VAE, CLIP-L, fp16: 2.1 GB
    python scripts/make_checkpoint.py sd21 tiny       # several at once
    python scripts/make_checkpoint.py tiny-sdxl       # a family of scripts/checkpoints/: tiny-NAME, wide-NAME or NAME

Kinds: sd15, sd21 (v-prediction, 768 px), tiny (SD 1.x shape, 64-px tiles), tiny-sd2 (SD 2.x shape: linear projections,
v-prediction), tiny-old (as `tiny`, with what old versions of diffusers left in configs: sample_size 32, a DDIM
scheduler with steps_offset 0 and without clip_sample), tiny-plain (tiny-plain-sd2: of SD 2.x, tiny-plain-sdxl: of SDXL;
of which shapes say all that single files do not: heads, groups of norms, vocabulary and native size as published),
taesd (an AutoencoderTiny alone, of 4 or, taesd8, of 8 latent channels as `mini` has). A family NAME has three sizes:
tiny-NAME, wide-NAME (full width and few blocks: what the memory depends on) and NAME (full size). Prints the folder.
Weights are random but scaled so that activations neither vanish nor overflow.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

KINDS = (
    "sd15",
    "sd21",
    "tiny",
    "tiny-sd2",
    "tiny-old",
    "tiny-plain",
    "tiny-plain-sd2",
    "tiny-plain-sdxl",
    "taesd",
    "taesd8",
)
FAMILIES = tuple(path.stem for path in sorted((Path(__file__).parent / "checkpoints").glob("[a-z]*.py")))
"""Modules of scripts/checkpoints/, each with `write(folder, size)`."""
SIZES = ("tiny", "wide", "full")
CACHE = Path(os.environ.get("TILER_TEST_CACHE", Path.home() / ".cache/tiler/checkpoints"))

# As in the published repositories: written by an old diffusers, later fields missing.
_UNET = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
_VAE = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
_TEXT = {
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "torch_dtype": "float32",
    "transformers_version": "4.22.0.dev0",
    "vocab_size": 49408,
}
_SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
_V_SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "_diffusers_version": "0.8.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}


def configs(kind: str) -> dict[str, dict[str, Any]]:
    """The config of every part."""
    if kind == "sd15":
        return {"unet": _UNET, "vae": _VAE, "text_encoder": _TEXT, "scheduler": _SCHEDULER}
    sd2 = {
        "attention_head_dim": [5, 10, 20, 20],
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
        "sample_size": 96,
    }
    sd2_text = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 23,
        "hidden_act": "gelu",
        "projection_dim": 512,
    }
    if kind == "sd21":
        return {
            "unet": _UNET | sd2,
            "vae": _VAE | {"sample_size": 768},
            "text_encoder": _TEXT | sd2_text,
            "scheduler": _V_SCHEDULER,
        }
    small = {
        "block_out_channels": [32, 64, 64],
        "sample_size": 8,
        "cross_attention_dim": 32,
        "norm_num_groups": 8,
        "attention_head_dim": 4,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    }
    small_vae = {"block_out_channels": [8, 16, 16, 16], "norm_num_groups": 4, "layers_per_block": 1, "sample_size": 64}
    small_text = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "vocab_size": 5000,
        "projection_dim": 32,
    }
    parts = {
        "unet": _UNET | small,
        "vae": _VAE | small_vae,
        "text_encoder": _TEXT | small_text,
        "scheduler": _SCHEDULER,
    }
    if kind == "tiny-old":
        parts["unet"] = parts["unet"] | {"sample_size": 32}
        dropped = ("clip_sample", "skip_prk_steps")
        parts["scheduler"] = {k: v for k, v in _SCHEDULER.items() if k not in dropped} | {
            "_class_name": "DDIMScheduler",
            "steps_offset": 0,
        }
        return parts
    if kind.startswith("tiny-plain"):
        second, width = kind.endswith("sd2"), 1024 if kind.endswith("sd2") else 768
        parts["unet"] |= {
            "attention_head_dim": 8,
            "norm_num_groups": 32,
            "cross_attention_dim": width,
            "sample_size": 64,
        }
        parts["vae"] |= {"block_out_channels": [32] * 4, "norm_num_groups": 32}
        parts["text_encoder"] |= {"hidden_size": width, "num_attention_heads": width // 64, "vocab_size": 49408}
        if second:
            parts["unet"] |= {
                "attention_head_dim": [1, 2, 2],
                "block_out_channels": [64, 128, 128],
                "use_linear_projection": True,
            }
            parts["text_encoder"] |= {"hidden_act": "gelu"}
            parts["scheduler"] = {k: v for k, v in _V_SCHEDULER.items() if k != "prediction_type"}
    # Of our own making: a small sample_size is meant, not left over from an old version.
    for part in ("unet", "vae", "scheduler"):
        parts[part] = parts[part] | {"_diffusers_version": metadata.version("diffusers")}
    if kind == "tiny-sd2":
        parts["unet"] = parts["unet"] | {"attention_head_dim": [2, 4, 4], "use_linear_projection": True}
        parts["scheduler"] = _V_SCHEDULER | {"_diffusers_version": metadata.version("diffusers")}
    return parts


def make(kind: str, cache: Path = CACHE, *, force: bool = False) -> Path:
    """Write one checkpoint unless it is there; its folder."""
    folder = cache / kind
    if folder.exists() and not force:
        return folder
    temp = cache / f".{kind}.{os.getpid()}"
    shutil.rmtree(temp, ignore_errors=True)
    torch.manual_seed(sum(map(ord, kind)))
    if kind.startswith("taesd"):
        from diffusers import AutoencoderTiny

        AutoencoderTiny(latent_channels=int(kind[5:] or 4)).half().save_pretrained(temp)
    elif kind == "tiny-plain-sdxl":
        import_module("checkpoints.sdxl").write(temp, "plain")
    elif (name := kind.removeprefix("tiny-").removeprefix("wide-")) in FAMILIES:
        size = kind.removesuffix(name).removesuffix("-") or "full"
        import_module(f"checkpoints.{name}").write(temp, size)
    else:
        _pipeline(temp, configs(kind))
    folder.parent.mkdir(parents=True, exist_ok=True)
    if force:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        temp.rename(folder)
    except OSError:  # another process was quicker
        shutil.rmtree(temp)
    return folder


def _pipeline(folder: Path, parts: dict[str, dict[str, Any]]) -> None:
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.6.0",
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "scheduler": ["diffusers", parts["scheduler"]["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    write_json(folder / "model_index.json", index)
    for part, config in parts.items():
        write_json(folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json"), config)
    clip_tokenizer(folder / "tokenizer", parts["text_encoder"]["vocab_size"])
    for part in ("unet", "vae", "text_encoder"):
        save_weights(folder / part, part, parts[part])


def write_json(path: Path, data: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2) + "\n")


def save_weights(folder: Path, part: str, config: dict[str, Any]) -> None:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    model: torch.nn.Module
    if part == "unet":
        model = UNet2DConditionModel.from_config(config)
    elif part == "vae":
        model = AutoencoderKL.from_config(config)
    else:
        model = CLIPTextModel(CLIPTextConfig(**config))
    prefix = (
        "text_model." if part == "text_encoder" and not next(iter(model.state_dict())).startswith("text_model.") else ""
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.02)
            elif parameter.ndim == 1:
                parameter.normal_(1, 0.05)
    tensors = {prefix + name: value.half().contiguous() for name, value in model.state_dict().items()}
    if part == "text_encoder":  # published files carry this buffer
        tensors["text_model.embeddings.position_ids"] = torch.arange(config["max_position_embeddings"]).unsqueeze(0)
    stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / f"{stem}.fp16.safetensors", metadata={"format": "pt"})


def clip_tokenizer(folder: Path, vocab_size: int) -> None:
    """A CLIP vocabulary with no merges: every byte is a piece; the specials have CLIP's last two ids."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: i for i, piece in enumerate([*alphabet, *(c + "</w>" for c in alphabet)])}
    vocab["<|startoftext|>"], vocab["<|endoftext|>"] = vocab_size - 2, vocab_size - 1
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": 77,
            "do_lower_case": True,
            "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    families = [prefix + name for name in FAMILIES for prefix in ("tiny-", "wide-", "")]
    parser.add_argument("kinds", nargs="+", choices=(*KINDS, *families))
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--force", action="store_true", help="write again what is there")
    args = parser.parse_args()
    for kind in args.kinds:
        print(make(kind, args.cache, force=args.force))


if __name__ == "__main__":
    main()
