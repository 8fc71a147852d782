"""What a checkpoint is, read from its configs alone: Stable Diffusion 1.x and 2.x, or a refusal that says what it is.

Builds diffusers' and transformers' own modules on the meta device; no class named in a config is ever imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tiler.errors import ModelError
from tiler.memory.lean_imports import lean_imports
from tiler.models import bounds
from tiler.models.corrections import correct_unet
from tiler.weights.checkpoint import Checkpoint

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from torch import Tensor
    from transformers.models.clip.modeling_clip import CLIPTextModel

    from tiler.weights.index import TensorInfo

_OTHERS = {
    "StableDiffusionXL": "SDXL", "StableDiffusion3": "Stable Diffusion 3", "Flux": "Flux", "PixArt": "PixArt",
    "Inpaint": "an inpainting model", "InstructPix2Pix": "an InstructPix2Pix model", "Upscale": "an upscaler",
    "Kandinsky": "Kandinsky", "WuerstchenCombined": "Würstchen", "Video": "a video model", "LatentConsistency": "",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class VaeSpec:
    """An AutoencoderKL or AutoencoderTiny: where its weights are and how its latents are scaled."""

    checkpoint: Checkpoint
    part: str
    config: dict[str, Any]
    tiny: bool = False

    @property
    def scaling_factor(self) -> float:
        return float(self.config.get("scaling_factor", 1.0 if self.tiny else 0.18215))

    @property
    def shift_factor(self) -> float:
        return 0.0 if self.tiny else float(self.config.get("shift_factor") or 0.0)

    @cached_property
    def weights(self) -> dict[str, TensorInfo]:
        """The index of its files, read once."""
        return self.checkpoint.weights(self.part)

    def unscale_(self, latents: Tensor) -> Tensor:
        """What the diffusion works on → what the decoder takes, fp32, in place."""
        return latents.div_(self.scaling_factor).add_(self.shift_factor)

    def scale(self, mean: Tensor) -> Tensor:
        """What the encoder gives → what the diffusion works on."""
        return (mean - self.shift_factor) * self.scaling_factor


@dataclass(frozen=True, kw_only=True)
class Family:
    """A checkpoint's configs, checked. Sizes in latent pixels."""

    checkpoint: Checkpoint
    unet: dict[str, Any]
    vae: dict[str, Any]
    text: dict[str, Any]
    scheduler: dict[str, Any]
    notes: tuple[str, ...] = ()  # of what was corrected in them, for the user

    @property
    def native(self) -> int:
        """The side of the square the UNet was trained on."""
        return int(self.unet.get("sample_size", 64))

    @property
    def granularity(self) -> int:
        """A UNet input's sides are multiples of this."""
        return int(2 ** (len(self.unet["block_out_channels"]) - 1))

    @property
    def latent_channels(self) -> int:
        return int(self.vae.get("latent_channels", 4))

    @cached_property
    def autoencoder(self) -> VaeSpec:
        return VaeSpec(checkpoint=self.checkpoint, part="vae", config=self.vae)


def read_family(checkpoint: Checkpoint) -> Family:
    """Check every config of the checkpoint. Raises ModelError, naming the file and what the model is."""
    index = checkpoint.config("", "model_index.json")
    name = str(index.get("_class_name", ""))
    for word, what in _OTHERS.items():
        if what and word.lower() in name.lower():
            raise ModelError(f"{checkpoint.name}: this is {what} ({name}); tiler supports Stable Diffusion 1.x and 2.x")
    parts = {}
    for part, want, check in (
        ("unet", "UNet2DConditionModel", bounds.check_unet),
        ("vae", "AutoencoderKL", bounds.check_vae),
        ("text_encoder", None, bounds.check_text),
    ):
        if part == "unet" and not (checkpoint.folder / part).is_dir() and (checkpoint.folder / "transformer").is_dir():
            raise ModelError(
                f"{checkpoint.name}: this is a diffusion transformer ({name}); tiler supports Stable Diffusion 1.x and 2.x"
            )
        config = checkpoint.config(part)
        if want and config.get("_class_name", want) != want:
            raise ModelError(
                f"{checkpoint.folder / part}: the class is {config['_class_name']!r}; tiler supports {want}"
            )
        if "auto_map" in config:
            raise ModelError(
                f"{checkpoint.folder / part}/config.json: auto_map asks to run code from the checkpoint; refused"
            )
        check(f"{checkpoint.folder / part}/config.json", config)
        parts[part] = config
    unet, vae, text = parts["unet"], parts["vae"], parts["text_encoder"]
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
    if len(vae["block_out_channels"]) != 4:
        raise ModelError(
            f"{checkpoint.name}: the VAE's factor is {2 ** (len(vae['block_out_channels']) - 1)}; tiler supports 8"
        )
    bounds.check_prediction(f"{checkpoint.folder / 'unet'}/config.json", unet)
    _check_unet_kind(f"{checkpoint.folder / 'unet'}/config.json", unet)
    scheduler = checkpoint.config("scheduler", "scheduler_config.json")
    unet, notes = correct_unet(unet)
    return Family(checkpoint=checkpoint, unet=unet, vae=vae, text=text, scheduler=scheduler, notes=notes)


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


