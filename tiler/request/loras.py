"""The LoRAs that a request names: files with --lora, names with tags in the prompt."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from tiler.errors import UsageError
from tiler.request.prompt import Tag


@dataclass(frozen=True, kw_only=True)
class Lora:
    """A LoRA file, with its strength for the denoiser's weights and its strength for those of the text encoders."""

    file: Path
    strength: float = 1.0
    text_strength: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "file", Path(self.file))
        for strength in (self.strength, self.text_strength):
            if not math.isfinite(strength):
                raise UsageError(f"--lora {self.file}: the strength {strength} is not a number; give one like 0.8")


class NamedLora(NamedTuple):
    """The content of a LoRA tag. The file is looked up in the LoRA folders."""

    name: str
    strength: float
    text_strength: float


def parse_lora(text: str) -> Lora:
    """Parse `FILE`, `FILE=0.8` or `FILE=0.8:0.5`; the last form has a separate strength for the text encoders. Raises
    UsageError."""
    file, said, strengths = text.rpartition("=")
    if not said or os.path.exists(os.path.expanduser(text)):
        return Lora(file=Path(text))
    unet, _, encoders = strengths.partition(":")
    strength = _number(unet, text)
    return Lora(file=Path(file), strength=strength, text_strength=_number(encoders, text) if encoders else strength)


def read_loras(said: Iterable[Lora | str]) -> tuple[Lora, ...]:
    """Convert the values that a library's caller may give: `Lora(...)`, or text as for --lora. Raises UsageError."""
    return tuple(parse_lora(lora) if isinstance(lora, str) else lora for lora in said)


def parse_tag(tag: Tag) -> NamedLora:
    """Parse `<lora:NAME:0.8>`, `<lora:NAME:TEXT_ENCODER:DENOISER>`, or the same with named arguments, as in
    `<lora:NAME:te=0.5:unet=0.8>`. Raises UsageError for any other argument."""
    name, *arguments = tag.arguments
    if not name.strip():
        raise UsageError(f"{tag}: the LoRA's name is missing; write <lora:NAME:0.8>")
    said: dict[str, float] = {}
    positions = iter(("te", "unet"))
    for argument in arguments:
        key, named, value = argument.rpartition("=")
        key = key.strip() if named else next(positions, "")
        if key not in ("te", "unet") or key in said:
            raise UsageError(
                f"{tag}: {argument!r} cannot be applied; a tag is <lora:NAME:0.8> or <lora:NAME:te=0.5:unet=0.8>"
            )
        said[key] = _number(value, str(tag))
    text = said.get("te", 1.0)
    return NamedLora(name.strip(), said.get("unet", text), text)


def summed(loras: Iterable[Lora]) -> tuple[Lora, ...]:
    """Each file once: if a file is named several times, its strengths are added. Raises UsageError if two different
    files have the same name."""
    found: dict[Path, Lora] = {}
    for lora in loras:
        path = Path(os.path.realpath(lora.file.expanduser()))
        if (before := found.get(path)) is not None:
            lora = replace(
                before,
                strength=before.strength + lora.strength,
                text_strength=before.text_strength + lora.text_strength,
            )
        found[path] = lora
    names: dict[str, Path] = {}
    for lora in found.values():
        if (other := names.setdefault(lora.file.stem, lora.file)) != lora.file:
            raise UsageError(f"two LoRAs are called {other.stem}, {other} and {lora.file}; rename one of them")
    return tuple(found.values())


def _number(text: str, whole: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"{whole}: the strength {text!r} is not a number; give one like 0.8")
    return number
