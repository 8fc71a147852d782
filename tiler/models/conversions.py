"""Rename the tensors of a file to the names of the modules: with diffusers' own conversion functions, run on stand-ins
for tensors, and with tables for what diffusers does not convert.

PixArt's names are those of its repository (PixArt-alpha/PixArt-sigma, diffusion/model/nets), HunyuanDiT's those that
diffusers' own script reads (huggingface/diffusers, scripts/convert_hunyuandit_to_diffusers.py); the short T5 names are
llama.cpp's (ggml-org/llama.cpp, gguf-py/gguf/constants.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from tiler.memory.lean_imports import lean_imports
from tiler.models.contents import Content, Kind, Naming
from tiler.models.kinds import text_width
from tiler.weights.index import TensorInfo
from tiler.weights.names import Rows, converted

Index = Mapping[str, TensorInfo]
Tensors = Mapping[str, Any]
Convert = Callable[[dict[str, Any]], Tensors]
_UNET = "model.diffusion_model."


def renamed(part: Content, index: Index) -> dict[str, TensorInfo]:
    """The part of the file's `index` under diffusers' or transformers' names. Raises ModelError for a file that a
    conversion cannot handle."""
    own = {name: index[_stored(part, name, index)] for name in part.shapes}
    if part.naming is Naming.DIFFUSERS:
        return own
    if part.kind is Kind.TINY_VAE:
        return {
            f"decoder.layers.{int(head) - 1}.{rest}": info
            for name, info in own.items()
            for head, rest in [name.split(".", 1)]
        }
    if part.naming is Naming.GGML:
        return _t5(own)
    with lean_imports():
        from diffusers.loaders import single_file_utils as diffusers
    diffusers.logger.setLevel("ERROR")  # it advises on weights of moving averages
    if part.kind is Kind.UNET:
        own = {_UNET + name: info for name, info in own.items()}
        return converted(own, partial(diffusers.convert_ldm_unet_checkpoint, config=_unet_facts(part)))
    if part.kind is Kind.VAE:
        levels = ["x"] * part.count(r"encoder\.down\.(\d+)\.")
        facts = {"down_block_types": levels, "up_block_types": levels}
        return converted(own, partial(diffusers.convert_ldm_vae_checkpoint, config=facts))
    if part.naming is Naming.OPEN_CLIP:
        model = SimpleNamespace(config=SimpleNamespace(hidden_size=text_width(part.shapes)))
        own = {f"x.{name}": info for name, info in own.items() if not name.startswith("visual.")}
        found = converted(own, lambda tensors: diffusers.convert_open_clip_checkpoint(model, tensors, prefix="x."))
        return {name.removeprefix("text_model."): info for name, info in found.items()}
    by_kind: dict[Kind, Convert] = {
        Kind.SD3: diffusers.convert_sd3_transformer_checkpoint_to_diffusers,
        Kind.FLUX: diffusers.convert_flux_transformer_checkpoint_to_diffusers,
        Kind.AURAFLOW: diffusers.convert_auraflow_transformer_checkpoint_to_diffusers,
        Kind.PIXART: _pixart,
        Kind.HUNYUANDIT: _hunyuandit,
    }
    return converted(own, by_kind[part.kind])


def _stored(part: Content, name: str, index: Index) -> str:
    """The complete name in the file: some names have `text_model.` after their prefix."""
    plain = part.prefix + name
    return plain if plain in index else f"{part.prefix}text_model.{name}"


def _unet_facts(part: Content) -> dict[str, Any]:
    """The config values that the conversion needs: the number of residual blocks per level, and whether the UNet is
    conditioned on size."""
    levels = 0
    while f"input_blocks.{levels + 1}.0.in_layers.0.weight" in part.shapes:
        levels += 1
    facts: dict[str, Any] = {"layers_per_block": max(1, levels)}
    return facts | ({"addition_embed_type": "text_time"} if "label_emb.0.0.weight" in part.shapes else {})


class _Names(NamedTuple):
    """Tables of names without their endings: of layers in blocks, of fused layers there with the layers that they hold,
    and of layers outside. Unknown names in blocks stay; `place` is what blocks are called."""

    blocks: Mapping[str, str]
    fused: Mapping[str, tuple[str, ...]]
    outside: Mapping[str, str]
    place: str

    def apply(self, tensors: Mapping[str, Rows]) -> dict[str, Rows]:
        made: dict[str, Rows] = {}
        for name, tensor in tensors.items():
            stem, _, ending = name.rpartition(".")
            if (block := re.fullmatch(r"blocks\.(\d+)\.(.+)", stem)) is not None:
                place = f"{self.place}.{block[1]}."
                names = self.fused.get(block[2], (self.blocks.get(block[2], block[2]),))
                parts = [tensor] if len(names) == 1 else tensor.chunk(len(names))
                made |= {f"{place}{new}.{ending}": rows for new, rows in zip(names, parts, strict=True)}
            elif stem in self.outside:
                made[f"{self.outside[stem]}.{ending}"] = tensor
        return made


_PIXART = {
    "x_embedder.proj": "pos_embed.proj", "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2", "t_block.1": "adaln_single.linear",
    "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
    "csize_embedder.mlp.0": "adaln_single.emb.resolution_embedder.linear_1",
    "csize_embedder.mlp.2": "adaln_single.emb.resolution_embedder.linear_2",
    "ar_embedder.mlp.0": "adaln_single.emb.aspect_ratio_embedder.linear_1",
    "ar_embedder.mlp.2": "adaln_single.emb.aspect_ratio_embedder.linear_2",
    "final_layer.linear": "proj_out",
}  # fmt: skip
_PIXART_BLOCK = {
    "attn.proj": "attn1.to_out.0", "cross_attn.proj": "attn2.to_out.0", "cross_attn.q_linear": "attn2.to_q",
    "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2",
}  # fmt: skip
_PIXART_FUSED = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"), "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
}  # fmt: skip


def _pixart(tensors: dict[str, Rows]) -> dict[str, Rows]:
    made = _Names(_PIXART_BLOCK, _PIXART_FUSED, _PIXART, "transformer_blocks").apply(tensors)
    for name, tensor in tensors.items():
        if name.endswith("scale_shift_table"):
            made[name.replace("blocks.", "transformer_blocks.").removeprefix("final_layer.")] = tensor
        elif name == "pos_embed":
            made["pos_embed.pos_embed"] = tensor
    return made


_HUNYUANDIT = {
    "x_embedder.proj": "pos_embed.proj", "mlp_t5.0": "text_embedder.linear_1", "mlp_t5.2": "text_embedder.linear_2",
    "t_embedder.mlp.0": "time_extra_emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_extra_emb.timestep_embedder.linear_2",
    "extra_embedder.0": "time_extra_emb.extra_embedder.linear_1",
    "extra_embedder.2": "time_extra_emb.extra_embedder.linear_2", "final_layer.linear": "proj_out",
    **{f"pooler{rest}": f"time_extra_emb.pooler{rest}" for rest in ("", ".q_proj", ".k_proj", ".v_proj", ".c_proj")},
}  # fmt: skip
_HUNYUANDIT_BLOCK = {
    "default_modulation.1": "norm1.linear", "norm1": "norm1.norm", "norm2": "norm3", "norm3": "norm2",
    "attn2.q_proj": "attn2.to_q", "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2",
    **{f"{a}.{x}_norm": f"{a}.norm_{x}" for a in ("attn1", "attn2") for x in "qk"},
    **{f"{a}.out_proj": f"{a}.to_out.0" for a in ("attn1", "attn2")},
}  # fmt: skip
_HUNYUANDIT_FUSED = {
    "attn1.Wqkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"), "attn2.kv_proj": ("attn2.to_k", "attn2.to_v"),
}  # fmt: skip


def _hunyuandit(tensors: dict[str, Rows]) -> dict[str, Rows]:
    made = _Names(_HUNYUANDIT_BLOCK, _HUNYUANDIT_FUSED, _HUNYUANDIT, "blocks").apply(tensors)
    for ending in ("weight", "bias"):
        shift, scale = tensors[f"final_layer.adaLN_modulation.1.{ending}"].chunk(2)
        made[f"norm_out.linear.{ending}"] = torch.cat([scale, shift])  # type: ignore[list-item, assignment]
    if (style := tensors.get("style_embedder.weight")) is not None:
        made["time_extra_emb.style_embedder.weight"] = style[0:1]
    made["text_embedding_padding"] = tensors["text_embedding_padding"]
    return made


_GGML = {
    "attn_q": "layer.0.SelfAttention.q", "attn_k": "layer.0.SelfAttention.k", "attn_v": "layer.0.SelfAttention.v",
    "attn_o": "layer.0.SelfAttention.o", "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "attn_norm": "layer.0.layer_norm", "ffn_norm": "layer.1.layer_norm", "ffn_gate": "layer.1.DenseReluDense.wi_0",
    "ffn_up": "layer.1.DenseReluDense.wi_1", "ffn_down": "layer.1.DenseReluDense.wo",
}  # fmt: skip


def _t5(own: Index) -> dict[str, TensorInfo]:
    made = {"token_embd.weight": "shared.weight", "enc.output_norm.weight": "encoder.final_layer_norm.weight"}
    for name in own:
        if (found := re.fullmatch(r"enc\.blk\.(\d+)\.(\w+)\.weight", name)) is not None and found[2] in _GGML:
            made[name] = f"encoder.block.{found[1]}.{_GGML[found[2]]}.weight"
    return {made[name]: info for name, info in own.items() if name in made}
