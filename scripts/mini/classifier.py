"""A small network that reads from pictures what prompts ask for. Trained here, on drawings alone, and judged by
drawings that it never saw."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import replace

import art
import numpy as np
import torch
import torch.nn.functional as F
from art import Body, Scene, Thing
from captions import as_seen
from labels import ATTRIBUTES, OBJECTS, attribute_loss, labels
from machine import DEVICE, autocast
from optimisers import step_size
from pool import HELD_OUT, shares_of
from torch import Tensor, nn
from workshop import Workshop, log, to_tensor

SIDE = 128  # px, what it sees
FEATURES = 64
_PART, _PARTS = 8, 3  # drawings; parts of a batch: larger ones take longer per drawing
_KEPT = 800  # parts: 630 MB
_LR = 2e-3
_LEAST_DISC = 0.001  # of the picture: less of a disc is hidden
_SECOND_DISC = 0.2  # share of drawings with a disc that get another one


class Classifier(nn.Module):
    """(n, 3, 128, 128) in [-1, 1] → FEATURES → logits of each attribute. Its last map keeps places apart: sides are
    places."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for a, b in ((3, 24), (24, 48), (48, 96), (96, 128)):
            layers += [nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU()]
            layers += [nn.Conv2d(b, b, 3, 1, 1), nn.BatchNorm2d(b), nn.ReLU()]
        self.features = nn.Sequential(
            *layers,
            nn.AdaptiveMaxPool2d((4, 4)),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(128 * 16, FEATURES),
            nn.ReLU(),
        )
        self.heads = nn.ModuleDict({name: nn.Linear(FEATURES, classes) for name, classes in ATTRIBUTES.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.features(x)
        return {name: head(features) for name, head in self.heads.items()}


def trained_classifier(workshop: Workshop, steps: int) -> Classifier:
    """The one in the workshop, else a new one, which is the same each time on one kind of machine."""
    torch.manual_seed(8)
    model = Classifier().to(DEVICE)
    if (state := workshop.load_state("classifier")) is not None:
        model.load_state_dict(state)
        return model.eval()
    optimiser = torch.optim.AdamW(model.parameters(), lr=_LR, weight_decay=0.01)
    batches = _batches(np.random.default_rng(1))
    for step, (pictures, want) in zip(range(steps), batches, strict=False):
        for group in optimiser.param_groups:
            group["lr"] = step_size(_LR, step, 1 - step / steps, falling=0.5)
        with autocast():
            got = model(_roughened(pictures).to(DEVICE))
        loss = attribute_loss({n: v.float() for n, v in got.items()}, {n: v.to(DEVICE) for n, v in want.items()})
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 100 == 99:
            log(f"classifier step {step + 1} loss {loss.item():.3f}")
    workshop.save_state("classifier", model.state_dict())
    return model.eval()


def _batches(rng: np.random.Generator) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Endless batches of drawings and what can be seen in them. A drawing takes longer than learning from it, so one
    part of a batch is new, and the others are parts of earlier ones."""
    kept: deque[tuple[Tensor, dict[str, Tensor]]] = deque(maxlen=_KEPT)
    while True:
        scenes = []
        for seed in rng.integers(HELD_OUT, size=_PART).tolist():
            scene = art.compose(seed)
            scenes.append(with_second_disc(scene, rng) if scene.discs and rng.random() < _SECOND_DISC else scene)
        pictures, seen = draw_labelled(scenes)
        kept.append((pictures.half(), seen))
        parts = [kept[-1], *(kept[k] for k in rng.integers(len(kept), size=_PARTS - 1))]
        want = {name: torch.cat([part[1][name] for part in parts]) for name in seen}
        yield torch.cat([part[0] for part in parts]).float(), want


def with_second_disc(scene: Scene, rng: np.random.Generator) -> Scene:
    """A mistake that a model could make and our drawings never do: counting needs examples of it."""
    first = scene.discs[0]
    right = first.x < 0.5 * scene.aspect  # where there is more room
    room = 0.95 * scene.aspect - first.x if right else first.x - 0.05 * scene.aspect
    apart = rng.uniform(2.1 * first.radius, max(2.2 * first.radius, room))
    x = first.x + apart if right else first.x - apart
    other = replace(first, x=x, y=rng.uniform(0.12, 0.35), radius=first.radius * rng.uniform(0.6, 1.0))
    return replace(scene, discs=(first, other))


def draw_labelled(scenes: list[Scene]) -> tuple[Tensor, dict[str, Tensor]]:
    """Pictures (n, 3, 128, 128) and what can be seen in them."""
    drawings = [art.draw(scene, None, SIDE, SIDE) for scene in scenes]
    seen = [_as_seen(scene, drawing.things) for scene, drawing in zip(scenes, drawings, strict=True)]
    return to_tensor(np.stack([d.pixels for d in drawings])), labels(seen)


def _as_seen(scene: Scene, things: np.ndarray) -> Scene:
    """The scene without what is hidden, each of its discs by itself."""
    side = len(things)
    y, x = np.mgrid[:side, :side] / side
    shown = things == Thing.BODY.number
    discs = [d for d in scene.discs if (shown & (np.hypot(x - d.x, y - d.y) < d.radius)).mean() > _LEAST_DISC]
    return replace(as_seen(scene, shares_of(things)), body=scene.body if discs else Body.NONE, discs=tuple(discs))


def _roughened(pictures: Tensor) -> Tensor:
    """Generated pictures are neither perfectly flat nor everywhere sharp."""
    soft = F.interpolate(F.avg_pool2d(pictures, 2), scale_factor=2.0, mode="bilinear")
    mixed = torch.where(torch.rand(len(pictures), 1, 1, 1) < 0.4, soft, pictures)
    return mixed + 0.05 * torch.randn_like(mixed)


@torch.no_grad()
def read(model: Classifier, pictures: Tensor) -> dict[str, Tensor]:
    """Logits on the processor."""
    return {name: logits.cpu() for name, logits in model(pictures.to(DEVICE)).items()}


@torch.no_grad()
def features(model: Classifier, pictures: Tensor) -> Tensor:
    """(n, FEATURES), the last layer before the heads."""
    return torch.cat([model.features(part.to(DEVICE)).cpu() for part in pictures.split(64)])


def accuracy(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    """Share of pictures read as `want` says; of an object, of those pictures that should have it."""
    right = {name: got[name].argmax(1) == want[name] for name in ATTRIBUTES if name != "objects"}
    shares = {name: hits.float().mean().item() for name, hits in right.items()}
    shares["disc: kind, side and count"] = (right["body"] & right["side"] & right["count"]).float().mean().item()
    found = got["objects"] > 0
    for k, thing in enumerate(OBJECTS):
        asked = want["objects"][:, k] > 0.5
        shares[thing.value] = found[asked, k].float().mean().item() if asked.any() else float("nan")
    return shares


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Between two samples of features (n, FEATURES), taken as Gaussians (Heusel et al. 2017, arXiv:1706.08500, equation
    6)."""
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)
