"""Describe a model to people: its family and prediction, the source and storage of each part, the decisions that were
made and why, and what is missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from tiler.errors import TilerError
from tiler.models.contents import DENOISERS
from tiler.models.family import Family, open_family
from tiler.models.kinds import family_of, row_of_pipeline
from tiler.models.own_defaults import read_defaults
from tiler.models.part_files import WeightFile
from tiler.models.required import fetch_part
from tiler.request import RenderRequest
from tiler.request.model import ModelOptions
from tiler.weights.checkpoint import Checkpoint, resolve
from tiler.weights.flavours import read_json
from tiler.weights.hub import DEFAULTS
from tiler.weights.index import TensorInfo
from tiler.weights.places import expand

_PARTS = "text_encoder", "tokenizer", "unet", "transformer", "vae", "scheduler"  # and text_encoder_2 and so on
_MISSING = "missing"


def diagnose(options: ModelOptions) -> tuple[dict[str, str], TilerError | None]:
    """Facts under headings, in print order, and the reason if the model cannot be opened. Raises ModelError for a file
    of unknown kind."""
    path = expand(options.diffusion_model or options.model)
    facts = _of_file(WeightFile(path)) if path.is_file() else {}
    try:
        family = open_family(options)
    except TilerError as error:
        if not (facts := facts or _of_folder(options)):
            raise
        return facts | {"missing or wrong": str(error)}, error
    return {"model": family.checkpoint.name} | facts | _of_family(family), None


def _of_file(file: WeightFile) -> dict[str, str]:
    parts = [f"{part.kind} ({part.naming} names, {len(part.shapes)} tensors)" for part in file.contents.parts]
    facts = {"in the file": ", ".join(parts)}
    denoisers = file.contents.find(*DENOISERS)
    if denoisers:
        facts["family"] = family_of(denoisers[0], str(file.path)).title
    if file.contents.ignored:
        facts["left out"] = ", ".join(f"{name} ({count})" for name, count in sorted(file.contents.ignored.items()))
    if unknown := file.contents.unknown:
        facts["unknown names"] = f"{len(unknown)}: {', '.join(unknown[:3])}" + ("…" if len(unknown) > 3 else "")
    if said := file.words.get("modelspec.architecture"):
        facts["its header says"] = said
    return facts


def _of_folder(options: ModelOptions) -> dict[str, str]:
    """What the folder of a model that cannot be opened has of the parts that it names, and the command that fetches the
    missing ones. Nothing if there is no such folder."""
    try:
        found = resolve(
            options.model, variant=options.variant, revision=options.revision, model_dirs=options.model_dirs
        )
        named = {} if found.file is not None else found.config("", "model_index.json")
    except TilerError:
        return {}
    parts = {name: what for name, what in named.items() if name.startswith(_PARTS) and isinstance(what, list)}
    states = {name: _state(found, name) for name, what in parts.items() if None not in what}
    unet, pipeline = found.folder / "unet" / "config.json", str(named.get("_class_name"))
    row = row_of_pipeline(pipeline, read_json(unet) if unet.is_file() else {})
    if missing := [name for name, state in states.items() if state == _MISSING]:
        states["to fetch them"] = fetch_part(found, row.others if row is not None else "", *missing)
    return {"model": found.name, "family": pipeline if row is None else row.title} | states


def _state(found: Checkpoint, name: str) -> str:
    """How a part of a folder is stored, or what is wrong with it."""
    folder = found.folder / name
    if not folder.is_dir() or not any(folder.iterdir()):
        return _MISSING
    if name.startswith(("tokenizer", "scheduler")):
        return "found"
    if not (folder / "config.json").is_file():
        return "config.json is missing"
    try:
        return _stored(found.weights(name))
    except TilerError as error:
        return str(error)


def _of_family(family: Family) -> dict[str, str]:
    found, facts = family.checkpoint, {"family": family.traits.title}
    told = found.sources.get("scheduler")
    predicts = "flow" if family.traits.flow else str(family.scheduler.get("prediction_type", "epsilon"))
    by = told.label if told is not None else f"{found.folder / 'scheduler'}/scheduler_config.json"
    facts["prediction"] = f"{predicts.removesuffix('_prediction')} ({by})"
    facts["scheduler"] = str(family.scheduler.get("_class_name"))
    facts["native size"] = f"{8 * family.traits.native} px"
    for part in family.parts:
        source = found.sources.get(part.name)
        where = source.label if source is not None else str(found.folder / part.name)
        facts[part.name] = f"{_stored(found.weights(part.name))}, from {where}"
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        folder: Path = found.tokenizer(name)
        if folder.is_dir():
            facts[name] = str(folder)
    if found.file is None and (own := read_defaults(found.folder)):
        facts["its own defaults"] = f"{_defaults(own)} ({found.folder / DEFAULTS})"
    notes = dict.fromkeys((*found.notes, *family.notes))
    return facts | {f"note {number}": note for number, note in enumerate(notes, 1)}


def _defaults(own: Mapping[str, Any]) -> str:
    """The model's own defaults, by the names of the options."""
    names = {f.name: next(iter(f.metadata["option"].names), "PROMPT") for f in fields(RenderRequest)}
    said = dict(own)
    if isinstance(prompts := own.get("prompt"), tuple):
        said["prompt"] = f"one of {len(prompts)}, by the seed"
    if "guidance_interval" in own:
        said["guidance_interval"] = "-".join(f"{share:g}" for share in own["guidance_interval"])
    return ", ".join(f"{names[key]} {value}" for key, value in said.items())


def _stored(tensors: Mapping[str, TensorInfo]) -> str:
    """The number of tensors in each format, most frequent first, and their bytes."""
    counts = Counter(info.dtype for info in tensors.values())
    formats = ", ".join(f"{count} {dtype}" for dtype, count in counts.most_common())
    return f"{formats}; {sum(info.nbytes for info in tensors.values()) / 1e6:,.0f} MB"
