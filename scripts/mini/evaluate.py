"""Judge `mini` with drawings it never saw: `evaluate.py autoencoder`, `attributes`, `sheet`, `enlarge`, `refine`, `poster`, `int8`.

    autoencoder   PSNR of the decoded encoding, held-out whole scenes and crops at 1/4 scale
    attributes    a small classifier, trained here on drawn scenes, reads palette, terrain, sun or moon (kind and side) and
                  objects from held-out drawings and from pictures generated for held-out prompts
    sheet         24 prompts drawn with guidance 4 in 20 steps, as one PNG
    enlarge       a drawn 256-px scene four times as large by `--guide-upscale pixel` and `latent`, before any denoising,
                  against the scene drawn that large: sharpness on its edges, specks in its flat areas
    refine        the same after the canvas, by `tiler`'s defaults and at --strength
    poster        --size squared in each of --ways (presets, cheaper samples), as one picture beside their guides: seconds,
                  gradient across the borders of tiles against beside them, correlation of the shrunken picture with its
                  guide, PSNR against the first of the ways
    int8          256-px pictures for 16 prompts, int8 against fp32 with the same seeds: PSNR

Held-out seeds begin at data.HELD_OUT. Judges the folder given by --model (default: the embedded one).
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from itertools import count
from pathlib import Path
from typing import Any

import captions
import numpy as np
import scenes
import torch
import torch.nn.functional as F
from data import HELD_OUT, ahead, random_view, to_tensor
from diffusers import StableDiffusionPipeline
from heads import ATTRIBUTES, DEVICE, attribute_loss, labels
from PIL import Image
from torch import Tensor, nn

from tiler import Budget, RenderRequest, render
from tiler.compute import cpu
from tiler.decode.rows import to_uint8
from tiler.diffusion import guide
from tiler.models.family import read_family
from tiler.plan.tiling import plan_tiling
from tiler.request import PRESETS, Layout, Precision
from tiler.weights.checkpoint import resolve

SIDE = 128  # px, what the classifier sees
WAYS: dict[str, dict[str, Any]] = {
    **{preset.value: dict(settings) for preset, settings in PRESETS.items()},
    "shift": {"layout": Layout.SHIFT},
    "interval": {"guidance_interval": (0.0, 0.5)},
    "window": {"attention_window": 16},
    "int8": {"precision": Precision.INT8},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["autoencoder", "attributes", "sheet", "enlarge", "refine", "poster", "int8"])
    parser.add_argument("--model", type=Path, default=Path(__file__).parents[2] / "tiler/models/mini")
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache/tiler/mini")
    parser.add_argument("--minutes", type=float, default=10, help="training of the classifier")
    parser.add_argument("--count", type=int, default=200, help="pictures judged")
    parser.add_argument("--strength", type=float, nargs="+", default=[RenderRequest.strength], help="for refine")
    parser.add_argument("--size", type=int, default=2048, help="px, for poster")
    parser.add_argument("--ways", nargs="+", default=["quality", "fast"], choices=list(WAYS), help="for poster")
    parser.add_argument("--out", type=Path, default=Path("sheet.png"))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    parts = {
        "autoencoder": autoencoder, "attributes": attributes, "sheet": sheet, "enlarge": enlarge, "refine": refine,
        "poster": poster, "int8": in_int8,
    }  # fmt: skip
    parts[args.what](args)


def pipeline(folder: Path) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32).to(DEVICE)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def psnr(a: np.ndarray | Tensor, b: np.ndarray | Tensor, span: float = 255.0) -> float:
    """dB; `span` is what lies between black and white."""
    error = np.square(np.asarray(a, float) - np.asarray(b, float)).mean()
    return 10 * math.log10(span**2 / max(1e-9, float(error)))


@torch.no_grad()
def autoencoder(args: argparse.Namespace) -> None:
    vae, rng = pipeline(args.model).vae, np.random.default_rng(0)
    for name, sizes in (("scenes", None), ("crops at 1/4", (0.25,))):
        found = []
        for k in range(args.count // 4):
            scene = scenes.make(HELD_OUT + k)
            view = None if sizes is None else random_view(rng, scene.aspect, sizes)
            x = to_tensor(scenes.render(scene, view, 256, 256)[None]).to(DEVICE)
            y = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
            found.append(psnr(y.cpu(), x.cpu(), 2))
        print(f"{name:14} PSNR median {np.median(found):.2f} dB, worst {min(found):.2f} dB")


class Classifier(nn.Module):
    """(n, 3, 128, 128) in [-1, 1] → one set of logits a head. The last map keeps columns apart: sides are places."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for a, b in ((3, 24), (24, 48), (48, 96), (96, 128)):
            layers += [
                nn.Conv2d(a, b, 3, 2, 1),
                nn.BatchNorm2d(b),
                nn.ReLU(),
                nn.Conv2d(b, b, 3, 1, 1),
                nn.BatchNorm2d(b),
                nn.ReLU(),
            ]
        self.body = nn.Sequential(*layers, nn.AdaptiveMaxPool2d((4, 4)), nn.Flatten(), nn.Dropout(0.2))
        self.heads = nn.ModuleDict({name: nn.Linear(128 * 16, n) for name, n in ATTRIBUTES.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.body(x)
        return {name: head(h) for name, head in self.heads.items()}


def draw(seeds: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
    made = [scenes.make(s) for s in seeds]
    images = to_tensor(np.stack([scenes.render(s, None, SIDE, SIDE) for s in made]))
    return images, labels(made)


def train_classifier(args: argparse.Namespace) -> Classifier:
    model, path = Classifier().to(DEVICE), args.work / "classifier.pt"
    if path.exists():
        model.load_state_dict(torch.load(path, map_location=DEVICE))
        return model.eval()
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    rng, end, step = np.random.default_rng(1), time.monotonic() + 60 * args.minutes, 0
    batches = ahead(draw(rng.integers(HELD_OUT, size=48).tolist()) for _ in count())
    while (left := end - time.monotonic()) > 0:
        for group in opt.param_groups:
            group["lr"] = 1e-3 * min(1.0, 2 * left / (60 * args.minutes))
        x, want = next(batches)
        # Generated pictures are neither perfectly flat nor all sharp.
        soft = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2.0, mode="bilinear")
        x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.4, soft, x)
        got = model((x + 0.05 * torch.randn_like(x)).to(DEVICE))
        loss = attribute_loss(got, {n: v.to(DEVICE) for n, v in want.items()})
        opt.zero_grad()
        loss.backward()
        opt.step()
        step += 1
        if step % 50 == 0:
            print(f"classifier step {step} loss {loss.item():.3f}", flush=True)
    torch.save(model.state_dict(), path)
    return model.eval()


def accuracy(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    """Share read rightly; `sun or moon` needs kind and side; `objects` is the mean over objects that were asked for."""
    right = {n: (got[n].argmax(1) == want[n]) for n in ATTRIBUTES if n != "objects"}
    asked = want["objects"] > 0.5
    found = (got["objects"] > 0) & asked
    return {
        "palette": right["palette"].float().mean().item(),
        "terrain": right["terrain"].float().mean().item(),
        "sun or moon": (right["body"] & right["side"]).float().mean().item(),
        "its kind": right["body"].float().mean().item(),
        "its side": right["side"].float().mean().item(),
        "objects": (found.sum() / asked.sum().clamp_min(1)).item(),
    }


@torch.no_grad()
def attributes(args: argparse.Namespace) -> None:
    with torch.enable_grad():
        model = train_classifier(args)
    seeds = [HELD_OUT + 1000 + k for k in range(args.count)]
    x, want = draw(seeds)
    drawn = accuracy({n: v.cpu() for n, v in model(x.to(DEVICE)).items()}, want)
    pipe, pictures = pipeline(args.model), []
    rng = np.random.default_rng(2)
    for first in range(0, len(seeds), 8):
        prompts = [captions.caption(scenes.make(s), rng, None, 1.0) for s in seeds[first : first + 8]]
        generators = [torch.Generator().manual_seed(s) for s in seeds[first : first + 8]]
        images = pipe(prompts, num_inference_steps=20, guidance_scale=4.0, generator=generators).images
        pictures += [np.asarray(i.resize((SIDE, SIDE), Image.Resampling.BOX)) for i in images]
    made = accuracy({n: v.cpu() for n, v in model(to_tensor(np.stack(pictures)).to(DEVICE)).items()}, want)
    for name, value in drawn.items():
        print(
            f"{name:12} drawings {value:6.1%}  generated {made[name]:6.1%}  relative {made[name] / max(value, 1e-6):6.1%}"
        )


@torch.no_grad()
def sheet(args: argparse.Namespace) -> None:
    pipe, rng = pipeline(args.model), np.random.default_rng(3)
    prompts = [captions.caption(scenes.make(HELD_OUT + 5000 + k), rng, None, 1.0) for k in range(24)]
    images = []
    for first in range(0, 24, 8):
        generators = [torch.Generator().manual_seed(first + k) for k in range(8)]
        images += pipe(
            prompts[first : first + 8], num_inference_steps=20, guidance_scale=4.0, generator=generators
        ).images
    width, height = images[0].size
    page = Image.new("RGB", (8 * width, 3 * height))
    for k, image in enumerate(images):
        page.paste(image, (k % 8 * width, k // 8 * height))
    page.save(args.out)
    print("\n".join(f"{k:2} {p}" for k, p in enumerate(prompts)))


class Edges:
    """Where a drawing, (3, H, W) in [-1, 1], has edges, and where it is flat for eight pixels around."""

    def __init__(self, drawing: Tensor) -> None:
        steep = self.energy(drawing) > 0.1**2
        near = F.max_pool2d(steep[None, None].float(), 17, 1, 8)[0, 0] > 0
        self.edges = F.max_pool2d(steep[None, None].float(), 5, 1, 2)[0, 0] > 0
        self.flat = ~near & (self.energy(drawing) < 1e-4)

    @staticmethod
    def energy(picture: Tensor) -> Tensor:
        """Squared gradient, (H, W)."""
        right, below = picture.diff(dim=2, append=picture[:, :, -1:]), picture.diff(dim=1, append=picture[:, -1:])
        return (right.square() + below.square()).sum(0)

    def report(self, picture: Tensor, drawing: Tensor, lanczos: Tensor) -> dict[str, float]:
        """Gradient energy on the edges over that of `lanczos`, the largest gradients in flat areas in steps of 255, PSNR."""
        energy = self.energy(picture)
        return {
            "sharpness": float(energy[self.edges].mean() / self.energy(lanczos)[self.edges].mean()),
            "specks": 127.5 * float(energy[self.flat].quantile(0.999).sqrt()) if self.flat.any() else 0.0,
            "psnr": psnr(picture, drawing, 2),
        }


def drawn_twice(seed: int) -> tuple[np.ndarray, Tensor, Tensor]:
    """A held-out scene at 256 px, at 1024 (3, 1024, 1024), and enlarged from 256 by Lanczos."""
    scene = scenes.make(HELD_OUT + 7000 + seed)
    small, large = (scenes.render(scene, None, side, side) for side in (256, 1024))
    lanczos = np.array(Image.fromarray(small).resize((1024, 1024), Image.Resampling.LANCZOS))
    return small, to_tensor(large[None])[0], to_tensor(lanczos[None])[0]


def show(name: str, found: list[dict[str, float]]) -> None:
    middle = {key: float(np.median([f[key] for f in found])) for key in found[0]}
    print(
        f"{name:24} edges {middle['sharpness']:.2f}× Lanczos, specks {middle['specks']:.1f}/255, PSNR {middle['psnr']:.1f} dB",
        flush=True,
    )


@torch.no_grad()
def enlarge(args: argparse.Namespace) -> None:
    vae, results = (
        pipeline(args.model).vae,
        {"lanczos alone": [], "large drawing encoded": [], "pixel": [], "latent": []},
    )
    for k in range(args.count // 10):
        small, drawing, lanczos = drawn_twice(k)
        z = vae.encode(to_tensor(small[None]).to(DEVICE)).latent_dist.mean
        decoded = to_uint8(vae.decode(z).sample[0].cpu())
        pixels = to_tensor(guide.crop_to_aspect(decoded, 1024, 1024)[0:1024][None]).to(DEVICE)
        large = {
            "pixel": vae.encode(pixels).latent_dist.mean,
            "latent": guide.upscale(z.cpu(), guide.GuideSize(32, 32, 32.0, 32.0), (128, 128), (False, False)).to(
                DEVICE
            ),
            "large drawing encoded": vae.encode(drawing[None].to(DEVICE)).latent_dist.mean,
        }
        edges = Edges(drawing)
        results["lanczos alone"].append(edges.report(lanczos, drawing, lanczos))
        for name, latents in large.items():
            picture = vae.decode(latents).sample[0].clamp(-1, 1).cpu()
            results[name].append(edges.report(picture, drawing, lanczos))
    for name, found in results.items():
        show(name, found)


def refine(args: argparse.Namespace) -> None:
    rng = np.random.default_rng(4)
    for strength in args.strength:
        found = []
        for k in range(args.count // 25):
            small, drawing, lanczos = drawn_twice(k)
            with tempfile.TemporaryDirectory() as folder:
                sketch, out = Path(folder) / "sketch.png", Path(folder) / "out.png"
                Image.fromarray(small).save(sketch)
                prompt = captions.caption(scenes.make(HELD_OUT + 7000 + k), rng, None, 1.0)
                render(
                    RenderRequest(
                        prompt=prompt, output=out, model=str(args.model), width=1024, height=1024, seed=k, guide_image=sketch,
                        strength=strength,
                    )
                )  # fmt: skip
                picture = to_tensor(np.asarray(Image.open(out))[None])[0]
            found.append(Edges(drawing).report(picture, drawing, lanczos))
        show(f"strength {strength}", found)


def rendered(args: argparse.Namespace, prompt: str, size: int, seed: int, **settings: Any) -> np.ndarray:
    """`tiler`'s picture of a prompt, (size, size, 3) uint8."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.png"
        request = RenderRequest(
            prompt=prompt, output=out, model=str(args.model), width=size, height=size, seed=seed, guidance_scale=4.0, **settings
        )  # fmt: skip
        render(request, Budget("4GB"))
        return np.asarray(Image.open(out))


def seam_score(picture: np.ndarray, borders: set[int]) -> float:
    """Gradient across the rows and columns where tiles begin or end over that of the lines one and two latents beside each
    (every eighth line is steeper: mini's decoder). The median of all borders: a horizon near one would outweigh the rest."""
    scores = []
    for axis in (0, 1):
        steps = np.abs(np.diff(picture.astype(float), axis=axis)).mean(axis=(1 - axis, 2))
        for at in (border - 1 for border in borders):
            beside = [steps[i] for i in (at - 16, at - 8, at + 8, at + 16) if 0 <= i < len(steps)]
            scores.append(steps[at] / max(1e-6, float(np.mean(beside))))
    return float(np.median(scores)) if scores else math.nan


def poster(args: argparse.Namespace) -> None:
    rng, family = np.random.default_rng(6), read_family(resolve(str(args.model)))
    columns, rows = len(args.ways) + 1, max(1, args.count // 100)
    page = Image.new("RGB", (columns * 512, rows * 512))
    for k in range(rows):
        prompt = captions.caption(scenes.make(HELD_OUT + 9000 + k), rng, None, 1.0)
        guide_picture = rendered(args, prompt, 256, k, guide=False)
        page.paste(Image.fromarray(guide_picture).resize((512, 512), Image.Resampling.NEAREST), (0, 512 * k))
        print(prompt)
        first: np.ndarray | None = None
        for column, name in enumerate(args.ways, 1):
            start = time.monotonic()
            picture = rendered(args, prompt, args.size, k, **WAYS[name])
            seconds = time.monotonic() - start
            first = picture if first is None else first
            request = RenderRequest(prompt="x", output=args.out, width=args.size, height=args.size)
            borders = {8 * edge for r in plan_tiling(request, family).regions for edge in (r.left, r.left + r.width)}
            small = Image.fromarray(picture).resize((256, 256), Image.Resampling.BOX)
            alike = np.corrcoef(np.asarray(small).ravel(), guide_picture.ravel())[0, 1]
            print(
                f"  {name:9}{seconds:6.0f} s, seams {seam_score(picture, borders - {0, args.size}):.3f}, correlation with the "
                f"guide {alike:.3f}" + (f", {psnr(picture, first):.1f} dB" if picture is not first else ""), flush=True,
            )  # fmt: skip
            page.paste(Image.fromarray(picture).resize((512, 512), Image.Resampling.BOX), (512 * column, 512 * k))
    page.save(args.out)


def in_int8(args: argparse.Namespace) -> None:
    rng, found = np.random.default_rng(7), []
    for k in range(16):
        prompt = captions.caption(scenes.make(HELD_OUT + 11000 + k), rng, None, 1.0)
        found.append(psnr(*(rendered(args, prompt, 256, k, precision=p) for p in (Precision.FP32, Precision.INT8))))
    print(f"int8 against fp32: PSNR median {np.median(found):.1f} dB, worst {min(found):.1f} dB ({cpu.int8().why})")


if __name__ == "__main__":
    main()
