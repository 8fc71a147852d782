"""A checkpoint in one file, as sharing sites have them: which family, its configs from the shapes of its tensors, and where the
parameters lie.

Names are those of CompVis' and Stability AI's repositories, which other trainers keep; what shapes cannot say stands in `_KINDS`.
Nothing is decided by the file's name, and nothing is fetched.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from tiler.errors import ModelError
from tiler.memory.lean_imports import lean_imports
from tiler.models.vocabulary import END, clip_tokenizer
from tiler.weights.checkpoint import Checkpoint, PartSource
from tiler.weights.gguf import is_gguf, read_gguf
from tiler.weights.index import TensorInfo, read_index
from tiler.weights.names import converted
from tiler.weights.store import WeightStore

Index = Mapping[str, TensorInfo]
UNET, VAE, CLIP, OPEN_CLIP = (
    "model.diffusion_model.",
    "first_stage_model.",
    "cond_stage_model.transformer.",
    "cond_stage_model.model.",
)
_IGNORED = re.compile(
    r"model_ema\.|.*position_ids$|betas$|alphas_cumprod|sqrt_|posterior_|log_one_minus|.*logit_scale$|.*attn_mask$|loss\."
)
_SCALED = re.compile(r"scale_weight$|weight_scale$|scaled_fp8$|comfy_quant$")
_OTHERS = {
    "joint_blocks.": "Stable Diffusion 3", "double_blocks.": "Flux", "cross_attn.kv_linear.": "PixArt",
    "lora_": "a LoRA",
    "control_model.": "a ControlNet",
}  # fmt: skip
_V_DEVIATION = 0.09  # of a bias of Stable Diffusion 2: above it the model predicts v (comfyanonymous/ComfyUI, SD20)
_V_BIAS = f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
_SCHEDULER = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000, "clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True,
    "steps_offset": 1,
}  # fmt: skip


class _Kind(NamedTuple):
    """What shapes do not say. `heads`: of every level, None for a head each 64 channels. `pad`: what fills a prompt."""

    title: str
    cross_width: int
    heads: int | None
    scaling_factor: float
    hidden_act: str
    scheduler: str
    pad: str = END


_KINDS = (
    _Kind("Stable Diffusion 1.x", 768, 8, 0.18215, "quick_gelu", "PNDMScheduler"),
    _Kind("Stable Diffusion 2.x", 1024, None, 0.18215, "gelu", "DDIMScheduler", "!"),
)


def read_single(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint in `checkpoint.file` with a source for each part, and notes on what was decided. Raises ModelError, naming what
    the file is."""
    assert checkpoint.file is not None
    path = checkpoint.file
    index = {name: info for name, info in _index(path).items() if not _IGNORED.match(name)}
    if scaled := next((name for name in index if _SCALED.search(name)), None):
        raise ModelError(
            f"{path}: {scaled!r} scales weights of 8 bits, which tiler does not read from single files; use an fp16 file"
        )
    open_clip = any(name.startswith(OPEN_CLIP) for name in index)
    try:
        kind = _kind(path, index)
        unet, vae = _unet_config(index, kind), _vae_config(index, kind)
        text = _text_config(index, kind, OPEN_CLIP if open_clip else CLIP)
        predicts, why = _prediction(index, kind)
    except (KeyError, IndexError) as error:
        raise ModelError(f"{path}: tensor {error} is missing; download the file again") from error
    with lean_imports():
        from diffusers.loaders import single_file_utils as diffusers
    convert: dict[str, tuple[dict[str, Any], Callable[[dict[str, Any]], Mapping[str, Any]]]] = {
        "unet": (unet, partial(diffusers.convert_ldm_unet_checkpoint, config=unet)),
        "vae": (vae, partial(diffusers.convert_ldm_vae_checkpoint, config=vae)),
        "text_encoder": (text, diffusers.convert_ldm_clip_checkpoint),
    }
    if open_clip:
        model = SimpleNamespace(config=SimpleNamespace(hidden_size=text["hidden_size"]))
        convert["text_encoder"] = text, partial(diffusers.convert_open_clip_checkpoint, model)
    sources = {part: PartSource(config=config, index=converted(index, how)) for part, (config, how) in convert.items()}
    sources[""] = PartSource(config={"_class_name": "StableDiffusionPipeline"})
    sources["scheduler"] = PartSource(config=_SCHEDULER | {"_class_name": kind.scheduler, "prediction_type": predicts})
    note = f"{path.name} is {kind.title}, which predicts {predicts.removesuffix('_prediction')} ({why})"
    return checkpoint.with_sources(sources, {"tokenizer": clip_tokenizer(kind.pad)}, (note,))


def _index(path: Path) -> dict[str, TensorInfo]:
    return read_gguf(path).tensors if is_gguf(path) else read_index(path)


