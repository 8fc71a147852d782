"""Flux.1 dev and schnell: a transformer of joint and single blocks over packed latents, CLIP's pooled vector and T5's tokens.

dev takes the guidance scale as an input, schnell none; so a tile is one sample. Each tile claims a grid of its own, (0, y, x)
from 0, for the model knows no larger ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiler.compute.stream import Streamer
from tiler.decoding import FACTOR
from tiler.errors import ModelError
from tiler.memory.lean_imports import lean_imports
from tiler.models import bounds
from tiler.models.clip import build_clip, clip_bytes, clip_names, encode_penultimate, load_tokenizer
from tiler.models.dit import FeedForward, Stream, add_attended, add_feed_forward, attention, modulated, project
from tiler.models.family import (
    Family,
    Guidance,
    OpenPart,
    Options,
    Part,
    Role,
    Traits,
    VaeSpec,
    build_vae,
    plain_names,
    read_config,
    vae_names,
)
from tiler.models.meta import on_meta, refusing
from tiler.models.modulation import Modulations, modulations
from tiler.models.samples import Place, Prompt, Sample
from tiler.weights.checkpoint import Checkpoint

if TYPE_CHECKING:
    from diffusers.models.transformers.transformer_flux import (
        FluxSingleTransformerBlock,
        FluxTransformer2DModel,
        FluxTransformerBlock,
    )

PATCH, NATIVE = 2, 128  # latents; the published configs name no size
ARENA_BYTES = 114_000_000  # a single block, a feed-forward or an attention in int8


LENGTHS = {Guidance.EMBEDDED: 512, Guidance.NONE: 256}


class Prepared(NamedTuple):
    """The modulations by (step, number of the prompt's pooled vector, guidance), and these numbers by identity."""

    modulations: Modulations
    prompts: dict[int, int]


class Flux(Family):
    def encode(self, prompts: Sequence[str | None], open_part: OpenPart, warn: Callable[[str], None]) -> list[Prompt]:
        """T5's last hidden states, (1, 512 or 256, width), pads included, and CLIP's pooled vector, (1, width)."""
        clip, t5 = self.encoders
        texts = list(dict.fromkeys(prompt or "" for prompt in prompts))
        tokenizer = load_tokenizer(self)
        with open_part(clip) as encoder:
            pooled = [prompt.pooled for prompt in encode_penultimate(tokenizer, encoder, texts, warn)]
        with open_part(t5) as encoder:
            tokens = interim_t5(self, encoder, texts, self.length)
        encoded = {text: Prompt(*both) for text, *both in zip(texts, tokens, pooled, strict=True)}
        return [encoded[prompt or ""] for prompt in prompts]

    @property
    def length(self) -> int:
        """Tokens of T5."""
        return LENGTHS[self.traits.guidance]

    def prepare(
        self, model: Any, streamer: Streamer, timesteps: Tensor, prompts: Sequence[Prompt], options: Options
    ) -> Prepared:
        """Read the modulation layers, once for all steps, prompts and guidance scales."""
        pooled = list({id(prompt.pooled): prompt.pooled for prompt in prompts}.values())
        numbers = {id(vector): number for number, vector in enumerate(pooled)}
        scales = (options.guidance or (1.0,)) if self.traits.guidance is Guidance.EMBEDDED else (0.0,)
        keys = [(step, n, scale) for step in range(len(timesteps)) for n in range(len(pooled)) for scale in scales]
        vectors = torch.cat([pooled[n] for _, n, _ in keys])
        times = timesteps.repeat_interleave(len(pooled) * len(scales)) if not timesteps.is_meta else vectors[:, 0]
        embedded = [times / 1000 * 1000]  # as the pipeline and the model do, for the same bits
        if self.traits.guidance is Guidance.EMBEDDED:
            embedded.append(torch.tensor([scale * 1000 for _, _, scale in keys]).to(vectors.device))
        temb = model.time_text_embed(*embedded, vectors)
        made = modulations(streamer, _modulating(model), F.silu(temb), keys, options.scratch)
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
        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, device="meta")

        config = self.part(Role.DENOISER).config
        prompt = Prompt(empty(1, self.length, config["joint_attention_dim"]), empty(1, config["pooled_projection_dim"]))
        latents = {tile: empty(1, self.latent_channels, *sides) for tile in tiles}
        height, width = (FACTOR * side for side in sides)
        return [Sample(latents[tile], prompt, Place(0, 0, height, width, (height, width)), 1.0) for tile in tiles]


