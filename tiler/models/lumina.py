"""Lumina-Next: the states of a Gemma, and a transformer trained by flow matching whose positions are relative.

Zhuo et al. 2024, arXiv:2406.18583; the arithmetic is that of diffusers' LuminaPipeline. Each tile is treated as a
picture of its own, from position 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tiler.compute.stream import Streamer
from tiler.errors import ModelError
from tiler.models import bounds, gemma
from tiler.models.family import (
    Family,
    OpenPart,
    Options,
    Part,
    Role,
    Traits,
    VaeSpec,
    plain_names,
    read_config,
    vae_part,
)
from tiler.models.lumina_blocks import build_transformer, conditioning, modulating, predict_sample, quantised, read_once
from tiler.models.modulation import Modulations, modulations
from tiler.models.patches import PATCH
from tiler.models.reading import READING, Reading
from tiler.models.required import check_latents, check_parts, fetch_part, read_scheduler, text_encoders
from tiler.models.samples import Prompt, Sample, empty, examples
from tiler.models.words import stripped
from tiler.weights.checkpoint import Checkpoint

TOKENS = 256  # the most tokens of a prompt
GUIDED = 3  # channels
_PIPELINES = "LuminaPipeline", "LuminaText2ImgPipeline"
_REPOSITORY = "Alpha-VLLM/Lumina-Next-SFT-diffusers"
# A strength of 0.62 in a flow without shift adds the noise that 0.5 of Stable Diffusion 1.x does: σ/(1 − σ) is the
# same.
_DEFAULTS = MappingProxyType({"num_inference_steps": 30, "guidance_scale": 4.0, "strength": 0.62})


class Prepared(NamedTuple):
    """The modulations by (step, number of the prompt), and the number of each prompt by the identity of its tokens."""

    modulations: Modulations
    prompts: dict[int, int]


class Lumina(Family):
    def encode(
        self,
        prompts: Sequence[str | None],
        open_part: OpenPart,
        warn: Callable[[str], None],
        reading: Reading = READING,
    ) -> list[Prompt]:
        """Gemma's states of each prompt's own tokens before its last layer, (1, T, width); a missing prompt is an empty
        one. The pipeline cuts a negative prompt to the length of the positive one; here it is complete."""
        texts = list(dict.fromkeys(stripped(prompt) for prompt in prompts))
        tokenizer = gemma.load_tokenizer(self.checkpoint, "tokenizer")
        with open_part(self.part(Role.TEXT_ENCODER)) as encoder:
            encoded = gemma.encode_gemma(tokenizer, encoder, texts, TOKENS, warn, reading, clean=str.lower)
        found = {text: Prompt(tokens) for text, tokens in zip(texts, encoded, strict=True)}
        return [found[stripped(prompt)] for prompt in prompts]

    def prepare(
        self, model: Any, streamer: Streamer, timesteps: Tensor, prompts: Sequence[Prompt], options: Options
    ) -> Prepared:
        """Read the modulation layers once for all steps and prompts. The model's time runs from noise, 0, to the
        picture, 1."""
        texts = list({id(prompt.tokens): prompt.tokens for prompt in prompts}.values())
        times = 1 - timesteps / self.scheduler.get("num_train_timesteps", 1000)
        seen = torch.cat([conditioning(model, times, text) for text in texts])
        keys = [(step, number) for number in range(len(texts)) for step in range(len(times))]
        made = modulations(streamer, modulating(model), F.silu(seen), keys, options.scratch)
        return Prepared(made, {id(text): number for number, text in enumerate(texts)})

    def predict(
        self,
        model: Any,
        streamer: Streamer,
        samples: Sequence[Sample],
        step: int,
        prepared: Prepared,
        check: Callable[[str], None] = lambda where: None,
    ) -> Tensor:
        """Predict the velocity. The model predicts the direction from noise to the picture, its opposite."""
        made, native = [], self.traits.native // PATCH
        for latents, prompt, _, _ in samples:
            rows = prepared.modulations.read((step, prepared.prompts[id(prompt.tokens)]))
            made.append(predict_sample(model, streamer, latents, prompt.tokens, rows, native, check).neg_())
        return torch.cat(made)

    def example(self, tiles: Sequence[int], sides: tuple[int, int]) -> list[Sample]:
        prompt = Prompt(empty(1, TOKENS, self.part(Role.DENOISER).config.get("cross_attention_dim", 2048)))
        return examples(tiles, self.latent_channels, sides, lambda: prompt)


def read(checkpoint: Checkpoint, name: str) -> Lumina:
    """Check the configs of a pipeline of class `name`. Raises ModelError, which says what the model is."""
    if name not in _PIPELINES:
        what = "Lumina-Image 2" if "Lumina2" in name else "a Lumina pipeline of another kind"
        raise ModelError(f"{checkpoint.name}: this is {what} ({name}); tiler supports Lumina-Next (LuminaPipeline)")
    encoders = text_encoders(checkpoint, ["text_encoder"])
    check_parts(checkpoint, _REPOSITORY, ["transformer", *encoders, "vae"])
    if checkpoint.reads_text:
        gemma.check_tokenizer(checkpoint, "tokenizer", fetch_part(checkpoint, _REPOSITORY, "tokenizer"))
    config = read_config(checkpoint, "transformer", "LuminaNextDiT2DModel", bounds.check_lumina)
    vae = read_config(checkpoint, "vae", "AutoencoderKL", bounds.check_vae)
    texts = [gemma.read_gemma(checkpoint, part, TOKENS) for part in encoders]
    channels, width = config.get("in_channels", 4), config.get("hidden_size", 2304)
    check_latents(checkpoint, {"in_channels": channels}, vae)  # as many of the outputs are used
    for text in texts:
        if (given := text.config["hidden_size"]) != (wanted := config.get("cross_attention_dim", 2048)):
            raise ModelError(
                f"{checkpoint.name}: the transformer expects text of width {wanted} (cross_attention_dim), {text.name} "
                f"gives {given}; these parts do not belong together"
            )
    spec = VaeSpec(checkpoint=checkpoint, part="vae", config=vae)
    denoiser = Part(
        name="transformer", role=Role.DENOISER, config=config, aliases=plain_names,
        build=partial(build_transformer, checkpoint, config), quantise=quantised, once=read_once, rotate=True,
    )  # fmt: skip
    traits = Traits(
        title="Lumina-Next", native=int(config.get("sample_size", 128)), granularity=PATCH, patch=PATCH, samples=1,
        channels=channels, width=width, flow=True, large_blocks=True, guided_channels=GUIDED, defaults=_DEFAULTS,
    )  # fmt: skip
    return Lumina(
        checkpoint=checkpoint, traits=traits, parts=(*texts, denoiser, vae_part(spec)), vae=spec,
        scheduler=read_scheduler(checkpoint, _REPOSITORY),
    )  # fmt: skip
