"""A planned render, and the facts that `tiler plan` prints of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tiler.models.built import Models
from tiler.models.family import Role
from tiler.planning.render import RenderPlan
from tiler.planning.summary import summarise
from tiler.planning.time import Speed
from tiler.request import RenderRequest, ResolvedRequest

if TYPE_CHECKING:
    from tiler.cluster.outlook import Outlook


@dataclass(frozen=True, kw_only=True)
class Planned:
    """How a render would be carried out, and the request it was planned for, without gaps."""

    said: RenderRequest
    request: ResolvedRequest
    plan: RenderPlan
    models: Models
    advice: str  # on what would need less memory, where the plan does not fit
    replan: Callable[[ResolvedRequest], RenderPlan]  # how others would be carried out
    speed: Speed | None = None  # of this machine, where it is known already
    cluster: Outlook | None = None  # what the workers that were asked for would bring

    def check(self) -> None:
        """Raises BudgetRefused where it does not fit."""
        self.plan.memory.check(table=False, advice=self.advice)

    def facts(self) -> dict[str, Any]:
        """What `tiler plan --json` prints; measures this machine's speed for half a second."""
        with torch.no_grad():
            speed = self.speed or speed_of(self.models)
            facts = summarise(self.said, self.request, self.plan, self.models, speed, self.replan)
        if self.cluster is not None:
            saved = self.cluster.alone_seconds - self.cluster.canvas_seconds
            whole = max(0, round(facts["expected_seconds"] - saved))
            facts["cluster"] = self.cluster.facts() | {"expected_seconds": whole}
        return facts


def speed_of(models: Models) -> Speed:
    """Of this machine, and of the disk with the denoiser's weights."""
    family = models.family
    stored = family.checkpoint.weights(family.part(Role.DENOISER).name).values()
    return Speed(max(stored, key=lambda info: info.nbytes).path)
