"""Transformers of diffusers' folders under the names of their original repositories: what those stack is stacked, what
those swap is swapped."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file


class Original(NamedTuple):
    """A tensor of the original: the parameters whose rows it stacks; or one, whose halves are swapped."""

    parameters: tuple[str, ...]
    swapped: bool = False


def write_transformer(folder: Path, path: Path, kind: str, prefix: str = "") -> Path:
    """Write the transformer of the checkpoint in `folder` to `path`, every name behind `prefix`."""
    (file,) = (folder / "transformer").glob("*.safetensors")
    loaded = load_file(file)
    tensors = {}
    for name, original in originals(kind, loaded).items():
        tensor = torch.cat([loaded[parameter] for parameter in original.parameters])
        if original.swapped:
            tensor = torch.cat(tensor.chunk(2)[::-1])
        tensors[prefix + name] = tensor.contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return path


def originals(kind: str, parameters: Iterable[str]) -> dict[str, Original]:
    """The tensors of the original of a transformer with these parameters; kinds: sd3, flux, auraflow, pixart,
    hunyuandit."""
    stacked: dict[str, list[tuple[int, str]]] = {}
    for parameter in parameters:
        name, place = _KINDS[kind](parameter)
        stacked.setdefault(name, []).append((place, parameter))
    last = max((int(n) for p in parameters for n in re.findall(r"^transformer_blocks\.(\d+)\.", p)), default=0)
    swapped = {f"joint_blocks.{last}.context_block.adaLN_modulation.1.{x}" for x in ("weight", "bias")}
    swapped |= {f"final_layer.adaLN_modulation.1.{x}" for x in ("weight", "bias")} | {"modF.1.weight"}
    return {
        name: Original(tuple(parameter for _, parameter in sorted(rows)), name in swapped)
        for name, rows in stacked.items()
    }


def _replace(name: str, table: Mapping[str, str]) -> str:
    for old, new in table.items():
        name = re.sub(old, new, name)
    return name


def _place(name: str) -> int:
    """Of queries, keys, values and what follows them, in the tensor that stacks them."""
    order = ("to_q", "add_q_proj"), ("to_k", "add_k_proj"), ("to_v", "add_v_proj"), ("proj_mlp",)
    return next((place for place, names in enumerate(order) if any(f".{n}." in name for n in names)), 0)


def _sd3(name: str) -> tuple[str, int]:
    block = r"^transformer_blocks\.(\d+)\."
    table = {
        r"^pos_embed\.pos_embed$": "pos_embed",
        r"^pos_embed\.proj": "x_embedder.proj",
        r"^time_text_embed\.timestep_embedder\.linear_(\d)": lambda m: f"t_embedder.mlp.{2 * int(m[1]) - 2}",
        r"^time_text_embed\.text_embedder\.linear_(\d)": lambda m: f"y_embedder.mlp.{2 * int(m[1]) - 2}",
        r"^norm_out\.linear": "final_layer.adaLN_modulation.1",
        r"^proj_out": "final_layer.linear",
        block + r"attn\.(to_[qkv])\.": r"joint_blocks.\1.x_block.attn.qkv.",
        block + r"attn2\.(to_[qkv])\.": r"joint_blocks.\1.x_block.attn2.qkv.",
        block + r"attn\.add_[qkv]_proj\.": r"joint_blocks.\1.context_block.attn.qkv.",
        block + r"attn(2?)\.to_out\.0": r"joint_blocks.\1.x_block.attn\2.proj",
        block + r"attn\.to_add_out": r"joint_blocks.\1.context_block.attn.proj",
        block + r"attn(2?)\.norm_([qk])": r"joint_blocks.\1.x_block.attn\2.ln_\3",
        block + r"attn\.norm_added_([qk])": r"joint_blocks.\1.context_block.attn.ln_\2",
        block + r"norm1\.linear": r"joint_blocks.\1.x_block.adaLN_modulation.1",
        block + r"norm1_context\.linear": r"joint_blocks.\1.context_block.adaLN_modulation.1",
        block + r"ff\.net\.0\.proj": r"joint_blocks.\1.x_block.mlp.fc1",
        block + r"ff\.net\.2": r"joint_blocks.\1.x_block.mlp.fc2",
        block + r"ff_context\.net\.0\.proj": r"joint_blocks.\1.context_block.mlp.fc1",
        block + r"ff_context\.net\.2": r"joint_blocks.\1.context_block.mlp.fc2",
    }
    return _replace(name, table), _place(name)  # type: ignore[arg-type]


def _flux(name: str) -> tuple[str, int]:
    double, single = r"^transformer_blocks\.(\d+)\.", r"^single_transformer_blocks\.(\d+)\."
    table = {
        r"^time_text_embed\.timestep_embedder\.": "time_in.",
        r"^time_text_embed\.text_embedder\.": "vector_in.",
        r"^time_text_embed\.guidance_embedder\.": "guidance_in.",
        r"linear_1\.(weight|bias)$": r"in_layer.\1",
        r"linear_2\.(weight|bias)$": r"out_layer.\1",
        r"^context_embedder": "txt_in",
        r"^x_embedder": "img_in",
        r"^norm_out\.linear": "final_layer.adaLN_modulation.1",
        r"^proj_out": "final_layer.linear",
        double + r"norm1\.linear": r"double_blocks.\1.img_mod.lin",
        double + r"norm1_context\.linear": r"double_blocks.\1.txt_mod.lin",
        double + r"attn\.to_[qkv]\.": r"double_blocks.\1.img_attn.qkv.",
        double + r"attn\.add_[qkv]_proj\.": r"double_blocks.\1.txt_attn.qkv.",
        double + r"attn\.norm_q\.weight": r"double_blocks.\1.img_attn.norm.query_norm.scale",
        double + r"attn\.norm_k\.weight": r"double_blocks.\1.img_attn.norm.key_norm.scale",
        double + r"attn\.norm_added_q\.weight": r"double_blocks.\1.txt_attn.norm.query_norm.scale",
        double + r"attn\.norm_added_k\.weight": r"double_blocks.\1.txt_attn.norm.key_norm.scale",
        double + r"attn\.to_out\.0": r"double_blocks.\1.img_attn.proj",
        double + r"attn\.to_add_out": r"double_blocks.\1.txt_attn.proj",
        double + r"ff\.net\.0\.proj": r"double_blocks.\1.img_mlp.0",
        double + r"ff\.net\.2": r"double_blocks.\1.img_mlp.2",
        double + r"ff_context\.net\.0\.proj": r"double_blocks.\1.txt_mlp.0",
        double + r"ff_context\.net\.2": r"double_blocks.\1.txt_mlp.2",
        single + r"norm\.linear": r"single_blocks.\1.modulation.lin",
        single + r"(?:attn\.to_[qkv]|proj_mlp)\.": r"single_blocks.\1.linear1.",
        single + r"proj_out": r"single_blocks.\1.linear2",
        single + r"attn\.norm_q\.weight": r"single_blocks.\1.norm.query_norm.scale",
        single + r"attn\.norm_k\.weight": r"single_blocks.\1.norm.key_norm.scale",
    }
    return _replace(name, table), _place(name)


def _auraflow(name: str) -> tuple[str, int]:
    joint, single = r"^joint_transformer_blocks\.(\d+)\.", r"^single_transformer_blocks\.(\d+)\."
    attention = {"to_q": "q", "to_k": "k", "to_v": "v", r"to_out\.0": "o"}
    added = {"add_q_proj": "q", "add_k_proj": "k", "add_v_proj": "v", "to_add_out": "o"}
    layers = {"linear_1": "c_fc1", "linear_2": "c_fc2", "out_projection": "c_proj"}
    table = {
        r"^pos_embed\.pos_embed$": "positional_encoding",
        r"^pos_embed\.proj": "init_x_linear",
        r"^time_step_proj\.linear_(\d)": lambda m: f"t_embedder.mlp.{2 * int(m[1]) - 2}",
        "^context_embedder": "cond_seq_linear",
        r"^norm_out\.linear": "modF.1",
        "^proj_out": "final_linear",
        **{joint + rf"attn\.{old}\.": rf"double_layers.\1.attn.w2{new}." for old, new in attention.items()},
        **{joint + rf"attn\.{old}\.": rf"double_layers.\1.attn.w1{new}." for old, new in added.items()},
        **{single + rf"attn\.{old}\.": rf"single_layers.\1.attn.w1{new}." for old, new in attention.items()},
        **{joint + rf"ff\.{old}": rf"double_layers.\1.mlpX.{new}" for old, new in layers.items()},
        **{joint + rf"ff_context\.{old}": rf"double_layers.\1.mlpC.{new}" for old, new in layers.items()},
        **{single + rf"ff\.{old}": rf"single_layers.\1.mlp.{new}" for old, new in layers.items()},
        joint + r"norm1\.linear": r"double_layers.\1.modX.1",
        joint + r"norm1_context\.linear": r"double_layers.\1.modC.1",
        single + r"norm1\.linear": r"single_layers.\1.modCX.1",
    }
    return _replace(name, table), 0  # type: ignore[arg-type]


def _numbered(stem: str) -> Callable[[re.Match[str]], str]:
    """Linear layers 1 and 2 stand at 0 and 2 of a sequence, with the activation between them."""
    return lambda m: f"{stem}.{2 * int(m[1]) - 2}"


def _pixart(name: str) -> tuple[str, int]:
    block, emb = r"^transformer_blocks\.(\d+)\.", r"^adaln_single\.emb\."

    table = {
        r"^pos_embed\.proj": "x_embedder.proj",
        r"^caption_projection\.linear_": "y_embedder.y_proj.fc",
        emb + r"timestep_embedder\.linear_(\d)": _numbered("t_embedder.mlp"),
        emb + r"resolution_embedder\.linear_(\d)": _numbered("csize_embedder.mlp"),
        emb + r"aspect_ratio_embedder\.linear_(\d)": _numbered("ar_embedder.mlp"),
        r"^adaln_single\.linear": "t_block.1",
        "^proj_out": "final_layer.linear",
        "^scale_shift_table": "final_layer.scale_shift_table",
        block + r"attn1\.to_[qkv]\.": r"blocks.\1.attn.qkv.",
        block + r"attn1\.to_out\.0": r"blocks.\1.attn.proj",
        block + r"attn2\.to_q": r"blocks.\1.cross_attn.q_linear",
        block + r"attn2\.to_[kv]\.": r"blocks.\1.cross_attn.kv_linear.",
        block + r"attn2\.to_out\.0": r"blocks.\1.cross_attn.proj",
        block + r"ff\.net\.0\.proj": r"blocks.\1.mlp.fc1",
        block + r"ff\.net\.2": r"blocks.\1.mlp.fc2",
        block + "scale_shift_table": r"blocks.\1.scale_shift_table",
    }
    return _replace(name, table), _place(name)  # type: ignore[arg-type]


def _hunyuandit(name: str) -> tuple[str, int]:
    block, emb = r"^blocks\.(\d+)\.", r"^time_extra_emb\."

    table = {
        r"^pos_embed\.proj": "x_embedder.proj",
        r"^text_embedder\.linear_(\d)": _numbered("mlp_t5"),
        emb + r"timestep_embedder\.linear_(\d)": _numbered("t_embedder.mlp"),
        emb + r"extra_embedder\.linear_(\d)": _numbered("extra_embedder"),
        emb + r"(pooler|style_embedder)\.": r"\1.",
        r"^norm_out\.linear": "final_layer.adaLN_modulation.1",
        "^proj_out": "final_layer.linear",
        block + r"norm([23])\.": lambda m: f"blocks.{m[1]}.norm{5 - int(m[2])}.",
        block + r"norm1\.norm\.": r"blocks.\1.norm1.",
        block + r"norm1\.linear\.": r"blocks.\1.default_modulation.1.",
        block + r"attn1\.to_[qkv]\.": r"blocks.\1.attn1.Wqkv.",
        block + r"attn2\.to_[kv]\.": r"blocks.\1.attn2.kv_proj.",
        block + r"attn2\.to_q\.": r"blocks.\1.attn2.q_proj.",
        block + r"attn([12])\.to_out\.0": r"blocks.\1.attn\2.out_proj",
        block + r"attn([12])\.norm_([qk])": r"blocks.\1.attn\2.\3_norm",
        block + r"ff\.net\.0\.proj": r"blocks.\1.mlp.fc1",
        block + r"ff\.net\.2": r"blocks.\1.mlp.fc2",
    }
    return _replace(name, table), _place(name)  # type: ignore[arg-type]


_KINDS = {"sd3": _sd3, "flux": _flux, "auraflow": _auraflow, "pixart": _pixart, "hunyuandit": _hunyuandit}
