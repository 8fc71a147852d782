"""What a render's LoRAs change of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tiler.request.loras import Lora
from tiler.weights.changes import Changes
from tiler.weights.lora_files import Digests


@dataclass(frozen=True, kw_only=True)
class Applied:
    """What a render's LoRAs change, by part and parameter; `files` have their digests. `notes` are for the user."""

    changes: Mapping[str, Changes] = field(default_factory=dict)
    files: tuple[tuple[Lora, Digests], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def hashes(self) -> dict[str, str]:
        """By the names of the files, as pictures tell them."""
        return {lora.file.stem: digests.short for lora, digests in self.files}

    @property
    def said(self) -> list[dict[str, str | float]]:
        """All that decides what they change, wherever the files lie."""
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
        """By parameter of a part."""
        return self.changes.get(part, {})
