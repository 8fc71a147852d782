"""A planned render, and the facts that `tiler plan` prints about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tiler.diffusion.guide_picture import size_of
from tiler.models.built import Models
from tiler.models.family import Role
from tiler.planning.render import RenderPlan
from tiler.planning.summary import guide_of, summarise, with_old_names
from tiler.planning.time import Speed
from tiler.request import RenderRequest, ResolvedRequest

if TYPE_CHECKING:
    from tiler.cluster.outlook import Outlook


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A render's plan, and the request it was made for with all gaps filled."""

    said: RenderRequest
    request: ResolvedRequest
    plan: RenderPlan
    models: Models
    advice: str  # what would need less memory, if the plan does not fit
    replan: Callable[[ResolvedRequest], RenderPlan]  # plans another request
    speed: Speed | None = None  # of this machine, if it is known already
    smaller: Planned | None = None  # the plan of the picture that is rendered first
    cluster: Outlook | None = None  # the expected gain from the workers, if a cluster was asked for

    @property
    def pictures(self) -> list[Planned]:
        """This picture, and those that are rendered first, the largest first."""
        return [self, *([] if self.smaller is None else self.smaller.pictures)]

    def check(self) -> None:
        """Raises BudgetRefused if the plan of a picture does not fit."""
        for one in reversed(self.pictures):
            one.plan.memory.check(table=False, advice=one.advice)

    def facts(self) -> dict[str, Any]:
        """The facts that `tiler plan --json` prints. Measures this machine's speed for half a second."""
        with torch.no_grad():
            speed = self.speed or speed_of(self.models)
            facts = summarise(self.said, self.request, self.plan, self.models, speed, self.replan)
        facts["smaller"] = []
        for first in self.pictures[1:]:
            facts["smaller"].insert(0, f"{first.request.width}×{first.request.height}")
            facts["guide"] = guide_of(first.plan)
            facts["denoiser_calls"] += first.plan.denoiser_calls
            facts["predicted_peak_bytes"] = max(facts["predicted_peak_bytes"], first.plan.memory.peak_bytes)
            for choice in facts, *facts["hints"]:
                name = "smallest_max_ram_bytes"
                choice[name] = max(choice[name], first.plan.memory.smallest_bytes)
        facts = with_old_names(facts)
        if (guide := self.request.guide_image) is not None:
            own = self.request.width, self.request.height  # of a picture that is repainted
            width, height = size_of(guide) if self.plan.spot is None else own
            facts["guide_image"] = {"path": str(guide), "width": width, "height": height}
        if self.cluster is not None:
            saved = self.cluster.alone_seconds - self.cluster.canvas_seconds
            saved += self.cluster.encode_alone_seconds - self.cluster.encode_seconds
            saved += self.cluster.decode_alone_seconds - self.cluster.decode_seconds
            whole = max(0, round(facts["expected_seconds"] - saved))
            facts["cluster"] = self.cluster.facts() | {"expected_seconds": whole}
        return facts


def speed_of(models: Models) -> Speed:
    """The speed of this machine and of the disk that holds the denoiser's weights."""
    family = models.family
    stored = family.checkpoint.weights(family.part(Role.DENOISER).name).values()
    return Speed(max(stored, key=lambda info: info.nbytes).path)
