"""Impossible numbers in configs are refused before any work, with the name of the field."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tiler.errors import ModelError
from tiler.models import bounds, family
from tiler.weights.checkpoint import resolve

HUGE = 4 * 10**8
NONE_OF_THEM: dict[str, list[Any]] = {
    "number": [None, "1e-5", True, [1], {}, float("nan"), float("inf"), -float("inf"), 10**400],
    "whole": [None, "4", True, False, 4.0, -4, 0, HUGE, 10**400, [4], {}, float("nan")],
    "flag": ["false", "true", 0, 1, [], "no"],
}
UNET = {
    "in_channels": "whole", "out_channels": "whole", "cross_attention_dim": "whole", "sample_size": "whole",
    "norm_num_groups": "whole", "conv_in_kernel": "whole", "conv_out_kernel": "whole", "norm_eps": "number",
    "freq_shift": "number", "resnet_out_scale_factor": "number", "mid_block_scale_factor": "number",
    "flip_sin_to_cos": "flag", "use_linear_projection": "flag", "upcast_attention": "flag",
}  # fmt: skip
VAE = {
    "latent_channels": "whole", "layers_per_block": "whole", "norm_num_groups": "whole", "in_channels": "whole",
    "out_channels": "whole", "scaling_factor": "number", "use_quant_conv": "flag", "use_post_quant_conv": "flag",
    "mid_block_add_attention": "flag",
}  # fmt: skip
TEXT = {
    "hidden_size": "whole", "vocab_size": "whole", "intermediate_size": "whole", "num_hidden_layers": "whole",
    "num_attention_heads": "whole", "max_position_embeddings": "whole", "layer_norm_eps": "number",
}  # fmt: skip
LISTS: list[Any] = [
    None,
    5,
    "320",
    [],
    [32] * 17,
    [32, 64, 0, 64],
    [32, 64, -64, 64],
    [32, 64, 64.0, 64],
    [32, 64, "64", 64],
    [32, 64, True, 64],
    [32, 64, 10**9, 64],
    [32, 64, None, 64],
    [[32], 64, 64, 64],
]
CASES = [
    *(("unet", key, value) for key, kind in UNET.items() for value in NONE_OF_THEM[kind]),
    *(("vae", key, value) for key, kind in VAE.items() for value in NONE_OF_THEM[kind]),
    *(("text_encoder", key, value) for key, kind in TEXT.items() for value in NONE_OF_THEM[kind]),
    *(("unet", "block_out_channels", value) for value in LISTS),
    *(("vae", "block_out_channels", value) for value in LISTS),
    *(("unet", key, value) for key in ("layers_per_block", "attention_head_dim", "transformer_layers_per_block")
      for value in [None, "2", 0, -1, 2.0, True, HUGE, [], [2], [2] * 5, [2, 2, 0], [2, 2, "2"], [[2], 2, 2]]),
    *((part, key, value) for part in ("unet", "vae") for key in ("down_block_types", "up_block_types")
      for value in [None, [], "DownBlock2D", ["DownBlock2D"], [["DownBlock2D"]] * 3, [1, 2, 3], [None] * 4]),
    *(("vae", "scaling_factor", value) for value in [0, 0.0, -0.18215, 1e-30, 1e30]),
    *(("vae", "shift_factor", value) for value in ["0", True, float("nan"), 1e30, [0.1]]),
    *(("unet", "norm_eps", value) for value in [0, -1e-5, 1, 5.0]),
    *(("unet", key, value) for key in ("resnet_out_scale_factor", "mid_block_scale_factor") for value in [0, -1, 1e9]),
    *(("vae", "out_channels", value) for value in [1, 4, 8]),
    *(("unet", "out_channels", value) for value in [1, 3, 8]),
    *(("unet", key, value) for key in ("conv_in_kernel", "conv_out_kernel") for value in [2, 4, 11]),
    ("unet", "num_attention_heads", "8"), ("unet", "addition_time_embed_dim", "8"),
    ("unet", "time_cond_proj_dim", 1),
    ("unet", "projection_class_embeddings_input_dim", -1),
    *(("vae", key, value) for key in ("latents_mean", "latents_std")
      for value in [0.5, "0", [], [1.0], [1.0] * 5, [1.0, 1.0, 1.0, None], [1.0, 1.0, 1.0, float("nan")]]),
    ("vae", "latents_std", [1.0, 1.0, 1.0, 0.0]),
    ("unet", "norm_num_groups", 5), ("vae", "norm_num_groups", 3), ("text_encoder", "num_attention_heads", 3),
]  # fmt: skip


@pytest.fixture(scope="module")
def configs(tiny: Path) -> dict[str, dict[str, Any]]:
    return {part: json.loads((tiny / part / "config.json").read_text()) for part in ("unet", "vae", "text_encoder")}


def check(part: str, config: dict[str, Any]) -> None:
    checks: dict[str, Callable[[str, dict[str, Any]], None]] = {
        "unet": bounds.check_unet, "vae": bounds.check_vae, "text_encoder": bounds.check_text,
    }  # fmt: skip
    checks[part]("folder/config.json", config)
    if part == "unet":
        bounds.check_prediction("folder/config.json", config)


@pytest.mark.parametrize(("part", "key", "value"), CASES, ids=lambda x: str(x)[:30])
def test_a_field_is_blamed(configs: dict[str, dict[str, Any]], part: str, key: str, value: object) -> None:
    config = json.loads(json.dumps(configs[part] | {key: value}))  # as it comes out of a file
    blamed = {
        "norm_num_groups": "(norm_num_groups|block_out_channels)",
        "num_attention_heads": "(num_attention_heads|hidden_size)",
        "in_channels": "(in_channels|out_channels)",
    }.get(key, key)
    with pytest.raises(ModelError, match=rf"^folder/config\.json: {blamed} ") as caught:
        check(part, config)
    assert len(str(caught.value)) < 300
    assert "weights" not in str(caught.value)


def test_what_published_models_say_is_taken(configs: dict[str, dict[str, Any]]) -> None:
    import make_checkpoint

    for kind in ("tiny", "tiny-sd2", "sd15", "sd21"):
        for part in configs:
            check(part, make_checkpoint.configs(kind)[part])
    family.read_family(resolve("mini"))
    for part, fields in (
        ("unet", {"upcast_attention": None, "num_attention_heads": None, "time_embedding_dim": None, "norm_eps": 1e-6}),
        ("unet", {"layers_per_block": [2, 2, 2], "transformer_layers_per_block": [1, 1, 1], "freq_shift": 1}),
        ("vae", {"shift_factor": None, "scaling_factor": 1, "act_fn": "swish"}),
        ("vae", {"shift_factor": 0.0609, "scaling_factor": 1.5305, "sample_size": None}),
        ("text_encoder", {"layer_norm_eps": 1e-6, "projection_dim": None}),
    ):
        check(part, configs[part] | fields)


def test_fields_that_may_be_left_out(configs: dict[str, dict[str, Any]]) -> None:
    for part, needed in (
        ("unet", "block_out_channels"),
        ("vae", "block_out_channels"),
        ("text_encoder", "hidden_size"),
    ):
        with pytest.raises(ModelError, match=f"'{needed}' is missing"):
            check(part, {key: value for key, value in configs[part].items() if key != needed})
    lists = {"block_out_channels": [32, 64, 64, 64]}
    check("unet", lists)
    check("vae", configs["vae"] | {"scaling_factor": 0.5} | lists)
    with pytest.raises(ModelError, match="down_block_types"):
        check("vae", lists | {"norm_num_groups": 4})  # diffusers' own default is a single block


@pytest.mark.parametrize(
    ("key", "value"), [("scaling_factor", 0), ("scaling_factor", None), ("num_decoder_blocks", 3), ("decoder_block_out_channels", [64] * 5),
                       ("num_encoder_blocks", [1, 3, 3, 0]), ("latent_channels", "4")],
)  # fmt: skip
def test_a_tiny_autoencoders_numbers(key: str, value: object) -> None:
    with pytest.raises(ModelError, match=f"config.json: {key} "):
        bounds.check_tiny("config.json", {key: value})


@pytest.mark.parametrize("kind", ["AttnUpDecoderBlock2D", "os.system"])
def test_an_autoencoder_of_other_blocks_is_refused(configs: dict[str, dict[str, Any]], kind: str) -> None:
    with pytest.raises(ModelError, match=f"up_block_types names '{kind}'"):
        check("vae", configs["vae"] | {"up_block_types": ["UpDecoderBlock2D"] * 3 + [kind]})
    with pytest.raises(ModelError, match="act_fn = 'relu'"):
        check("vae", configs["vae"] | {"act_fn": "relu"})


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("vae", "scaling_factor", 0),
        ("unet", "out_channels", 8),
        ("unet", "norm_eps", "1e-5"),
        ("unet", "mid_block_type", ["UNetMidBlock2DCrossAttn"]),
        ("unet", "num_class_embeds", 10),
        ("unet", "cross_attention_norm", "group_norm"),
        ("text_encoder", "num_hidden_layers", -1),
    ],
)
def test_a_checkpoint_is_refused_before_work(tiny: Path, tmp_path: Path, part: str, key: str, value: object) -> None:
    shutil.copytree(tiny, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    path = tmp_path / "model" / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    blamed = "UNetMidBlock2DCrossAttn" if key == "mid_block_type" else key
    with pytest.raises(ModelError, match=rf"{part}/config\.json: .*{blamed}") as caught:
        family.read_family(resolve(str(tmp_path / "model")))
    assert caught.value.exit_code == 3
