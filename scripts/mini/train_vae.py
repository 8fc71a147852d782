"""Training of the autoencoder on 128-px pieces of the pool."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL
from machine import DEVICE, autocast
from model import LATENT_CHANNELS, POSTERIOR_STD, build_vae, fix_variance
from optimisers import Average, Clock, step_size
from pool import HELD_OUT_SHARD, SIDE
from pooling import start_as_pooling
from spectrum import spectral_error
from torch import Tensor
from workshop import Workshop, log, psnr, resized, set_parameters, shipped_vae, to_tensor

PIECE = 128  # px
_SAVE_EVERY = 120.0  # seconds
_SPECTRUM = 0.05  # weight of spectral_error


@dataclass(frozen=True, kw_only=True)
class VaeSettings:
    minutes: float
    fresh: bool = False  # from the committed weights even if there is a state
    batch: int = 0  # 0: 16 on a processor, 128 on CUDA
    lr: float = 3e-4
    cold: bool = False  # from averages and differences of pixels, not from weights
    decoder: bool = False  # that alone, for the spectrum too: a UNet needs no training after it
    smooth: float = 0.0  # weight of decoding shrunk latents


def train_vae(workshop: Workshop, settings: VaeSettings) -> None:
    torch.manual_seed(1)
    pieces = _pieces(workshop, settings.batch or (16 if DEVICE.type == "cpu" else 128))
    vae = _begin(settings, next(pieces))
    if settings.decoder:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    held_out = _held_out(workshop)
    optimiser = torch.optim.AdamW(vae.parameters(), lr=settings.lr, betas=(0.9, 0.98), weight_decay=1e-4, fused=True)
    average, step, goal = Average([vae], 0.998), 0, None
    if not settings.fresh and (state := workshop.load_state("vae")) is not None:
        vae.load_state_dict(state["vae"])
        optimiser.load_state_dict(state["optimiser"])
        average.load_state_dict(state["average"])
        step, goal = state["step"], state["goal"]
        if settings.decoder:  # it must decode the latents of the encoder that is exported
            set_parameters([vae], average.mean)
    goal = goal or _statistics(vae, held_out)
    log(f"vae step {step}{measure(vae, average, held_out)}")
    clock, saved = Clock(settings.minutes), 0.0
    losses: list[float] = []
    while True:
        for group in optimiser.param_groups:
            group["lr"] = step_size(settings.lr, len(losses), clock.left, falling=0.5)
        x = next(pieces)
        smooth = settings.smooth
        loss = _decoder_loss(vae, x, smooth) if settings.decoder else _loss(vae, x, goal, smooth)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 0.5)
        optimiser.step()
        if not settings.decoder:
            fix_variance(vae)
        average.update()
        step += 1
        losses.append(loss.item())
        done = not clock.left
        if step % 100 == 0 or done:
            log(f"vae step {step} loss {np.mean(losses[-100:]):.4f}{measure(vae, average, held_out)}")
        if done or clock.spent - saved > _SAVE_EVERY:
            state = {"vae": vae.state_dict(), "optimiser": optimiser.state_dict(), "average": average.state_dict()}
            workshop.save_state("vae", {**state, "step": step, "goal": goal})
            saved = clock.spent
        if done:
            return


def _begin(settings: VaeSettings, some: Tensor) -> AutoencoderKL:
    if settings.cold:
        vae = build_vae()
        start_as_pooling(vae, some.cpu())
    else:
        vae = shipped_vae()
    return vae.to(DEVICE)


def _pieces(workshop: Workshop, batch: int) -> Iterator[Tensor]:
    """Endless batches (batch, 3, 128, 128) in [-1, 1], some of them mirrored."""
    pool = workshop.pool
    shards = [pool.pictures(k) for k in pool.shards()]
    rng = np.random.default_rng()
    while True:
        pieces = []
        for _ in range(batch):
            shard = shards[rng.integers(len(shards))]
            count, height, width, _ = shard.shape
            y, x = rng.integers(0, height - PIECE + 1), rng.integers(0, width - PIECE + 1)
            piece = shard[rng.integers(count), y : y + PIECE, x : x + PIECE]
            pieces.append(piece[:, ::-1] if rng.random() < 0.5 else piece)
        yield to_tensor(np.stack(pieces), DEVICE)


def _held_out(workshop: Workshop) -> Tensor:
    """(32, 3, 128, 128): the middles of 16 whole scenes, then of 16 crops."""
    pictures, part = workshop.pool.pictures(HELD_OUT_SHARD), workshop.part
    middle = slice(SIDE // 4, SIDE // 4 + PIECE)
    chosen = np.concatenate([pictures[:16], pictures[part : part + 16]])[:, middle, middle]
    return to_tensor(chosen, DEVICE)


@torch.no_grad()
def _statistics(vae: AutoencoderKL, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each latent channel. Training pulls latents to them, so that a UNet can go on."""
    z = vae.encode(pictures).latent_dist.mean
    return z.mean((0, 2, 3)), z.std((0, 2, 3))


def _loss(vae: AutoencoderKL, x: Tensor, goal: tuple[Tensor, Tensor], smooth: float) -> Tensor:
    z = _latents(vae, x)
    drift = (z.mean((0, 2, 3)) - goal[0]).square().mean() + (z.std((0, 2, 3)) - goal[1]).square().mean()
    return _difference(_decoded(vae, z) - x) + 0.01 * drift + _smooth_loss(vae, x, z, smooth)


def _decoder_loss(vae: AutoencoderKL, x: Tensor, smooth: float) -> Tensor:
    with torch.no_grad():
        z = _latents(vae, x)
    y = _decoded(vae, z)
    return _difference(y - x) + _SPECTRUM * spectral_error(y, x) + _smooth_loss(vae, x, z, smooth)


def _latents(vae: AutoencoderKL, x: Tensor) -> Tensor:
    """(n, 8, 16, 16) fp32."""
    with autocast():
        return vae.quant_conv(vae.encoder(x))[:, :LATENT_CHANNELS].float()


def _decoded(vae: AutoencoderKL, z: Tensor) -> Tensor:
    """(n, 3, 128, 128) from latents with the noise of a posterior."""
    with autocast():
        return vae.decode(z + POSTERIOR_STD * torch.randn_like(z)).sample.float()


def _smooth_loss(vae: AutoencoderKL, x: Tensor, z: Tensor, weight: float) -> Tensor | float:
    """Shrunk latents should decode to the shrunk picture (EQ-VAE, arXiv:2502.09509): what is fine in a picture is then
    fine in its latents too, instead of being spread over all scales."""
    if not weight:
        return 0.0
    side = PIECE // 32 * int(torch.randint(2, 4, ()))  # a half, or three quarters
    with autocast():
        y = vae.decode(resized(z, side)).sample
    return weight * _difference(y.float() - resized(x, 8 * side))


def _difference(error: Tensor) -> Tensor:
    """Of pixels, and of their edges."""
    edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    return error.abs().mean() + 0.5 * edges + error.square().mean()


@torch.no_grad()
def measure(vae: AutoencoderKL, average: Average, held_out: Tensor) -> str:
    """PSNR of the averaged weights."""
    with average:
        decoded = vae.decode(vae.encode(held_out).latent_dist.mean).sample
    scenes, crops = psnr(decoded, held_out).chunk(2)
    return f" PSNR scenes {scenes.mean():.2f}, crops {crops.mean():.2f} dB"
