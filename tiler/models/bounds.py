"""Check the numbers in a model's configs before anything is built or allocated from them.

A wrong number would otherwise show up hours later as a black or wrong picture, and the weights would be blamed. Fields
that neither this program nor the built modules read may hold anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from tiler.errors import ModelError

Config = Mapping[str, Any]
MAX_BLOCKS = 16


def check_unet(where: str, config: Config) -> None:
    """Check a UNet2DConditionModel's config, read from the file `where`. Raises ModelError, naming the field."""
    _need(where, config, "block_out_channels")
    _whole(where, config, in_channels=(1, 64), out_channels=(1, 64), cross_attention_dim=(1, 8192))
    _whole(
        where, config, sample_size=(1, 4096), norm_num_groups=(1, 256), conv_in_kernel=(1, 9), conv_out_kernel=(1, 9)
    )
    _whole(where, config, may_be_null=True, num_attention_heads=(1, 128), time_embedding_dim=(1, 65_536))
    _whole(where, config, may_be_null=True, addition_time_embed_dim=(2, 8192), time_cond_proj_dim=(4, 8192))
    _whole(where, config, may_be_null=True, projection_class_embeddings_input_dim=(1, 65_536))
    _whole(where, config, downsample_padding=(0, 1))
    _number(where, config, norm_eps=(1e-12, 0.1), freq_shift=(0, 1))
    _number(where, config, resnet_out_scale_factor=(1e-3, 1e3), mid_block_scale_factor=(1e-3, 1e3))
    _flags(where, config, "flip_sin_to_cos", "use_linear_projection", "upcast_attention")
    levels = _widths(where, config, 4, ("down_block_types", "up_block_types"))
    _each(where, config, levels, layers_per_block=(1, 16), attention_head_dim=(1, 512))
    _each(where, config, levels, transformer_layers_per_block=(1, 64))
    for key in ("conv_in_kernel", "conv_out_kernel"):
        if config.get(key, 3) % 2 == 0:
            _refuse(where, key, config[key], "an odd number")


def check_prediction(where: str, config: Config) -> None:
    """Check that a UNet has as many output channels as input channels. Raises ModelError."""
    taken = config.get("in_channels", 4)
    if (given := config.get("out_channels", 4)) != taken:
        _refuse(
            where,
            "out_channels",
            given,
            f"it must be {taken}, as in_channels: tiler uses predictions alone, no variances",
        )


def check_sd3(where: str, config: Config) -> None:
    """Check an SD3Transformer2DModel's config. Raises ModelError, naming the field."""
    for key in ("num_layers", "num_attention_heads", "attention_head_dim", "joint_attention_dim"):
        _need(where, config, key)
    _whole(where, config, num_layers=(1, 256), num_attention_heads=(1, 256), attention_head_dim=(2, 1024))
    _whole(where, config, joint_attention_dim=(1, 65_536), pooled_projection_dim=(1, 65_536))
    _need(where, config, "in_channels")
    _whole(where, config, caption_projection_dim=(1, 65_536), in_channels=(1, 64), patch_size=(2, 2))
    _whole(where, config, sample_size=(8, 4096), pos_embed_max_size=(1, 4096))
    _whole(where, config, may_be_null=True, out_channels=(1, 64))
    width = config["num_attention_heads"] * config["attention_head_dim"]
    if (taken := config.get("caption_projection_dim", 1152)) != width:
        _refuse(where, "caption_projection_dim", taken, f"it must be heads times their width, {width}")
    if config.get("qk_norm") not in (None, "rms_norm"):
        _refuse(where, "qk_norm", config["qk_norm"], "tiler supports null and 'rms_norm'")
    layers = config.get("dual_attention_layers") or []
    if not isinstance(layers, list) or not all(_is_whole(n, 0, config["num_layers"] - 1) for n in layers):
        _refuse(where, "dual_attention_layers", layers, "it must be a list of the numbers of layers")


