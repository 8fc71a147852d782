"""Regions: rectangles of the canvas with their own prompts, given by keywords or a TOML file."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from tiler.errors import UsageError
from tiler.request.choices import MAX_SEED, PIXEL_STEP, Mask, within


@dataclass(frozen=True, kw_only=True)
class Region:
    """A rectangle of the canvas with its own prompt. `rows` and `cols` are (first, last + 1) in canvas pixels."""

    prompt: str
    rows: tuple[int, int]
    cols: tuple[int, int]
    negative_prompt: str | None = None
    guidance_scale: float | None = None
    seed: int | None = None
    mask: Mask | None = None
    mask_weight: float = 1.0

    def __post_init__(self) -> None:
        for name, span in (("rows", self.rows), ("cols", self.cols)):
            if len(span) != 2 or not all(type(v) is int for v in span) or not 0 <= span[0] < span[1]:
                raise UsageError(
                    f"region {self.prompt!r}: {name} = {list(span)} is not [first, last] in canvas pixels with first < last"
                )
            if span[0] % PIXEL_STEP or span[1] % PIXEL_STEP:
                raise UsageError(
                    f"region {self.prompt!r}: {name} = {list(span)} must be multiples of {PIXEL_STEP} pixels"
                )
        within("guidance_scale", self.guidance_scale, 0, 100)
        within("seed", self.seed, 0, MAX_SEED)
        if not 1e-100 < self.mask_weight < 1e100:  # nor NaN
            raise UsageError(
                f"region {self.prompt!r}: mask_weight = {self.mask_weight} must be a positive number of ordinary size; "
                "take one near 1"
            )


def read_regions(path: Path) -> tuple[str | None, tuple[Region, ...]]:
    """Read the top-level prompt (None if absent) and the [[region]] tables of a TOML file. Raises UsageError."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except (UnicodeDecodeError, RecursionError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path}: not valid TOML ({error})") from error
    if unknown := data.keys() - {"prompt", "region"}:
        raise UsageError(f"{path}: unknown key {sorted(unknown)[0]!r}; the file holds `prompt` and [[region]] tables")
    tables, prompt = data.get("region", []), data.get("prompt")
    if not isinstance(tables, list) or not tables or not isinstance(prompt, str | None):
        raise UsageError(f"{path}: no [[region]] table; see `tiler render --help` for an example")
    return prompt, tuple(_region(path, i, table) for i, table in enumerate(tables, 1))


_TYPES: Mapping[str, tuple[type, ...]] = {
    "prompt": (str,), "negative_prompt": (str,), "rows": (list,), "cols": (list,), "guidance_scale": (int, float),
    "seed": (int,), "mask": (str,), "mask_weight": (int, float),
}  # fmt: skip


def _region(path: Path, number: int, table: dict[str, Any]) -> Region:
    if not isinstance(table, dict):
        raise UsageError(f"{path}: region {number} is not a table; write [[region]] and its keys below")
    known = {f.name for f in fields(Region)}
    for key, value in table.items():
        if key not in known:
            raise UsageError(
                f"{path}: region {number} has an unknown key {key!r}; known are {', '.join(sorted(known))}"
            )
        if not isinstance(value, _TYPES[key]) or isinstance(value, bool):
            raise UsageError(f"{path}: region {number}: {key} = {value!r} has the wrong type")
    if missing := {"prompt", "rows", "cols"} - table.keys():
        raise UsageError(f"{path}: region {number} has no {sorted(missing)[0]!r}; add it")
    values = dict(table)
    if "mask" in values:
        if values["mask"] not in tuple(Mask):
            raise UsageError(f"{path}: region {number}: mask = {values['mask']!r}; choose {', '.join(Mask)}")
        values["mask"] = Mask(values["mask"])
    try:
        return replace(
            Region(prompt=values.pop("prompt"), rows=tuple(values.pop("rows")), cols=tuple(values.pop("cols"))),
            **values,
        )
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
