"""Stable Diffusion 3 and 3.5, medium, large and turbo: two CLIP text encoders, an optional T5, and a transformer of
joint blocks trained by flow matching.

Esser et al. 2024, arXiv:2403.03206; the arithmetic is that of diffusers' StableDiffusion3Pipeline. Each tile uses the
middle of the model's grid of positions, since the model was not trained on larger pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tiler.compute.stream import Streamer
from tiler.errors import ModelError
from tiler.models import bounds, t5
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
    OpenPart,
    Options,
    Part,
    Role,
    Traits,
    VaeSpec,
    no_parameter,
    read_config,
    vae_part,
)
from tiler.models.few_steps import FEW_STEPS, note_of, sign_of_few_steps
from tiler.models.modulation import Modulations, modulations
from tiler.models.patches import PATCH
from tiler.models.positions import table_names
from tiler.models.reading import READING, Reading
from tiler.models.required import check_latents, check_parts, fetch_part, read_scheduler, text_encoders
from tiler.models.samples import Prompt, Sample, empty, examples
from tiler.models.sd3_blocks import build_mmdit, modulating, predict_sample, quantised, read_once, table_side
from tiler.models.unet import quantised as quantised_text
from tiler.weights.checkpoint import Checkpoint

T5, T5_TOKENIZER, T5_TOKENS = "text_encoder_3", "tokenizer_3", 256
_CLIPS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


class Prepared(NamedTuple):
    """The modulations by (step, index of the prompt's pooled vector), and these indices by tensor identity."""

    modulations: Modulations
    prompts: dict[int, int]


class StableDiffusion3(Family):
    def encode(
        self,
        prompts: Sequence[str | None],
        open_part: OpenPart,
        warn: Callable[[str], None],
        reading: Reading = READING,
    ) -> list[Prompt]:
        """The states before the last layer of both CLIPs side by side, followed by T5's last states: (1, 77·chunks +
        256, width), with zeros in the gaps; and both projected vectors, (1, 2048). An absent negative prompt is encoded
        as an empty one."""
        texts = list(dict.fromkeys(prompt or "" for prompt in prompts))
        found: list[list[Prompt]] = []
        for part, tell in zip(self.encoders[:2], (warn, _silent), strict=True):
            with open_part(part) as encoder:
                tokenizer = load_tokenizer(self, _CLIPS[part.name])
                found.append(encode_penultimate(tokenizer, encoder, texts, tell, reading))
        below: list[Tensor] = []
        for part in self.encoders[2:]:
            with open_part(part) as encoder:
                words = t5.load_tokenizer(self.checkpoint, T5_TOKENIZER)
                below = t5.encode_t5(words, encoder, texts, T5_TOKENS, _silent, reading, keep_pads=True)
        width = self._shape[1]
        encoded = {}
        for i, (first, second) in enumerate(zip(*found, strict=True)):
            assert first.pooled is not None and second.pooled is not None
            clip = torch.cat([first.tokens, second.tokens], dim=-1)
            tokens = torch.zeros(1, clip.shape[1] + T5_TOKENS, width)
            tokens[:, : clip.shape[1], : clip.shape[2]] = clip
            if below:
                tokens[:, -T5_TOKENS:] = below[i]
            encoded[texts[i]] = Prompt(tokens, torch.cat([first.pooled, second.pooled], dim=-1))
        return [encoded[prompt or ""] for prompt in prompts]

    def lengthened(self, prompt: Prompt, tokens: int, empty: Prompt) -> Prompt:
        return Prompt(lengthened(prompt.tokens, tokens, empty.tokens[:, :CLIP_TOKENS], behind=T5_TOKENS), prompt.pooled)

    @property
    def _shape(self) -> tuple[int, int]:
        """The rows of a prompt, and their width."""
        return CLIP_TOKENS + T5_TOKENS, self.part(Role.DENOISER).config["joint_attention_dim"]

    def prepare(
        self, model: Any, streamer: Streamer, timesteps: Tensor, prompts: Sequence[Prompt], options: Options
    ) -> Prepared:
        """Evaluate the modulation layers once for all steps and prompts."""
        pooled = list({id(p.pooled): p.pooled for p in prompts if p.pooled is not None}.values())
        keys = [(step, number) for step in range(len(timesteps)) for number in range(len(pooled))]
        vectors = torch.cat([pooled[number] for _, number in keys])
        temb = model.time_text_embed(timesteps.repeat_interleave(len(pooled)), vectors)
        made = modulations(streamer, modulating(model), F.silu(temb), keys, options.scratch)
        return Prepared(made, {id(vector): number for number, vector in enumerate(pooled)})

    def predict(
        self,
        model: Any,
        streamer: Streamer,
        samples: Sequence[Sample],
        step: int,
        prepared: Prepared,
        check: Callable[[str], None] = lambda where: None,
    ) -> Tensor:
        side, made = table_side(self.part(Role.DENOISER).config), []
        for latents, prompt, _, _ in samples:
            rows = prepared.modulations.read((step, prepared.prompts[id(prompt.pooled)]))
            made.append(predict_sample(model, streamer, latents, prompt.tokens, rows, side, check))
        return torch.cat(made)

    def example(self, tiles: Sequence[int], sides: tuple[int, int]) -> list[Sample]:
        config = self.part(Role.DENOISER).config
        prompt = Prompt(empty(1, *self._shape), empty(1, pooled_width(config)))
        return examples(tiles, self.latent_channels, sides, lambda: prompt)


def pooled_width(config: Mapping[str, Any]) -> int:
    return int(config.get("pooled_projection_dim", 2048))


def read(checkpoint: Checkpoint, name: str) -> StableDiffusion3:
    """Check the configs of a pipeline of class `name`. Raises ModelError, saying what the model is."""
    for word, what in (("ControlNet", "a ControlNet pipeline"), ("Inpaint", "an inpainting model")):
        if word in name:
            raise ModelError(f"{checkpoint.name}: this is {what} ({name}); tiler needs text-to-image")
    check_parts(checkpoint, _BASE, ["transformer"])
    config = read_config(checkpoint, "transformer", "SD3Transformer2DModel", bounds.check_sd3)
    kind = _Kind.of(checkpoint.name, config)
    clips = text_encoders(checkpoint, list(_CLIPS))
    check_parts(checkpoint, kind.repository, [*clips, "vae"])
    for tokenizer in _CLIPS.values() if checkpoint.reads_text else ():
        check_tokenizer(checkpoint.tokenizer(tokenizer), fetch_part(checkpoint, kind.repository, tokenizer))
    vae = read_config(checkpoint, "vae", "AutoencoderKL", bounds.check_vae)
    texts = {part: read_config(checkpoint, part, None, bounds.check_text) for part in clips}
    check_latents(checkpoint, config, vae)
    _check_widths(checkpoint, config, texts)
    spec = VaeSpec(checkpoint=checkpoint, part="vae", config=vae)
    encoders = [
        Part(
            name=part, role=Role.TEXT_ENCODER, config=text, aliases=clip_names,
            build=partial(build_clip, checkpoint, part, text, projection=True),
            quantise=partial(quantised_text, widths=()) if part == "text_encoder" else no_parameter,
            example=partial(run_clip, output_hidden_states=True),
        )
        for part, text in texts.items()
    ]  # fmt: skip
    notes = [kind.note] if kind.note else []
    if checkpoint.has(T5) if checkpoint.reads_text else checkpoint.has_weights(T5):
        encoders.append(_read_t5(checkpoint, kind, config))
    elif checkpoint.reads_text:
        fetch = fetch_part(checkpoint, kind.repository, T5, T5_TOKENIZER)
        notes.append(f"{T5} (T5) is missing: CLIP alone reads the prompt; to add T5, {fetch}")
    denoiser = Part(
        name="transformer", role=Role.DENOISER, config=config, aliases=table_names,
        build=partial(build_mmdit, checkpoint, config), quantise=quantised, once=read_once, rotate=True,
    )  # fmt: skip
    traits = Traits(
        title=kind.title, native=int(config.get("sample_size", 128)), granularity=PATCH, patch=PATCH, samples=1,
        channels=int(vae["latent_channels"]), width=config["num_attention_heads"] * config["attention_head_dim"],
        flow=True, large_blocks=True, chunked=True, longest=PATCH * table_side(config),
        defaults=MappingProxyType(dict(kind.defaults)),
        few_steps="SD 3.5 large turbo" if kind.title == "SD 3.5 large" else None,
    )  # fmt: skip
    return StableDiffusion3(
        checkpoint=checkpoint, traits=traits, parts=(*encoders, denoiser, vae_part(spec)), vae=spec, notes=tuple(notes),
        scheduler=read_scheduler(checkpoint, kind.repository),
    )  # fmt: skip


def _read_t5(checkpoint: Checkpoint, kind: _Kind, config: Mapping[str, Any]) -> Part:
    check_parts(checkpoint, kind.repository, [T5])
    part = t5.read_t5(checkpoint, T5, T5_TOKENS)
    if checkpoint.reads_text:
        t5.check_tokenizer(checkpoint, T5_TOKENIZER, fetch_part(checkpoint, kind.repository, T5_TOKENIZER))
    if (given := part.config["d_model"]) != config["joint_attention_dim"]:
        raise ModelError(
            f"{checkpoint.name}: the transformer expects text of width {config['joint_attention_dim']} (joint_attention_dim), "
            f"{T5} gives {given}; these parts do not belong together"
        )
    return part


_BASE = "stabilityai/stable-diffusion-3-medium-diffusers"


class _Kind(NamedTuple):
    """The published model that a checkpoint resembles."""

    title: str
    repository: str
    defaults: Mapping[str, Any]
    note: str | None = None

    @classmethod
    def of(cls, name: str, config: Mapping[str, Any]) -> _Kind:
        # 0.35 of a flow adds the noise that 0.5 of Stable Diffusion 1.x does: σ/(1 − σ) is the same.
        if config.get("qk_norm") is None:
            return cls("SD 3", _BASE, {"num_inference_steps": 28, "guidance_scale": 7.0, "strength": 0.35})
        large = "stabilityai/stable-diffusion-3.5-large"
        if (sign := sign_of_few_steps(name, {})) is not None:
            return cls("SD 3.5 turbo", f"{large}-turbo", FEW_STEPS, note_of(sign))
        medium = bool(config.get("dual_attention_layers"))
        defaults = {"num_inference_steps": 40 if medium else 28, "guidance_scale": 4.5, "strength": 0.35}
        if medium:
            return cls("SD 3.5 medium", "stabilityai/stable-diffusion-3.5-medium", defaults)
        return cls("SD 3.5 large", large, defaults)


def _check_widths(checkpoint: Checkpoint, config: Mapping[str, Any], texts: Mapping[str, Mapping[str, Any]]) -> None:
    """Check that transformer and text encoders fit together. Raises ModelError."""
    for part, text in texts.items():
        if not (kind := str(text.get("model_type", "clip_text_model"))).startswith("clip"):
            raise ModelError(
                f"{checkpoint.folder / part}/config.json: this is {kind!r}; it must be a CLIP text encoder"
            )
    if not texts:
        return
    where = f"{checkpoint.folder / 'transformer'}/config.json"
    side_by_side, pooled = (
        sum(text["hidden_size"] for text in texts.values()),
        sum(text.get("projection_dim") or 512 for text in texts.values()),
    )
    if config["joint_attention_dim"] < side_by_side:
        raise ModelError(
            f"{where}: joint_attention_dim = {config['joint_attention_dim']}, but both CLIP encoders come to {side_by_side}; "
            "these parts do not belong together"
        )
    if pooled_width(config) != pooled:
        raise ModelError(
            f"{where}: pooled_projection_dim = {pooled_width(config)}, but both CLIP encoders' vectors come to {pooled}; "
            "these parts do not belong together"
        )


def _silent(text: str) -> None:
    """Discard notes: another encoder already reports a prompt that is too long."""