def check_pixart(where: str, config: Config) -> None:
    """Check a PixArtTransformer2DModel's config. Raises ModelError, naming the field."""
    for key in ("num_attention_heads", "attention_head_dim", "caption_channels"):
        _need(where, config, key)
    _whole(where, config, num_attention_heads=(1, 256), attention_head_dim=(1, 1024), num_layers=(1, 256))
    _whole(where, config, caption_channels=(1, 65_536), in_channels=(1, 64), sample_size=(8, 4096))
    _whole(where, config, may_be_null=True, out_channels=(1, 128), cross_attention_dim=(1, 65_536))
    _number(where, config, norm_eps=(1e-12, 0.1))
    _number(where, config, may_be_null=True, interpolation_scale=(1e-3, 1e3))
    _flags(where, config, "attention_bias", "norm_elementwise_affine", "use_additional_conditions")


def check_auraflow(where: str, config: Config) -> None:
    """Check an AuraFlowTransformer2DModel's config. Raises ModelError, naming the field."""
    for key in ("in_channels", "num_attention_heads", "attention_head_dim", "joint_attention_dim"):
        _need(where, config, key)
    _whole(where, config, num_mmdit_layers=(0, 256), num_single_dit_layers=(0, 256), num_attention_heads=(1, 256))
    _whole(where, config, attention_head_dim=(2, 1024), joint_attention_dim=(1, 65_536), in_channels=(1, 64))
    _whole(where, config, caption_projection_dim=(1, 65_536), sample_size=(4, 4096), patch_size=(2, 2))
    _whole(where, config, pos_embed_max_size=(1, 2**24))
    _whole(where, config, may_be_null=True, out_channels=(1, 64))
    width = config["num_attention_heads"] * config["attention_head_dim"]
    if (taken := config.get("caption_projection_dim", 3072)) != width:
        _refuse(where, "caption_projection_dim", taken, f"it must be heads times their width, {width}")
    positions = config.get("pos_embed_max_size", 1024)
    if math.isqrt(positions) ** 2 != positions:
        _refuse(where, "pos_embed_max_size", positions, "it must be the square of a whole number")


def check_hunyuandit(where: str, config: Config) -> None:
    """A HunyuanDiT2DModel's config. Raises ModelError, naming the field."""
    for key in ("in_channels", "num_attention_heads", "attention_head_dim", "hidden_size", "num_layers", "patch_size"):
        _need(where, config, key)
    _whole(where, config, in_channels=(1, 64), num_attention_heads=(1, 256), attention_head_dim=(4, 1024))
    _whole(where, config, num_layers=(1, 256), patch_size=(2, 2), sample_size=(8, 4096), text_len=(1, 4096))
    _whole(where, config, text_len_t5=(1, 4096), cross_attention_dim=(1, 16_384), cross_attention_dim_t5=(8, 16_384))
    _whole(where, config, pooled_projection_dim=(1, 65_536))
    _number(where, config, mlp_ratio=(0.1, 64))
    _flags(where, config, "learn_sigma", "use_style_cond_and_image_meta_size")
    width = config["num_attention_heads"] * config["attention_head_dim"]
    if config["hidden_size"] != width:
        _refuse(where, "hidden_size", config["hidden_size"], f"it must be heads times their width, {width}")
    if config["attention_head_dim"] % 4:
        _refuse(where, "attention_head_dim", config["attention_head_dim"], "it must be a multiple of 4")
    if config.get("cross_attention_dim_t5", 2048) % 8:
        _refuse(where, "cross_attention_dim_t5", config["cross_attention_dim_t5"], "it must be a multiple of 8")
    if config.get("activation_fn", "gelu-approximate") != "gelu-approximate":
        _refuse(where, "activation_fn", config["activation_fn"], "tiler supports 'gelu-approximate'")


