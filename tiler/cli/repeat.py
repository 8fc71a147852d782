"""`--from IMG`: take the options of a render from a picture's metadata; typed options win."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tiler.errors import ModelError, UsageError
from tiler.files import sha256_of
from tiler.jobs.manifest import option_name
from tiler.output.recipes import Recipe, read_recipe
from tiler.output.texts import opened, read_texts
from tiler.request import Region, Scheduler, ScheduleType, parse_scheduler
from tiler.request.choices import Mask, parse_schedule_type
from tiler.request.loras import Lora
from tiler.request.render import OF_THE_RUN
from tiler.request.settings import Kind
from tiler.weights.folders import files, find
from tiler.weights.hashes import is_called
from tiler.weights.lora_files import digests_of

# Endings of sampler names that include the schedule type: in A1111 before 1.9, and in InvokeAI.
_ENDINGS = {" karras": ScheduleType.KARRAS, " exponential": ScheduleType.EXPONENTIAL, "_k": ScheduleType.KARRAS}
_KARRAS_OWN = (Scheduler.DPMPP_2M_KARRAS,)  # schedulers whose own name includes the schedule type
_PARTS = {
    "diffusion_model": Kind.MODEL, "vae": Kind.VAE, "text_encoder": Kind.TEXT_ENCODER, "clip_l": Kind.TEXT_ENCODER,
    "clip_g": Kind.TEXT_ENCODER, "t5xxl": Kind.TEXT_ENCODER,
}  # fmt: skip
_NEVER = (*OF_THE_RUN, "size", "preset", "scale")  # other fields hold what these resolved to
_UNTOLD = re.compile(
    r"Version|.*[Hh]ash(es)?|VAE|RNG|Schedule type|denoise|SDCPP|sampler|"
    r"kernels|model_id|bleed_mm|revision|.*_sha256"
)
_INVOKE_WEIGHT = re.compile(r"[\w)][+-]+(?=[\s,.]|$)|\)\d")


class Repeated(NamedTuple):
    """Values by the names of RenderRequest's fields, and notes for the user."""

    values: dict[str, Any]
    notes: list[str]


def repeat(
    picture: Path, typed: frozenset[str], defaults: Mapping[str, Any], model_dirs: Sequence[Path] = (), *,
    by_preset: frozenset[str] = frozenset(), repaints: bool = False,
) -> Repeated:  # fmt: skip
    """The values that `picture` gives for the fields of a request that are not `typed`. A picture by tiler gives all of
    them: those that it does not mention have their `defaults`. Models are searched in `model_dirs` (--model-dir) and in
    the folders of the configuration. A note names the picture's values that a typed preset replaces, `by_preset`.
    `repaints`: a mask is typed. Raises UsageError, ModelError."""
    fields, notes = frozenset(defaults), list[str]()
    try:
        recipe = read_recipe(read_texts(picture))
        if recipe.lacks:
            raise ModelError(f"{recipe.lacks}; `tiler info` shows what was found")
        values = {name: v for name, v in recipe.settings.items() if name in fields and name not in (*_NEVER, *typed)}
        if "model" in typed:  # variant and revision belong to the picture's model
            values = {name: value for name, value in values.items() if name not in ("variant", "revision")}
        if "model" in values:
            values["model"], said = _model(str(values["model"]), recipe, model_dirs)
            notes += said
        for name, kind in _PARTS.items():
            if values.get(name):
                try:
                    values[name] = _found(str(values[name]), kind, name, model_dirs)
                except ModelError as error:
                    if recipe.is_whole:
                        raise
                    notes.append(f"{str(error).partition(';')[0]}: the model's own takes its place")
                    del values[name]
        if "scheduler" in values:
            values["scheduler"], spread = _scheduler(str(values["scheduler"]), recipe)
            if not recipe.is_whole and "schedule_type" not in typed and values["scheduler"] not in _KARRAS_OWN:
                values["schedule_type"] = _levels(recipe) or spread
        for name, flag in (("guide_image", "guide"), ("repaint", "repaint")):
            if name in values:
                values[name] = _beside(str(values[name]), picture, flag)
                notes += _changed(values[name], flag, recipe)
    except ModelError as error:
        raise ModelError(f"{picture}: {error}") from error
    if "loras" in values:
        values["loras"] = tuple(_lora(said, picture) for said in _members("loras", "--lora", values["loras"], picture))
    changed = list(_changed_loras(recipe, picture))
    if "regions" in values:
        try:
            values["regions"] = tuple(map(_region, _members("regions", "--regions", values["regions"], picture)))
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(
                f"{picture}: its metadata about regions cannot be read ({error}); give --regions"
            ) from error
    if isinstance(interval := values.get("guidance_interval"), list):
        values["guidance_interval"] = tuple(interval)
    if "Hires upscale" in recipe.others:
        values |= {name: side for name, side in _size(picture).items() if name not in typed}
    repaints = repaints or "repaint" in values
    if values.get("paper") is not None or repaints:
        values = {name: value for name, value in values.items() if name not in ("width", "height")}
    if repaints:
        values.pop("layout", None)  # a spot's tiles always lie on a grid
    values = {name: value for name, value in values.items() if value is not None}
    if recipe.is_whole:
        silent = {name: v for name, v in defaults.items() if name not in typed and name not in OF_THE_RUN}
        values = silent | values
    if lost := [
        option_name(name) for name, value in recipe.settings.items() if name in by_preset and value is not None
    ]:
        notes.append(f"--preset takes the place of the picture's {', '.join(lost)}")
    return Repeated(values, [*_notes(recipe, fields), *notes, *changed])


