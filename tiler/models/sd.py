"""Stable Diffusion 1.x and 2.x: one CLIP text encoder and a UNet, epsilon or v-prediction.

The modules are diffusers' and transformers' own, built on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from tiler.compute.stream import Streamer
from tiler.errors import ModelError
from tiler.models import bounds
from tiler.models.checks import check_channels, check_unet_kind
from tiler.models.chunks import CLIP_TOKENS
from tiler.models.clip import (
    build_clip,
    check_tokenizer,
    clip_names,
    encode_last,
    lengthened,
    load_tokenizer,
    run_clip,
)
from tiler.models.corrections import correct_unet
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
from tiler.models.kinds import SD1, SD2
from tiler.models.reading import READING, Reading
from tiler.models.required import check_parts, fetch_part, read_scheduler, text_encoders
from tiler.models.samples import Prompt, Sample, empty, examples
from tiler.models.unet import build_unet, halved, predict_noise, quantised, windows_of
from tiler.weights.checkpoint import Checkpoint

CROSS_WIDTH = 1280  # of a prompt's tokens where a UNet's config does not say it, as diffusers has it


class Prepared(NamedTuple):
    """The schedule's timesteps (steps,), and the user's options for attention."""

    timesteps: Tensor
    options: Options


class StableDiffusion(Family):
    def encode(
        self,
        prompts: Sequence[str | None],
        open_part: OpenPart,
        warn: Callable[[str], None],
        reading: Reading = READING,
    ) -> list[Prompt]:
        """The last hidden states of CLIP, (1, 77·chunks, width) each; an absent negative prompt is encoded as an empty
        one."""
        tokenizer = load_tokenizer(self)
        texts = list(dict.fromkeys(prompt or "" for prompt in prompts))
        with open_part(self.part(Role.TEXT_ENCODER)) as encoder:
            encoded = dict(zip(texts, encode_last(tokenizer, encoder, texts, warn, reading), strict=True))
        return [encoded[prompt or ""] for prompt in prompts]

    def lengthened(self, prompt: Prompt, tokens: int, empty: Prompt) -> Prompt:
        return Prompt(lengthened(prompt.tokens, tokens, empty.tokens))

    def prepare(
        self, model: Any, streamer: Streamer, timesteps: Tensor, prompts: Sequence[Prompt], options: Options
    ) -> Prepared:
        return Prepared(timesteps, options)

    def predict(
        self,
        model: Any,
        streamer: Streamer,
        samples: Sequence[Sample],
        step: int,
        prepared: Prepared,
        check: Callable[[str], None] = lambda where: None,
    ) -> Tensor:
        timestep = prepared.timesteps[step]
        windows = windows_of(prepared.options, timestep)
        latents, tokens = [s.latents for s in samples], [s.prompt.tokens for s in samples]
        return predict_noise(model, streamer, latents, timestep, tokens, check, windows)

    def example(self, tiles: Sequence[int], sides: tuple[int, int]) -> list[Sample]:
        wide = self.part(Role.DENOISER).config.get("cross_attention_dim", CROSS_WIDTH)
        return examples(tiles, self.latent_channels, sides, lambda: Prompt(empty(1, CLIP_TOKENS, wide)))


def read(checkpoint: Checkpoint, name: str) -> StableDiffusion:
    """Check the configs of a pipeline of class `name`. Raises ModelError, saying what the model is."""
    if not checkpoint.has("unet") and checkpoint.has("transformer"):
        raise ModelError(
            f"{checkpoint.name}: this is a diffusion transformer that tiler does not know ({name}); it knows "
            "Stable Diffusion 3, PixArt, Flux.1, AuraFlow, HunyuanDiT and Lumina-Next"
        )
    check_parts(checkpoint, "", ["unet"])
    unet = read_config(checkpoint, "unet", "UNet2DConditionModel", bounds.check_unet)
    repository = (SD1 if unet.get("cross_attention_dim") == SD1.encoders[0].width else SD2).others
    text_parts = text_encoders(checkpoint, ["text_encoder"])
    check_parts(checkpoint, repository, ("vae", *text_parts))
    if checkpoint.reads_text:
        check_tokenizer(checkpoint.tokenizer("tokenizer"), fetch_part(checkpoint, repository, "tokenizer"))
    vae = read_config(checkpoint, "vae", "AutoencoderKL", bounds.check_vae)
    texts = {part: read_config(checkpoint, part, None, bounds.check_text) for part in text_parts}
    if unet.get("addition_embed_type") == "text_time" or unet.get("cross_attention_dim") == 2048:
        raise ModelError(
            f"{checkpoint.folder}/model_index.json: the class is {name!r}, but this UNet is SDXL's; correct the class to "
            "StableDiffusionXLPipeline, or download the file again"
        )
    check_channels(checkpoint, unet, vae)
    for text in texts.values():
        if not str(text.get("model_type", "clip_text_model")).startswith("clip"):
            raise ModelError(f"{checkpoint.name}: the text encoder is {text['model_type']!r}; tiler supports CLIP")
        if (taken := unet.get("cross_attention_dim", CROSS_WIDTH)) != text["hidden_size"]:
            raise ModelError(
                f"{checkpoint.name}: the UNet expects text width {taken}, the text encoder gives {text['hidden_size']}; "
                "these parts do not belong together"
            )
    check_unet_kind(f"{checkpoint.folder / 'unet'}/config.json", unet, "Stable Diffusion 1.x and 2.x")
    unet, notes = correct_unet(unet)
    scheduler = read_scheduler(checkpoint, repository)
    spec, levels = VaeSpec(checkpoint=checkpoint, part="vae", config=vae), len(unet["block_out_channels"])
    encoders = [
        Part(
            name=part,
            role=Role.TEXT_ENCODER,
            config=text,
            build=partial(build_clip, checkpoint, part, text),
            aliases=clip_names,
            quantise=partial(quantised, widths=()),
            example=run_clip,
        )
        for part, text in texts.items()
    ]
    parts = (
        *encoders,
        Part(
            name="unet",
            role=Role.DENOISER,
            config=unet,
            build=partial(build_unet, checkpoint, unet),
            aliases=plain_names,
            quantise=partial(quantised, widths=unet["block_out_channels"]),
            half=halved,
        ),
        vae_part(spec),
    )
    # The LoRAs that exist for few steps fit a UNet of the published size.
    is_sd1 = unet["block_out_channels"][0] == 320 and unet.get("cross_attention_dim") == SD1.encoders[0].width
    traits = Traits(
        title="Stable Diffusion", native=int(unet.get("sample_size", 64)), granularity=2 ** (levels - 1),
        channels=int(vae.get("latent_channels", 4)), width=unet["block_out_channels"][0],
        chunked=True, embeddings=True, clip_skip=True,
        few_steps="an LCM or Hyper-SD LoRA" if is_sd1 else None,
    )  # fmt: skip
    return StableDiffusion(
        checkpoint=checkpoint, traits=traits, parts=parts, vae=spec, scheduler=scheduler, notes=notes
    )