def check_lumina(where: str, config: Config) -> None:
    """A LuminaNextDiT2DModel's config. Raises ModelError, naming the field."""
    _whole(where, config, hidden_size=(8, 16_384), num_layers=(1, 256), num_attention_heads=(1, 256))
    _whole(where, config, in_channels=(1, 64), patch_size=(2, 2), sample_size=(8, 4096), multiple_of=(1, 65_536))
    _whole(where, config, cross_attention_dim=(1, 16_384))
    _whole(where, config, may_be_null=True, num_kv_heads=(1, 256))
    _number(where, config, norm_eps=(1e-12, 0.1))
    _number(where, config, may_be_null=True, ffn_dim_multiplier=(0.01, 64))
    _flags(where, config, "learn_sigma", "qk_norm")
    width, heads = config.get("hidden_size", 2304), config.get("num_attention_heads", 32)
    if width % (4 * heads):
        _refuse(where, "hidden_size", width, f"it must be a multiple of 4 · num_attention_heads, {4 * heads}")
    if heads % (shared := config.get("num_kv_heads") or heads):
        _refuse(where, "num_kv_heads", shared, f"num_attention_heads, {heads}, must be a multiple of it")
    if config.get("qk_norm", True) is not True:
        _refuse(where, "qk_norm", config["qk_norm"], "tiler supports true")


def check_gemma(where: str, config: Config) -> None:
    """A GemmaModel's config. Raises ModelError, naming the field."""
    for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads"):
        _need(where, config, key)
    _whole(where, config, hidden_size=(1, 16_384), vocab_size=(2, 1_000_000), intermediate_size=(1, 131_072))
    _whole(where, config, num_hidden_layers=(2, 128), num_attention_heads=(1, 128), num_key_value_heads=(1, 128))
    _whole(where, config, head_dim=(2, 1024), max_position_embeddings=(256, 10**6))
    _number(where, config, rms_norm_eps=(1e-12, 0.1))
    if config["num_attention_heads"] % (shared := config["num_key_value_heads"]):
        _refuse(where, "num_key_value_heads", shared, "num_attention_heads must be a multiple of it")
    for key in ("attention_bias", "use_bidirectional_attention"):
        if config.get(key):
            _refuse(where, key, config[key], "tiler supports false")


def check_bert(where: str, config: Config) -> None:
    """A BertModel's config. Raises ModelError, naming the field."""
    _need(where, config, "hidden_size")
    _whole(where, config, hidden_size=(1, 8192), vocab_size=(2, 1_000_000), intermediate_size=(1, 65_536))
    _whole(where, config, num_hidden_layers=(1, 128), num_attention_heads=(1, 128), max_position_embeddings=(2, 4096))
    _number(where, config, layer_norm_eps=(1e-12, 0.1))
    heads = config.get("num_attention_heads", 12)
    if config["hidden_size"] % heads:
        _refuse(where, "hidden_size", config["hidden_size"], f"a multiple of num_attention_heads, {heads}")


def check_vae(where: str, config: Config) -> None:
    """Check an AutoencoderKL's config. Raises ModelError, naming the field."""
    _need(where, config, "block_out_channels")
    _whole(where, config, latent_channels=(1, 64), layers_per_block=(1, 16), norm_num_groups=(1, 256))
    _whole(where, config, in_channels=(3, 3), out_channels=(3, 3))
    _whole(where, config, may_be_null=True, sample_size=(1, 65_536))
    _number(where, config, scaling_factor=(1e-3, 1e3))
    _number(where, config, may_be_null=True, shift_factor=(-1e3, 1e3))
    for key, low in (("latents_mean", -1e3), ("latents_std", 1e-3)):
        values, channels = config.get(key), config.get("latent_channels", 4)
        if values is not None and not (
            isinstance(values, list) and len(values) == channels and all(_is_number(v, low, 1e3) for v in values)
        ):
            _refuse(where, key, values, f"it must be a list of {channels} numbers, {low:g} to 1000, or null")
    _flags(where, config, "use_quant_conv", "use_post_quant_conv", "mid_block_add_attention")
    _widths(where, config, 1, ("down_block_types", "up_block_types"))
    # What decode/rows.py would leave out, or do otherwise.
    for key, known in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        for kind in config.get(key, []):
            if kind != known:
                raise ModelError(f"{where}: {key} names {str(kind)[:60]!r}; tiler supports {known}")
    if config.get("act_fn", "silu") not in ("silu", "swish"):
        raise ModelError(f"{where}: act_fn = {str(config['act_fn'])[:60]!r} is not supported; tiler supports silu")


