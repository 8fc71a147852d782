"""Stable Diffusion 1.x and 2.x: one CLIP text encoder and a UNet, epsilon or v-prediction.

The modules are diffusers' and transformers' own, built on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from tiler.compute.stream import Streamer
from tiler.decoding import FACTOR
from tiler.errors import ModelError
from tiler.memory.lean_imports import lean_imports
from tiler.models import bounds
from tiler.models.blocks import Windows
from tiler.models.clip import TOKENS, encode_prompts, load_tokenizer, run_clip
from tiler.models.corrections import correct_unet
from tiler.models.family import (
    Family,
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
from tiler.models.samples import Place, Prompt, Sample
from tiler.models.unet import predict_noise, quantised
from tiler.weights.checkpoint import Checkpoint

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers.models.clip.modeling_clip import CLIPTextModel


class Prepared(NamedTuple):
    """The schedule's timesteps (steps,), and what the user asked of the attention."""

    timesteps: Tensor
    options: Options


class StableDiffusion(Family):
    def encode(self, prompts: Sequence[str | None], open_part: OpenPart, warn: Callable[[str], None]) -> list[Prompt]:
        """The last hidden states of CLIP, (1, 77, width) each; a prompt that was not given is an empty one."""
        tokenizer = load_tokenizer(self)
        texts = list(dict.fromkeys(prompt or "" for prompt in prompts))
        with open_part(self.part(Role.TEXT_ENCODER)) as encoder:
            encoded = dict(zip(texts, encode_prompts(tokenizer, encoder, texts, warn).split(1), strict=True))
        return [Prompt(encoded[prompt or ""]) for prompt in prompts]

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
        size, seed = options.attention_window, options.seed
        windows = None if size is None else Windows(size) if timestep.is_meta else Windows.drawn(size, seed, timestep)
        latents, tokens = [s.latents for s in samples], [s.prompt.tokens for s in samples]
        return predict_noise(model, streamer, latents, timestep, tokens, check, windows)

    def example(self, tiles: Sequence[int], sides: tuple[int, int]) -> list[Sample]:
        meta, wide = torch.device("meta"), self.part(Role.TEXT_ENCODER).config["hidden_size"]
        latents = {tile: torch.empty(1, self.latent_channels, *sides, device=meta) for tile in tiles}
        height, width = (FACTOR * side for side in sides)
        place = Place(0, 0, height, width, (height, width))
        return [Sample(latents[tile], Prompt(torch.empty(1, TOKENS, wide, device=meta)), place, 1.0) for tile in tiles]


def read(checkpoint: Checkpoint, name: str) -> StableDiffusion:
    """Check the configs of a pipeline of class `name`. Raises ModelError, saying what the model is."""
    if not (checkpoint.folder / "unet").is_dir() and (checkpoint.folder / "transformer").is_dir():
        raise ModelError(
            f"{checkpoint.name}: this is a diffusion transformer ({name}); tiler supports Stable Diffusion 1.x and 2.x"
        )
    unet = read_config(checkpoint, "unet", "UNet2DConditionModel", bounds.check_unet)
    vae = read_config(checkpoint, "vae", "AutoencoderKL", bounds.check_vae)
    text = read_config(checkpoint, "text_encoder", None, bounds.check_text)
    if unet.get("addition_embed_type") == "text_time" or unet.get("cross_attention_dim") == 2048:
        raise ModelError(f"{checkpoint.name}: this is SDXL; tiler supports Stable Diffusion 1.x and 2.x")
    latent, channels = vae.get("latent_channels", 4), unet.get("in_channels", 4)
    if channels != latent:
        kind = {9: "an inpainting model", 8: "an InstructPix2Pix model", 7: "an upscaler"}.get(
            channels, "of another kind"
        )
        raise ModelError(
            f"{checkpoint.name}: the UNet takes {channels} channels, the VAE gives {latent}: this is {kind}; tiler needs text-to-image"
        )
    if not str(text.get("model_type", "clip_text_model")).startswith("clip"):
        raise ModelError(f"{checkpoint.name}: the text encoder is {text['model_type']!r}; tiler supports CLIP")
    if unet.get("cross_attention_dim", text["hidden_size"]) != text["hidden_size"]:
        raise ModelError(
            f"{checkpoint.name}: the UNet expects text width {unet['cross_attention_dim']}, the text encoder gives {text['hidden_size']}"
        )
    if (factor := 2 ** (len(vae["block_out_channels"]) - 1)) != FACTOR:
        raise ModelError(f"{checkpoint.name}: the VAE's factor is {factor}; tiler supports {FACTOR}")
    bounds.check_prediction(f"{checkpoint.folder / 'unet'}/config.json", unet)
    _check_unet_kind(f"{checkpoint.folder / 'unet'}/config.json", unet)
    unet, notes = correct_unet(unet)
    scheduler = checkpoint.config("scheduler", "scheduler_config.json")
    spec, levels = VaeSpec(checkpoint=checkpoint, part="vae", config=vae), len(unet["block_out_channels"])
    parts = (
        Part(
            name="text_encoder",
            role=Role.TEXT_ENCODER,
            config=text,
            build=partial(_build_text_encoder, checkpoint, text),
            aliases=text_names,
            quantise=partial(quantised, levels=0),
            example=run_clip,
        ),
        Part(
            name="unet",
            role=Role.DENOISER,
            config=unet,
            build=partial(_build_unet, checkpoint, unet),
            aliases=plain_names,
            quantise=partial(quantised, levels=levels),
        ),
        Part(
            name="vae",
            role=Role.VAE,
            config=vae,
            build=partial(build_vae, spec),
            aliases=vae_names,
            quantise=lambda name: False,
        ),
    )
    traits = Traits(
        title="Stable Diffusion", native=int(unet.get("sample_size", 64)), granularity=2 ** (levels - 1),
        channels=int(latent), width=unet["block_out_channels"][0],
    )  # fmt: skip
    return StableDiffusion(
        checkpoint=checkpoint, traits=traits, parts=parts, vae=spec, scheduler=scheduler, notes=notes
    )


