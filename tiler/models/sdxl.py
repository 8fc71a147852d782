"""SDXL: two CLIP text encoders, and a UNet conditioned on the picture's size and on the crop that a sample shows.

Podell et al. 2023, arXiv:2307.01952; the arithmetic is that of diffusers' StableDiffusionXLPipeline. Turbo, Lightning
and LCM models differ in their configs alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
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
    encode_penultimate,
    lengthened,
    load_tokenizer,
    run_clip,
)
from tiler.models.family import (
    Family,
    Guidance,
    OpenPart,
    Options,
    Part,
    Role,
    Traits,
    VaeSpec,
    no_parameter,
    plain_names,
    read_config,
    vae_part,
)
from tiler.models.few_steps import FEW_STEPS, note_of, sign_of_few_steps
from tiler.models.reading import READING, Reading
from tiler.models.required import check_parts, fetch_part, read_scheduler, text_encoders
from tiler.models.samples import Place, Prompt, Sample, empty, examples
from tiler.models.unet import build_unet, halved, predict_noise, quantised, windows_of
from tiler.request import TileConditioning
from tiler.weights.checkpoint import Checkpoint

BASE = "stabilityai/stable-diffusion-xl-base-1.0"
# Of a hidden state and its skip joined, which is 63 MB where the last level of a 1024-px tile begins. Below this, what
# a unit holds of weights is the larger part.
WHOLE_ELEMENTS = 3 * 2**20
EMBEDDED_SCALE = 8.0  # of guidance, in the example of latent-consistency/lcm-sdxl
NUMBERS = 6  # that the UNet is told of a sample's place
_NOT_TEXT_TO_IMAGE = {"Inpaint": "an inpainting model", "InstructPix2Pix": "an InstructPix2Pix model"}


class Prepared(NamedTuple):
    """The schedule's timesteps (steps,), and the user's options for the denoiser."""

    timesteps: Tensor
    options: Options


@dataclass(frozen=True, kw_only=True)
class StableDiffusionXL(Family):
    zeros_for_absent: bool = True  # whether a negative prompt that was not given is zeros, not an empty text

    @property
    def encoding(self) -> tuple[object, ...]:
        return (self.zeros_for_absent,)

    def encode(
        self,
        prompts: Sequence[str | None],
        open_part: OpenPart,
        warn: Callable[[str], None],
        reading: Reading = READING,
    ) -> list[Prompt]:
        """The states before the last layer of both encoders, (1, 77·chunks, 2048), and the second one's projected
        vector (1, 1280)."""
        given = ["" if prompt is None and not self.zeros_for_absent else prompt for prompt in prompts]
        texts = list(dict.fromkeys(text for text in given if text is not None))
        encoded = []
        for part, tokenizer, tell in zip(
            self.encoders, ("tokenizer", "tokenizer_2"), (warn, lambda text: None), strict=True
        ):
            with open_part(part) as encoder:
                encoded.append(encode_penultimate(load_tokenizer(self, tokenizer), encoder, texts, tell, reading))
        both = [
            Prompt(torch.cat([first.tokens, second.tokens], dim=-1), second.pooled)
            for first, second in zip(*encoded, strict=True)
        ]
        known: dict[str | None, Prompt] = dict(zip(texts, both, strict=True))
        known[None] = Prompt(*(torch.zeros(shape) for shape in self._shapes))
        return [known[text] for text in given]

    def lengthened(self, prompt: Prompt, tokens: int, empty: Prompt) -> Prompt:
        # A prompt that was not given is zeros to its end.
        rows = empty.tokens if bool(prompt.tokens.any()) else torch.zeros_like(empty.tokens)
        return Prompt(lengthened(prompt.tokens, tokens, rows), prompt.pooled)

    @property
    def _shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of a prompt's tokens and of its pooled vector."""
        config = self.part(Role.DENOISER).config
        pooled = config["projection_class_embeddings_input_dim"] - numbers_width(config)
        return (1, CLIP_TOKENS, text_width(config)), (1, pooled)

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
        timestep, options = prepared.timesteps[step], prepared.options
        added: dict[tuple[int, tuple[int, ...]], Tensor] = {}  # samples of one prompt and place share a tensor
        for _, prompt, place, _ in samples:
            assert prompt.pooled is not None
            ids = time_ids(place, options.tile_conditioning)
            if (key := (id(prompt.pooled), ids)) not in added:
                sizes = model.add_time_proj(torch.tensor(ids, dtype=torch.float32, device=prompt.pooled.device))
                added[key] = torch.cat([prompt.pooled, sizes.view(1, -1)], dim=-1)
        told = [added[id(s.prompt.pooled), time_ids(s.place, options.tile_conditioning)] for s in samples]
        latents, tokens = [s.latents for s in samples], [s.prompt.tokens for s in samples]
        windows = windows_of(options, timestep)
        guidance = [s.guidance for s in samples] if self.traits.guidance is Guidance.EMBEDDED else None
        return predict_noise(model, streamer, latents, timestep, tokens, check, windows, told, WHOLE_ELEMENTS, guidance)

    def example(self, tiles: Sequence[int], sides: tuple[int, int]) -> list[Sample]:
        # Each sample has a prompt of its own: halves of a guidance never have the same pooled vector.
        return examples(tiles, self.latent_channels, sides, lambda: Prompt(*(empty(*s) for s in self._shapes)))


