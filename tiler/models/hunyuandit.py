"""HunyuanDiT 1.0 to 1.2: a bilingual BERT, a multilingual T5, and a transformer with skips from its first half to its
second.

Li et al. 2024, arXiv:2405.08748; the arithmetic is that of diffusers' HunyuanDiTPipeline. Each tile is treated as a
picture of its own, whose positions are stretched over the grid that the model was trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tiler.compute.stream import Streamer
from tiler.decoding import FACTOR
from tiler.errors import ModelError
from tiler.models import bert, bounds, t5
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
from tiler.models.hunyuandit_blocks import (
    Told,
    build_transformer,
    conditioning,
    modulating,
    pooled,
    predict_sample,
    projected,
    quantised,
    read_once,
)
from tiler.models.modulation import Modulations, modulations
from tiler.models.nameless import NamelessFile
from tiler.models.patches import PATCH
from tiler.models.reading import READING, Reading
from tiler.models.required import check_latents, check_parts, fetch_part, read_scheduler, text_encoders
from tiler.models.samples import Prompt, Sample, empty, examples
from tiler.weights.checkpoint import Checkpoint

_REPOSITORY = "Tencent-Hunyuan/HunyuanDiT-v1.2-Diffusers"
_ENCODERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
# A strength of 0.38 adds the noise that 0.5 of Stable Diffusion 1.x does.
_DEFAULTS = MappingProxyType({"num_inference_steps": 50, "guidance_scale": 5.0, "strength": 0.38})


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Values that are computed once for all steps. `timesteps` are the schedule's; `prompts` maps the identity of a
    prompt's tokens to its number and its projected tokens; `pools` holds the pooled vectors. `modulations` holds each
    layer's values by (step, number), for every sample size that is an input of the model; they are computed when a size
    first occurs. Waiting states are kept in `scratch`."""

    timesteps: Tensor
    prompts: dict[int, tuple[int, Tensor]]
    pools: list[Tensor]
    folder: Path | None
    scratch: NamelessFile | None
    modulations: dict[tuple[int, int] | None, Modulations] = field(default_factory=dict)

    def of(self, model: Any, streamer: Streamer, sides: tuple[int, int] | None) -> Modulations:
        if sides not in self.modulations:
            steps, prompts = range(len(self.timesteps)), range(len(self.pools))
            keys = [(step, number) for number in prompts for step in steps]
            seen = torch.cat([conditioning(model, self.timesteps, pool, sides) for pool in self.pools])
            self.modulations[sides] = modulations(streamer, modulating(model), F.silu(seen), keys, self.folder)
        return self.modulations[sides]


@dataclass(frozen=True, kw_only=True)
class HunyuanDiT(Family):
    lengths: tuple[int, int]  # tokens of a prompt, for BERT and for T5
    told_sizes: bool  # whether a sample's size is an input, as up to version 1.1

    def encode(
        self,
        prompts: Sequence[str | None],
        open_part: OpenPart,
        warn: Callable[[str], None],
        reading: Reading = READING,
    ) -> list[Prompt]:
        """BERT's last hidden states, with T5's below them: (1, 77 + 256, width + 1). The last column is 1 for a
        prompt's own tokens and 0 for padding, for which T5 also has states. A missing negative prompt is an empty
        one."""
        texts = list(dict.fromkeys(prompt or "" for prompt in prompts))
        first, second = self.encoders
        with open_part(first) as encoder:
            words = bert.load_tokenizer(self.checkpoint, _ENCODERS[first.name])
            above = bert.encode_bert(words, encoder, texts, self.lengths[0], warn, reading)
        with open_part(second) as encoder:
            pieces = t5.load_tokenizer(self.checkpoint, _ENCODERS[second.name])
            below = t5.encode_masked(pieces, encoder, texts, self.lengths[1], warn, reading)
        found = {}
        for text, states, (wide, own) in zip(texts, above, below, strict=True):
            tokens = torch.zeros(1, *self._shape)
            tokens[:, : states.shape[1], : states.shape[2]] = states
            tokens[:, self.lengths[0] :, : wide.shape[2]] = wide
            tokens[:, : states.shape[1], -1] = 1
            tokens[:, self.lengths[0] : self.lengths[0] + own, -1] = 1
            found[text] = Prompt(tokens)
        return [found[prompt or ""] for prompt in prompts]

    @property
    def _widths(self) -> tuple[int, int]:
        """The widths of BERT's states and of T5's."""
        config = self.part(Role.DENOISER).config
        return config.get("cross_attention_dim", 1024), config.get("cross_attention_dim_t5", 2048)

    @property
    def _shape(self) -> tuple[int, int]:
        return sum(self.lengths), max(self._widths) + 1

    def prepare(
        self, model: Any, streamer: Streamer, timesteps: Tensor, prompts: Sequence[Prompt], options: Options
    ) -> Prepared:
        """Project and pool the prompts, once for all steps."""
        (rows, _), (narrow, wide) = self.lengths, self._widths
        found, pools = dict[int, tuple[int, Tensor]](), list[Tensor]()
        for tokens in {id(prompt.tokens): prompt.tokens for prompt in prompts}.values():
            states = tokens[:, rows:, :wide]
            text = projected(model, tokens[:, :rows, :narrow], states, tokens[..., -1:] == 1)
            found[id(tokens)] = len(pools), text
            pools.append(pooled(model.time_extra_emb.pooler, states))
        scratch = None if timesteps.is_meta else NamelessFile(options.scratch)
        return Prepared(timesteps=timesteps, prompts=found, pools=pools, folder=options.scratch, scratch=scratch)

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
            sides = (FACTOR * latents.shape[2], FACTOR * latents.shape[3]) if self.told_sizes else None
            number, text = prepared.prompts[id(prompt.tokens)]
            told = Told(text, prepared.of(model, streamer, sides).read((step, number)))
            made.append(predict_sample(model, streamer, latents, told, prepared.scratch, check))
        return torch.cat(made)

    def example(self, tiles: Sequence[int], sides: tuple[int, int]) -> list[Sample]:
        prompt = Prompt(empty(1, *self._shape))
        return examples(tiles, self.latent_channels, sides, lambda: prompt)


