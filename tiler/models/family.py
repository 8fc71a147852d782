"""The interface of a model family: its parts, its traits, and how it encodes prompts and predicts noise.

A family is one file, registered by one line of `REGISTRY`. Classes named in a config are never imported.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property, partial
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from tiler.errors import ModelError
from tiler.memory.lean_imports import lean_imports
from tiler.models.meta import on_meta, refusing
from tiler.models.reading import READING, Reading
from tiler.request import TileConditioning
from tiler.request.model import ModelOptions
from tiler.weights.checkpoint import Checkpoint, resolve

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tiler.compute.stream import Streamer
    from tiler.models.samples import Prompt, Sample
    from tiler.weights.index import TensorInfo

REGISTRY: dict[str, str] = {
    "StableDiffusion": "tiler.models.sd",
    "StableDiffusionXL": "tiler.models.sdxl",
    "StableDiffusion3": "tiler.models.sd3",
    "Flux": "tiler.models.flux",
    "PixArt": "tiler.models.pixart",
    "AuraFlow": "tiler.models.auraflow",
    "HunyuanDiT": "tiler.models.hunyuandit",
    "Lumina": "tiler.models.lumina",
}
"""Part of a pipeline's class name → the module whose `read(checkpoint)` gives the Family. The longest match counts; a
class that none matches is read as Stable Diffusion, whose checks say what is foreign in it."""
_OTHERS = {
    "Inpaint": "an inpainting model", "InstructPix2Pix": "an InstructPix2Pix model", "Upscale": "an upscaler",
    "Depth2Img": "a depth-to-image model", "AnimateDiff": "a video model",
    "Kandinsky": "Kandinsky", "WuerstchenCombined": "Würstchen", "Video": "a video model",
    "Latte": "a video model",
}  # fmt: skip


class Role(StrEnum):
    """The role of a part in a checkpoint."""

    DENOISER = "denoiser"
    TEXT_ENCODER = "text encoder"
    VAE = "vae"


class Guidance(StrEnum):
    """How a family follows its prompt: by a second prediction for the negative prompt, by a scale that is an input of
    the model, or without guidance."""

    CFG = "classifier-free"
    EMBEDDED = "embedded"
    NONE = "none"


class Traits(NamedTuple):
    """The properties of a family that planning needs. Sizes in latent pixels."""

    title: str
    native: int  # the side of the square it was trained on
    granularity: int  # the sides of an input are multiples of this
    channels: int  # of the latents
    width: int  # channels of the denoiser where its resolution is highest
    flow: bool = False  # whether it was trained by flow matching, not on discrete noise levels
    patch: int = 1  # tiles begin at multiples of this, and the canvas's sides are multiples of it
    guidance: Guidance = Guidance.CFG
    samples: int | None = None  # of one read of the weights at most, where more gain nothing
    defaults: Mapping[str, Any] = MappingProxyType({})  # by field of RenderRequest, where nothing else says anything
    old_schedulers: bool = True  # whether diffusers' pipeline corrects scheduler configs that its old versions wrote
    longest: int | None = None  # side of a guide, where the positions it knows end
    large_blocks: bool = False  # whether a sample's activations are few blocks of many MB, which leave no holes behind
    chunked: bool = (
        False  # whether long prompts continue in chunks of 77 tokens; all prompts of a sample have the same number
    )
    embeddings: bool = False  # whether prompts may name embeddings (textual inversion)
    clip_skip: bool = False  # whether the states of another layer of CLIP can be taken
    told_place: bool = False  # whether a sample is told where on the canvas it lies
    few_steps: str | None = None  # a model of this family that was distilled to few steps, where this one was not
    guided_channels: int | None = None  # of the latents, if not all: the others follow the prompt alone
    even_sigmas: bool = False  # of a flow: σ falls from 1 to 1/N in equal steps before it is shifted

    @property
    def tokens(self) -> int:
        """The patches of a native tile: the tokens that a transformer processes at once."""
        return (self.native // self.patch) ** 2


class Options(NamedTuple):
    """The user's options for the denoiser itself, all guidance scales that samples will have, and a folder for scratch
    files."""

    attention_window: int | None = None
    seed: int = 0
    tile_conditioning: TileConditioning = TileConditioning.PLACE
    guidance: tuple[float, ...] = ()
    scratch: Path | None = None


def no_parameter(name: str) -> bool:
    return False


@dataclass(frozen=True, kw_only=True)
class Part:
    """One model of a checkpoint.

    `name` is its folder. `build` creates it on the meta device. `aliases` gives the names that a parameter may have in
    files. `quantise` selects the parameters that may become int8, `half` those that may be multiplied in bf16 (None:
    the same ones), and `once` those that are read before the steps and not during them. With `rotate`, the inputs of
    int8 weights are rotated because some of them are outliers. A text encoder must have an `example`, which runs it as
    `Family.encode` does for prompts of the greatest length, also with weights on the meta device, to measure its
    memory.
    """

    name: str
    role: Role
    config: dict[str, Any]
    build: Callable[[], Any]
    aliases: Callable[[str], list[str]]
    quantise: Callable[[str], bool] = no_parameter
    half: Callable[[str], bool] | None = None
    once: Callable[[str], bool] = no_parameter
    arena_bytes: int | None = None
    rotate: bool = False
    example: Callable[[Any], object] | None = None

    def int8_weights(self, module: nn.Module) -> frozenset[str]:
        """The parameters of the built `module` that are quantised."""
        from tiler.models.unet import large_weights

        return frozenset(filter(self.quantise, large_weights(module)))

    def bf16_weights(self, module: nn.Module) -> frozenset[str]:
        """The parameters of the built `module` that may be computed with in bf16."""
        from tiler.models.unet import large_weights

        return frozenset(filter(self.half or self.quantise, large_weights(module)))


OpenPart = Callable[[Part], AbstractContextManager[Any]]
"""A part → a context in which its module has its weights."""


@dataclass(frozen=True, kw_only=True)
class VaeSpec:
    """An AutoencoderKL or AutoencoderTiny: the location of its weights, and the scaling of its latents."""

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

    @property
    def moments(self) -> tuple[Tensor, Tensor] | None:
        """The mean and standard deviation of each channel, (1, C, 1, 1), for an autoencoder whose latents are
        normalised by both."""
        import torch

        found = [self.config.get(name) for name in ("latents_mean", "latents_std")]
        if self.tiny or None in found:
            return None
        mean, std = (torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1) for values in found)
        return mean, std

    def unscale_(self, latents: Tensor) -> Tensor:
        """Convert the diffusion model's latents to the decoder's input, fp32 (1, C, h, w), in place."""
        if self.moments is not None:
            mean, std = self.moments
            return latents.mul_(std).div_(self.scaling_factor).add_(mean)
        return latents.div_(self.scaling_factor).add_(self.shift_factor)

    def scale(self, mean: Tensor) -> Tensor:
        """Convert the encoder's output, (1, C, h, w), to the diffusion model's latents."""
        if self.moments is not None:
            middle, std = self.moments
            return (mean - middle) * self.scaling_factor / std
        return (mean - self.shift_factor) * self.scaling_factor


@dataclass(frozen=True, kw_only=True)
class Family(ABC):
    """A checkpoint whose configs were checked, and the use of its models."""

    checkpoint: Checkpoint
    traits: Traits
    parts: tuple[Part, ...]
    vae: VaeSpec
    scheduler: dict[str, Any]
    notes: tuple[str, ...] = ()  # of what was corrected in the configs, for the user

    def part(self, role: Role) -> Part:
        """The first part with this role."""
        return next(part for part in self.parts if part.role is role)

    @property
    def encoders(self) -> tuple[Part, ...]:
        return tuple(part for part in self.parts if part.role is Role.TEXT_ENCODER)

    @property
    def native(self) -> int:
        return self.traits.native

    @property
    def granularity(self) -> int:
        return self.traits.granularity

    @property
    def latent_channels(self) -> int:
        return self.traits.channels

    @property
    def autoencoder(self) -> VaeSpec:
        return self.vae

    @property
    def encoding(self) -> tuple[object, ...]:
        """The properties of the checkpoint that determine a prompt's embeddings, besides its text encoders and the
        shape of their output."""
        return ()

    @abstractmethod
    def encode(
        self,
        prompts: Sequence[str | None],
        open_part: OpenPart,
        warn: Callable[[str], None],
        reading: Reading = READING,
    ) -> list[Prompt]:
        """The embeddings of every prompt, parsed according to `reading`; None is an absent negative prompt. Each
        encoder is opened once."""

    def lengthened(self, prompt: Prompt, tokens: int, empty: Prompt) -> Prompt:
        """Pad the prompt with chunks of an `empty` prompt to `tokens` tokens; for families whose prompts have
        chunks."""
        return prompt

    @abstractmethod
    def prepare(
        self, model: Any, streamer: Streamer, timesteps: Tensor, prompts: Sequence[Prompt], options: Options
    ) -> Any:
        """Compute for `predict` what all steps of a run share, in guide and canvas. The result must not refer to
        `model`, which differs between phases. timesteps: (steps,), those of the whole schedule."""

    @abstractmethod
    def predict(
        self,
        model: Any,
        streamer: Streamer,
        samples: Sequence[Sample],
        step: int,
        prepared: Any,
        check: Callable[[str], None] = lambda where: None,
    ) -> Tensor:
        """The denoiser's prediction for each sample, (n, C, h, w) fp32, with one read of its weights. Consecutive
        samples with the same latents tensor are the two halves of one guidance. `check` is called at every unit."""

    @abstractmethod
    def example(self, tiles: Sequence[int], sides: tuple[int, int]) -> list[Sample]:
        """A sample on the meta device for each number in `tiles`; equal numbers share their latents, which have
        `sides`."""


def open_family(options: ModelOptions, *, reads_text: bool = True) -> Family:
    """Open the family of the requested model, with its files found and its parts replaced. If no prompt has to be
    encoded, its text encoders may be missing. Raises ModelError, UsageError, OfflineError, StorageError."""
    if options.diffusion_model is None or options.model != "mini":  # whose parts go with no other denoiser
        found = resolve(
            options.model, variant=options.variant, revision=options.revision, model_dirs=options.model_dirs,
            reads_text=reads_text,
        )  # fmt: skip
    else:
        found = resolve(options.diffusion_model, model_dirs=options.model_dirs, reads_text=reads_text)
        if found.file is None:
            raise ModelError(f"{options.diffusion_model}: this is a folder; give it with --model")
        options = replace(options, diffusion_model=str(found.file))
    return read_family(found, options)


def read_family(checkpoint: Checkpoint, options: ModelOptions | None = None) -> Family:
    """Check every config of the checkpoint, whose parts `options` may replace. Raises ModelError, naming the file and
    the kind of model."""
    from tiler.models.single_file import assemble

    checkpoint = assemble(checkpoint, options or ModelOptions())
    name = str(checkpoint.config("", "model_index.json").get("_class_name", ""))
    known = [key for key in REGISTRY if key.lower() in name.lower()]
    exact = max(known, key=len, default="StableDiffusion")
    if REGISTRY[exact] == REGISTRY["StableDiffusion"]:
        for word, what in _OTHERS.items():
            if word.lower() in name.lower():
                raise ModelError(f"{checkpoint.name}: this is {what} ({name}); tiler needs text-to-image")
    family: Family = import_module(REGISTRY[exact]).read(checkpoint, name)
    return family


def read_config(
    checkpoint: Checkpoint, part: str, want: str | None, check: Callable[[str, Mapping[str, Any]], None]
) -> dict[str, Any]:
    """The config of a part, whose class must be `want`, with its numbers checked by `check`. Raises ModelError."""
    config = checkpoint.config(part)
    if want and config.get("_class_name", want) != want:
        raise ModelError(f"{checkpoint.folder / part}: the class is {config['_class_name']!r}; tiler supports {want}")
    if "auto_map" in config:
        raise ModelError(
            f"{checkpoint.folder / part}/config.json: auto_map asks to run code from the checkpoint; refused"
        )
    check(f"{checkpoint.folder / part}/config.json", config)
    return config


def build_vae(vae: VaeSpec) -> Any:
    """diffusers' own AutoencoderKL or AutoencoderTiny on the meta device."""
    with lean_imports():
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
        from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
    with on_meta(), refusing(vae.part, vae.checkpoint):
        kind: Any = AutoencoderTiny if vae.tiny else AutoencoderKL
        model = kind.from_config(vae.config).eval().requires_grad_(False)
        if vae.tiny and not any(name.startswith("encoder.") for name in vae.weights):
            del model.encoder  # TAESD is published in halves, of which this is the one that makes pictures
        return model


def vae_part(vae: VaeSpec) -> Part:
    """The checkpoint's AutoencoderKL, which is never quantised."""
    return Part(name=vae.part, role=Role.VAE, config=vae.config, aliases=vae_names, build=partial(build_vae, vae))


# Names a parameter may have in published files, newest first.
_OLD_ATTENTION = (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn"))


def vae_names(name: str) -> list[str]:
    """Old diffusers versions wrote the VAE's attention as query, key, value, proj_attn."""
    names = [name]
    for new, old in _OLD_ATTENTION:
        if f".{new}." in name:
            names.append(name.replace(f".{new}.", f".{old}."))
    return names


def plain_names(name: str) -> list[str]:
    return [name]
