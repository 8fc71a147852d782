"""Identify the family that a LoRA file was made for, and the few-step recipe that it implements, from its names, shapes
and header."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from tiler.models.family import Family, Role
from tiler.request import Scheduler, ScheduleType
from tiler.request.loras import Lora
from tiler.weights.index import TensorInfo
from tiler.weights.lora_keys import Slot, Tensors

_BY_TEXT_WIDTH = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}
_TEXT_PROJECTION = re.compile(r"attn2[._](?:processor\.)?to_k$")
_TRUNKS = (
    (re.compile(r"double_blocks|single_blocks"), "Flux"),
    (re.compile(r"joint_transformer_blocks"), "AuraFlow"),
    (re.compile(r"single_transformer_blocks"), "Flux"),
    (re.compile(r"joint_blocks"), "Stable Diffusion 3"),
    (re.compile(r"(?:^|[._])transformer_blocks[._]\d+[._]attn[._]add_"), "Stable Diffusion 3"),
    (re.compile(r"cross_attn[._](?:q_linear|kv_linear)|adaln_single|caption_projection"), "PixArt"),
)


def family_of_model(family: Family) -> str:
    """The name of the model's family as LoRAs use it."""
    if family.traits.title == "Stable Diffusion":
        width = family.part(Role.DENOISER).config.get("cross_attention_dim")
        return _BY_TEXT_WIDTH.get(width, f"Stable Diffusion with prompts of width {width}")  # type: ignore[arg-type]
    return family.traits.title


def family_of_lora(modules: Mapping[str, Tensors], said: Mapping[str, str]) -> str | None:
    """The family of a LoRA file, None if it cannot be identified; `said` is its header."""
    for name, tensors in modules.items():
        if _TEXT_PROJECTION.search(name) and (info := _takes_inputs(tensors)) is not None:
            return _BY_TEXT_WIDTH.get(info.shape[1], f"a model with prompts of width {info.shape[1]}")
    for pattern, title in _TRUNKS:
        if any(pattern.search(name) for name in modules):
            return title
    for key in ("modelspec.architecture", "ss_base_model_version"):
        if said.get(key):
            return " ".join(said[key].split())[:60]
    return None


def _takes_inputs(tensors: Tensors) -> TensorInfo | None:
    """The tensor whose second dimension is the module's inputs."""
    found = (tensors.by_slot.get(slot) for slot in (Slot.DOWN, Slot.W1_B, Slot.DIFF))
    return next((info for info in found if info is not None and len(info.shape) > 1), None)


class Recipe(NamedTuple):
    """The sampling settings of the model that a LoRA distilled: defaults by field of RenderRequest."""

    title: str
    defaults: Mapping[str, Any]


def _recipe(title: str, steps: int, guidance: float, scheduler: Scheduler) -> Recipe:
    said: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance, "scheduler": scheduler}
    if scheduler in (Scheduler.EULER, Scheduler.DDIM):
        said["schedule_type"] = ScheduleType.SGM_UNIFORM
    return Recipe(title, MappingProxyType(said))


_WORD = re.compile(r"[a-z]+|\d+")
_STEPS = re.compile(r"(\d+)[ _-]?steps?")


def few_steps(loras: Iterable[Lora], *, flow: bool) -> tuple[Path, Recipe] | None:
    """The first file of `loras` with a strength other than 0 whose name marks it as a few-step LoRA (LCM, Luo et al.
    2023, arXiv:2311.05556; Lightning, arXiv:2402.13929; or Hyper-SD, arXiv:2404.13686), and its recipe. Models trained
    by `flow` matching keep their scheduler and their guidance, which is an input of some of them."""
    for path in (lora.file for lora in loras if lora.strength):
        name = path.stem.lower()
        words = set(_WORD.findall(name))
        match = _STEPS.search(name)
        steps = int(match[1]) if match is not None and 1 <= int(match[1]) <= 16 else None
        # Not a style, such as hyper-realism or lightning bolts.
        is_of_model = steps is not None or bool(words & {"sd", "sdxl", "xl", "flux"})
        if "lcm" in words:
            found = _recipe("LCM", steps or 4, 1.0, Scheduler.LCM)
        elif "lightning" in words and is_of_model:
            found = _recipe("Lightning", steps or 4, 1.0, Scheduler.EULER)
        elif words & {"hyper", "hypersd", "hypersdxl"} and is_of_model:
            found = _recipe("Hyper-SD", steps or 8, 5.0 if "cfg" in name else 1.0, Scheduler.DDIM)
        else:
            continue
        if flow:
            found = Recipe(found.title, {"num_inference_steps": found.defaults["num_inference_steps"]})
        return path, found
    return None


class Scaling(NamedTuple):
    """The alpha of a header, for files without alpha tensors: PEFT's config as diffusers writes it, or SimpleTuner's
    own keys."""

    said: Mapping[str, Any]

    @classmethod
    def read(cls, header: Mapping[str, str]) -> Scaling:
        found: dict[str, Any] = {key: value for key, value in header.items() if key.endswith(".lora_alpha")}
        try:
            config = json.loads(header.get("lora_adapter_metadata", "{}"))
        except (ValueError, RecursionError):
            config = {}
        return cls(found | (config if isinstance(config, dict) else {}))

    def of(self, part: str, module: str, rank: int) -> float:
        """alpha / rank, or alpha / √rank if the trainer used that; 1 without an alpha."""
        alpha = _number(self.said.get(f"{part}.lora_alpha"))
        patterns = self.said.get(f"{part}.alpha_pattern")
        for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
            if module == pattern or module.endswith(f".{pattern}"):
                alpha = _number(value)
        if alpha is None:
            return 1.0
        return alpha / (rank**0.5 if self.said.get(f"{part}.use_rslora") is True else rank)


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
