"""Validated requests, which hold only the values that the user gave. Knows nothing of models or memory, and imports no
torch."""

from __future__ import annotations

from tiler.request.choices import (
    MAX_SEED,
    MAX_SIDE,
    MAX_STEPS,
    PIXEL_STEP,
    PRESETS,
    Decode,
    Emphasis,
    GuideUpscale,
    Layout,
    Mask,
    Precision,
    Preset,
    Scheduler,
    ScheduleType,
    ScratchDtype,
    TileConditioning,
    Wrap,
    parse_scheduler,
)
from tiler.request.decode import DecodeRequest, DoctorRequest, EncodeRequest, QuantizeRequest
from tiler.request.loras import Lora
from tiler.request.model import ModelOptions, Prediction
from tiler.request.regions import Region, read_regions
from tiler.request.render import RenderRequest, ResolvedRequest

__all__ = [
    "MAX_SEED",
    "MAX_SIDE",
    "MAX_STEPS",
    "PIXEL_STEP",
    "PRESETS",
    "Decode",
    "DecodeRequest",
    "DoctorRequest",
    "Emphasis",
    "EncodeRequest",
    "GuideUpscale",
    "Layout",
    "Lora",
    "Mask",
    "ModelOptions",
    "Precision",
    "Prediction",
    "Preset",
    "QuantizeRequest",
    "Region",
    "RenderRequest",
    "ResolvedRequest",
    "ScheduleType",
    "Scheduler",
    "ScratchDtype",
    "TileConditioning",
    "Wrap",
    "parse_scheduler",
    "read_regions",
]