def build_unet(family: Family) -> UNet2DConditionModel:
    """diffusers' own UNet on the meta device."""
    with lean_imports():
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    with _on_meta(), _refuse("unet", family.checkpoint):
        return UNet2DConditionModel.from_config(family.unet).eval().requires_grad_(False)


def build_vae(vae: VaeSpec) -> Any:
    """diffusers' own AutoencoderKL or AutoencoderTiny on the meta device."""
    with lean_imports():
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
        from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
    with _on_meta(), _refuse(vae.part, vae.checkpoint):
        kind: Any = AutoencoderTiny if vae.tiny else AutoencoderKL
        return kind.from_config(vae.config).eval().requires_grad_(False)


def read_tiny(checkpoint: Checkpoint, family: Family) -> VaeSpec:
    """An AutoencoderTiny in TAESD's layout that goes with `family`. Raises ModelError."""
    config, where = checkpoint.config(""), f"{checkpoint.folder}/config.json"
    if config.get("_class_name") != "AutoencoderTiny":
        raise ModelError(f"{where}: the class is {config.get('_class_name')!r}; --tiny-vae takes an AutoencoderTiny")
    wanted = {
        "latent_channels": (family.latent_channels, 4),
        "act_fn": ("relu", "relu"),
        "upsample_fn": ("nearest", "nearest"),
        "upsampling_scaling_factor": (2, 2),
    }
    for key, (want, default) in wanted.items():
        if config.get(key, default) != want:
            raise ModelError(
                f"{where}: {key} = {config[key]!r}, {family.checkpoint.name} needs {want!r}; use another --tiny-vae"
            )
    bounds.check_tiny(where, config)
    return VaeSpec(checkpoint=checkpoint, part="", config=config, tiny=True)


def build_text_encoder(family: Family) -> CLIPTextModel:
    """transformers' own CLIP text model on the meta device; its position ids are real."""
    with lean_imports():
        from transformers.models.clip.configuration_clip import CLIPTextConfig
        from transformers.models.clip.modeling_clip import CLIPTextModel
    known = {
        k: v for k, v in family.text.items() if k not in ("architectures", "torch_dtype", "dtype", "_name_or_path")
    }
    with _refuse("text_encoder", family.checkpoint):
        config = CLIPTextConfig(**known)
        config._attn_implementation = "sdpa"
        with _on_meta():
            model = CLIPTextModel(config).eval().requires_grad_(False)
    return model


@contextmanager
def _on_meta() -> Iterator[None]:
    """Modules made here have shapes and no data. Their initialisers do nothing: torch's own, for the meta device, are
    written in Python and import sympy (40 MB)."""
    import torch
    from torch.overrides import TorchFunctionMode

    class NoInit(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if func is torch.arange:  # position ids: small, and needed for real
                return func(*args, **kwargs | {"device": "cpu"})
            tensor = args[0] if args else kwargs.get("tensor")
            name = getattr(func, "__name__", "")
            if (
                name.endswith("_")
                and not name.startswith("_")
                and name != "requires_grad_"
                and isinstance(tensor, torch.Tensor)
                and tensor.is_meta
            ):
                return tensor
            return func(*args, **kwargs)

    with torch.device("meta"), NoInit():
        yield


class _refuse:
    """Turn what a library says of an impossible config into a ModelError."""

    def __init__(self, part: str, checkpoint: Checkpoint) -> None:
        self.where = f"{checkpoint.folder / part}/config.json"

    def __enter__(self) -> None:
        import diffusers.utils.logging

        diffusers.utils.logging.set_verbosity_error()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: object) -> None:
        if isinstance(value, Exception) and not isinstance(value, ModelError):
            raise ModelError(
                f"{self.where}: no model can be built from it ({str(value).splitlines()[0] if str(value) else kind})"
            ) from value


# Names a parameter may have in published files, newest first.
_OLD_ATTENTION = (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn"))


def vae_names(name: str) -> list[str]:
    """Old diffusers versions wrote the VAE's attention as query, key, value, proj_attn."""
    names = [name]
    for new, old in _OLD_ATTENTION:
        if f".{new}." in name:
            names.append(name.replace(f".{new}.", f".{old}."))
    return names


def text_names(name: str) -> list[str]:
    """Published files carry the prefix text_model., which transformers 5 dropped from its modules."""
    return (
        [f"text_model.{name}", name] if not name.startswith("text_model.") else [name, name.removeprefix("text_model.")]
    )


def plain_names(name: str) -> list[str]:
    return [name]