def time_ids(place: Place, conditioning: TileConditioning) -> tuple[int, ...]:
    """(height, width) of the original, (top, left) of the crop, (height, width) of the target, in pixels.

    A tile is described as a crop of the canvas at its own place and size, or, as AUTOMATIC1111 does for every tile, as
    the whole canvas. A guide is a canvas of its own and in both cases a whole picture.
    """
    if conditioning is TileConditioning.NONE:
        return (*place.canvas, 0, 0, *place.canvas)
    top, left = (start % side for start, side in zip(place[:2], place.canvas, strict=True))
    return (*place.canvas, top, left, place.height, place.width)


def text_width(unet: Mapping[str, Any]) -> int:
    """The width of a prompt's tokens."""
    return int(unet.get("cross_attention_dim", 1280))


def numbers_width(unet: Mapping[str, Any]) -> int:
    """The width of the embedded size and crop numbers, which follow the pooled vector."""
    return NUMBERS * int(unet.get("addition_time_embed_dim") or 0)


def projected_width(text: Mapping[str, Any]) -> int:
    """The width of the pooled vector of a CLIP with a projection, given its config."""
    return int(text.get("projection_dim") or 512)


def read(checkpoint: Checkpoint, name: str) -> StableDiffusionXL:
    """Check the configs of a pipeline of class `name`. Raises ModelError, saying what the model is."""
    index = checkpoint.config("", "model_index.json")
    for word, what in _NOT_TEXT_TO_IMAGE.items():
        if word in name:
            raise ModelError(f"{checkpoint.name}: this is {what} ({name}); tiler needs text-to-image")
    where = f"{checkpoint.folder / 'unet'}/config.json"
    check_parts(checkpoint, "", ["unet"])
    unet = read_config(checkpoint, "unet", "UNet2DConditionModel", bounds.check_unet)
    _check_base(checkpoint, index, unet)
    encoders = text_encoders(checkpoint, ("text_encoder", "text_encoder_2"))
    check_parts(checkpoint, BASE, (*encoders, "vae"))
    for part in ("tokenizer", "tokenizer_2") if checkpoint.reads_text else ():
        check_tokenizer(checkpoint.tokenizer(part), fetch_part(checkpoint, BASE, part))
    vae = read_config(checkpoint, "vae", "AutoencoderKL", bounds.check_vae)
    texts = {part: read_config(checkpoint, part, None, bounds.check_text) for part in encoders}
    check_channels(checkpoint, unet, vae)
    guidance = Guidance.CFG if unet.get("time_cond_proj_dim") is None else Guidance.EMBEDDED
    check_unet_kind(
        where, unet, "SDXL", addition_embed_type="text_time", time_cond_proj_dim=unet.get("time_cond_proj_dim")
    )
    _check_widths(checkpoint, where, unet, texts)
    scheduler = read_scheduler(checkpoint, BASE)
    spec, levels = VaeSpec(checkpoint=checkpoint, part="vae", config=vae), len(unet["block_out_channels"])
    text_parts = [
        Part(
            name=part,
            role=Role.TEXT_ENCODER,
            config=text,
            build=partial(build_clip, checkpoint, part, text, projection=part == "text_encoder_2"),
            aliases=clip_names,
            quantise=partial(quantised, widths=()) if part == "text_encoder" else no_parameter,
            example=partial(run_clip, output_hidden_states=True),
        )
        for part, text in texts.items()
    ]
    denoiser = Part(
        name="unet",
        role=Role.DENOISER,
        config=unet,
        build=partial(build_unet, checkpoint, unet),
        aliases=plain_names,
        quantise=partial(quantised, widths=unet["block_out_channels"]),
        half=halved,
    )
    defaults, notes = {"guidance_scale": 5.0}, []
    if (sign := sign_of_few_steps(checkpoint.name, scheduler)) is not None:
        defaults, told = dict(FEW_STEPS), "no guidance"
        if guidance is Guidance.EMBEDDED:  # consistency models that were not merged into their base
            defaults["guidance_scale"], told = (
                EMBEDDED_SCALE,
                f"a guidance of {EMBEDDED_SCALE:g} as an input of the model",
            )
        notes.append(note_of(sign, told))
    traits = Traits(
        title="SDXL", native=int(unet.get("sample_size") or 128), granularity=2 ** (levels - 1),
        channels=int(vae.get("latent_channels", 4)), width=unet["block_out_channels"][0],
        guidance=guidance, defaults=MappingProxyType(defaults), old_schedulers=False,
        chunked=True, embeddings=True, told_place=True,
        few_steps="SDXL-Lightning or an LCM LoRA" if sign is None else None,
    )  # fmt: skip
    return StableDiffusionXL(
        checkpoint=checkpoint, traits=traits, parts=(*text_parts, denoiser, vae_part(spec)), vae=spec,
        scheduler=scheduler,
        notes=tuple(notes), zeros_for_absent=bool(index.get("force_zeros_for_empty_prompt", True)),
    )  # fmt: skip


