"""The parts of a weight file and their naming scheme, found from the names and shapes of its tensors alone.

Only the header is read, and torch is not needed, so `tiler models` can look into a hundred files quickly. Known
schemes: the repositories of CompVis, Stability AI and Black Forest Labs, OpenCLIP, llama.cpp, diffusers and
transformers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import NamedTuple

from tiler.errors import ModelError

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


class Kind(StrEnum):
    """The kind of a part."""

    UNET = "a UNet"
    SD3 = "a transformer of Stable Diffusion 3"
    FLUX = "a transformer of Flux"
    PIXART = "a transformer of PixArt"
    AURAFLOW = "a transformer of AuraFlow"
    HUNYUANDIT = "a transformer of HunyuanDiT"
    LUMINA = "a transformer of Lumina-Next"
    VAE = "an autoencoder"
    TINY_VAE = "a tiny autoencoder"
    CLIP = "a CLIP text encoder"
    T5 = "a T5 text encoder"


DENOISERS = frozenset({Kind.UNET, Kind.SD3, Kind.FLUX, Kind.PIXART, Kind.AURAFLOW, Kind.HUNYUANDIT, Kind.LUMINA})


class Naming(StrEnum):
    """The naming scheme of a part's tensors."""

    DIFFUSERS = "diffusers"  # for text encoders transformers'
    ORIGINAL = "original"
    OPEN_CLIP = "OpenCLIP"
    GGML = "llama.cpp"


class Content(NamedTuple):
    """A part of a file: the names of its tensors begin with `prefix`; `shapes` are keyed by the rest of the name."""

    kind: Kind
    naming: Naming
    prefix: str
    shapes: dict[str, Shape]

    def count(self, pattern: str) -> int:
        """How many numbers stand where `pattern` has its group."""
        return count(self.shapes, pattern)


class Contents(NamedTuple):
    """The parts of a file, the number of tensors that no picture needs, and the tensors that are unknown."""

    parts: tuple[Content, ...]
    ignored: Mapping[str, int]
    unknown: tuple[str, ...]

    @property
    def named(self) -> str:
        """The contents in words."""
        return " and ".join(dict.fromkeys(str(part.kind) for part in self.parts))

    def find(self, *kinds: Kind) -> list[Content]:
        return [part for part in self.parts if part.kind in kinds]


_PREFIXES = (
    "model.diffusion_model.", "first_stage_model.", "vae.", "cond_stage_model.transformer.", "cond_stage_model.model.",
    "conditioner.embedders.0.transformer.", "conditioner.embedders.0.model.", "conditioner.embedders.1.model.",
    "text_encoders.clip_l.transformer.", "text_encoders.clip_g.transformer.", "text_encoders.t5xxl.transformer.",
    "text_encoders.pile_t5xl.transformer.",
)  # fmt: skip
_IGNORED = re.compile(
    r"(model_ema|loss|embedding_manager)\.|.*(position_ids|logit_scale|attn_mask)$|(log_one_minus_|posterior_|sqrt_|alphas_cumprod)|"
    r"(betas|global_step|denoiser\.sigmas|edm_mean|edm_std|edm_vpred\.\w+|v_pred|ztsnr)$|lvlb_weights$|.*scaled_fp8$|text_encoders\.\w+\.\w+$"
)
_LORA = re.compile(r"(^|[._])lora_|\.lora\.|\.hada_w|\.lokr_w|\.oft_blocks")
_ADDITIONS = {
    "control_model": "a ControlNet", "controlnet_cond_embedding": "a ControlNet", "controlnet_blocks": "a ControlNet",
    "input_hint_block": "a ControlNet", "ip_adapter": "an IP-Adapter", "emb_params": "a textual inversion",
    "conv_first": "an upscaler of pictures", "single_stream_modulation": "FLUX.2",
    "noise_refiner": "Lumina 2 or Z-Image",
    "cap_embedder": "a transformer of Lumina-Next under its repository's own names, which tiler cannot read; take the "
    "file of its folder in diffusers layout",
}  # fmt: skip


