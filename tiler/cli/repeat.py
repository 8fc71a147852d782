"""`--from IMG`: the options of a render from what a picture says of itself, under what is typed beside it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tiler.errors import ModelError, UsageError
from tiler.output.recipes import Recipe, read_recipe
from tiler.output.texts import opened, read_texts
from tiler.request import Region, Scheduler, ScheduleType, parse_scheduler, settings
from tiler.request.choices import Mask, parse_schedule_type
from tiler.request.render import OF_THE_MACHINE
from tiler.request.settings import Kind

_SAMPLERS = {
    "euler": Scheduler.EULER, "euler_a": Scheduler.EULER_A, "euler_ancestral": Scheduler.EULER_A,
    "ddim": Scheduler.DDIM, "dpmpp_2m": Scheduler.DPMPP_2M, "dpm++2m": Scheduler.DPMPP_2M,
    "dpmpp_2m_k": Scheduler.DPMPP_2M_KARRAS,
    "uni_pc": Scheduler.UNIPC, "unipc": Scheduler.UNIPC, "lcm": Scheduler.LCM,
}  # fmt: skip
_KARRAS_OWN = (None, Scheduler.DPMPP_2M_KARRAS)  # with its schedule type in its name, or not told
_OF_THE_RUN = (*OF_THE_MACHINE, "metadata", "embd_dir", "model_dirs")  # never the picture's
_PARTS = {
    "diffusion_model": Kind.MODEL, "vae": Kind.VAE, "text_encoder": Kind.TEXT_ENCODER, "clip_l": Kind.TEXT_ENCODER,
    "clip_g": Kind.TEXT_ENCODER, "t5xxl": Kind.TEXT_ENCODER,
}  # fmt: skip
_NEVER = (*_OF_THE_RUN, "size", "preset")  # resolved in others
_UNTOLD = re.compile(
    r"Version|.*[Hh]ash(es)?|VAE|RNG|Schedule type|scheduler|denoise|SDCPP|kernels|model_id|bleed_mm|revision"
)


class Repeated(NamedTuple):
    """Values by the names of RenderRequest's fields, and what a user should know of them."""

    values: dict[str, Any]
    notes: list[str]


def repeat(picture: Path, typed: frozenset[str], defaults: Mapping[str, Any]) -> Repeated:
    """What `picture` says for those fields of a request that are not `typed`; one of ours says all of them, by `defaults` where
    it is silent. Raises UsageError, ModelError."""
    fields = frozenset(defaults)
    try:
        recipe = read_recipe(read_texts(picture))
        if recipe.lacks:
            raise ModelError(f"{recipe.lacks}; `tiler info` shows what was found")
        values = {name: v for name, v in recipe.settings.items() if name in fields and name not in (*_NEVER, *typed)}
        if "model" in values:
            values["model"] = _found(str(values["model"]), Kind.MODEL, "model")
        values |= {name: _found(str(values[name]), kind, name) for name, kind in _PARTS.items() if values.get(name)}
        if "scheduler" in values:
            values["scheduler"] = _scheduler(str(values["scheduler"]), recipe)
        if not recipe.is_whole and "schedule_type" not in typed and values.get("scheduler") not in _KARRAS_OWN:
            values["schedule_type"] = _levels(recipe)
        if "guide_image" in values:
            values["guide_image"] = _guide(str(values["guide_image"]), picture)
    except ModelError as error:
        raise ModelError(f"{picture}: {error}") from error
    if "regions" in values:
        values["regions"] = tuple(map(_region, values["regions"]))
    if isinstance(interval := values.get("guidance_interval"), list):
        values["guidance_interval"] = tuple(interval)
    if "Hires upscale" in recipe.others:
        values |= {name: side for name, side in _size(picture).items() if name not in typed}
    if values.get("paper") is not None:
        values = {name: value for name, value in values.items() if name not in ("width", "height")}
    values = {name: value for name, value in values.items() if value is not None}
    if recipe.is_whole:
        silent = {name: v for name, v in defaults.items() if name not in typed and name not in _OF_THE_RUN}
        values = silent | values
    return Repeated(values, list(_notes(recipe, fields)))


def _notes(recipe: Recipe, fields: frozenset[str]) -> Iterator[str]:
    if recipe.tool != "tiler":
        yield f"made by {recipe.tool}, whose noise and steps differ: expect a picture of this kind, not the same one"
    unknown = [name for name in recipe.settings if name not in fields and name not in _NEVER]
    others = [name for name in recipe.others if not _UNTOLD.fullmatch(name)]
    if unknown + others:
        yield f"not taken from the picture: {', '.join(unknown + others)}"
    if recipe.tool == "InvokeAI" and re.search(r"[\w)][+-]+(?=[\s,.]|$)", str(recipe.settings.get("prompt", ""))):
        yield "InvokeAI's weights like word++ are read as plain words"


def _found(name: str, kind: Kind, field: str) -> str:
    """A file by its name: `mini`, a hub id, or what is called so in the folders. Raises ModelError, UsageError."""
    stem, flag = re.sub(r"\.(safetensors|ckpt|gguf)$", "", name.replace("\\", "/")), f"--{field.replace('_', '-')}"
    if name == "mini" or re.fullmatch(r"[\w.-]+/[\w.-]+", name) or Path(name).exists():
        return name
    found = settings.find(kind, stem.rpartition("/")[2])
    if len(found) > 1:
        raise UsageError(f"several files are called {stem!r}: {', '.join(map(str, found))}; give {flag}")
    if not found:
        raise ModelError(f"made with the {field} {stem!r}, which is in none of the {kind}; give {flag}")
    return str(found[0])


def _scheduler(name: str, recipe: Recipe) -> Scheduler:
    """A sampler by the names of several tools, and the noise levels told beside it. Raises ModelError."""
    folded = name.lower().removesuffix("_gpu").strip()
    levels = str(recipe.others.get("Schedule type", recipe.others.get("scheduler", ""))).lower()
    try:
        scheduler = _SAMPLERS.get(folded) or parse_scheduler(name)
    except UsageError as error:
        raise ModelError(f"made with the sampler {name!r}, which tiler lacks; give --scheduler") from error
    if levels == "karras" and scheduler is Scheduler.DPMPP_2M:
        return Scheduler.DPMPP_2M_KARRAS
    return scheduler


def _levels(recipe: Recipe) -> ScheduleType | None:
    """How another tool spread the noise levels; None for the scheduler's own way. Raises ModelError."""
    name = str(recipe.others.get("Schedule type", recipe.others.get("scheduler", "")))
    if name.lower() in ("", "automatic", "normal"):
        return None
    try:
        return parse_schedule_type(name.replace("_", " "))
    except UsageError as error:
        raise ModelError(f"made with the schedule type {name!r}, which tiler lacks; give --schedule-type") from error


def _guide(name: str, picture: Path) -> Path:
    """The guide's file, beside the picture or here. Raises ModelError."""
    for folder in (picture.parent, Path()):
        if (path := folder / name).is_file():
            return path
    raise ModelError(f"made from the guide {name}, which is not beside it; give --guide")


def _region(said: Mapping[str, Any]) -> Region:
    values = dict(said) | {"rows": tuple(said["rows"]), "cols": tuple(said["cols"])}
    return Region(**values | {"mask": None if values.get("mask") is None else Mask(values["mask"])})


def _size(picture: Path) -> dict[str, int]:
    with opened(picture) as image:
        return {"width": image.width, "height": image.height}