def predict_sample(
    model: FluxTransformer2DModel,
    streamer: Streamer,
    latents: Tensor,
    tokens: Tensor,
    modulation: Sequence[Tensor],
    check: Callable[[str], None] = lambda where: None,
) -> Tensor:
    """The velocity that FluxTransformer2DModel predicts, (1, C, h, w), for latents of that shape and the prompt's tokens
    (1, T, W). `modulation`: the values of each of the model's modulation layers, in its order."""
    height, width = (side // PATCH for side in latents.shape[2:])
    text, image = slice(0, tokens.shape[1]), slice(tokens.shape[1], tokens.shape[1] + height * width)
    x = latents.new_empty(1, image.stop, model.inner_dim)
    for part, layer, given in ((text, model.context_embedder, tokens), (image, model.x_embedder, pack(latents))):
        made = layer(given)
        if not x.is_meta:
            x[:, part] = made
        del made, given
    rotation = None if x.is_meta else rotations(model, text.stop, height, width)
    rows = iter(modulation)
    for i, block in enumerate(model.transformer_blocks):
        check(f"transformer.transformer_blocks.{i}")
        joint_block(streamer, block, x, text, image, next(rows), next(rows), rotation)
    for i, block in enumerate(model.single_transformer_blocks):
        check(f"transformer.single_transformer_blocks.{i}")
        single_block(streamer, block, x, next(rows), rotation)
    check("transformer.proj_out")
    scale, shift = next(rows).chunk(2)
    return unpack(project(streamer, model.proj_out, image, modulated(model.norm_out.norm, x, scale, shift)), height)


def joint_block(
    streamer: Streamer, block: FluxTransformerBlock, x: Tensor, text: slice, image: slice, of_image: Tensor,
    of_text: Tensor, rotation: Tensor | None,
) -> None:  # fmt: skip
    """A FluxTransformerBlock on the state x (1, tokens, d), in place; `of_image` and `of_text`, (6 d,), are what norm1 and
    norm1_context make of the conditioning."""
    attn = block.attn
    shift, scale, gate, ff_shift, ff_scale, ff_gate = of_image.chunk(6)
    t_shift, t_scale, t_gate, t_ff_shift, t_ff_scale, t_ff_gate = of_text.chunk(6)
    text_layers, text_norms = (
        (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj),
        (attn.norm_added_q, attn.norm_added_k),
    )
    streams = (
        Stream(text, modulated(block.norm1_context.norm, x, t_scale, t_shift), text_layers, text_norms),
        _image_stream(image, attn, modulated(block.norm1.norm, x, scale, shift)),
    )
    attended = attention(streamer, x, streams, attn.heads, rotation)
    add_attended(streamer, attn.to_add_out, attended, x, text, t_gate)
    add_attended(streamer, attn.to_out[0], attended, x, image, gate)
    del attended
    normed = modulated(block.norm2_context, x, t_ff_scale, t_ff_shift)
    add_feed_forward(streamer, _feed_forward(block.ff_context), x, text, normed, t_ff_gate)
    normed = modulated(block.norm2, x, ff_scale, ff_shift)
    add_feed_forward(streamer, _feed_forward(block.ff), x, image, normed, ff_gate)


def single_block(
    streamer: Streamer, block: FluxSingleTransformerBlock, x: Tensor, modulation: Tensor, rotation: Tensor | None
) -> None:
    """A FluxSingleTransformerBlock on the state x (1, tokens, d), in place; modulation: (3 d,). Attention and feed-forward see
    the same input, and share their last layer."""
    shift, scale, gate = modulation.chunk(3)
    normed, everything = modulated(block.norm.norm, x, scale, shift), slice(0, x.shape[1])
    attended = attention(streamer, x, [_image_stream(everything, block.attn, normed)], block.attn.heads, rotation)
    layers = FeedForward(block.proj_mlp, partial(F.gelu, approximate="tanh"), block.proj_out)
    add_feed_forward(streamer, layers, x, everything, normed, gate, beside=attended)


def _image_stream(tokens: slice, attn: Any, normed: Callable[[slice], Tensor]) -> Stream:
    return Stream(tokens, normed, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k))