def look(shapes: Shapes, where: str) -> Contents:
    """Find the parts of a file with these names and shapes. Raises ModelError, saying what the file is, for a LoRA, a
    ControlNet and the like; for a mixture of two kinds of names; and for a file without any known part."""
    groups: dict[str, dict[str, Shape]] = {}
    ignored: Counter[str] = Counter()
    for name, shape in shapes.items():
        if _LORA.search(name):
            raise ModelError(f"{where}: this is a LoRA, which goes with a model; give the model with --model")
        if _IGNORED.match(name):
            ignored[name.split(".", 1)[0]] += 1
            continue
        prefix = next((p for p in _PREFIXES if name.startswith(p)), "")
        groups.setdefault(prefix, {})[name[len(prefix) :]] = shape
    parts, unknown = [], list[str]()
    for prefix, group in groups.items():
        if any(name.startswith("text_model.") for name in group):
            group = _without(group, "text_model.")
        found = [Content(*kind, prefix, group) for kind in _kinds(group, where)]
        if not found and not prefix and all(name.startswith("model.") for name in group):  # AuraFlow's own files
            group = _without(group, "model.")
            found = [Content(*kind, "model.", group) for kind in _kinds(group, where)]
        parts += found
        unknown += [] if found else [prefix + name for name in group]
    denoisers = [part for part in parts if part.kind in DENOISERS]
    if len(denoisers) > 1:
        names = " and ".join(f"{part.kind} ({part.prefix or 'without a prefix'})" for part in denoisers)
        raise ModelError(f"{where}: this file holds two denoisers, {names}; give a file with one")
    if not parts:
        heads = {name.split(".", 1)[0] for name in unknown}
        what = next((what for head, what in _ADDITIONS.items() if head in heads), None)
        if what is None and heads <= {"clip_l", "clip_g", "string_to_param", "string_to_token"} and heads:
            what = "a textual inversion"
        some = f" ({', '.join(unknown[:3])}…)" if unknown else ""
        raise ModelError(
            f"{where}: this is {what or f'not a model that tiler knows{some}'}; give a model of Stable Diffusion 1.x to 3.5, SDXL, "
            "PixArt, Flux.1 or AuraFlow"
        )
    return Contents(tuple(parts), dict(ignored), tuple(unknown))


def count(names: Iterable[str], pattern: str) -> int:
    """How many numbers stand where `pattern` has its group."""
    compiled = re.compile(pattern)
    return len({match[1] for name in names if (match := compiled.match(name)) is not None})


def _without(group: Mapping[str, Shape], prefix: str) -> dict[str, Shape]:
    return {name.removeprefix(prefix): shape for name, shape in group.items()}


def _kinds(names: Shapes, where: str) -> list[tuple[Kind, Naming]]:
    """The possible kinds of the tensors under one prefix; empty if unknown."""
    heads = {name.split(".", 1)[0] for name in names}
    if heads & _CONTROLS:
        return []
    found = [kind for kind, test in _DENOISERS.items() if test <= heads]
    if len({kind for kind, _ in found}) < len(found):
        raise ModelError(
            f"{where}: this file has both the original's and diffusers' names of tensors; give a file with one of them"
        )
    for test, kind in _TRANSFORMERS:
        if not found and "transformer_blocks" in heads and test <= heads:
            found = [(kind, Naming.DIFFUSERS)]
    if found:
        return found[:1]
    if "decoder" in heads and any(name.startswith("decoder.layers.") for name in names):
        return [(Kind.TINY_VAE, Naming.DIFFUSERS)]
    if "1.weight" in names and "3.conv.0.weight" in names:
        return [(Kind.TINY_VAE, Naming.ORIGINAL)]
    if any(name.startswith(("decoder.conv_in.", "decoder.conv_out.", "encoder.conv_in.")) for name in names):
        own = any(name.startswith(("decoder.mid_block.", "decoder.up_blocks.")) for name in names)
        return [(Kind.VAE, Naming.DIFFUSERS if own else Naming.ORIGINAL)]
    if any(name.startswith("transformer.resblocks.") for name in names):
        return [(Kind.CLIP, Naming.OPEN_CLIP)]
    if "embeddings" in heads or any(name.startswith("encoder.layers.") for name in names):
        return [(Kind.CLIP, Naming.DIFFUSERS)]
    if "shared" in heads or any(name.startswith("encoder.block.") for name in names):
        return [(Kind.T5, Naming.DIFFUSERS)]
    return [(Kind.T5, Naming.GGML)] if "enc" in heads else []


# ControlNets also have the layers of the denoiser that they control.
_CONTROLS = frozenset({"control_model", "controlnet_cond_embedding", "controlnet_blocks", "input_hint_block"})
# By the first words of names that only they have.
_DENOISERS: Mapping[tuple[Kind, Naming], set[str]] = {
    (Kind.UNET, Naming.ORIGINAL): {"input_blocks"},
    (Kind.UNET, Naming.DIFFUSERS): {"down_blocks", "conv_in"},
    (Kind.SD3, Naming.ORIGINAL): {"joint_blocks"},
    (Kind.FLUX, Naming.ORIGINAL): {"double_blocks"},
    (Kind.PIXART, Naming.ORIGINAL): {"blocks", "t_block", "y_embedder"},
    (Kind.AURAFLOW, Naming.ORIGINAL): {"double_layers"},
    (Kind.AURAFLOW, Naming.DIFFUSERS): {"joint_transformer_blocks"},
    (Kind.HUNYUANDIT, Naming.ORIGINAL): {"blocks", "mlp_t5"},
    (Kind.HUNYUANDIT, Naming.DIFFUSERS): {"blocks", "time_extra_emb"},
    (Kind.LUMINA, Naming.DIFFUSERS): {"layers", "time_caption_embed"},
}
_TRANSFORMERS = (
    ({"adaln_single"}, Kind.PIXART),
    ({"single_transformer_blocks"}, Kind.FLUX),
    ({"pos_embed", "time_text_embed"}, Kind.SD3),
)
