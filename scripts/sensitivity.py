"""How much each kind of layer loses as int8, and as bf16: one UNet call with only that kind rounded, against fp32.

    python scripts/sensitivity.py                       SD 1.5's size, random weights
    python scripts/sensitivity.py --model mini --largest 64

Weights and inputs take the values that tiler/weights/int8.py gives them and are multiplied in fp32, so any processor
can judge for any other; so it is with bf16, but for attention's own products. `--largest` is the largest weight: 64
where there are no dot-product instructions, else 127. `FP32_NAMES` in tiler/models/unet.py are not in the table: they
stay in fp32. Beside int8 so do the outermost blocks but for their transformers, whose row tells what they would lose;
the last row is `--precision bf16`, which rounds all of the table. The whole UNet is in memory: 6 GB for SD 1.5.
"""

from __future__ import annotations

import argparse
import re

import make_checkpoint
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from tiler.compute import int8
from tiler.compute.layers import SMALL
from tiler.compute.onednn import Geometry
from tiler.models.unet import FP32_NAMES, int8_weights
from tiler.weights.checkpoint import resolve


def kind(name: str) -> str:
    """`up_blocks.1.resnets.0.conv1` → `up resnets.conv1`."""
    words = [word for word in name.split(".") if not word.isdigit()]
    return re.sub(r"^(down|mid|up)_block\w*\.", r"\1 ", ".".join(words)).replace("transformer_blocks.", "")


def fake(module: nn.Module, largest: int | None) -> tuple[Tensor, torch.utils.hooks.RemovableHandle]:
    """Quantise a layer's weight and, from now on, its input, or round both to bf16 (None); returns what undoes it."""
    kept = module.weight.data
    if largest is None:
        module.weight.data = kept.bfloat16().float()
        return kept, module.register_forward_pre_hook(lambda _, inputs: (inputs[0].bfloat16().float(), *inputs[1:]))
    values, scale = int8.quantize_rows(kept, largest)
    module.weight.data = values.float() * scale.view(-1, *(1,) * (kept.ndim - 1))

    def rounded(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0]
        if isinstance(module, nn.Conv2d) and Geometry.of(module).is_pointwise(module.weight.shape):
            pixels = [int8.quantize_pixels(sample).restored() for sample in x]
            return (torch.stack([p.T.view(x.shape[1:]) for p in pixels]), *inputs[1:])
        if isinstance(module, nn.Conv2d):
            return (torch.stack([int8.quantize_image(sample).restored().permute(2, 0, 1) for sample in x]), *inputs[1:])
        return (int8.quantize_tokens(x).restored().view_as(x), *inputs[1:])

    return kept, module.register_forward_pre_hook(rounded)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or `mini`; default: the generated sd15")
    parser.add_argument("--largest", type=int, nargs="+", default=[64, 127])
    parser.add_argument("--only", help="kinds that match this regular expression")
    args = parser.parse_args()
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
        f"{'kind':32} layers  share  " + "  ".join("       bf16" if n is None else f"weights ±{n:<3}" for n in columns)
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
