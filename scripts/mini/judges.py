"""The evaluations that `evaluate.py` offers; each prints what it found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import art
import numpy as np
import torch
from captions import caption
from classifier import SIDE, accuracy, draw_labelled, features, frechet_distance, read, trained_classifier
from labels import labels
from machine import DEVICE
from pictures import PROMPTS, generate, load_pipeline, page
from PIL import Image
from pool import HELD_OUT, choose_view
from posters import judge_poster
from refinement import compare_refined
from roundness import disc_roundness, scenes_of_big_suns
from torch import Tensor
from workshop import Workshop, psnr, resized, to_tensor

_ATTRIBUTE_SEEDS, _DISTANCE_SEEDS, _POSTER_SEEDS = HELD_OUT + 1_000, HELD_OUT + 20_000, HELD_OUT + 9_000


@dataclass(frozen=True, kw_only=True)
class Settings:
    model: Path
    workshop: Workshop
    steps: int  # of training the classifier
    count: int  # pictures, 0: as many as the evaluation says
    width: int
    height: int
    strength: float
    seed: int
    out: Path


def sheet(settings: Settings) -> None:
    seeds = [settings.seed + k for k in range(len(PROMPTS))]
    pictures = generate(load_pipeline(settings.model), PROMPTS, seeds)
    page(list(pictures), columns=6, side=256).save(settings.out)
    print("\n".join(f"{k:2} {prompt}" for k, prompt in enumerate(PROMPTS)))


def posters(settings: Settings) -> None:
    classifier = trained_classifier(settings.workshop, settings.steps)
    pictures, more = [], []
    for k in range(settings.seed, settings.seed + (settings.count or 4)):
        prompt = caption(art.compose(_POSTER_SEEDS + k), np.random.default_rng(k), keep=1.0)
        found = judge_poster(settings.model, prompt, settings.width, settings.height, k, classifier)
        pictures.append(_thumbnail(found.picture, 512))  # fifty canvases would take 600 MB
        if found.discs > 1:
            more.append(k)
        low, high = found.seams.elsewhere
        print(
            f"{k:2} {prompt}\n   seams {found.seams.borders:.2f} (elsewhere {low:.2f}–{high:.2f}), "
            f"likeness to the guide {found.likeness:.3f}, discs {found.discs}",
            flush=True,
        )
        page(pictures, columns=2 if len(pictures) <= 4 else 10, side=512).save(settings.out)
    print(f"second discs in {len(more)} of {len(pictures)}: {more}")


def _thumbnail(picture: np.ndarray, side: int) -> np.ndarray:
    image = Image.fromarray(picture)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return np.asarray(image)


def attributes(settings: Settings) -> None:
    classifier = trained_classifier(settings.workshop, settings.steps)
    seeds = [_ATTRIBUTE_SEEDS + k for k in range(settings.count or 200)]
    scenes = [art.compose(seed) for seed in seeds]
    pictures, seen = draw_labelled(scenes)
    drawn = accuracy(read(classifier, pictures), seen)
    made = accuracy(read(classifier, _generated(settings, seeds)), labels(scenes))
    for name, share in drawn.items():
        print(
            f"{name:28} drawn {share:6.1%}   generated {made[name]:6.1%}   relative {made[name] / max(share, 1e-6):6.1%}"
        )


def distance(settings: Settings) -> None:
    """By pictures of as many held-out scenes: those drawn, and those generated from their captions."""
    classifier = trained_classifier(settings.workshop, settings.steps)
    count = settings.count or 2000
    seeds = [_DISTANCE_SEEDS + k for k in range(2 * count)]
    drawn = torch.cat(
        [
            features(classifier, draw_labelled([art.compose(seed) for seed in seeds[k : k + 100]])[0])
            for k in range(0, len(seeds), 100)
        ]
    )
    made = features(classifier, _generated(settings, seeds[:count]))
    print(f"generated against drawn, {count} each: {frechet_distance(made, drawn[:count]):.3f}")
    print(f"generated against as many others drawn: {frechet_distance(made, drawn[count:]):.3f}")
    print(f"drawn against drawn: {frechet_distance(drawn[:count], drawn[count:]):.3f}")


def _generated(settings: Settings, seeds: list[int]) -> Tensor:
    """(n, 3, 128, 128): pictures for the full captions of these scenes."""
    rng = np.random.default_rng(2)
    prompts = [caption(art.compose(seed), rng, keep=1.0) for seed in seeds]
    pictures = generate(load_pipeline(settings.model), prompts, seeds)
    small = [np.asarray(Image.fromarray(p).resize((SIDE, SIDE), Image.Resampling.BOX)) for p in pictures]
    return to_tensor(np.stack(small))


def discs(settings: Settings) -> None:
    asked, rng = scenes_of_big_suns(settings.count or 200), np.random.default_rng(3)
    prompts = [caption(scene, rng, keep=1.0) for scene, _ in asked]
    pictures = generate(load_pipeline(settings.model), prompts, [scene.seed for scene, _ in asked])
    every = [disc_roundness(picture, *drawn) for picture, drawn in zip(pictures, asked, strict=True)]
    found = [shape for shape in every if shape is not None]
    low, middle, high = np.percentile(found, (25, 50, 75))
    print(
        f"roundness of big suns, 1 for a circle: median {middle:.3f}, quartiles {low:.3f} and {high:.3f}; {len(found)} of "
        f"{len(every)} pictures measured"
    )
    page(list(pictures[:48]), columns=8, side=256).save(settings.out)


@torch.no_grad()
def autoencoder(settings: Settings) -> None:
    """In fp32, as `tiler` decodes: bf16 costs 0.3 to 0.5 dB on crops. Also of latents halved in size, against the
    halved picture: the nearer to the first figure, the smoother the latent space."""
    vae, rng = load_pipeline(settings.model).vae, np.random.default_rng(0)
    for name in ("scenes", "crops"):
        found, smaller = [], []
        for k in range(settings.count or 200):
            scene = art.compose(HELD_OUT + k)
            view = choose_view(rng, scene) if name == "crops" else None
            x = to_tensor(art.draw(scene, view).pixels[None, 64:192, 64:192], DEVICE)
            z = vae.encode(x).latent_dist.mean
            found.append(psnr(vae.decode(z).sample, x).item())
            smaller.append(psnr(vae.decode(resized(z, 8)).sample, resized(x, 64)).item())
        print(
            f"{name}: PSNR {np.mean(found):.2f} dB, median {np.median(found):.2f}, least {min(found):.2f}; "
            f"of halved latents {np.mean(smaller):.2f} dB"
        )


def refine(settings: Settings) -> None:
    pictures = []
    for k in range(settings.count or 4):
        found = compare_refined(settings.model, k, settings.width, settings.strength)
        pictures += [found.picture, found.drawn]
        low, high = found.seams.elsewhere
        print(
            f"{found.prompt}\n   seams {found.seams.borders:.2f} (elsewhere {low:.2f}–{high:.2f})\n"
            "   wavelength, px: refined and Lanczos against the drawing"
        )
        for wavelength, (refined, lanczos) in found.octaves.items():
            print(f"   {wavelength:7.0f}: {refined:+5.1f} dB  {lanczos:+5.1f} dB", flush=True)
    page(pictures, columns=2, side=settings.width).save(settings.out)


JUDGES: dict[str, Callable[[Settings], None]] = {
    "sheet": sheet,
    "posters": posters,
    "attributes": attributes,
    "distance": distance,
    "discs": discs,
    "autoencoder": autoencoder,
    "refine": refine,
}