_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D", "UNetMidBlock2DCrossAttn", None)
_FOREIGN = (
    "class_embed_type", "addition_embed_type", "time_cond_proj_dim", "encoder_hid_dim_type", "dual_cross_attention",
    "center_input_sample", "time_embedding_act_fn", "attention_type", "only_cross_attention", "resnet_time_scale_shift",
    "resnet_skip_time_act", "encoder_hid_dim", "num_class_embeds", "class_embeddings_concat", "cross_attention_norm",
    "mid_block_only_cross_attention", "timestep_post_act", "time_embedding_type",
)  # fmt: skip


def _check_unet_kind(where: str, unet: dict[str, Any]) -> None:
    """Refuse what `models/unet.py` would leave out: a picture that is silently wrong helps nobody."""
    blocks = [*unet.get("down_block_types", []), *unet.get("up_block_types", []), unet.get("mid_block_type")]
    for block in blocks:
        if block not in _BLOCKS:
            raise ModelError(
                f"{where}: blocks of type {block!r} are not supported; tiler supports Stable Diffusion 1.x and 2.x"
            )
    for key in _FOREIGN:
        if unet.get(key) not in (None, False, "default", "positional"):
            raise ModelError(
                f"{where}: {key} = {unet[key]!r} is not supported; tiler supports Stable Diffusion 1.x and 2.x"
            )


def _build_unet(checkpoint: Checkpoint, config: dict[str, Any]) -> UNet2DConditionModel:
    """diffusers' own UNet on the meta device."""
    with lean_imports():
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    with on_meta(), refusing("unet", checkpoint):
        return UNet2DConditionModel.from_config(config).eval().requires_grad_(False)


def _build_text_encoder(checkpoint: Checkpoint, text: dict[str, Any]) -> CLIPTextModel:
    """transformers' own CLIP text model on the meta device; its position ids are real."""
    with lean_imports():
        from transformers.models.clip.configuration_clip import CLIPTextConfig
        from transformers.models.clip.modeling_clip import CLIPTextModel
    known = {k: v for k, v in text.items() if k not in ("architectures", "torch_dtype", "dtype", "_name_or_path")}
    with refusing("text_encoder", checkpoint):
        config = CLIPTextConfig(**known)
        config._attn_implementation = "sdpa"
        with on_meta():
            model = CLIPTextModel(config).eval().requires_grad_(False)
    return model


def text_names(name: str) -> list[str]:
    """Published files carry the prefix text_model., which transformers 5 dropped from its modules."""
    return (
        [f"text_model.{name}", name] if not name.startswith("text_model.") else [name, name.removeprefix("text_model.")]
    )
