"""A model folder's own defaults for renders: tiler.toml beside model_index.json."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tiler.errors import ModelError, UsageError
from tiler.request import RenderRequest, parse_scheduler
from tiler.request.prompt import parse_prompt
from tiler.weights.hub import DEFAULTS

_MAX_BYTES = 100_000
_KEYS: Mapping[str, tuple[type, ...]] = {
    "prompt": (str, list), "negative_prompt": (str,), "num_inference_steps": (int,), "guidance_scale": (int, float),
    "guidance_interval": (list,), "strength": (int, float), "scheduler": (str,), "layout": (str,),
    "guide_upscale": (str,), "guide_sharpen": (int,),
}  # fmt: skip


def read_defaults(folder: Path) -> dict[str, Any]:
    """The defaults by field of RenderRequest; empty without such a file. `prompt` may be a tuple, from which the seed
    chooses one. Raises ModelError."""
    path = folder / DEFAULTS
    if not path.is_file():
        return {}
    said = _read(path)
    for key, value in said.items():
        if key not in _KEYS:
            raise ModelError(f"{path}: unknown key {key!r}; known are {', '.join(_KEYS)}")
        if not isinstance(value, _KEYS[key]) or isinstance(value, bool):
            raise ModelError(f"{path}: {key} = {value!r} has the wrong type; correct the file")
    if isinstance(prompts := said.get("prompt"), list):
        if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise ModelError(f"{path}: prompt = {prompts!r} is neither a text nor a list of texts; correct the file")
        said["prompt"] = tuple(prompts)
    if (interval := said.get("guidance_interval")) is not None:
        if len(interval) != 2 or not all(type(share) in (int, float) for share in interval):
            raise ModelError(f"{path}: guidance_interval = {interval!r} is not two numbers, such as [0, 0.75]")
        said["guidance_interval"] = tuple(interval)
    try:
        for prompt in (prompts,) if isinstance(prompts, str) else said.get("prompt", ()):
            for tag in parse_prompt(prompt).tags:
                raise ModelError(f"{path}: {tag}: a model's own prompt names no LoRA; give it with --lora")
        if "scheduler" in said:
            said["scheduler"] = parse_scheduler(said["scheduler"])
        for key in ("layout", "guide_upscale"):
            if key in said:
                said[key] = getattr(RenderRequest(**{key: said[key]}), key)
        RenderRequest(**{key: value for key, value in said.items() if key != "prompt"})
    except UsageError as error:
        raise ModelError(f"{path}: {error}") from error
    return said


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ModelError(f"{path}: larger than {_MAX_BYTES} bytes; this is no file of defaults")
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    except (UnicodeDecodeError, RecursionError, tomllib.TOMLDecodeError) as error:
        raise ModelError(f"{path}: not valid TOML ({error})") from error