def _notes(recipe: Recipe, fields: frozenset[str]) -> Iterator[str]:
    if recipe.tool != "tiler":
        yield f"made by {recipe.tool}, whose noise and steps differ: expect a similar picture, not the same one"
    unknown = [name for name in recipe.settings if name not in fields and name not in _NEVER]
    others = [name for name in recipe.others if not _UNTOLD.fullmatch(name)]
    if unknown + others:
        yield f"not taken from the picture: {', '.join(unknown + others)}"
    if recipe.tool == "InvokeAI" and _INVOKE_WEIGHT.search(str(recipe.settings.get("prompt", ""))):
        yield "InvokeAI's weights like word++ and (words)1.3 are read as plain text"


def _model(name: str, recipe: Recipe, model_dirs: Sequence[Path]) -> tuple[str, list[str]]:
    """Find the model by its name and by the hash in the metadata, and return notes for the user. Only files of that
    name are hashed. Raises ModelError, UsageError."""
    told = [str(recipe.others.get(key, "")) for key in ("model_hash", "Model hash", "base_model_hash")]
    told += re.findall(r'"model": *"(\w+)"', str(recipe.others.get("Hashes", "")))
    digest = next((text for text in told if re.fullmatch(r"[0-9a-fA-F]{8,64}", text)), None)
    if digest is None or _is_place(name):
        return _found(name, Kind.MODEL, "model", model_dirs), []
    named = _called(_stem(name).rpartition("/")[2], Kind.MODEL, model_dirs)
    equal = [path for path in named if is_called(path, digest, compute=True)]
    if not named:
        known = [path for path in files(Kind.MODEL) if is_called(path, digest, compute=False)]
        if known:
            return str(known[0]), [f"the model {_stem(name)!r} is called {known[0].stem!r} here; its hash is {digest}"]
    if equal:
        return str(equal[0]), []
    found = _found(name, Kind.MODEL, "model", model_dirs)
    other = Path(found).is_file()
    return found, [f"{found} is not the file that the picture was made with, whose hash is {digest}"] if other else []


def _found(name: str, kind: Kind, field: str, model_dirs: Sequence[Path]) -> str:
    """The place of a model or a part of one: `mini`, a hub id, an existing path, or the file of that name in the
    folders. Raises ModelError, UsageError."""
    stem, flag = _stem(name), f"--{field.replace('_', '-')}"
    if _is_place(name):
        return name
    found = _called(stem.rpartition("/")[2], kind, model_dirs)
    if len(found) > 1:
        raise UsageError(f"several files are called {stem!r}: {', '.join(map(str, found))}; give {flag}")
    if not found:
        raise ModelError(f"made with the {field} {stem!r}, which is in none of the {kind}; give {flag} with its path")
    return str(found[0])


def _called(stem: str, kind: Kind, model_dirs: Sequence[Path]) -> Sequence[Path]:
    """The files and folders of this name in --model-dir, or else in the configured folders. Raises UsageError."""
    given = [folder.resolve() for folder in model_dirs]
    return find(kind, stem, given) or find(kind, stem)


def _stem(name: str) -> str:
    return re.sub(r"\.(safetensors|ckpt|gguf)$", "", name.replace("\\", "/"))


def _is_place(name: str) -> bool:
    """Whether no folder has to be searched: `name` is `mini`, a hub id, or an existing path."""
    return name == "mini" or re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None or Path(name).exists()


