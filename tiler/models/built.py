"""The models of a checkpoint on the meta device, each built once for the whole run."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from tiler.models.applied import Applied
from tiler.models.family import Family, Part, Role, VaeSpec, build_vae
from tiler.weights.changes import Changes


class Models:
    """The modules of a family's parts, built on first use and kept: shapes without data, a few MB. Planning, packing
    and the phases use the same modules one after another (compute/lending.py).

    `decoder` decodes the picture: the checkpoint's own autoencoder, or the `tiny` one, which may also be there for
    previews alone. `loras` holds the changes to the weights. `rehearsed` is for planning: what running a part on shapes
    gave, by all that it depends on, because the plans of one run ask the same again.
    """

    def __init__(self, family: Family, tiny: VaeSpec | None = None, *, previews_only: bool = False) -> None:
        self.family, self.tiny = family, tiny
        self.decoder = family.autoencoder if tiny is None or previews_only else tiny
        self._built: dict[str, Any] = {}
        self.loras = Applied()
        self.rehearsed: dict[Hashable, Any] = {}

    def module(self, part: Part) -> Any:
        """The module of a part of the family."""
        if part.name not in self._built:
            self._built[part.name] = part.build()
        return self._built[part.name]

    def changes(self, part: Part) -> Changes:
        """The changes that LoRAs make to a part, by parameter."""
        return self.loras.of(part.name)

    def vae(self, spec: VaeSpec) -> Any:
        """The family's own autoencoder, or the tiny one."""
        if spec is self.family.autoencoder:
            return self.module(self.family.part(Role.VAE))
        assert spec is self.tiny
        if spec.part not in self._built:
            self._built[spec.part] = build_vae(spec)
        return self._built[spec.part]

    def build(self, *, encoders: bool = True) -> None:
        """Build all modules, or all except the text encoders. This also imports all code that they need."""
        for part in self.family.parts:
            if encoders or part.role is not Role.TEXT_ENCODER:
                self.module(part)
        for spec in (self.decoder, self.tiny):
            if spec is not None:
                self.vae(spec)
