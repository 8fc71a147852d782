"""PixArt-α and PixArt-Σ: a transformer with cross-attention to a T5 encoder's tokens.

Chen et al. 2023, arXiv:2310.00426; Chen et al. 2024, arXiv:2403.04692; the arithmetic is that of diffusers'
PixArtAlphaPipeline and PixArtSigmaPipeline. Each tile is treated as a picture of its own: positions start at 0, and α
receives the tile's own size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from tiler.compute.layers import SMALL
from tiler.compute.stream import Streamer
from tiler.decoding import FACTOR
from tiler.errors import ModelError
from tiler.memory.lean_imports import lean_imports
from tiler.models import bounds, t5
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
from tiler.models.few_steps import FEW_STEPS, note_of, sign_of_few_steps
from tiler.models.meta import on_meta, refusing
from tiler.models.patches import PATCH
from tiler.models.pixart_blocks import Grid, Modulation, modulations, predict_sample
from tiler.models.reading import READING, Reading
from tiler.models.required import check_latents, check_parts, fetch_part, read_scheduler, text_encoders
from tiler.models.samples import Prompt, Sample, empty, examples
from tiler.models.words import stripped
from tiler.weights.checkpoint import Checkpoint

if TYPE_CHECKING:
    from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel


class _Kind(NamedTuple):
    """A pipeline: the number of tokens of a prompt, and the repositories of its transformer and its other parts."""

    title: str
    length: int
    repository: str
    others: str


_ALPHA = "PixArt-alpha/PixArt-XL-2-1024-MS"
_KINDS = {
    "PixArtAlphaPipeline": _Kind("PixArt-α", 120, _ALPHA, _ALPHA),
    "PixArtSigmaPipeline": _Kind(
        "PixArt-Σ", 300, "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers"
    ),
}
_DEFAULTS: Mapping[str, Any] = MappingProxyType({"num_inference_steps": 20, "guidance_scale": 4.5, "strength": 0.35})


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The schedule's timesteps; projected prompts by the identity of their tokens; and each step's modulation by the
    sides of a sample, computed for the first sample of a size."""

    timesteps: Tensor
    texts: Mapping[int, Tensor]
    modulations: dict[tuple[int, int], list[Modulation]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PixArt(Family):
    length: int

    def encode(
        self,
        prompts: Sequence[str | None],
        open_part: OpenPart,
        warn: Callable[[str], None],
        reading: Reading = READING,
    ) -> list[Prompt]:
        """T5's last hidden states of each prompt's own tokens, (1, T, width); an absent negative prompt is encoded as
        an empty one."""
        texts = list(dict.fromkeys(stripped(prompt) for prompt in prompts))
        tokenizer = t5.load_tokenizer(self.checkpoint, "tokenizer")
        with open_part(self.part(Role.TEXT_ENCODER)) as encoder:
            encoded = t5.encode_t5(
                tokenizer, encoder, texts, self.length, warn, reading, keep_pads=False, clean=str.lower
            )
        found = {text: Prompt(tokens) for text, tokens in zip(texts, encoded, strict=True)}
        return [found[stripped(prompt)] for prompt in prompts]

    def prepare(
        self, model: Any, streamer: Streamer, timesteps: Tensor, prompts: Sequence[Prompt], options: Options
    ) -> Prepared:
        """Project the prompts once for all steps."""
        tokens = {id(prompt.tokens): prompt.tokens for prompt in prompts}
        return Prepared(
            timesteps=timesteps, texts={key: model.caption_projection(states) for key, states in tokens.items()}
        )

    def predict(
        self,
        model: Any,
        streamer: Streamer,
        samples: Sequence[Sample],
        step: int,
        prepared: Prepared,
        check: Callable[[str], None] = lambda where: None,
    ) -> Tensor:
        made = []
        for latents, prompt, _, _ in samples:
            check("transformer")
            sides = FACTOR * latents.shape[2], FACTOR * latents.shape[3]
            if sides not in prepared.modulations:
                prepared.modulations[sides] = modulations(model, prepared.timesteps, sides)
            text, modulation = prepared.texts[id(prompt.tokens)], prepared.modulations[sides][step]
            made.append(predict_sample(model, streamer, latents, text, modulation, self._grid, check))
        return torch.cat(made)

    @property
    def _grid(self) -> Grid:
        config = self.part(Role.DENOISER).config
        side = config.get("sample_size", 128)
        scale = config.get("interpolation_scale")
        return Grid(side // PATCH, max(side // 64, 1) if scale is None else scale)

    def example(self, tiles: Sequence[int], sides: tuple[int, int]) -> list[Sample]:
        prompt = Prompt(empty(1, self.length, self.part(Role.DENOISER).config["caption_channels"]))
        return examples(tiles, self.latent_channels, sides, lambda: prompt)


def quantised(name: str) -> bool:
    """Whether a weight becomes int8: those of the blocks."""
    return name.startswith("transformer_blocks.")


def read_once(name: str) -> bool:
    """Whether a parameter depends only on timesteps, sizes and prompts."""
    return name.startswith(("adaln_single.", "caption_projection."))


def read(checkpoint: Checkpoint, name: str) -> PixArt:
    """Check the configs of a pipeline of class `name`. Raises ModelError, saying what the model is."""
    if name not in _KINDS:
        what = "a ControlNet pipeline" if "ControlNet" in name else "a PixArt pipeline of another kind"
        raise ModelError(f"{checkpoint.name}: this is {what} ({name}); tiler supports PixArt-α and PixArt-Σ")
    kind = _KINDS[name]
    check_parts(checkpoint, kind.repository, ["transformer"])
    config = _read_transformer(checkpoint)
    encoders = text_encoders(checkpoint, ["text_encoder"])
    check_parts(checkpoint, kind.others, [*encoders, "vae"])
    if checkpoint.reads_text:
        t5.check_tokenizer(checkpoint, "tokenizer", fetch_part(checkpoint, kind.others, "tokenizer"))
    vae = read_config(checkpoint, "vae", "AutoencoderKL", bounds.check_vae)
    texts = [t5.read_t5(checkpoint, part, kind.length) for part in encoders]
    for text in texts:
        if config["caption_channels"] != text.config["d_model"]:
            raise ModelError(
                f"{checkpoint.name}: the transformer expects text of width {config['caption_channels']} "
                f"(caption_channels), text_encoder gives {text.config['d_model']}; these parts do not belong together"
            )
    channels = config.get("in_channels", 4)
    check_latents(checkpoint, {"in_channels": channels}, vae)  # of the outputs those that count are as many
    spec = VaeSpec(checkpoint=checkpoint, part="vae", config=vae)
    parts = (
        *texts,
        Part(
            name="transformer", role=Role.DENOISER, config=config, aliases=plain_names,
            build=partial(_build, checkpoint, config), quantise=quantised, once=read_once, rotate=True,
        ),
        vae_part(spec),
    )  # fmt: skip
    scheduler = read_scheduler(checkpoint, kind.repository)
    defaults, notes = _DEFAULTS, tuple[str, ...]()
    if (sign := sign_of_few_steps(checkpoint.name, scheduler)) is not None:
        defaults = MappingProxyType(dict(FEW_STEPS) | {"strength": 0.5})  # of four steps the canvas has two
        notes = (note_of(sign),)
    traits = Traits(
        title=kind.title, native=int(config.get("sample_size", 128)), granularity=PATCH, channels=channels,
        width=config["num_attention_heads"] * config["attention_head_dim"], patch=PATCH, samples=1, large_blocks=True,
        defaults=defaults, few_steps=None if notes else "PixArt-LCM",
    )  # fmt: skip
    return PixArt(
        checkpoint=checkpoint,
        traits=traits,
        parts=parts,
        vae=spec,
        scheduler=scheduler,
        notes=notes,
        length=kind.length,
    )


_CLASSES = "PixArtTransformer2DModel", "Transformer2DModel"
# What the forward would leave out, or do otherwise, unless it is so.
_WANTED = {
    "norm_type": "ada_norm_single", "activation_fn": "gelu-approximate", "attention_type": "default",
    "patch_size": PATCH,
    "double_self_attention": False, "only_cross_attention": False, "num_vector_embeds": None,
}  # fmt: skip


def _read_transformer(checkpoint: Checkpoint) -> dict[str, Any]:
    """The transformer's config. Published ones name diffusers' older class. Raises ModelError."""
    config = read_config(checkpoint, "transformer", None, bounds.check_pixart)
    where = f"{checkpoint.folder / 'transformer'}/config.json"
    if config.get("_class_name", _CLASSES[0]) not in _CLASSES:
        raise ModelError(f"{where}: the class is {config['_class_name']!r}; tiler supports {_CLASSES[0]}")
    if config.get("_class_name") == _CLASSES[1] and "norm_type" not in config:
        raise ModelError(f"{where}: norm_type is missing; a PixArt transformer says 'ada_norm_single'")
    for key, wanted in _WANTED.items():
        if config.get(key, wanted) != wanted:
            raise ModelError(f"{where}: {key} = {config[key]!r} is not supported; PixArt has {wanted!r}")
    width = config["num_attention_heads"] * config["attention_head_dim"]
    if config.get("cross_attention_dim", width) != width:
        raise ModelError(
            f"{where}: cross_attention_dim = {config['cross_attention_dim']}; it must be the width of the state, "
            f"num_attention_heads · attention_head_dim = {width}. Correct this file or download it again"
        )
    channels, side = config.get("in_channels", 4), config.get("sample_size", 128)
    if config.get("use_additional_conditions") is None:
        config = config | {"use_additional_conditions": side == 128}  # diffusers' rule
    parts = 12 if config["use_additional_conditions"] else 4  # thirds for the sizes, halves of halves for positions
    if width % parts or width * channels * PATCH**2 > SMALL:
        raise ModelError(f"{where}: a state of width {width}, made of {channels} channels, is not supported")
    if side % PATCH:
        raise ModelError(f"{where}: sample_size = {side} is odd; a tile has patches of {PATCH} × {PATCH} latents")
    if config.get("out_channels", 2 * channels) not in (channels, 2 * channels, None):
        raise ModelError(
            f"{where}: out_channels = {config['out_channels']}; it must be in_channels = {channels}, or twice as many"
        )
    return config


def _build(checkpoint: Checkpoint, config: dict[str, Any]) -> PixArtTransformer2DModel:
    """Build diffusers' own transformer on the meta device. Its table of positions is reduced to one token, since a full
    one would be computed in fp64 here and is not used. For another class in the config diffusers would import that
    class's package."""
    with lean_imports():
        from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
    config = config | {"sample_size": PATCH, "_class_name": _CLASSES[0]}
    with on_meta(), refusing("transformer", checkpoint):
        return PixArtTransformer2DModel.from_config(config).eval().requires_grad_(False)