def read(checkpoint: Checkpoint, name: str) -> HunyuanDiT:
    """Check the configs of a pipeline of class `name`. Raises ModelError, which says what the model is."""
    if name != "HunyuanDiTPipeline":
        what = "a ControlNet pipeline" if "ControlNet" in name else "a HunyuanDiT pipeline of another kind"
        raise ModelError(f"{checkpoint.name}: this is {what} ({name}); tiler supports HunyuanDiTPipeline")
    encoders = text_encoders(checkpoint, list(_ENCODERS))
    check_parts(checkpoint, _REPOSITORY, ["transformer", *encoders, "vae"])
    for check, tokenizer in (bert.check_tokenizer, "tokenizer"), (t5.check_tokenizer, "tokenizer_2"):
        if checkpoint.reads_text:
            check(checkpoint, tokenizer, fetch_part(checkpoint, _REPOSITORY, tokenizer))
    config = read_config(checkpoint, "transformer", "HunyuanDiT2DModel", bounds.check_hunyuandit)
    lengths = config.get("text_len", 77), config.get("text_len_t5", 256)
    vae = read_config(checkpoint, "vae", "AutoencoderKL", bounds.check_vae)
    channels = config["in_channels"]
    check_latents(checkpoint, {"in_channels": channels}, vae)  # as many of the outputs are used
    texts: tuple[Part, ...] = ()
    if encoders:
        texts = (
            bert.read_bert(checkpoint, "text_encoder", lengths[0]),
            t5.read_t5(checkpoint, "text_encoder_2", lengths[1]),
        )
        _check_widths(checkpoint, config, texts)
    spec = VaeSpec(checkpoint=checkpoint, part="vae", config=vae)
    denoiser = Part(
        name="transformer", role=Role.DENOISER, config=config, aliases=plain_names,
        build=partial(build_transformer, checkpoint, config), quantise=quantised, once=read_once, rotate=True,
    )  # fmt: skip
    scheduler = read_scheduler(checkpoint, _REPOSITORY)
    defaults, notes = _DEFAULTS, tuple[str, ...]()
    if (sign := sign_of_few_steps(checkpoint.name, scheduler)) is not None:
        defaults = MappingProxyType(dict(FEW_STEPS))
        notes = (note_of(sign),)
    traits = Traits(
        title="HunyuanDiT", native=int(config.get("sample_size", 128)), granularity=PATCH, channels=channels,
        width=config["num_attention_heads"] * config["attention_head_dim"], patch=PATCH, samples=1, large_blocks=True,
        defaults=defaults, old_schedulers=False,
    )  # fmt: skip
    return HunyuanDiT(
        checkpoint=checkpoint, traits=traits, parts=(*texts, denoiser, vae_part(spec)), vae=spec, scheduler=scheduler,
        notes=notes, lengths=lengths, told_sizes=bool(config.get("use_style_cond_and_image_meta_size", True)),
    )  # fmt: skip


def _check_widths(checkpoint: Checkpoint, config: dict[str, Any], texts: Sequence[Part]) -> None:
    """Raise ModelError if the transformer and the text encoders do not belong together."""
    wanted = ("cross_attention_dim", 1024, "hidden_size"), ("cross_attention_dim_t5", 2048, "d_model")
    for part, (key, default, width) in zip(texts, wanted, strict=True):
        if (given := part.config[width]) != (expected := config.get(key, default)):
            raise ModelError(
                f"{checkpoint.name}: the transformer expects text of width {expected} ({key}), {part.name} gives {given}; "
                "these parts do not belong together"
            )