def check_tiny(where: str, config: Config) -> None:
    """Check an AutoencoderTiny's config. Raises ModelError, naming the field."""
    _whole(where, config, latent_channels=(1, 64), in_channels=(3, 3), out_channels=(3, 3))
    _number(where, config, scaling_factor=(1e-3, 1e3))
    for key in ("decoder_block_out_channels", "encoder_block_out_channels", "num_decoder_blocks", "num_encoder_blocks"):
        values = config.get(key, [64] * 4)
        if not isinstance(values, list) or len(values) != 4 or not all(_is_whole(v, 1, 1024) for v in values):
            _refuse(where, key, values, "four whole numbers, 1–1024")


def check_text(where: str, config: Config) -> None:
    """Check a CLIPTextModel's config. Raises ModelError, naming the field."""
    _need(where, config, "hidden_size")
    _whole(where, config, hidden_size=(1, 8192), vocab_size=(2, 1_000_000), intermediate_size=(1, 65_536))
    _whole(where, config, num_hidden_layers=(1, 128), num_attention_heads=(1, 128), max_position_embeddings=(2, 4096))
    _whole(where, config, may_be_null=True, projection_dim=(0, 65_536))
    _whole(
        where, config, may_be_null=True, bos_token_id=(-1, 10**6), eos_token_id=(-1, 10**6), pad_token_id=(-1, 10**6)
    )
    _number(where, config, layer_norm_eps=(1e-12, 0.1))
    heads = config.get("num_attention_heads", 8)
    if config["hidden_size"] % heads:
        _refuse(where, "hidden_size", config["hidden_size"], f"a multiple of num_attention_heads, {heads}")


def check_flux(where: str, config: Config) -> None:
    """Check a FluxTransformer2DModel's config. Raises ModelError, naming the field."""
    for key in ("num_attention_heads", "attention_head_dim", "joint_attention_dim", "pooled_projection_dim"):
        _need(where, config, key)
    _whole(where, config, num_attention_heads=(1, 256), attention_head_dim=(2, 1024), patch_size=(1, 1))
    _whole(where, config, num_layers=(0, 256), num_single_layers=(0, 256), in_channels=(1, 4096))
    _whole(where, config, joint_attention_dim=(1, 65_536), pooled_projection_dim=(1, 65_536))
    _whole(where, config, may_be_null=True, out_channels=(1, 4096), sample_size=(8, 4096))
    _flags(where, config, "guidance_embeds")
    axes, size = config.get("axes_dims_rope", [16, 56, 56]), config["attention_head_dim"]
    if not isinstance(axes, list) or len(axes) != 3 or not all(_is_whole(n, 2, 1024) and n % 2 == 0 for n in axes):
        _refuse(where, "axes_dims_rope", axes, "it must be three even numbers")
    if sum(axes) != size:
        _refuse(where, "axes_dims_rope", axes, f"together they must be attention_head_dim, {size}")


def check_t5(where: str, config: Config) -> None:
    """Check a T5EncoderModel's or UMT5EncoderModel's config. Raises ModelError, naming the field."""
    for key in ("d_model", "d_kv", "d_ff", "num_heads", "num_layers"):
        _need(where, config, key)
    _whole(where, config, d_model=(1, 16_384), d_kv=(1, 1024), d_ff=(1, 131_072), num_heads=(1, 256))
    _whole(where, config, num_layers=(1, 128), vocab_size=(2, 1_000_000))
    _whole(where, config, relative_attention_num_buckets=(4, 1024), relative_attention_max_distance=(2, 65_536))
    _number(where, config, layer_norm_epsilon=(1e-12, 0.1))


