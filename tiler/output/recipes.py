"""Read how a picture was made from its file's texts, as values of RenderRequest's fields. The sources are tiler's own
JSON, AUTOMATIC1111 and its kin (Forge, sd.cpp), InvokeAI, SwarmUI, Fooocus, and ComfyUI's graph."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tiler.errors import ModelError
from tiler.output.comfy import read_graph
from tiler.output.infotext import parse_infotext


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The metadata of a picture. `settings` are values of RenderRequest's fields as the file gives them, `others` the
    values without such a field; `lacks` says why the picture cannot be repeated ("" if it can). If `is_whole`, the
    recipe names everything that was not at its default."""

    tool: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    others: Mapping[str, Any] = field(default_factory=dict)
    lacks: str = ""
    is_whole: bool = False


_INFOTEXT = {
    "Steps": "num_inference_steps", "Sampler": "scheduler", "CFG scale": "guidance_scale", "Seed": "seed",
    "Model": "model", "Denoising strength": "strength", "Clip skip": "clip_skip", "Hires prompt": "canvas_prompt",
}  # fmt: skip
_EMPHASIS = {"no norm": "no-norm", "ignore": "ignore", "none": "none"}  # A1111's words to tiler's
_READ = ("Size", "VAE", "Emphasis", "Tiling")  # fields that are read in addition to _INFOTEXT
_SWARM = {
    "prompt": "prompt", "negativeprompt": "negative_prompt", "model": "model", "seed": "seed",
    "steps": "num_inference_steps", "cfgscale": "guidance_scale", "width": "width", "height": "height",
    "sampler": "scheduler",
}  # fmt: skip
_FOOOCUS = {
    "prompt": "prompt", "negative_prompt": "negative_prompt", "base_model": "model", "seed": "seed",
    "steps": "num_inference_steps", "guidance_scale": "guidance_scale", "sampler": "scheduler",
}  # fmt: skip
_INVOKE = {
    "positive_prompt": "prompt", "negative_prompt": "negative_prompt", "seed": "seed", "steps": "num_inference_steps",
    "cfg_scale": "guidance_scale", "width": "width", "height": "height", "scheduler": "scheduler",
    "strength": "strength",
}  # fmt: skip


def read_recipe(texts: Mapping[str, str]) -> Recipe:
    """Return the recipe in a picture's texts. Raises ModelError if they contain none that tiler knows."""
    if (own := _json(texts.get("tiler"))) is not None:
        settings = {k: v for k, v in own.items() if k not in _FACTS}
        return Recipe(tool="tiler", settings=settings, others=_of(own, _FACTS), is_whole=True)
    if (invoke := _json(texts.get("invokeai_metadata"))) is not None:
        return _invoke(invoke)
    for key in ("sd-metadata", "Dream"):
        if key in texts:
            return Recipe(tool="InvokeAI before 3.0", others={key: texts[key]}, lacks=f"its `{key}` text is not read")
    if (graph := _json(texts.get("prompt"))) is not None:
        settings, others, lacks = read_graph(graph)
        return Recipe(tool="ComfyUI", settings=settings, others=others, lacks=lacks)
    if (text := texts.get("parameters")) is not None and text.strip():
        return _parameters(text)
    raise ModelError("no parameters in this picture: its file does not say how it was made")


# Facts in tiler's own JSON that are not part of the request.
_FACTS = ("sampler", "kernels", "model_id", "model_hash", "bleed_mm", "lora_hashes", "guide_sha256", "mask_sha256")


def _parameters(text: str) -> Recipe:
    if (data := _json(text)) is not None:
        if isinstance(params := data.get("sui_image_params"), dict):
            return _named("SwarmUI", params, _SWARM)
        recipe = _named("Fooocus", data, _FOOOCUS)
        sides = re.findall(r"\d+", str(data.get("resolution", "")))
        size = dict(zip(("width", "height"), map(int, sides), strict=False)) if len(sides) == 2 else {}
        return Recipe(tool=recipe.tool, settings={**recipe.settings, **size}, others=recipe.others)
    prompt, negative, fields = parse_infotext(text)
    version = fields.get("Version", "")
    tool = "stable-diffusion.cpp" if "SDCPP" in fields or "stable-diffusion.cpp" in version else "AUTOMATIC1111"
    recipe = _named(tool if not version.startswith("tiler") else "tiler", fields, _INFOTEXT)
    if recipe.tool == "stable-diffusion.cpp":
        negative = negative or ""  # stable-diffusion.cpp encodes this if none was given
    settings: dict[str, Any] = {"prompt": prompt, "negative_prompt": negative, **recipe.settings}
    if fields.get("VAE", "None") not in ("None", "Automatic"):
        settings["vae"] = fields["VAE"]
    if (emphasis := fields.get("Emphasis", "").lower()) in _EMPHASIS:
        settings["emphasis"] = _EMPHASIS[emphasis]
    if fields.get("Tiling") == "True":
        settings["wrap"] = "xy"
    if match := re.fullmatch(r"(\d+)x(\d+)", fields.get("Size", "")):
        settings |= {"width": int(match[1]), "height": int(match[2])}
    return Recipe(
        tool=recipe.tool, settings=settings, others={k: v for k, v in recipe.others.items() if k not in _READ}
    )


def _invoke(data: Mapping[str, Any]) -> Recipe:
    recipe = _named("InvokeAI", data, _INVOKE)
    model = data.get("model")
    name = (model.get("name") or model.get("model_name")) if isinstance(model, dict) else model
    settings = recipe.settings if name is None else {**recipe.settings, "model": name}
    return Recipe(tool="InvokeAI", settings=settings, others={k: v for k, v in recipe.others.items() if k != "model"})


_TEXTS = frozenset(("prompt", "negative_prompt", "canvas_prompt", "model", "vae", "scheduler"))  # never numbers


def _named(tool: str, data: Mapping[str, Any], names: Mapping[str, str]) -> Recipe:
    told = {names[key]: value for key, value in data.items() if key in names and value is not None}
    settings = {name: str(value) if name in _TEXTS else _number(value) for name, value in told.items()}
    # A `scheduler` without a name is what AUTOMATIC1111 calls the schedule type.
    others = {"Schedule type" if key == "scheduler" else key: v for key, v in data.items() if key not in names}
    return Recipe(tool=tool, settings=settings, others=others)


def _number(value: Any) -> Any:
    """Convert a text that is an integer or a decimal number and nothing else; return any other value unchanged."""
    if isinstance(value, str) and re.fullmatch(r"-?\d{1,20}", value):
        return int(value)
    if isinstance(value, str) and re.fullmatch(r"-?\d{1,20}\.\d{1,20}", value):
        return float(value)
    return value


def _of(data: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: data[name] for name in names if name in data}


def _json(text: str | None) -> dict[str, Any] | None:
    """Return a JSON object, which may contain a bare NaN, or None for anything else."""
    if text is None or not text.lstrip().startswith("{"):
        return None
    try:
        data = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None
