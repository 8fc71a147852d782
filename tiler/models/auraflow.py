"""AuraFlow: Pile-T5 (a UMT5 encoder with LLaMA's tokenizer), and a transformer of few joint and many single blocks,
trained by flow matching; the arithmetic is that of diffusers' AuraFlowPipeline.

Each tile claims the middle of the model's learned grid of positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tiler.compute.stream import Streamer
from tiler.errors import ModelError
from tiler.models import bounds, t5
from tiler.models.auraflow_blocks import build_transformer, modulating, predict_sample, quantised, read_once, table_side
from tiler.models.family import (
    Family,
    OpenPart,
    Options,
    Part,
    Role,
    Traits,
    VaeSpec,
    read_config,
    vae_part,
)
from tiler.models.modulation import Modulations, modulations
from tiler.models.patches import PATCH
from tiler.models.positions import table_names
from tiler.models.reading import READING, Reading
from tiler.models.required import check_latents, check_parts, fetch_part, read_scheduler, text_encoders
from tiler.models.samples import Prompt, Sample, empty, examples
from tiler.weights.checkpoint import Checkpoint

TOKENS = 256  # of a prompt
ARENA_BYTES = 114_000_000  # a feed-forward or an attention in int8
_REPOSITORY = "fal/AuraFlow-v0.3"
# 0.48 of its schedule adds the noise that 0.5 of Stable Diffusion 1.x does: σ/(1 − σ) is the same.
_DEFAULTS = MappingProxyType({"num_inference_steps": 50, "guidance_scale": 3.5, "strength": 0.48})


class AuraFlow(Family):
    def encode(
        self,
        prompts: Sequence[str | None],
        open_part: OpenPart,
        warn: Callable[[str], None],
        reading: Reading = READING,
    ) -> list[Prompt]:
        """The last hidden states of a prompt's own tokens, followed by zeros: (1, 256, width). The transformer attends
        to the zeros as well. An absent negative prompt is encoded as an empty one."""
        part = self.part(Role.TEXT_ENCODER)
        texts = list(dict.fromkeys(prompt or "" for prompt in prompts))
        tokenizer = t5.load_tokenizer(self.checkpoint, "tokenizer")
        with open_part(part) as encoder:
            rows = t5.encode_t5(tokenizer, encoder, texts, TOKENS, warn, reading, keep_pads=False)
        encoded = {
            text: Prompt(F.pad(states, (0, 0, 0, TOKENS - states.shape[1])))
            for text, states in zip(texts, rows, strict=True)
        }
        return [encoded[prompt or ""] for prompt in prompts]

    def prepare(
        self, model: Any, streamer: Streamer, timesteps: Tensor, prompts: Sequence[Prompt], options: Options
    ) -> Modulations:
        """Evaluate the modulation layers once for all steps: they do not depend on the prompt."""
        temb = model.time_step_proj(model.time_step_embed(timesteps / 1000))
        return modulations(streamer, modulating(model), F.silu(temb), range(len(timesteps)), options.scratch)

    def predict(
        self,
        model: Any,
        streamer: Streamer,
        samples: Sequence[Sample],
        step: int,
        prepared: Modulations,
        check: Callable[[str], None] = lambda where: None,
    ) -> Tensor:
        side, rows = table_side(self.part(Role.DENOISER).config), prepared.read(step)
        made = [predict_sample(model, streamer, s.latents, s.prompt.tokens, rows, side, check) for s in samples]
        return torch.cat(made)

    def example(self, tiles: Sequence[int], sides: tuple[int, int]) -> list[Sample]:
        prompt = Prompt(empty(1, TOKENS, self.part(Role.DENOISER).config["joint_attention_dim"]))
        return examples(tiles, self.latent_channels, sides, lambda: prompt)


def read(checkpoint: Checkpoint, name: str) -> AuraFlow:
    """Check the configs of a pipeline of class `name`. Raises ModelError, saying what the model is."""
    encoders = text_encoders(checkpoint, ["text_encoder"])
    check_parts(checkpoint, _REPOSITORY, ["transformer", *encoders, "vae"])
    if checkpoint.reads_text:
        t5.check_tokenizer(checkpoint, "tokenizer", fetch_part(checkpoint, _REPOSITORY, "tokenizer"))
    config = read_config(checkpoint, "transformer", "AuraFlowTransformer2DModel", bounds.check_auraflow)
    vae = read_config(checkpoint, "vae", "AutoencoderKL", bounds.check_vae)
    texts = [t5.read_t5(checkpoint, part, TOKENS) for part in encoders]
    check_latents(checkpoint, config, vae)
    for text in texts:
        if (given := text.config["d_model"]) != config["joint_attention_dim"]:
            raise ModelError(
                f"{checkpoint.name}: the transformer expects text of width {config['joint_attention_dim']} "
                f"(joint_attention_dim), the text encoder gives {given}; these parts do not belong together"
            )
    spec = VaeSpec(checkpoint=checkpoint, part="vae", config=vae)
    denoiser = Part(
        name="transformer", role=Role.DENOISER, config=config, aliases=table_names, arena_bytes=ARENA_BYTES,
        build=partial(build_transformer, checkpoint, config), quantise=quantised, once=read_once, rotate=True,
    )  # fmt: skip
    traits = Traits(
        # What the config calls its sample size is in patches: 64 of them are the 1024 pixels it was trained on.
        title="AuraFlow", native=PATCH * int(config.get("sample_size", 64)), granularity=PATCH, patch=PATCH, samples=1,
        channels=int(vae["latent_channels"]), width=config["num_attention_heads"] * config["attention_head_dim"],
        flow=True, large_blocks=True, longest=PATCH * table_side(config), defaults=_DEFAULTS,
    )  # fmt: skip
    return AuraFlow(
        checkpoint=checkpoint, traits=traits, parts=(*texts, denoiser, vae_part(spec)), vae=spec,
        scheduler=read_scheduler(checkpoint, _REPOSITORY),
    )  # fmt: skip
