"""Judge `mini` with drawings it never saw: `evaluate.py autoencoder`, `attributes`, `sheet`.

    autoencoder   PSNR of the decoded encoding, held-out whole scenes and crops at 1/4 scale
    attributes    a small classifier, trained here on drawn scenes, reads palette, terrain, sun or moon (kind and side) and
                  objects from held-out drawings and from pictures generated for held-out prompts
    sheet         24 prompts drawn with guidance 4 in 20 steps, as one PNG

Held-out seeds begin at train.HELD_OUT. Judges the folder given by --model (default: the embedded one).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import captions
import numpy as np
import scenes
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor, nn
from train import DEVICE, HELD_OUT, random_view, to_tensor

SIDE = 128  # px, what the classifier sees
OBJECTS = ("stars", "clouds", "birds", "pines", "cabin", "boat", "balloon")
HEADS = {
    "palette": len(scenes.PALETTES),
    "terrain": len(scenes.TERRAINS),
    "body": len(scenes.BODIES),
    "side": 4,
    "objects": len(OBJECTS),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["autoencoder", "attributes", "sheet"])
    parser.add_argument("--model", type=Path, default=Path(__file__).parents[2] / "tiler/models/mini")
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache/tiler/mini")
    parser.add_argument("--minutes", type=float, default=10, help="training of the classifier")
    parser.add_argument("--count", type=int, default=200, help="pictures judged")
    parser.add_argument("--out", type=Path, default=Path("sheet.png"))
    args = parser.parse_args()
    {"autoencoder": autoencoder, "attributes": attributes, "sheet": sheet}[args.what](args)


def pipeline(folder: Path) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32).to(DEVICE)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def autoencoder(args: argparse.Namespace) -> None:
    vae, rng = pipeline(args.model).vae, np.random.default_rng(0)
    for name, sizes in (("scenes", None), ("crops at 1/4", (0.25,))):
        psnr = []
        for k in range(args.count // 4):
            scene = scenes.make(HELD_OUT + k)
            view = None if sizes is None else random_view(rng, scene.aspect, sizes)
            x = to_tensor(scenes.render(scene, view, 256, 256)[None]).to(DEVICE)
            y = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
            psnr.append(-10 * float(((y - x).square().mean() / 4).clamp_min(1e-7).log10()))
        print(f"{name:14} PSNR median {np.median(psnr):.2f} dB, worst {min(psnr):.2f} dB")


def labels(scene: scenes.Scene) -> dict[str, Tensor]:
    side = 3 if scene.body == "none" else scenes.SIDES.index(scene.side)
    return {
        "palette": torch.tensor(list(scenes.PALETTES).index(scene.palette)),
        "terrain": torch.tensor(scenes.TERRAINS.index(scene.terrain)),
        "body": torch.tensor(scenes.BODIES.index(scene.body)),
        "side": torch.tensor(side),
        "objects": torch.tensor([float(bool(getattr(scene, name))) for name in OBJECTS]),
    }


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
        self.heads = nn.ModuleDict({name: nn.Linear(128 * 16, n) for name, n in HEADS.items()})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.body(x)
        return {name: head(h) for name, head in self.heads.items()}


def draw(seeds: list[int]) -> tuple[Tensor, dict[str, Tensor]]:
    made = [scenes.make(s) for s in seeds]
    images = to_tensor(np.stack([scenes.render(s, None, SIDE, SIDE) for s in made]))
    each = [labels(s) for s in made]
    return images, {name: torch.stack([e[name] for e in each]) for name in HEADS}


def train_classifier(args: argparse.Namespace) -> Classifier:
    model, path = Classifier().to(DEVICE), args.work / "classifier.pt"
    if path.exists():
        model.load_state_dict(torch.load(path, map_location=DEVICE))
        return model.eval()
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    rng, end, step = np.random.default_rng(1), time.monotonic() + 60 * args.minutes, 0
    while (left := end - time.monotonic()) > 0:
        for group in opt.param_groups:
            group["lr"] = 1e-3 * min(1.0, 2 * left / (60 * args.minutes))
        x, want = draw(rng.integers(HELD_OUT, size=48).tolist())
        x = (x + 0.05 * torch.randn_like(x)).to(DEVICE)  # generated pictures are not perfectly flat
        got = model(x)
        loss = sum(
            F.binary_cross_entropy_with_logits(got[n], want[n].to(DEVICE))
            if n == "objects"
            else F.cross_entropy(got[n], want[n].to(DEVICE))
            for n in HEADS
        )
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
    right = {n: (got[n].argmax(1) == want[n]) for n in HEADS if n != "objects"}
    asked = want["objects"] > 0.5
    found = (got["objects"] > 0) & asked
    return {
        "palette": right["palette"].float().mean().item(),
        "terrain": right["terrain"].float().mean().item(),
        "sun or moon": (right["body"] & right["side"]).float().mean().item(),
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


if __name__ == "__main__":
    main()
