"""Detect checkpoints that were distilled to few steps without guidance, like Turbo, Lightning and LCM models."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

FEW_STEPS: Mapping[str, Any] = MappingProxyType({"num_inference_steps": 4, "guidance_scale": 1.0})
"""Defaults of such a model, by field of RenderRequest."""
_NAMES = frozenset({"turbo", "lightning", "lcm", "hyper", "dmd", "dmd2"})
_WORD = re.compile(r"[A-Z]+(?![a-z])\d*|[A-Z]?[a-z]+\d*|\d+")


def sign_of_few_steps(name: str, scheduler: Mapping[str, Any]) -> str | None:
    """The reason, for people, to believe that a checkpoint is such a model, from its name (folder or hub id) or its
    scheduler_config.json; None if there is none."""
    said = [word for word in _WORD.findall(re.split(r"[/\\]", name.rstrip("/\\"))[-1]) if word.lower() in _NAMES]
    if said:
        return f"its name says {said[0]}"
    cls = str(scheduler.get("_class_name"))
    if cls == "LCMScheduler":
        return "its scheduler is LCM"
    if cls == "EulerAncestralDiscreteScheduler" and scheduler.get("timestep_spacing") == "trailing":
        return "its scheduler is Euler a with trailing timesteps"
    return None


def note_of(sign: str, guidance: str = "no guidance") -> str:
    """The note on the defaults of such a model, which `sign` gave away."""
    return f"a few-step model ({sign}): by default {FEW_STEPS['num_inference_steps']} steps, {guidance}"
