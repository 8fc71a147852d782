"""Flux.1 dev and schnell: a transformer of joint and single blocks over packed latents, with CLIP's pooled vector and
T5's tokens.

dev has the guidance scale as an input, schnell has no guidance, so a tile is one sample. Each tile uses its own grid of
positions, (0, y, x) from 0, since the model was not trained on larger ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tiler.compute.stream import Streamer
from tiler.errors import ModelError
from tiler.memory.lean_imports import lean_imports
from tiler.models import bounds, t5
from tiler.models.clip import build_clip, check_tokenizer, clip_names, encode_penultimate, load_tokenizer, run_clip
from tiler.models.family import (
    Family,
    Guidance,
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
from tiler.models.flux_blocks import modulating, predict_sample
from tiler.models.meta import on_meta, refusing
from tiler.models.modulation import Modulations, modulations
from tiler.models.patches import PATCH
from tiler.models.reading import READING, Reading
from tiler.models.required import check_factor, check_parts, fetch_part, read_scheduler, text_encoders
from tiler.models.samples import Prompt, Sample, empty, examples
from tiler.weights.checkpoint import Checkpoint

if TYPE_CHECKING:
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

Config = Mapping[str, Any]
NATIVE = 128  # latents; the published configs name no size
ARENA_BYTES = 114_000_000  # a single block, a feed-forward or an attention in int8
LENGTHS = {Guidance.EMBEDDED: 512, Guidance.NONE: 256}  # tokens of T5


class Prepared(NamedTuple):
    """The modulations by (step, index of the prompt's pooled vector, guidance), and these indices by tensor
    identity."""

    modulations: Modulations
    prompts: dict[int, int]


class Flux(Family):
    def encode(
        self,
        prompts: Sequence[str | None],
        open_part: OpenPart,
        warn: Callable[[str], None],
        reading: Reading = READING,
    ) -> list[Prompt]:
        """T5's last hidden states, (1, 512 or 256, width), pads included, and the pooled vector of CLIP's first chunk,
        (1, width)."""
        first, second = self.encoders
        texts = list(dict.fromkeys(prompt or "" for prompt in prompts))
        clip_tokenizer, t5_tokenizer = load_tokenizer(self), t5.load_tokenizer(self.checkpoint, "tokenizer_2")
        with open_part(first) as encoder:
            pooled = [p.pooled for p in encode_penultimate(clip_tokenizer, encoder, texts, _silent, reading)]
        with open_part(second) as encoder:
            tokens = t5.encode_t5(t5_tokenizer, encoder, texts, self.length, warn, reading, keep_pads=True)
        encoded = {text: Prompt(rows, vector) for text, rows, vector in zip(texts, tokens, pooled, strict=True)}
        return [encoded[prompt or ""] for prompt in prompts]

    @property
    def length(self) -> int:
        """The number of T5 tokens."""
        return LENGTHS[self.traits.guidance]

    def prepare(
        self, model: Any, streamer: Streamer, timesteps: Tensor, prompts: Sequence[Prompt], options: Options
    ) -> Prepared:
        """Evaluate the modulation layers once, for all steps, prompts and guidance scales."""
        pooled = list({id(v): v for prompt in prompts if (v := prompt.pooled) is not None}.values())
        numbers = {id(vector): number for number, vector in enumerate(pooled)}
        scales = (options.guidance or (1.0,)) if self.traits.guidance is Guidance.EMBEDDED else (0.0,)
        keys = [(step, n, scale) for step in range(len(timesteps)) for n in range(len(pooled)) for scale in scales]
        vectors = torch.cat([pooled[n] for _, n, _ in keys])
        times = timesteps.repeat_interleave(len(pooled) * len(scales)) if not timesteps.is_meta else vectors[:, 0]
        embedded = [times / 1000 * 1000]  # as the pipeline and the model do, for the same bits
        if self.traits.guidance is Guidance.EMBEDDED:
            embedded.append(torch.tensor([scale * 1000 for _, _, scale in keys]).to(vectors.device))
        temb = model.time_text_embed(*embedded, vectors)
        made = modulations(streamer, modulating(model), F.silu(temb), keys, options.scratch)
        return Prepared(made, numbers)

    def predict(
        self,
        model: Any,
        streamer: Streamer,
        samples: Sequence[Sample],
        step: int,
        prepared: Prepared,
        check: Callable[[str], None] = lambda where: None,
    ) -> Tensor:
        embedded = self.traits.guidance is Guidance.EMBEDDED
        made = []
        for latents, prompt, _, guidance in samples:
            key = step, prepared.prompts[id(prompt.pooled)], guidance if embedded else 0.0
            check("transformer")
            made.append(predict_sample(model, streamer, latents, prompt.tokens, prepared.modulations.read(key), check))
        return torch.cat(made)

    def example(self, tiles: Sequence[int], sides: tuple[int, int]) -> list[Sample]:
        config = self.part(Role.DENOISER).config
        prompt = Prompt(empty(1, self.length, config["joint_attention_dim"]), empty(1, config["pooled_projection_dim"]))
        return examples(tiles, self.latent_channels, sides, lambda: prompt)


def _silent(text: str) -> None:
    """Discard notes: T5 already reports a prompt that is too long."""


def quantised(name: str) -> bool:
    """Whether a weight becomes int8: those of the blocks, except their modulation layers, which are read once."""
    return name.startswith(("transformer_blocks.", "single_transformer_blocks.")) and not read_once(name)


def read_once(name: str) -> bool:
    """Whether a parameter belongs to a modulation layer or to the embeddings that feed it."""
    return name.startswith(("time_text_embed.", "norm_out.")) or ".norm1" in name or ".norm.linear" in name


def read(checkpoint: Checkpoint, name: str) -> Flux:
    """Check the configs of a pipeline of class `name`. Raises ModelError, saying what the model is."""
    if name != "FluxPipeline":
        what = next((what for word, what in _KINDS.items() if word in name), "a model of another kind")
        raise ModelError(f"{checkpoint.name}: this is {what} ({name}); tiler supports {_SUPPORTED}")
    repository = _REPOSITORIES["schnell" in checkpoint.name.lower()]
    encoders = text_encoders(checkpoint, ("text_encoder", "text_encoder_2"))
    check_parts(checkpoint, repository, ("transformer", "vae", *encoders))
    if checkpoint.reads_text:
        check_tokenizer(checkpoint.tokenizer("tokenizer"), fetch_part(checkpoint, repository, "tokenizer"))
        t5.check_tokenizer(checkpoint, "tokenizer_2", fetch_part(checkpoint, repository, "tokenizer_2"))
    config = read_config(checkpoint, "transformer", "FluxTransformer2DModel", bounds.check_flux)
    vae = read_config(checkpoint, "vae", "AutoencoderKL", bounds.check_vae)
    guidance = Guidance.EMBEDDED if config.get("guidance_embeds", False) else Guidance.NONE
    texts = (_read_clip(checkpoint), t5.read_t5(checkpoint, "text_encoder_2", LENGTHS[guidance])) if encoders else ()
    _check_widths(checkpoint, config, vae, {part.name: part.config for part in texts})
    spec = VaeSpec(checkpoint=checkpoint, part="vae", config=vae)
    parts = (
        *texts,
        Part(
            name="transformer", role=Role.DENOISER, config=config, aliases=plain_names,
            build=partial(_build, checkpoint, config), quantise=quantised, once=read_once, rotate=True,
            arena_bytes=ARENA_BYTES,
        ),
        vae_part(spec),
    )  # fmt: skip
    traits = Traits(
        title="Flux.1 dev" if guidance is Guidance.EMBEDDED else "Flux.1 schnell",
        native=int(config.get("sample_size") or NATIVE), granularity=PATCH, patch=PATCH, samples=1, large_blocks=True,
        channels=int(vae["latent_channels"]), width=config["num_attention_heads"] * config["attention_head_dim"],
        flow=True, even_sigmas=True, guidance=guidance, defaults=_DEFAULTS[guidance],
        few_steps="FLUX.1-schnell" if guidance is Guidance.EMBEDDED else None,
    )  # fmt: skip
    scheduler = read_scheduler(checkpoint, repository)
    return Flux(checkpoint=checkpoint, traits=traits, parts=parts, vae=spec, scheduler=scheduler)


def _read_clip(checkpoint: Checkpoint) -> Part:
    config = read_config(checkpoint, "text_encoder", None, bounds.check_text)
    return Part(
        name="text_encoder", role=Role.TEXT_ENCODER, config=config, aliases=clip_names,
        build=partial(build_clip, checkpoint, "text_encoder", config),
        quantise=lambda name: "embed" not in name, example=partial(run_clip, output_hidden_states=True),
    )  # fmt: skip


_SUPPORTED = "Flux.1 dev and schnell"
_REPOSITORIES = "black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-schnell"
_KINDS = {
    "Flux2": "FLUX.2", "Fill": "Flux.1 Fill, which repaints pictures", "Inpaint": "an inpainting model",
    "Kontext": "Flux.1 Kontext, which edits pictures", "Control": "Flux.1 with a control picture",
    "Redux": "Flux.1 Redux, which takes pictures as prompts",
}  # fmt: skip
_WIDTHS = {  # what must be equal in the transformer's config and in a text encoder's
    "text_encoder": ("pooled_projection_dim", "hidden_size"), "text_encoder_2": ("joint_attention_dim", "d_model"),
}  # fmt: skip
_KINDS_BY_CHANNELS = {
    2: "Flux.1 Canny or Depth, which take a control picture",
    6: "Flux.1 Fill, which repaints pictures",
}
# schnell is distilled for few steps, of which the guide may not take all but one.
_DEFAULTS = {
    Guidance.EMBEDDED: {"num_inference_steps": 28, "guidance_scale": 3.5, "strength": 0.34},
    Guidance.NONE: {"num_inference_steps": 4, "guidance_scale": 1.0, "strength": 0.5},
}


def _check_widths(checkpoint: Checkpoint, config: Config, vae: Config, texts: Mapping[str, Config]) -> None:
    """Check that the parts fit together and generate pictures from text alone. Raises ModelError."""
    taken, wanted = config.get("in_channels", 64), PATCH**2 * vae.get("latent_channels", 4)
    if taken != wanted or (config.get("out_channels") or taken) != taken:
        what = _KINDS_BY_CHANNELS.get(taken / wanted, "a model of another kind")
        raise ModelError(
            f"{checkpoint.name}: the transformer takes {taken} channels, tokens of the VAE's latents have {wanted}: this is {what}; "
            f"tiler supports {_SUPPORTED}"
        )
    for part, text in texts.items():
        key, width = _WIDTHS[part]
        if config[key] != text[width]:
            raise ModelError(
                f"{checkpoint.name}: the transformer expects text of width {config[key]} ({key}), {part} gives {text[width]}; "
                "these parts do not belong together"
            )
    check_factor(checkpoint, vae)


def _build(checkpoint: Checkpoint, config: dict[str, Any]) -> FluxTransformer2DModel:
    """Build diffusers' own transformer on the meta device."""
    with lean_imports():
        from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
    with on_meta(), refusing("transformer", checkpoint):
        return FluxTransformer2DModel.from_config(config).eval().requires_grad_(False)