def _scheduler(name: str, recipe: Recipe) -> tuple[Scheduler, ScheduleType | None]:
    """The scheduler for a sampler's name in any of several tools, and the schedule type that the name includes. Raises
    ModelError."""
    folded, spread = name.lower().removesuffix("_gpu").strip(), None
    levels = str(recipe.others.get("Schedule type", "")).lower()
    known = _sampler(folded)
    if known is None and (ending := next((end for end in _ENDINGS if folded.endswith(end)), None)) is not None:
        known, spread = _sampler(folded.removesuffix(ending)), _ENDINGS[ending]
    if known is None:
        raise ModelError(f"made with the sampler {name!r}, which tiler lacks; give --scheduler")
    if levels == "karras" and known is Scheduler.DPMPP_2M:
        return Scheduler.DPMPP_2M_KARRAS, None
    return known, spread


def _sampler(folded: str) -> Scheduler | None:
    try:
        return parse_scheduler(folded)
    except UsageError:
        return None


def _levels(recipe: Recipe) -> ScheduleType | None:
    """The schedule type that another tool used; None for the scheduler's own. Raises ModelError."""
    name = str(recipe.others.get("Schedule type", ""))
    if name.lower() in ("", "automatic", "normal"):
        return None
    try:
        return parse_schedule_type(name.replace("_", " "))
    except UsageError as error:
        raise ModelError(f"made with the schedule type {name!r}, which tiler lacks; give --schedule-type") from error


def _beside(name: str, picture: Path, flag: str) -> Path:
    """A file that the picture was made from, found beside the picture or in the current folder. Raises ModelError."""
    for folder in (picture.parent, Path()):
        if (path := folder / name).is_file():
            return path
    what = "guide" if flag == "guide" else "mask"
    raise ModelError(f"made from the {what} {name}, which is neither beside it nor here; give --{flag} with its path")


def _changed(path: Path, flag: str, recipe: Recipe) -> Iterator[str]:
    """A note if a guide or a mask is not the file that the picture was made from."""
    what = "guide" if flag == "guide" else "mask"
    was = recipe.others.get(f"{what}_sha256")
    try:
        if was is not None and was != sha256_of(path):
            yield f"{path} is not the {what} that the picture was made from: the file has changed"
    except OSError:
        return  # the render says why it cannot be read


def _lora(said: Mapping[str, Any], picture: Path) -> Lora:
    """A LoRA's file, found beside the picture, in the current folder, or in the lora_dirs. Raises ModelError."""
    try:
        name, strength, text_strength = str(said["file"]), float(said["strength"]), float(said["text_strength"])
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{picture}: its metadata about LoRAs cannot be read ({error}); give --lora") from error
    if not (found := _lora_files(name, picture)):
        raise ModelError(f"made with the LoRA {name}, which is neither beside it nor in the lora_dirs; give --lora")
    return Lora(file=found[0], strength=strength, text_strength=text_strength)


def _lora_files(name: str, picture: Path) -> Sequence[Path]:
    beside = [path for folder in (picture.parent, Path()) if (path := folder / f"{name}.safetensors").is_file()]
    return beside or find(Kind.LORA, name)


def _changed_loras(recipe: Recipe, picture: Path) -> Iterator[str]:
    """Notes on LoRAs whose files are not the ones that the picture was made with."""
    ours = recipe.others.get("lora_hashes")
    pairs = (
        ours.items()
        if isinstance(ours, dict)
        else re.findall(r"([^,:]+): *(\w+)", str(recipe.others.get("Lora hashes", "")))
    )
    for name, was in pairs:
        files = _lora_files(str(name).strip(), picture)
        if files and (now := digests_of(files[0]).short)[: len(str(was))] != was:
            yield f"the picture was made with another file of the LoRA {name}: its hash was {was}, {files[0]} has {now}"


def _members(name: str, flag: str, said: Any, picture: Path) -> list[Any]:
    if not isinstance(said, list):
        raise ModelError(f"{picture}: its metadata about {name} cannot be read: {said!r}; give {flag}")
    return said


def _region(said: Mapping[str, Any]) -> Region:
    values = dict(said) | {"rows": tuple(said["rows"]), "cols": tuple(said["cols"])}
    return Region(**values | {"mask": None if values.get("mask") is None else Mask(values["mask"])})


def _size(picture: Path) -> dict[str, int]:
    with opened(picture) as image:
        return {"width": image.width, "height": image.height}
