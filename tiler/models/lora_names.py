"""The names that LoRA trainers give to a model's modules. They are generated from the modules, since names whose dots
became underscores cannot be parsed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from torch import nn

from tiler.models.built import Models
from tiler.models.family import Part, Role

_DENOISER_DOTTED = (
    "", "unet.", "transformer.", "diffusion_model.", "model.diffusion_model.", "base_model.model.",
    "unet.base_model.model.", "transformer.base_model.model.", "base_model.model.unet.",
    "base_model.model.transformer.",
)  # fmt: skip
_DENOISER_JOINED = ("lora_unet_", "lora_transformer_", "lycoris_", "lycoris_unet_", "lycoris_transformer_")
_OLD_CLIP = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


class Target(NamedTuple):
    """A module that a name refers to. If a name refers to several modules whose outputs are concatenated, this one's
    start at row `first`."""

    part: str
    module: str
    first: int = 0


def names_of_modules(models: Models) -> dict[str, tuple[Target, ...]]:
    """The modules that each name refers to, for all text encoders and the denoiser."""
    found: dict[str, tuple[Target, ...]] = {}
    family = models.family
    for number, part in enumerate(family.encoders):
        for path, targets in _own_names(part, models.module(part)):
            for name in _encoder_spellings(path, part, number, len(family.encoders)):
                found.setdefault(name, targets)
    denoiser = family.part(Role.DENOISER)
    module = models.module(denoiser)
    for path, targets in _own_names(denoiser, module):
        for name in _denoiser_spellings(path):
            found.setdefault(name, targets)
    sizes = {path: len(m.weight) for path, m in module.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    for name, paths in _original_names(module, sizes):
        firsts = [sum(sizes.get(path, 0) for path in paths[:i]) for i in range(len(paths))]
        targets = tuple(Target(denoiser.name, path, first) for path, first in zip(paths, firsts, strict=True))
        for spelling in _denoiser_spellings(name):
            found.setdefault(spelling, targets)
    return found


def _own_names(part: Part, module: nn.Module) -> Iterator[tuple[str, tuple[Target, ...]]]:
    for path, child in module.named_modules():
        if path and isinstance(getattr(child, "weight", None), nn.Parameter) and not isinstance(child, nn.Embedding):
            for alias in {path, *(alias.removesuffix(".weight") for alias in part.aliases(f"{path}.weight"))}:
                yield alias, (Target(part.name, path),)


def _denoiser_spellings(path: str) -> Iterator[str]:
    for prefix in _DENOISER_JOINED:
        yield prefix + path.replace(".", "_")
    old = re.sub(r"\.(attn\d?)\.(to_[qkv]|to_out|add_[qkv]_proj|to_add_out)(\.0)?$", r".\1.processor.\2", path)
    for spelling in {path, old}:
        for prefix in _DENOISER_DOTTED:
            yield prefix + spelling


def _encoder_spellings(path: str, part: Part, number: int, count: int) -> Iterator[str]:
    numbers = {number + 1}
    if part.config.get("model_type") in ("t5", "umt5") and count == 2:
        numbers.add(3)  # kohya's trainer counts Flux's T5 as SD 3's
    prefixes = [*(f"lora_te{n}_" for n in numbers), *(["lora_te_", "lycoris_te_"] if number == 0 else [])]
    for prefix in prefixes:
        yield prefix + path.replace(".", "_")
    parent, _, last = path.rpartition(".")
    for spelling in {path, f"{parent}.{_OLD_CLIP[last]}"} if last in _OLD_CLIP else {path}:
        for prefix in (f"{part.name}.", f"{part.name}.base_model.model."):
            yield prefix + spelling


def _original_names(module: nn.Module, sizes: Mapping[str, int]) -> Iterator[tuple[str, list[str]]]:
    """The names of the denoiser's modules in the original repository, each with the corresponding module or modules of
    diffusers."""
    made = {"UNet2DConditionModel": _ldm, "FluxTransformer2DModel": _flux, "SD3Transformer2DModel": _sd3,
            "PixArtTransformer2DModel": _pixart}.get(type(module).__name__)  # fmt: skip
    for name, paths in () if made is None else made(module):
        if all(path in sizes for path in paths):
            yield name, paths


Names = Iterator[tuple[str, list[str]]]


def _ldm(unet: nn.Module) -> Names:
    """The names of CompVis' and Stability's UNets, which number all blocks in sequence, including up- and
    downsamplers."""
    paths = [
        path
        for path, child in unet.named_modules()
        if isinstance(child, nn.Linear | nn.Conv2d | nn.GroupNorm | nn.LayerNorm)
    ]
    blocks = dict(_ldm_blocks(unet))
    inner = {
        "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
        "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
    }  # fmt: skip
    for path in paths:
        match = re.match(r"(.*\.(?:resnets|attentions|downsamplers|upsamplers)\.\d+)\.(.*)", path)
        if match is not None and match[1] in blocks:
            yield f"{blocks[match[1]]}.{inner.get(match[2], match[2])}", [path]
    for name, path in (
        ("input_blocks.0.0", "conv_in"), ("time_embed.0", "time_embedding.linear_1"), ("out.2", "conv_out"),
        ("time_embed.2", "time_embedding.linear_2"), ("label_emb.0.0", "add_embedding.linear_1"),
        ("label_emb.0.2", "add_embedding.linear_2"),
    ):  # fmt: skip
        yield name, [path]
    for path, block in blocks.items():
        if ".downsamplers." in path:
            yield f"{block}.op", [f"{path}.conv"]


def _ldm_blocks(unet: nn.Module) -> Iterator[tuple[str, str]]:
    """The names of resnets, attentions and samplers, by their path in diffusers."""
    down, up, number = unet.down_blocks, unet.up_blocks, 1
    for i, block in enumerate(down):  # type: ignore[arg-type]
        for j in range(len(block.resnets)):
            yield f"down_blocks.{i}.resnets.{j}", f"input_blocks.{number}.0"
            yield f"down_blocks.{i}.attentions.{j}", f"input_blocks.{number}.1"
            number += 1
        if block.downsamplers:
            yield f"down_blocks.{i}.downsamplers.0", f"input_blocks.{number}.0"
            number += 1
    yield "mid_block.resnets.0", "middle_block.0"
    yield "mid_block.attentions.0", "middle_block.1"
    yield "mid_block.resnets.1", "middle_block.2"
    number = 0
    for i, block in enumerate(up):  # type: ignore[arg-type]
        has_attention = bool(getattr(block, "attentions", None))
        for j in range(len(block.resnets)):
            yield f"up_blocks.{i}.resnets.{j}", f"output_blocks.{number}.0"
            yield f"up_blocks.{i}.attentions.{j}", f"output_blocks.{number}.1"
            number += 1
        if block.upsamplers:
            yield f"up_blocks.{i}.upsamplers.0", f"output_blocks.{number - 1}.{2 if has_attention else 1}"


def _blocks(module: nn.Module, attribute: str) -> Iterable[int]:
    return range(len(getattr(module, attribute, ())))


def _flux(model: nn.Module) -> Names:
    """Black Forest Labs' names, without the last modulation, whose halves diffusers swapped."""
    for i in _blocks(model, "transformer_blocks"):
        here, there = f"double_blocks.{i}", f"transformer_blocks.{i}"
        for stream, norm, ff, out, qkv in (
            ("img", "norm1", "ff", "to_out.0", ("to_q", "to_k", "to_v")),
            ("txt", "norm1_context", "ff_context", "to_add_out", ("add_q_proj", "add_k_proj", "add_v_proj")),
        ):
            yield f"{here}.{stream}_mod.lin", [f"{there}.{norm}.linear"]
            yield f"{here}.{stream}_attn.qkv", [f"{there}.attn.{name}" for name in qkv]
            yield f"{here}.{stream}_attn.proj", [f"{there}.attn.{out}"]
            yield f"{here}.{stream}_mlp.0", [f"{there}.{ff}.net.0.proj"]
            yield f"{here}.{stream}_mlp.2", [f"{there}.{ff}.net.2"]
    for i in _blocks(model, "single_transformer_blocks"):
        here, there = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        yield f"{here}.modulation.lin", [f"{there}.norm.linear"]
        yield f"{here}.linear1", [*(f"{there}.attn.to_{name}" for name in "qkv"), f"{there}.proj_mlp"]
        yield f"{here}.linear2", [f"{there}.proj_out"]
    embedders = {"time_in": "timestep", "vector_in": "text", "guidance_in": "guidance"}
    for here, there in embedders.items():
        yield f"{here}.in_layer", [f"time_text_embed.{there}_embedder.linear_1"]
        yield f"{here}.out_layer", [f"time_text_embed.{there}_embedder.linear_2"]
    yield "img_in", ["x_embedder"]
    yield "txt_in", ["context_embedder"]
    yield "final_layer.linear", ["proj_out"]


