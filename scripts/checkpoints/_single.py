"""A diffusers folder of Stable Diffusion 1.x, 2.x or SDXL as one file with the names of the original repositories."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

PARTS = "unet", "vae", "text_encoder", "text_encoder_2"
_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_UNET = {
    "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0", "conv_out": "out.2", "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
_VAE = {
    "conv_shortcut": "nin_shortcut", "conv_norm_out": "norm_out", "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2", "mid_block.attentions.0": "mid.attn_1", "group_norm": "norm", "to_q": "q",
    "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
}  # fmt: skip


def write_single(folder: Path, path: Path, parts: tuple[str, ...] = PARTS) -> Path:
    """Write the checkpoint of `folder`, or some `parts` of it, to `path`."""
    tensors = single_tensors(folder, parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return path


def single_tensors(folder: Path, parts: tuple[str, ...] = PARTS) -> dict[str, torch.Tensor]:
    """The tensors of such a file."""
    tensors: dict[str, torch.Tensor] = {}
    config = json.loads((folder / "unet/config.json").read_text())
    second, both = config.get("use_linear_projection", False), (folder / "text_encoder_2").is_dir()
    for part in parts:
        if not (folder / part).is_dir():
            continue
        (file,) = (folder / part).glob("*.safetensors")
        loaded = load_file(file)
        if part == "text_encoder_2":
            tensors |= _open_clip(loaded, "conditioner.embedders.1.model.")
        elif part == "text_encoder" and second and not both:
            tensors |= _open_clip(loaded, "cond_stage_model.model.")
        elif part == "text_encoder":
            prefix = "conditioner.embedders.0.transformer." if both else "cond_stage_model.transformer."
            tensors |= {prefix + name: tensor for name, tensor in loaded.items()}
        else:
            tensors |= {rename(part, name, loaded): _shaped(part, name, tensor) for name, tensor in loaded.items()}
    return tensors


def rename(part: str, name: str, names: Iterable[str]) -> str:
    """The original name of a parameter of the UNet or the VAE, which has these `names`."""
    return _unet(name, names) if part == "unet" else _vae(name, names)


def _shaped(part: str, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The original autoencoder's attention is made of convolutions."""
    return tensor[..., None, None] if part == "vae" and ".attentions." in name and tensor.ndim == 2 else tensor


def _unet(name: str, loaded: Iterable[str]) -> str:
    resnets = len({m[1] for n in loaded if (m := re.match(r"down_blocks\.0\.resnets\.(\d+)", n))})

    def place(match: re.Match[str]) -> str:
        side, level, kind, number = match[1], int(match[2]), match[3], int(match[4])
        if side == "down":
            block = 1 + level * (resnets + 1) + (resnets if kind == "downsamplers" else number)
            return f"input_blocks.{block}.{ {'resnets': '0', 'attentions': '1', 'downsamplers': '0.op'}[kind] }"
        block = level * (resnets + 1) + (resnets if kind == "upsamplers" else number)
        attends = any(n.startswith(f"up_blocks.{level}.attentions") for n in loaded)
        return f"output_blocks.{block}.{ {'resnets': 0, 'attentions': 1, 'upsamplers': 2 if attends else 1}[kind] }"

    new = re.sub(r"^(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)", place, name)
    new = new.replace("0.op.conv.", "0.op.")
    new = re.sub(
        r"^mid_block\.(resnets|attentions)\.(\d+)",
        lambda m: f"middle_block.{1 if m[1] == 'attentions' else 2 * int(m[2])}",
        new,
    )
    for old, own in _UNET.items():
        new = re.sub(rf"^{re.escape(old)}\.", f"{own}.", new)
    for old, own in _RESNET.items():
        new = re.sub(rf"^((?:in|out)put_blocks\.\d+\.0|middle_block\.[02])\.{old}\.", rf"\1.{own}.", new)
    return f"model.diffusion_model.{new}"


def _vae(name: str, loaded: Iterable[str]) -> str:
    levels = len({m[1] for n in loaded if (m := re.match(r"decoder\.up_blocks\.(\d+)", n))})
    new = re.sub(r"\bdown_blocks\.(\d+)\.resnets\.", r"down.\1.block.", name)
    new = re.sub(r"\bdown_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample.", new)
    new = re.sub(r"\bup_blocks\.(\d+)\.resnets\.", lambda m: f"up.{levels - 1 - int(m[1])}.block.", new)
    new = re.sub(r"\bup_blocks\.(\d+)\.upsamplers\.0\.", lambda m: f"up.{levels - 1 - int(m[1])}.upsample.", new)
    for old, own in _VAE.items():
        new = re.sub(rf"\b{re.escape(old)}\b", own, new)
    return f"first_stage_model.{new}"


_OPEN_CLIP = {
    "text_model.embeddings.position_embedding.weight": "positional_embedding", "text_model.embeddings.": "",
    "text_model.final_layer_norm.": "ln_final.", "text_model.encoder.layers.": "transformer.resblocks.",
    ".layer_norm1.": ".ln_1.", ".layer_norm2.": ".ln_2.", ".mlp.fc1.": ".mlp.c_fc.", ".mlp.fc2.": ".mlp.c_proj.",
    ".self_attn.out_proj.": ".attn.out_proj.",
}  # fmt: skip


def _open_clip(loaded: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """OpenCLIP keeps queries, keys and values in one tensor, and its projection transposed."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in loaded.items():
        if name.endswith("position_ids") or re.search(r"\.(k|v)_proj\.", name):
            continue
        new = name
        for old, own in _OPEN_CLIP.items():
            new = new.replace(old, own)
        if ".q_proj." in name:
            tensor = torch.cat([loaded[name.replace(".q_proj.", f".{kind}_proj.")] for kind in "qkv"])
            new = new.replace(".self_attn.q_proj.", ".attn.in_proj_")
        if name == "text_projection.weight":
            new, tensor = "text_projection", tensor.T.contiguous()
        tensors[prefix + new] = tensor
    return tensors
