"""Training of the UNet together with its text encoder, on latents of the pool."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from art import Thing
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from examples import Batch, Sampler, Supply
from gradients import Gradients
from heads import LayoutHead, WordsHead
from machine import DEVICE, autocast, norms_in_bf16
from model import build_scheduler, build_text_encoder, build_unet
from optimisers import Average, Clock, Muon, step_size
from pool import HELD_OUT_SHARD
from tokens import move_words
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer
from workshop import Workshop, log, shipped_text_encoder, shipped_tokenizer, shipped_unet

HELD_OUT_TIMESTEPS = (999, 950, 850, 700, 500, 300, 150, 50)
_SAVE_EVERY, _MEASURE_EVERY = 120.0, 180.0  # seconds
_LAYOUT_SHARE, _WORDS_SHARE = 0.2, 0.1  # of the heads' losses


@dataclass(frozen=True, kw_only=True)
class UnetSettings:
    minutes: float
    fresh: bool = False  # from the committed weights even if there is a state
    batch: int = 0  # 0: 32 on a processor, 256 on CUDA
    lr: float = 1e-3
    crops: float = 0.35  # share of crops among the examples
    focus: float = 3.0  # weight of sun, moon and boat in the loss, where no noise hides them
    average: float = 0.998
    falling: float = 1 / 3  # share of the run, its last, over which the step size falls
    cold: bool = False  # from random weights


class Training:
    """The networks that are trained, with what moves them."""

    def __init__(self, settings: UnetSettings, tokenizer: CLIPTokenizer) -> None:
        self.settings, self.steps = settings, 0
        self.unet, self.text = (net.to(DEVICE).train() for net in _begin(settings.cold, tokenizer))
        if DEVICE.type == "cpu":  # in bf16 flash attention's backward takes a third of a step
            self.unet.set_attn_processor(AttnProcessor())
            self.text.set_attn_implementation("eager")
        else:
            norms_in_bf16(self.unet)
        self.layout = LayoutHead(self.unet).to(DEVICE)
        self.words = WordsHead(self.text.config.hidden_size).to(DEVICE)
        named = [*self.unet.named_parameters(), *self.text.named_parameters()]
        heads = [*self.layout.parameters(), *self.words.parameters()]
        matrices = {
            n: p for n, p in named if p.ndim > 1 and not any(k in n for k in ("embedding", "conv_in", "conv_out"))
        }
        self.muon = Muon(list(matrices.values()))
        rest = [*(p for n, p in named if n not in matrices), *heads]
        self.adam = torch.optim.AdamW(rest, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        self.parameters = [*(p for _, p in named), *heads]
        self.average = Average([self.unet, self.text], settings.average)
        self.alphas = build_scheduler().alphas_cumprod.to(DEVICE)
        self.gradients = Gradients(self._losses, self.parameters)

    def step(self, batch: Batch, lr: float) -> Tensor:
        """(4,) losses: what is made small, then noise, layout and words, which it is a sum of."""
        losses = self.gradients(batch)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()
        self.muon.step(lr)
        self.average.update()
        self.steps += 1
        return losses

    def _losses(self, batch: Batch) -> Tensor:
        noisy, target = self.noised(batch.latents, batch.noise, batch.timesteps)
        layout = batch.layout
        with autocast():
            said = self.text(batch.ids).last_hidden_state
            predicted = self.unet(noisy, batch.timesteps, said).sample
        # Sun, moon and boat are the shapes whose errors show, and 2 % of a picture. Noise that hides where they are
        # lowers their weight, or the network would learn to expect them, and larger ones.
        small = (layout == Thing.BODY.number) | (layout == Thing.BOAT.number)
        near = F.interpolate(F.max_pool2d(small.float()[:, None], 3, 1, 1), scale_factor=2.0)
        known = self.alphas[batch.timesteps].sqrt().view(-1, 1, 1, 1)
        weight = 1 + (self.settings.focus - 1) * known * near
        loss = ((predicted.float() - target).square() * weight).mean() / weight.mean()
        read, understood = self.layout.loss(layout), self.words.loss(said, batch.labels, batch.told)
        return torch.stack([loss + _LAYOUT_SHARE * read + _WORDS_SHARE * understood, loss, read, understood])

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Noisy latents and the velocity that the UNet should predict from them."""
        a = self.alphas[timesteps].view(-1, 1, 1, 1)
        return a.sqrt() * latents + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * latents

    @torch.no_grad()
    def held_out_loss(self, batch: Batch) -> str:
        """By the averaged weights, at each of HELD_OUT_TIMESTEPS."""
        found = []
        with self.average, autocast():
            said = self.text(batch.ids).last_hidden_state
            for t in HELD_OUT_TIMESTEPS:
                timesteps = torch.full((len(batch.latents),), t, device=DEVICE)
                noisy, target = self.noised(batch.latents, batch.noise, timesteps)
                predicted = self.unet(noisy, timesteps, said).sample.float()
                found.append(f"{t}:{F.mse_loss(predicted, target).item():.3f}")
        return " ".join(found)

    def _savers(self) -> dict[str, nn.Module | torch.optim.Optimizer | Muon | Average]:
        return {
            "unet": self.unet, "text": self.text, "layout": self.layout, "words": self.words,
            "adam": self.adam, "muon": self.muon, "average": self.average,
        }  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, **{name: part.state_dict() for name, part in self._savers().items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        for name, part in self._savers().items():
            part.load_state_dict(state[name])


def train_unet(workshop: Workshop, settings: UnetSettings) -> None:
    torch.manual_seed(2)
    tokenizer = workshop.tokenizer()
    if not workshop.pool.shards() or not workshop.pool.has(HELD_OUT_SHARD):
        sys.exit(f"{workshop.pool.folder} has no shards, or not the one that is held out: run `train.py draw` first")
    training = Training(settings, tokenizer)
    if not settings.fresh and (state := workshop.load_state("unet")) is not None:
        training.load_state_dict(state)
    supply = Supply(workshop, workshop.vae(), seed=10 + training.steps)
    try:
        _learn(workshop, settings, training, supply, Sampler(tokenizer, settings.crops, seed=11 + training.steps))
    finally:
        supply.close()


def _learn(workshop: Workshop, settings: UnetSettings, training: Training, supply: Supply, sampler: Sampler) -> None:
    held_out = _held_out(supply)
    sampler.add(supply.new(wait=True))
    log(f"unet step {training.steps}, {sampler.count} pictures, held out {training.held_out_loss(held_out)}")
    size = settings.batch or (32 if DEVICE.type == "cpu" else 256)
    clock, saved, measured = Clock(settings.minutes), 0.0, 0.0
    losses: list[Tensor] = []
    while True:
        lr = step_size(settings.lr, len(losses), clock.left, settings.falling)
        losses.append(training.step(sampler.batch(size), lr))
        done = not clock.left
        if training.steps % 100 == 0 or done:
            _, noise, layout, words = torch.stack(losses[-100:]).mean(0).tolist()
            speed = len(losses) * size / clock.spent
            log(
                f"unet step {training.steps} loss {noise:.4f} layout {layout:.3f} words {words:.3f} "
                f"{speed:.1f} samples/s, {sampler.count} pictures"
            )
            if not done:
                sampler.add(supply.new(wait=False))
        if done or clock.spent - measured > _MEASURE_EVERY:
            log(f"unet step {training.steps} held out {training.held_out_loss(held_out)}")
            measured = clock.spent
        if done or clock.spent - saved > _SAVE_EVERY:
            workshop.save_state("unet", training.state_dict())
            saved = clock.spent
        if done:
            return


def _begin(cold: bool, tokenizer: CLIPTokenizer) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Random weights, or the committed ones; the text encoder moves to `tokenizer` where that is another."""
    if cold:
        return build_unet(), build_text_encoder(len(tokenizer))
    text, known = shipped_text_encoder(), shipped_tokenizer()
    if tokenizer.get_vocab() != known.get_vocab():
        text = move_words(text, known, tokenizer)
    return shipped_unet(), text


def _held_out(supply: Supply) -> Batch:
    """24 whole scenes and 8 crops with one caption each and noise that is always the same."""
    e = supply.held_out()
    index = torch.cat([e.whole.nonzero()[:24, 0], (~e.whole).nonzero()[:8, 0]])
    latents = e.latents[index].float()
    return Batch(
        latents=latents,
        noise=torch.randn(latents.shape, generator=torch.Generator().manual_seed(4)).to(DEVICE),
        timesteps=torch.zeros(len(index), dtype=torch.long, device=DEVICE),
        ids=e.ids[index, 0],
        layout=e.layout[index],
        labels={name: values[index] for name, values in e.labels.items()},
        told=e.whole[index],
    )