def _sd3(model: nn.Module) -> Names:
    """Stability's names, without the modulations of the last context block and of the last layer, whose halves
    diffusers swapped."""
    count = len(_blocks(model, "transformer_blocks"))  # type: ignore[arg-type]
    for i in range(count):
        here, there = f"joint_blocks.{i}", f"transformer_blocks.{i}"
        for stream, norm, ff, out, qkv in (
            ("x_block", "norm1", "ff", "to_out.0", ("to_q", "to_k", "to_v")),
            ("context_block", "norm1_context", "ff_context", "to_add_out", ("add_q_proj", "add_k_proj", "add_v_proj")),
        ):
            yield f"{here}.{stream}.attn.qkv", [f"{there}.attn.{name}" for name in qkv]
            yield f"{here}.{stream}.attn.proj", [f"{there}.attn.{out}"]
            yield f"{here}.{stream}.mlp.fc1", [f"{there}.{ff}.net.0.proj"]
            yield f"{here}.{stream}.mlp.fc2", [f"{there}.{ff}.net.2"]
            if stream == "x_block" or i + 1 < count:
                yield f"{here}.{stream}.adaLN_modulation.1", [f"{there}.{norm}.linear"]
        yield f"{here}.x_block.attn2.qkv", [f"{there}.attn2.to_{name}" for name in "qkv"]
        yield f"{here}.x_block.attn2.proj", [f"{there}.attn2.to_out.0"]
    for here, there in (("t_embedder", "timestep"), ("y_embedder", "text")):
        yield f"{here}.mlp.0", [f"time_text_embed.{there}_embedder.linear_1"]
        yield f"{here}.mlp.2", [f"time_text_embed.{there}_embedder.linear_2"]
    yield "x_embedder.proj", ["pos_embed.proj"]
    yield "final_layer.linear", ["proj_out"]


def _pixart(model: nn.Module) -> Names:
    """The names of PixArt's own repository."""
    for i in _blocks(model, "transformer_blocks"):
        here, there = f"blocks.{i}", f"transformer_blocks.{i}"
        yield f"{here}.attn.qkv", [f"{there}.attn1.to_{name}" for name in "qkv"]
        yield f"{here}.attn.proj", [f"{there}.attn1.to_out.0"]
        yield f"{here}.cross_attn.q_linear", [f"{there}.attn2.to_q"]
        yield f"{here}.cross_attn.kv_linear", [f"{there}.attn2.to_k", f"{there}.attn2.to_v"]
        yield f"{here}.cross_attn.proj", [f"{there}.attn2.to_out.0"]
        yield f"{here}.mlp.fc1", [f"{there}.ff.net.0.proj"]
        yield f"{here}.mlp.fc2", [f"{there}.ff.net.2"]