def _check_base(checkpoint: Checkpoint, index: Mapping[str, Any], unet: Mapping[str, Any]) -> None:
    """Raise ModelError for the refiner, and for a UNet that is not SDXL's."""
    absent = index.get("text_encoder", "")
    alone = isinstance(absent, list) and not any(absent)
    if alone or index.get("requires_aesthetics_score") or unet.get("cross_attention_dim") == 1280:
        raise ModelError(
            f"{checkpoint.name}: this is SDXL's refiner, which finishes pictures of the base model; give the base: {BASE}"
        )
    if unet.get("addition_embed_type") != "text_time":
        raise ModelError(
            f"{checkpoint.folder / 'unet'}/config.json: addition_embed_type = {unet.get('addition_embed_type')!r}, SDXL's "
            "is 'text_time'; this UNet does not belong to the pipeline"
        )


def _check_widths(
    checkpoint: Checkpoint, where: str, unet: Mapping[str, Any], texts: Mapping[str, Mapping[str, Any]]
) -> None:
    """Check that UNet and text encoders fit together. Raises ModelError."""
    taken, numbers = unet.get("projection_class_embeddings_input_dim"), numbers_width(unet)
    if not isinstance(taken, int) or taken <= numbers:
        raise ModelError(f"{where}: projection_class_embeddings_input_dim = {taken}; it must be above {numbers}")
    for part, text in texts.items():
        kind = str(text.get("model_type", "clip_text_model"))
        if not kind.startswith("clip"):
            raise ModelError(f"{checkpoint.folder / part}/config.json: this is {kind!r}; SDXL's text encoders are CLIP")
    if not texts:
        return
    given, pooled = sum(text["hidden_size"] for text in texts.values()), projected_width(texts["text_encoder_2"])
    if text_width(unet) != given:
        raise ModelError(
            f"{where}: the UNet expects text width {text_width(unet)}, the text encoders give {given} together"
        )
    if taken != numbers + pooled:
        raise ModelError(
            f"{where}: projection_class_embeddings_input_dim = {taken}, but {NUMBERS} numbers and text_encoder_2's pooled "
            f"vector come to {numbers + pooled}"
        )
