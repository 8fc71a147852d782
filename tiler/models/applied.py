"""The changes that a render's LoRAs make to a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tiler.request.loras import Lora
from tiler.weights.changes import Changes
from tiler.weights.lora_files import Digests


@dataclass(frozen=True, kw_only=True)
class Applied:
    """The changes of a render's LoRAs, by part and parameter. `files` holds the digests of the LoRA files, and `notes`
    are for the user."""

    changes: Mapping[str, Changes] = field(default_factory=dict)
    files: tuple[tuple[Lora, Digests], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def found(self) -> tuple[Lora, ...]:
        """The files and their strengths."""
        return tuple(lora for lora, _ in self.files)

    @property
    def hashes(self) -> dict[str, str]:
        """The files' hashes by name, as they are written into pictures."""
        return {lora.file.stem: digests.short for lora, digests in self.files}

    @property
    def said(self) -> list[dict[str, str | float]]:
        """Everything that determines the changes, independent of where the files are."""
        return [
            {"name": lora.file.stem, "strength": lora.strength, "text_strength": lora.text_strength, "sha256": d.whole}
            for lora, d in self.files
        ]

    def marks(self, changes: Iterable[Changes]) -> list[str]:
        """What tells the files behind `changes` from others, and these in their strengths; sorted."""
        strengths = {
            (info.path, one.strength)
            for each in changes
            for some in each.values()
            for one in some
            for info in one.infos
        }
        digests = {lora.file: found.whole for lora, found in self.files}
        return sorted(f"{digests[path]} {strength!r}" for path, strength in strengths)

    def of(self, part: str) -> Changes:
        """The changes of a part, by parameter."""
        return self.changes.get(part, {})