def _kind(path: Path, index: Index) -> _Kind:
    """Raises ModelError for what is no whole Stable Diffusion 1.x or 2.x."""
    for mark, what in _OTHERS.items():
        if any(mark in name for name in index):
            raise ModelError(
                f"{path}: this single file is {what}; of single files tiler reads Stable Diffusion 1.x and 2.x"
            )
    cross = next(
        (info for name, info in index.items() if name.startswith(UNET) and name.endswith("attn2.to_k.weight")), None
    )
    missing = [
        what for prefixes, what in (((UNET,), "denoiser"), ((VAE,), "autoencoder"), ((CLIP, OPEN_CLIP), "text encoder"))
        if not any(name.startswith(prefixes) for name in index)
    ]  # fmt: skip
    if cross is None or missing:
        raise ModelError(
            f"{path}: no {' and no '.join(missing) or 'cross attention'} is in this file; --model takes a whole checkpoint"
        )
    width, channels = cross.shape[1], index[f"{UNET}input_blocks.0.0.weight"].shape[1]
    if f"{UNET}time_embed.cond_proj.weight" in index:
        raise ModelError(
            f"{path}: this is an LCM with embedded guidance, which tiler does not support; use an LCM LoRA's merged model"
        )
    if kind := {9: "an inpainting model", 8: "an InstructPix2Pix model", 7: "an upscaler", 5: "a depth model"}.get(
        channels
    ):
        raise ModelError(f"{path}: the UNet takes {channels} channels: this is {kind}; tiler needs text-to-image")
    found = next((kind for kind in _KINDS if kind.cross_width == width), None)
    if found is None:
        what = {2048: "SDXL", 1280: "SDXL's refiner"}.get(width, f"of another family (text of width {width})")
        raise ModelError(
            f"{path}: this single file is {what}; of single files tiler reads Stable Diffusion 1.x and 2.x"
        )
    return found


def _count(index: Index, pattern: str) -> int:
    """How many numbers stand where `pattern` has its group."""
    found = (re.match(pattern, name) for name in index)
    return len({match[1] for match in found if match is not None})


def _unet_config(index: Index, kind: _Kind) -> dict[str, Any]:
    levels: list[list[tuple[int, bool]]] = [[]]  # (channels, whether attention follows) of each resnet, by level
    for n in range(1, _count(index, re.escape(UNET) + r"input_blocks\.(\d+)\.")):
        block = f"{UNET}input_blocks.{n}."
        if f"{block}0.op.weight" in index:
            levels.append([])
        else:
            levels[-1].append((index[f"{block}0.out_layers.3.weight"].shape[0], f"{block}1.proj_in.weight" in index))
    widths, attends = [level[0][0] for level in levels], [level[0][1] for level in levels]
    first = f"{UNET}middle_block.1.proj_in.weight"
    return {
        "_class_name": "UNet2DConditionModel",
        "in_channels": index[f"{UNET}input_blocks.0.0.weight"].shape[1],
        "out_channels": index[f"{UNET}out.2.weight"].shape[0],
        "block_out_channels": widths,
        "layers_per_block": len(levels[0]),
        "down_block_types": ["CrossAttnDownBlock2D" if some else "DownBlock2D" for some in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if some else "UpBlock2D" for some in reversed(attends)],
        "cross_attention_dim": kind.cross_width,
        "attention_head_dim": kind.heads or [width // 64 for width in widths],  # diffusers' name for their number
        "use_linear_projection": len(index[first].shape) == 2,
        "sample_size": 96 if _prediction(index, kind)[0] == "v_prediction" else 64,
    }


def _vae_config(index: Index, kind: _Kind) -> dict[str, Any]:
    count = _count(index, re.escape(VAE) + r"encoder\.down\.(\d+)\.")
    if not count:
        raise KeyError(f"{VAE}encoder.down.0.block.0.conv2.weight")
    down = f"{VAE}encoder.down."
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": index[f"{VAE}decoder.conv_in.weight"].shape[1],
        "block_out_channels": [index[f"{down}{i}.block.0.conv2.weight"].shape[0] for i in range(count)],
        "layers_per_block": _count(index, re.escape(down) + r"0\.block\.(\d+)\."),
        "down_block_types": ["DownEncoderBlock2D"] * count,
        "up_block_types": ["UpDecoderBlock2D"] * count,
        "scaling_factor": kind.scaling_factor,
    }


def _text_config(index: Index, kind: _Kind, prefix: str) -> dict[str, Any]:
    names = {
        name.removeprefix(prefix).removeprefix("text_model."): info
        for name, info in index.items()
        if name.startswith(prefix)
    }
    table = names.get("embeddings.token_embedding.weight") or names["token_embedding.weight"]
    wide = names.get("encoder.layers.0.mlp.fc1.weight") or names["transformer.resblocks.0.mlp.c_fc.weight"]
    layers = _count(names, r"(?:encoder\.layers|transformer\.resblocks)\.(\d+)\.")
    return {
        "model_type": "clip_text_model",
        "hidden_size": table.shape[1],
        "intermediate_size": wide.shape[0],
        "num_hidden_layers": min(layers, 23)
        if prefix == OPEN_CLIP
        else layers,  # Stable Diffusion 2 leaves out the last of 24
        "num_attention_heads": max(1, table.shape[1] // 64),
        "hidden_act": kind.hidden_act,
        "vocab_size": table.shape[0],
        "max_position_embeddings": 77,
        "eos_token_id": 49407,
    }


def _prediction(index: Index, kind: _Kind) -> tuple[str, str]:
    """Epsilon or v_prediction, and by what that was told."""
    if "v_pred" in index:
        return "v_prediction", "it holds the key v_pred"
    if kind.cross_width != 1024 or _V_BIAS not in index:
        return "epsilon", "as models of this family do"
    with WeightStore({"bias": index[_V_BIAS]}) as store:
        deviation = float(torch.std(store.load("bias"), correction=0))
    what = "v_prediction" if deviation > _V_DEVIATION else "epsilon"
    return what, f"told by the deviation {deviation:.3f} of a bias"
