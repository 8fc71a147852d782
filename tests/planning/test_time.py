"""The work that `tiler plan` tells, against torch's own counter on diffusers' own module."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from tiler import RenderRequest
from tiler.decoding.method import DecodePlan
from tiler.models.built import Models
from tiler.models.family import Role, read_family
from tiler.planning.resolve import fill
from tiler.planning.tiling import plan_tiling
from tiler.planning.time import BY_LAYERS, BY_ROWS, OVERHEAD, Counter, Flops, Speed, seconds
from tiler.request import Decode, Precision, ScratchDtype
from tiler.weights.checkpoint import resolve


@pytest.mark.parametrize("kind", ["tiny", "tiny-sd2"])
def test_work_is_what_torch_counts(checkpoints: Path, kind: str) -> None:
    family = read_family(resolve(str(checkpoints / kind)))
    unet = UNet2DConditionModel.from_pretrained(checkpoints / kind / "unet", variant="fp16")
    unet = unet.to(torch.float32).eval()
    side, channels, width = family.native, family.latent_channels, family.part(Role.TEXT_ENCODER).config["hidden_size"]
    tokens, attention = [], 0

    def seen(module: torch.nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
        queries = args[0].shape[1]
        keys = queries if kwargs.get("encoder_hidden_states") is None else 77
        tokens.append(4 * queries * keys * module.inner_dim)

    for name, module in unet.named_modules():
        if name.endswith(("attn1", "attn2")):
            module.register_forward_pre_hook(seen, with_kwargs=True)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(torch.randn(1, channels, side, side), torch.tensor(1), torch.randn(1, 77, width))
    attention = sum(tokens)
    counted = counter.get_flop_counts()["Global"]
    layers = sum(n for op, n in counted.items() if "attention" not in str(op))
    one = plan_tiling(
        fill(RenderRequest(
            prompt="x", width=8 * side, height=8 * side, guide=False, num_inference_steps=3, guidance_scale=1.0,
        )),
        family,
    )  # fmt: skip
    work = Counter(Models(family)).count(one, None)
    assert one.denoiser_samples == 3
    assert work.attention == 3 * attention
    assert work.layers == pytest.approx(3 * layers, rel=1e-3)  # the time embedding is a vector, hardly work


def test_time_is_work_over_speed() -> None:
    speed = Speed(fp32=1e9, int8=2e9, attention=5e8)
    work = Flops(8_000_000_000, 1_000_000_000)
    layers, rows = (
        DecodePlan(
            kind=kind,
            encoding=False,
            why="",
            memory_bytes=0,
            folder=Path("."),
            dtype=ScratchDtype.FP16,
            flops=3_000_000_000,
            attention=share,
        )
        for kind, share in ((Decode.SAMPLED, (0.25, 1)), (Decode.FROZEN, (0.0, 1)))
    )
    for precision, unet in ((Precision.FP32, 8 + 2), (Precision.INT8, 4 + 2)):
        assert seconds(work, [], speed, precision) == pytest.approx(OVERHEAD[precision] * unet)
        assert seconds(work, [layers, rows], speed, precision) == pytest.approx(
            OVERHEAD[precision] * unet + 3 * BY_LAYERS + 1 + 3 * BY_ROWS
        )