def _feed_forward(ff: Any) -> FeedForward:
    return FeedForward(ff.net[0].proj, partial(F.gelu, approximate="tanh"), ff.net[2])


def _modulating(model: FluxTransformer2DModel) -> list[nn.Linear]:
    """The layers that see timestep, guidance and pooled text alone, in the order in which a pass needs their values."""
    joint = [norm.linear for block in model.transformer_blocks for norm in (block.norm1, block.norm1_context)]
    return [*joint, *(block.norm.linear for block in model.single_transformer_blocks), model.norm_out.linear]


def pack(latents: Tensor) -> Tensor:
    """(1, C, h, w) → (1, h/2 · w/2, 4 C): each token is 2 × 2 latents, channel by channel."""
    _, channels, height, width = latents.shape
    if latents.is_meta:
        return latents.new_empty(1, height * width // PATCH**2, channels * PATCH**2)
    return F.pixel_unshuffle(latents, PATCH).flatten(2).transpose(1, 2).contiguous()


def unpack(tokens: Tensor, height: int) -> Tensor:
    """The inverse of `pack`, for `height` rows of tokens."""
    if tokens.is_meta:
        return tokens.new_empty(1, tokens.shape[2] // PATCH**2, height * PATCH, tokens.shape[1] // height * PATCH)
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height, -1)), PATCH)


def rotations(model: FluxTransformer2DModel, text: int, height: int, width: int) -> Tensor:
    """(tokens, 1, head / 2) complex: cosine and sine of each pair's angle. The text's ids are 0, the picture's (0, y, x)."""
    ids = torch.zeros(text + height * width, 3)
    grid = ids[text:].view(height, width, 3)
    grid[..., 1], grid[..., 2] = torch.arange(height)[:, None], torch.arange(width)
    cos, sin = model.pos_embed(ids)  # each value twice, for both halves of its pair
    return torch.complex(cos[:, ::2].contiguous(), sin[:, ::2].contiguous())[:, None]


def quantised(name: str) -> bool:
    """Whether a weight becomes int8: those of the blocks, but not of what modulates them, which is read once."""
    return name.startswith(("transformer_blocks.", "single_transformer_blocks.")) and not read_once(name)


def read_once(name: str) -> bool:
    """Whether a parameter is that of a modulation, or of what it sees."""
    return name.startswith(("time_text_embed.", "norm_out.")) or ".norm1" in name or ".norm.linear" in name


