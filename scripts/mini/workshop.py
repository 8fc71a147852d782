"""Where training keeps its things, and what it goes on from: its own state where there is one, else the committed
weights."""

from __future__ import annotations

import time
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from machine import DEVICE, autocast
from model import build_text_encoder, build_unet, build_vae
from places import SHIPPED
from pool import Pool
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer


@dataclass(frozen=True, kw_only=True)
class Workshop:
    """`work` holds the pool, states and, if captions got a new vocabulary, a tokenizer."""

    work: Path
    part: int = 500  # scenes and crops of a shard

    @property
    def pool(self) -> Pool:
        return Pool(folder=self.work / "pool", part=self.part)

    def load_state(self, name: str) -> dict[str, Any] | None:
        path = self.work / f"{name}.pt"
        return torch.load(path, map_location=DEVICE) if path.exists() else None

    def save_state(self, name: str, state: dict[str, Any]) -> None:
        self.work.mkdir(parents=True, exist_ok=True)
        temporary = self.work / f"{name}.tmp"
        torch.save(state, temporary)
        temporary.replace(self.work / f"{name}.pt")

    def vae(self) -> AutoencoderKL:
        """Averaged weights."""
        vae = shipped_vae()
        state = self.load_state("vae")
        if state:
            set_parameters([vae], state["average"]["mean"])
        return vae.eval().to(DEVICE)

    def tokenizer(self) -> CLIPTokenizer:
        own = self.work / "tokenizer"
        return CLIPTokenizer.from_pretrained(own if own.exists() else SHIPPED / "tokenizer")

    def latents(self, shard: int, version: str) -> Tensor:
        """(2·part, 8, H/8, W/8) fp16."""
        return torch.load(self._latents(shard, version))

    @torch.no_grad()
    def encode(self, vae: AutoencoderKL, shard: int, version: str) -> None:
        """Keep the latents of a shard, unless this autoencoder's are there."""
        path = self._latents(shard, version)
        if path.exists():
            return
        pictures, many = self.pool.pictures(shard), 10 if DEVICE.type == "cpu" else 100
        parts = []
        for i in range(0, len(pictures), many):
            with autocast():
                z = vae.encode(to_tensor(pictures[i : i + many], DEVICE)).latent_dist.mean
            parts.append(z.half().cpu())
        temporary = path.with_suffix(".tmp")
        torch.save(torch.cat(parts), temporary)
        temporary.replace(path)
        log(f"encoded shard {shard}")

    def _latents(self, shard: int, version: str) -> Path:
        return self.pool.folder / f"z{shard:03d}-{version}.pt"


def shipped_vae() -> AutoencoderKL:
    vae = build_vae()
    vae.load_state_dict(load_file(SHIPPED / "vae/diffusion_pytorch_model.safetensors"))
    return vae


def shipped_unet() -> UNet2DConditionModel:
    unet = build_unet()
    unet.load_state_dict(load_file(SHIPPED / "unet/diffusion_pytorch_model.safetensors"))
    return unet


def shipped_text_encoder() -> CLIPTextModel:
    text = build_text_encoder(len(shipped_tokenizer()))
    text.load_state_dict(load_file(SHIPPED / "text_encoder/model.safetensors"))
    return text


def shipped_tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(SHIPPED / "tokenizer")


@torch.no_grad()
def set_parameters(modules: list[nn.Module], values: list[Tensor]) -> None:
    parameters = [p for module in modules for p in module.parameters()]
    for p, value in zip(parameters, values, strict=True):
        p.copy_(value)


def fingerprint(vae: AutoencoderKL) -> str:
    """Eight hex digits of an encoder's weights: latents of different encoders are never mixed."""
    digest = sha256()
    for p in (*vae.encoder.parameters(), *vae.quant_conv.parameters()):
        digest.update(p.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:8]


def to_tensor(pictures: np.ndarray, device: torch.device | None = None) -> Tensor:
    """(n, H, W, 3) uint8 → (n, 3, H, W) fp32 in [-1, 1]."""
    return torch.from_numpy(np.array(pictures)).to(device).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def resized(x: Tensor, side: int) -> Tensor:
    """(n, c, side, side), antialiased."""
    return F.interpolate(x, size=side, mode="bilinear", antialias=True)


def psnr(got: Tensor, want: Tensor) -> Tensor:
    """(n,) dB, of pictures (n, 3, H, W) in [-1, 1]; at most 70."""
    error = (got.clamp(-1, 1) - want).square().mean((1, 2, 3)) / 4
    return -10 * error.clamp_min(1e-7).log10()


def log(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, flush=True)
