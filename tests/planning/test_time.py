"""The work that `tiler plan` reports, against torch's counter on diffusers' module."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from tiler import RenderRequest
from tiler.compute.tuning import LOAD_CALLS, RUN_CALLS
from tiler.decoding.method import DecodePlan
from tiler.models.built import Models
from tiler.models.family import Role, read_family
from tiler.planning.resolve import fill
from tiler.planning.tiling import plan_tiling
from tiler.planning.time import Batches, Counter, Flops, seconds
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


def decoding(kind: Decode, attention: float = 0.25) -> DecodePlan:
    return DecodePlan(
        kind=kind, encoding=False, why="", memory_bytes=0, folder=Path("."), dtype=ScratchDtype.FP16,
        flops=3_000_000_000, attention=attention,
    )  # fmt: skip


class Speed(NamedTuple):
    """Of a machine: what tiler.planning.time.Speed would measure."""

    fp32: float
    bf16: float
    int8: float
    attention: float
    half_attention: float
    disk: float = math.inf
    call: float = 1e-5


SPEED, WORK = (
    Speed(fp32=1e9, bf16=2e9, int8=3e9, attention=5e8, half_attention=1e9),
    Flops(8_000_000_000, 1_000_000_000),
)


@pytest.mark.parametrize("precision", list(Precision))
def test_a_machine_twice_as_fast_takes_half_as_long(precision: Precision) -> None:
    methods = [decoding(Decode.SAMPLED), decoding(Decode.FROZEN, 0)]
    fast = Speed(*(2 * value for value in SPEED))._replace(call=SPEED.call / 2)
    assert seconds(WORK, methods, fast, precision) == pytest.approx(seconds(WORK, methods, SPEED, precision) / 2)


@pytest.mark.parametrize("kind", [Decode.SAMPLED, Decode.FROZEN])
def test_no_time_is_below_what_the_arithmetic_takes(kind: Decode) -> None:
    denoising = WORK.layers / SPEED.fp32 + WORK.attention / SPEED.attention
    method = decoding(kind)
    assert seconds(WORK, [], SPEED, Precision.FP32) > denoising
    least = method.flops / SPEED.fp32 + method.attention_flops / SPEED.attention
    taken = seconds(Flops(0, 0), [method], SPEED, Precision.FP32)
    assert taken > least
    half = replace(method, precision=Precision.BF16)
    assert seconds(Flops(0, 0), [half], SPEED, Precision.FP32) < taken


def test_each_part_of_a_render_adds_its_time() -> None:
    methods = [decoding(Decode.SAMPLED), decoding(Decode.FROZEN)]
    parts = [
        seconds(WORK, [], SPEED, Precision.FP32),
        *(seconds(Flops(0, 0), [m], SPEED, Precision.FP32) for m in methods),
    ]
    assert seconds(WORK, methods, SPEED, Precision.FP32) == pytest.approx(sum(parts))
    assert seconds(WORK.plus(WORK), [], SPEED, Precision.FP32) == pytest.approx(2 * parts[0])
    assert seconds(Flops(0, 0), [decoding(Decode.SAMPLED, 0.5)], SPEED, Precision.FP32) > parts[1]


def test_what_is_small_takes_longer_than_its_arithmetic(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer takes time to start, for each sample or for small ones together, and for each read of its weights, so
    samples that share a read take less; narrow layers have more values to an operation."""
    family = read_family(resolve(str(tiny)))
    request = fill(RenderRequest(prompt="x", width=64, height=64, guide=False, num_inference_steps=3))
    counter, tiling = Counter(Models(family)), plan_tiling(request, family)
    work, shared = (counter.count(tiling, None, Batches(1, batch)) for batch in (1, 2))
    unet = Models(family).module(family.part(Role.DENOISER))
    assert work.runs == 2 * 3 * sum(name.endswith(".weight") for name, _ in unet.named_parameters())
    assert (work.loads, shared.loads, shared.runs) == (work.runs, work.runs // 2, work.runs // 2)
    monkeypatch.setattr("tiler.planning.time.GROUP_ELEMENTS", 1)
    assert counter.count(tiling, None, Batches(1, 2)).runs == work.runs
    assert work.narrow > work.layers  # of 16 channels
    assert seconds(shared, [], SPEED, Precision.FP32) < seconds(work, [], SPEED, Precision.FP32)
    bare = work._replace(runs=0, loads=0, narrow=0)
    more = seconds(work, [], SPEED, Precision.FP32) - seconds(bare, [], SPEED, Precision.FP32)
    small = (RUN_CALLS + LOAD_CALLS) * work.runs * SPEED.call
    assert more == pytest.approx(small + work.narrow / SPEED.fp32)
    took = [
        seconds(Flops(0, 0), [replace(decoding(Decode.EXACT, 0), width=width)], SPEED, Precision.FP32)
        for width in (16, 64, 128, 512)
    ]
    assert took[0] > took[1] > took[2] == took[3]


def test_int8_saves_time_where_its_products_are_faster_and_only_in_the_denoiser() -> None:
    assert seconds(WORK, [], SPEED, Precision.INT8) < seconds(WORK, [], SPEED, Precision.FP32)
    method = [decoding(Decode.SAMPLED)]
    alone = [seconds(Flops(0, 0), method, SPEED, precision) for precision in (Precision.INT8, Precision.FP32)]
    assert alone[0] == alone[1]