def _refuse(where: str, key: str, value: object, rule: str) -> NoReturn:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else shown[:60] + "…"
    raise ModelError(f"{where}: {key} = {shown} is out of range: {rule}. Correct this file or download it again")


def _need(where: str, config: Config, key: str) -> None:
    if key not in config:
        raise ModelError(f"{where}: {key!r} is missing; download it again")


def _is_whole(value: object, low: float, high: float) -> bool:
    return isinstance(value, int) and type(value) is not bool and low <= value <= high


def _is_number(value: object, low: float, high: float) -> bool:
    """Whether a value is a finite number: not a bool, a string, or the NaN and Infinity that Python's JSON reader
    accepts."""
    return isinstance(value, int | float) and type(value) is not bool and low <= value <= high


def _whole(where: str, config: Config, *, may_be_null: bool = False, **bounds: tuple[int, int]) -> None:
    _within(where, config, _is_whole, "a whole number", may_be_null, bounds)


def _number(where: str, config: Config, *, may_be_null: bool = False, **bounds: tuple[float, float]) -> None:
    _within(where, config, _is_number, "a number", may_be_null, bounds)


def _within(
    where: str,
    config: Config,
    test: Callable[[object, float, float], bool],
    kind: str,
    may_be_null: bool,
    bounds: Mapping[str, tuple[float, float]],
) -> None:
    for key, (low, high) in bounds.items():
        if key not in config or (may_be_null and config[key] is None):
            continue
        if not test(config[key], low, high):
            span = f"{low:g}" if low == high else f"{low:g} to {high:g}"
            _refuse(where, key, config[key], f"it must be {kind}, {span}" + (", or null" if may_be_null else ""))


def _flags(where: str, config: Config, *keys: str) -> None:
    """Check that fields are booleans: diffusers accepts anything that Python calls true, even the string "false"."""
    for key in keys:
        if key in config and config[key] is not None and type(config[key]) is not bool:
            _refuse(where, key, config[key], "it must be true or false")


def _widths(where: str, config: Config, default: int, kinds: tuple[str, ...]) -> int:
    """Check block_out_channels, and that the lists of block types are equally long; return the number of levels.
    `default` is the number of types that diffusers assumes for a missing list."""
    widths = config["block_out_channels"]
    if (
        not isinstance(widths, list)
        or not 1 <= len(widths) <= MAX_BLOCKS
        or not all(_is_whole(w, 1, 8192) for w in widths)
    ):
        _refuse(where, "block_out_channels", widths, f"it must be a list of 1 to {MAX_BLOCKS} whole numbers, 1–8192")
    groups = config.get("norm_num_groups", 32)
    if any(width % groups for width in widths):
        _refuse(where, "block_out_channels", widths, f"multiples of norm_num_groups, {groups}")
    for key in kinds:
        types = config.get(key, [""] * default)
        if not isinstance(types, list) or len(types) != len(widths) or not all(isinstance(t, str) for t in types):
            _refuse(where, key, types, f"it must be a list of {len(widths)} names, one for each of block_out_channels")
    return len(widths)


def _each(where: str, config: Config, levels: int, **bounds: tuple[int, int]) -> None:
    """Check fields that hold one number, or one for each level."""
    for key, (low, high) in bounds.items():
        if key not in config:
            continue
        value = config[key]
        values = value if isinstance(value, list) else [value] * levels
        if len(values) != levels or not all(_is_whole(v, low, high) for v in values):
            _refuse(where, key, value, f"it must be one whole number, {low}–{high}, or a list of {levels}")
