"""One pass of a UNet2DConditionModel over many samples with one read of its weights.

Visits the blocks of diffusers' own module in the order of its forward(). Between two units it keeps only each sample's
hidden state and the skips still to be used. Skips are concatenated when a sample needs them, not before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tiler.compute import onednn
from tiler.compute.layers import SMALL
from tiler.compute.stream import Streamer
from tiler.compute.tuning import INT8_CHANNELS
from tiler.memory.lean_imports import lean_imports
from tiler.models import strips
from tiler.models.blocks import (
    Head,
    PrePrompt,
    Resnet,
    ResnetFirstHalf,
    ResnetSecondHalf,
    Transformer,
    Upsampler,
    Windows,
    prepare,
)
from tiler.models.meta import on_meta, refusing
from tiler.weights.checkpoint import Checkpoint

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    from tiler.models.family import Options

# Weights that keep their type where others become int8: the small ones before and after the blocks, and those of the
# outermost blocks except their transformers. These are 2 % of the weights, cause three quarters of int8's total error
# (squared: scripts/sensitivity.py), and are about as fast in fp32, with the convolutions transformed (winograd.py).
FP32_NAMES = ("time_emb", "add_embedding.", "conv_in.", "conv_out.")
# These keep their type too in the last block but one of a narrow UNet, where quantising inputs takes much of the time
# that 8-bit products save. In `mini` they are 8 % of the weights and cause half of int8's error (squared).
NARROW_FP32_NAMES = (".upsamplers.", ".ff.net.0.")


def build_unet(checkpoint: Checkpoint, config: dict[str, Any]) -> UNet2DConditionModel:
    """Build diffusers' own UNet on the meta device. Raises ModelError."""
    with lean_imports():
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    with on_meta(), refusing("unet", checkpoint):
        return UNet2DConditionModel.from_config(config).eval().requires_grad_(False)


def large_weights(model: torch.nn.Module) -> list[str]:
    """The weights of a module's layers with more than SMALL elements, without tables."""
    layers = ((n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d))
    return [f"{name}.weight" for name, layer in layers if layer.weight.numel() > SMALL]


def quantised(name: str, widths: Sequence[int]) -> bool:
    """Whether a weight of a UNet becomes int8 whose levels have these widths (`block_out_channels`); without any, a
    text encoder's."""
    levels, narrow = len(widths), min(widths, default=INT8_CHANNELS) < INT8_CHANNELS
    outermost = ("down_blocks.0.", f"up_blocks.{levels - 1}.")
    if narrow and name.startswith(f"up_blocks.{levels - 2}.") and any(part in name for part in NARROW_FP32_NAMES):
        return False
    return not any(part in name for part in FP32_NAMES) and (
        ".transformer_blocks." in name or not name.startswith(outermost)
    )


def halved(name: str) -> bool:
    """Whether a weight of a UNet may be multiplied in bf16."""
    return not any(part in name for part in FP32_NAMES)


def int8_weights(unet: Any) -> frozenset[str]:
    """The weights of a built UNet that become int8."""
    widths = unet.config.block_out_channels
    return frozenset(name for name in large_weights(unet) if quantised(name, widths))


def windows_of(options: Options, timestep: Tensor) -> Windows | None:
    """The windows of self-attention at a step, as requested by the user."""
    if (size := options.attention_window) is None:
        return None
    return Windows(size) if timestep.is_meta else Windows.drawn(size, options.seed, timestep)


def _ignore(where: str) -> None:
    pass