def read(checkpoint: Checkpoint, name: str) -> Flux:
    """Check the configs of a pipeline of class `name`. Raises ModelError, saying what the model is."""
    if name != "FluxPipeline":
        what = next((what for word, what in _KINDS.items() if word in name), "a model of another kind")
        raise ModelError(f"{checkpoint.name}: this is {what} ({name}); tiler supports {_SUPPORTED}")
    config = read_config(checkpoint, "transformer", "FluxTransformer2DModel", bounds.check_flux)
    vae = read_config(checkpoint, "vae", "AutoencoderKL", bounds.check_vae)
    text = read_config(checkpoint, "text_encoder", None, bounds.check_text)
    t5 = read_config(checkpoint, "text_encoder_2", None, lambda where, config: None)
    channels, wanted = config.get("in_channels", 64), PATCH**2 * vae.get("latent_channels", 4)
    if channels != wanted or (config.get("out_channels") or channels) != channels:
        what = _KINDS_BY_CHANNELS.get(channels / wanted, "a model of another kind")
        raise ModelError(
            f"{checkpoint.name}: the transformer takes {channels} channels, the VAE's latents have {wanted}: this is {what}; "
            f"tiler supports {_SUPPORTED}"
        )
    for part, key, width in (
        ("text_encoder", "pooled_projection_dim", text["hidden_size"]),
        ("text_encoder_2", "joint_attention_dim", t5["d_model"]),
    ):
        if config[key] != width:
            raise ModelError(
                f"{checkpoint.name}: the transformer expects text of width {config[key]} ({key}), {part} gives {width}; these "
                "parts do not belong together"
            )
    if (factor := 2 ** (len(vae["block_out_channels"]) - 1)) != FACTOR:
        raise ModelError(f"{checkpoint.name}: the VAE's factor is {factor}; tiler supports {FACTOR}")
    spec, dev = VaeSpec(checkpoint=checkpoint, part="vae", config=vae), bool(config.get("guidance_embeds", False))
    parts = (
        Part(
            name="text_encoder", role=Role.TEXT_ENCODER, config=text, aliases=clip_names,
            build=partial(build_clip, checkpoint, "text_encoder", text),
            quantise=lambda name: "embed" not in name, activation_bytes=clip_bytes(text, every_layer=True),
        ),
        Part(
            name="text_encoder_2", role=Role.TEXT_ENCODER, config=t5, aliases=plain_names,
            build=partial(interim_build, checkpoint, t5), quantise=lambda name: False, activation_bytes=200_000_000,
        ),
        Part(
            name="transformer", role=Role.DENOISER, config=config, aliases=plain_names,
            build=partial(_build, checkpoint, config), quantise=quantised, once=read_once, arena_bytes=ARENA_BYTES,
        ),
        Part(
            name="vae", role=Role.VAE, config=vae, aliases=vae_names, build=partial(build_vae, spec),
            quantise=lambda name: False,
        ),
    )  # fmt: skip
    traits = Traits(
        title="Flux.1 dev" if dev else "Flux.1 schnell", native=int(config.get("sample_size") or NATIVE),
        granularity=PATCH, channels=int(vae["latent_channels"]), patch=PATCH, flow=True, samples=1, even_sigmas=True,
        width=config["num_attention_heads"] * config["attention_head_dim"],
        guidance=Guidance.EMBEDDED if dev else Guidance.NONE, defaults=_DEFAULTS[dev],
    )  # fmt: skip
    scheduler = checkpoint.config("scheduler", "scheduler_config.json")
    return Flux(checkpoint=checkpoint, traits=traits, parts=parts, vae=spec, scheduler=scheduler)


_SUPPORTED = "Flux.1 dev and schnell"
_KINDS = {
    "Flux2": "FLUX.2", "Fill": "Flux.1 Fill, which repaints pictures", "Inpaint": "an inpainting model",
    "Kontext": "Flux.1 Kontext, which edits pictures", "Control": "Flux.1 with a control picture",
    "Redux": "Flux.1 Redux, which takes pictures as prompts",
}  # fmt: skip
_KINDS_BY_CHANNELS = {
    2: "Flux.1 Canny or Depth, which take a control picture",
    6: "Flux.1 Fill, which repaints pictures",
}
# schnell is distilled for few steps, of which the guide may not take all but one.
_DEFAULTS = {
    True: {"num_inference_steps": 28, "guidance_scale": 3.5, "strength": 0.34},
    False: {"num_inference_steps": 4, "guidance_scale": 1.0, "strength": 0.5},
}


def _build(checkpoint: Checkpoint, config: dict[str, Any]) -> FluxTransformer2DModel:
    """diffusers' own transformer on the meta device."""
    with lean_imports():
        from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
    with on_meta(), refusing("transformer", checkpoint):
        return FluxTransformer2DModel.from_config(config).eval().requires_grad_(False)


def interim_build(checkpoint, t5):
    from transformers import T5Config, T5EncoderModel

    with on_meta():
        model = T5EncoderModel(T5Config(**t5)).eval().requires_grad_(False)
    model.encoder.embed_tokens = model.shared
    return model


def interim_t5(family, encoder, texts, length):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(family.checkpoint.folder / "tokenizer_2")
    ids = [
        tokenizer(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
        for text in texts
    ]
    return [encoder(i)[0] for i in ids]
