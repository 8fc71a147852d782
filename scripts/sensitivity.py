"""How much each kind of layer loses as int8, and as bf16: one UNet call with only that kind rounded, against fp32.

    python scripts/sensitivity.py                       SD 1.5's size, random weights
    python scripts/sensitivity.py --model mini --largest 127
    python scripts/sensitivity.py --pictures            dB of `mini`'s pictures in int8 and bf16 against fp32's, by the
                                                        same seeds

Weights and inputs take the values that they have as int8 and are multiplied in fp32, so any processor
can judge for any other; so it is with bf16, but for attention's own products. `--largest` is the largest weight: 127
where there are dot-product instructions; 0 takes weights as this processor multiplies them. `FP32_NAMES` in
tiler/models/unet.py are not in the table: they stay in fp32. Beside int8 so do the outermost blocks but for their
transformers, whose row tells what they would lose; the last row is `--precision bf16`, which rounds all of the table.
The whole UNet is in memory: 6 GB for SD 1.5.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import tempfile
from pathlib import Path

import make_checkpoint
import numpy as np
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn

from tiler import RenderRequest, render
from tiler.compute.int8 import quantize_rows
from tiler.compute.layers import SMALL
from tiler.compute.onednn import Geometry
from tiler.compute.precisions import arithmetic
from tiler.models.unet import FP32_NAMES, int8_weights
from tiler.request import Precision
from tiler.weights.checkpoint import resolve


def kind(name: str) -> str:
    """`up_blocks.1.resnets.0.conv1` → `up resnets.conv1`."""
    words = [word for word in name.split(".") if not word.isdigit()]
    return re.sub(r"^(down|mid|up)_block\w*\.", r"\1 ", ".".join(words)).replace("transformer_blocks.", "")


def by_token(x: Tensor) -> Tensor:
    """Round (..., in) to 127 steps on both sides of zero, each token by its largest absolute value."""
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-30)
    return (x / scale).round() * scale


def by_image(x: Tensor) -> Tensor:
    """Round a whole image to 254 steps, one of which is zero."""
    low, high = x.min().clamp_max(0), x.max().clamp_min(0)
    scale = ((high - low) / 254).clamp_min(1e-30)
    return (x / scale).round() * scale


def fake(module: nn.Module, largest: int | None) -> tuple[Tensor, torch.utils.hooks.RemovableHandle]:
    """Quantise a layer's weight and, from now on, its input, or round both to bf16 (None); returns what undoes it."""
    kept = module.weight.data
    if largest is None:
        module.weight.data = kept.bfloat16().float()
        return kept, module.register_forward_pre_hook(lambda _, inputs: (inputs[0].bfloat16().float(), *inputs[1:]))
    values, scale = quantize_rows(kept, largest)
    module.weight.data = values.float() * scale.view(-1, *(1,) * (kept.ndim - 1))

    def rounded(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0]
        if isinstance(module, nn.Conv2d) and Geometry.of(module).is_pointwise(module.weight.shape):
            return (by_token(x.movedim(1, -1)).movedim(-1, 1), *inputs[1:])
        if isinstance(module, nn.Conv2d):
            return (torch.stack([by_image(sample) for sample in x]), *inputs[1:])
        return (by_token(x), *inputs[1:])

    return kept, module.register_forward_pre_hook(rounded)


def compare_pictures(model: str, prompt: str | None, side: int, count: int) -> None:
    """Print the dB of 8-bit pictures of `count` seeds in int8 and, where the processor has it, bf16, against those in
    fp32. Without a prompt, each seed chooses one of the model's own."""
    found: dict[Precision, list[float]] = {Precision.INT8: []}
    if arithmetic().bf16:
        found[Precision.BF16] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(count):
            drawn = {}
            for precision in (Precision.FP32, *found):
                path = Path(folder) / f"{precision}.png"
                request = RenderRequest(
                    model=model, size=side, seed=seed, precision=precision, output=path, force=True, prompt=prompt
                )  # fmt: skip
                render(request)
                drawn[precision] = np.asarray(Image.open(path), dtype=np.float64)
            for precision, values in found.items():
                error = np.square(drawn[precision] - drawn[Precision.FP32]).mean()
                values.append(float(10 * np.log10(255**2 / error)) if error else math.inf)
            print(f"seed {seed}: " + ", ".join(f"{p} {values[-1]:.1f} dB" for p, values in found.items()), flush=True)
    for precision, values in found.items():
        print(f"{precision}: median {statistics.median(values):.1f} dB, least {min(values):.1f}")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or `mini`; default: the generated sd15")
    parser.add_argument("--largest", type=int, nargs="+", default=[0, 127])
    parser.add_argument("--only", help="kinds that match this regular expression")
    parser.add_argument("--pictures", action="store_true", help="compare whole pictures instead")
    parser.add_argument("--prompt", help="for --pictures; default: the model's own, of which `mini` has 16")
    parser.add_argument("--size", type=int, default=512, help="pixels, for --pictures")
    parser.add_argument("--count", type=int, default=16, help="of pictures")
    args = parser.parse_args()
    if args.pictures:
        compare_pictures(args.model or "mini", args.prompt, args.size, args.count)
        return
    checkpoint = resolve(args.model or str(make_checkpoint.make("sd15")))
    options = {"subfolder": "unet", "torch_dtype": torch.float32}
    try:
        unet = UNet2DConditionModel.from_pretrained(checkpoint.folder, variant="fp16", **options).eval()
    except OSError:
        unet = UNet2DConditionModel.from_pretrained(checkpoint.folder, **options).eval()
    side, width = unet.config.sample_size, unet.config.cross_attention_dim
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, unet.config.in_channels, side, side, generator=generator)
    call = x, torch.tensor(500), torch.randn(1, 77, width, generator=generator)
    reference = unet(*call).sample
    groups: dict[str, list[nn.Module]] = {}
    for name in sorted(int8_weights(unet)):
        groups.setdefault(kind(name.removesuffix(".weight")), []).append(
            unet.get_submodule(name.removesuffix(".weight"))
        )
    everything = [module for modules in groups.values() for module in modules]
    quantised = {id(module) for module in everything}
    groups["outermost, fp32 beside int8"] = [
        module
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and module.weight.numel() > SMALL and id(module) not in quantised
        and not any(part in f"{name}.weight" for part in FP32_NAMES)
    ]  # fmt: skip
    columns = [*args.largest, None]
    print(
        f"{'kind':32} layers  share  "
        + "  ".join("       bf16" if n is None else f"weights ±{n:<3}" if n else "   own form" for n in columns)
    )
    total = sum(m.weight.numel() for m in everything)
    both = [*everything, *groups["outermost, fp32 beside int8"]]
    for name, modules in [("all of --precision int8", everything), *groups.items(), ("all of --precision bf16", both)]:
        if args.only and not re.search(args.only, name):
            continue
        errors = []
        for largest in columns:
            undo = [(module, *fake(module, largest)) for module in modules]
            errors.append(float((unet(*call).sample - reference).norm() / reference.norm()))
            for module, kept, handle in undo:
                module.weight.data = kept
                handle.remove()
        share = sum(m.weight.numel() for m in modules) / total
        print(f"{name:32} {len(modules):6} {share:6.1%}  " + "  ".join(f"{e:11.2%}" for e in errors), flush=True)


if __name__ == "__main__":
    main()