def predict_noise(
    unet: UNet2DConditionModel,
    streamer: Streamer,
    latents: Sequence[Tensor],
    timestep: Tensor,
    prompt_embeds: Sequence[Tensor],
    check: Callable[[str], None] = _ignore,
    windows: Windows | None = None,
    added: Sequence[Tensor] | None = None,
    whole_elements: int | None = None,
    guidance: Sequence[float] | None = None,
) -> Tensor:
    """The model's prediction (epsilon or v, whichever it was trained for).

    latents: one (1, channels, h, w) fp32 for each sample, scaled by the scheduler; timestep: scalar, the same for all;
    prompt_embeds: one (1, tokens, width) fp32 for each; added: one (1, width) for each, which a UNet with
    `add_embedding` adds to the time embedding → (batch, channels, h, w) fp32. Consecutive samples that are the same
    tensor, like the two halves of a guidance, share their work and memory up to the first layer that depends on the
    prompt or on `added`. `check` is called at every unit. If a hidden state together with its skip, or enlarged, has
    more than `whole_elements`, convolutions work on strips of rows, with different rounding. guidance: the scale of
    each sample, if it is an input of the model.
    """
    levels = [i for i, block in enumerate(unet.down_blocks) if hasattr(block, "attentions")]
    windowed = (
        {f"unet.down_blocks.{levels[0]}", f"unet.up_blocks.{len(unet.up_blocks) - 1 - levels[0]}"} if levels else set()
    )
    batch, up = len(latents), 2**unet.num_upsamplers
    assert all(x.shape[2] % up == 0 and x.shape[3] % up == 0 for x in latents), latents[0].shape
    embedded = unet.get_time_embed(sample=latents[0], timestep=timestep)
    tembs, texts = _time_embeddings(unet, streamer, embedded, batch, added, guidance), list(prompt_embeds)

    def each(where: str, module: torch.nn.Module, inputs: list[Tensor], *more: list[Tensor]) -> list[Tensor]:
        check(where)
        calls: list[tuple[Tensor, ...]] = list(zip(inputs, *more, strict=True))
        for column in (inputs, *more):  # each input is freed when its sample is done
            column.clear()
        return streamer.run(module, calls)

    def residual(where: str, block: torch.nn.Module, inputs: list[Tensor], *skip: list[Tensor]) -> list[Tensor]:
        large = strips.are_large([inputs[0], *(column[0] for column in skip)], whole_elements)
        if not large and streamer.fits(whole := Resnet(block, whole_elements)):
            return each(where, whole, inputs, list(tembs), *skip)
        halfway = each(where, ResnetFirstHalf(block, whole_elements), list(inputs), list(tembs), *map(list, skip))
        return each(where, ResnetSecondHalf(block, whole_elements), halfway, inputs, *skip)

    def transform(where: str, module: torch.nn.Module, inputs: list[Tensor]) -> list[Tensor]:
        check(where)
        seen = windows if where.rpartition(".attentions")[0] in windowed else None
        prepare(module, inputs[0].shape[1:], streamer.would_fit, seen, 2 ** (levels[0] if levels else 0))
        tokens: list[Tensor | None] = [None] * batch
        if any(a is b for a, b in pairwise(inputs)):  # everything before the prompt is the same for both halves
            tokens[:] = streamer.run(PrePrompt(module), [(x,) for x in inputs])
        calls = [tuple(t for t in call if t is not None) for call in zip(inputs, texts, tokens, strict=True)]
        inputs.clear()
        tokens.clear()
        return streamer.run(Transformer(module), calls)

    if onednn.convolves():  # in channels-last oneDNN reorders nothing but weights
        ordered = {id(x): x if x.is_meta else x.contiguous(memory_format=torch.channels_last) for x in latents}
        latents = [ordered[id(x)] for x in latents]
    hidden = each("unet.conv_in", unet.conv_in, list(latents))
    skips = [list(hidden)]
    for i, block in enumerate(unet.down_blocks):
        attentions = getattr(block, "attentions", [None] * len(block.resnets))
        for j, (resnet, attention) in enumerate(zip(block.resnets, attentions, strict=True)):
            hidden = residual(f"unet.down_blocks.{i}.resnets.{j}", resnet, hidden)
            if attention is not None:
                hidden = transform(f"unet.down_blocks.{i}.attentions.{j}", attention, hidden)
            skips.append(list(hidden))
        for sampler in block.downsamplers or []:
            hidden = each(f"unet.down_blocks.{i}.downsamplers", sampler, hidden)
            skips.append(list(hidden))
    if (mid := unet.mid_block) is not None:
        hidden = residual("unet.mid_block.resnets.0", mid.resnets[0], hidden)
        for j, (attention, resnet) in enumerate(zip(mid.attentions, mid.resnets[1:], strict=True)):
            if attention is not None:
                hidden = transform(f"unet.mid_block.attentions.{j}", attention, hidden)
            hidden = residual(f"unet.mid_block.resnets.{j + 1}", resnet, hidden)
    for i, block in enumerate(unet.up_blocks):
        attentions = getattr(block, "attentions", [None] * len(block.resnets))
        for j, (resnet, attention) in enumerate(zip(block.resnets, attentions, strict=True)):
            hidden = residual(f"unet.up_blocks.{i}.resnets.{j}", resnet, hidden, skips.pop())
            if attention is not None:
                hidden = transform(f"unet.up_blocks.{i}.attentions.{j}", attention, hidden)
        for sampler in block.upsamplers or []:
            large = whole_elements is not None and 4 * hidden[0].numel() > whole_elements
            upsampler = strips.Enlarged(sampler) if large else Upsampler(sampler)
            hidden = each(f"unet.up_blocks.{i}.upsamplers", upsampler, hidden)
    hidden = each("unet.conv_out", Head(unet), hidden)
    assert len(hidden) == batch and not skips
    return torch.cat(hidden)


def _time_embeddings(
    unet: UNet2DConditionModel,
    streamer: Streamer,
    embedded: Tensor,
    batch: int,
    added: Sequence[Tensor] | None,
    guidance: Sequence[float] | None,
) -> list[Tensor]:
    """The time embedding (1, width) of each sample, from the timestep's sines (1, n); samples with equal guidance and
    the same `added` tensor share one."""
    if guidance is None:
        tembs = [unet.time_embedding(embedded)] * batch
    else:
        width = unet.config.time_cond_proj_dim
        by_scale = {
            g: unet.time_embedding(embedded, guidance_sines(g, width, embedded)) for g in dict.fromkeys(guidance)
        }
        tembs = [by_scale[g] for g in guidance]
    if added is None:
        return tembs
    projected = streamer.run(unet.add_embedding, [(x,) for x in added])
    pairs = list(zip(tembs, projected, strict=True))
    sums = {(id(temb), id(more)): temb + more for temb, more in pairs}
    return [sums[id(temb), id(more)] for temb, more in pairs]


def guidance_sines(scale: float, width: int, like: Tensor) -> Tensor:
    """The embedding of the guidance scale for a UNet that has it as an input, (1, width) fp32: sines of 1000 · (scale −
    1), as in diffusers' get_guidance_scale_embedding."""
    if like.is_meta:
        return like.new_empty(1, width)
    half = width // 2
    rates = torch.exp(torch.arange(half, dtype=torch.float32) * -(torch.log(torch.tensor(10000.0)) / (half - 1)))
    angles = torch.tensor([[1000.0 * (scale - 1)]]) * rates
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, width % 2))
