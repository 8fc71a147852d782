"""The stages of training beside the two loops: drawing the pool, learning a vocabulary, exporting."""

from __future__ import annotations

import json
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import art
import numpy as np
from art import THINGS
from captions import caption
from diffusers import StableDiffusionPipeline
from model import build_scheduler, build_text_encoder, build_unet
from pool import HELD_OUT_SHARD
from tokens import train_tokenizer
from workshop import Workshop, log, set_parameters, shipped_text_encoder, shipped_unet

_WORDS_SEED = 5


def draw(workshop: Workshop, shards: int, processes: int = 1) -> None:
    """As many shards for training, and one that is held out."""
    wanted = (HELD_OUT_SHARD, *range(shards))
    if processes == 1:
        _tell(wanted, map(workshop.pool.draw, wanted))
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as several:
        _tell(wanted, several.map(workshop.pool.draw, wanted))


def _tell(shards: Iterable[int], drawn: Iterable[bool]) -> None:
    for shard, drew in zip(shards, drawn, strict=True):
        if drew:
            log(f"drew shard {shard}")


def learn_words(workshop: Workshop) -> None:
    """A vocabulary of the captions of 6,000 scenes."""
    rng, texts = np.random.default_rng(_WORDS_SEED), []
    every = np.full(len(THINGS), 1 / len(THINGS))
    for k in range(6000):
        scene = art.compose(k)
        texts.append(caption(scene, rng))
        if k % 3 == 0:
            texts.append(caption(scene, rng, 0.7, every))
    tokenizer = train_tokenizer(texts, workshop.work / "tokenizer")
    log(f"{len(tokenizer)} words in {workshop.work / 'tokenizer'}")


def export(workshop: Workshop, out: Path) -> None:
    """fp16 safetensors in a diffusers folder; what was not trained here is as it was committed."""
    tokenizer, state = workshop.tokenizer(), workshop.load_state("unet")
    if state is None:
        unet, text = shipped_unet(), shipped_text_encoder()
    else:
        unet, text = build_unet(), build_text_encoder(len(tokenizer))
        set_parameters([unet, text], state["average"]["mean"])
    pipeline = StableDiffusionPipeline(
        vae=workshop.vae().half().cpu(),
        text_encoder=text.half(),
        tokenizer=tokenizer,
        unet=unet.half(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(out)
    size = sum(f.stat().st_size for f in out.rglob("*.safetensors"))
    print(json.dumps({"out": str(out), "safetensors_bytes": size, "unet_steps": state["steps"] if state else 0}))
