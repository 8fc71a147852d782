"""Places in files, against the values that diffusers' conversion functions make from the tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils as convert
from safetensors.torch import save_file

from tiler.errors import ModelError
from tiler.weights.index import read_index
from tiler.weights.names import converted
from tiler.weights.store import Piece, WeightStore


def numbered(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def same(tensors: dict[str, torch.Tensor], function: Callable[[dict[str, Any]], Any], folder: Path) -> int:
    """Assert that the map leads to the same tensors as `function`; return their number."""
    save_file(tensors, folder / "x.safetensors")
    expected = function(dict(tensors))
    found = converted(read_index(folder / "x.safetensors"), function)
    assert found.keys() == expected.keys()
    with WeightStore(found) as store:
        for name, tensor in expected.items():
            assert torch.equal(store.load(name).view_as(tensor), tensor), name
            rows = found[name].shape[0]
            out = torch.empty(found[name].shape)
            for first, last in ((0, rows // 2), (rows // 2, rows)):  # kernels read some of them at a time
                store.fetch(Piece(name, first, last), out[first:last])
            assert torch.equal(out.view_as(tensor), tensor), name
    return len(expected)


def test_fused_weights_of_flux(tmp_path: Path) -> None:
    """Queries, keys and values are rows of one tensor, and the halves of the last modulation are swapped."""
    d, into = 3072, 8
    names: dict[str, tuple[int, ...]] = {}
    for prefix in ("img", "txt"):
        names |= {
            f"double_blocks.0.{prefix}_attn.qkv.weight": (3 * d, 2),
            f"double_blocks.0.{prefix}_attn.qkv.bias": (3 * d,),
        }
        names |= {f"double_blocks.0.{prefix}_attn.norm.{kind}_norm.scale": (128,) for kind in ("query", "key")}
        for layer in ("attn.proj", "mlp.0", "mlp.2", "mod.lin"):
            names |= {
                f"double_blocks.0.{prefix}_{layer}.weight": (into, 2),
                f"double_blocks.0.{prefix}_{layer}.bias": (into,),
            }
    names |= {"single_blocks.0.linear1.weight": (7 * d, 2), "single_blocks.0.linear1.bias": (7 * d,)}
    names |= {f"single_blocks.0.norm.{kind}_norm.scale": (128,) for kind in ("query", "key")}
    layers = ["single_blocks.0.linear2", "single_blocks.0.modulation.lin", "img_in", "txt_in", "final_layer.linear"]
    layers += [
        "final_layer.adaLN_modulation.1",
        *(f"{n}_in.{layer}" for n in ("time", "vector") for layer in ("in_layer", "out_layer")),
    ]
    for layer in layers:
        names |= {f"{layer}.weight": (into, 2), f"{layer}.bias": (into,)}
    assert same(numbered(names), convert.convert_flux_transformer_checkpoint_to_diffusers, tmp_path) > 40


def test_fused_weights_of_open_clip(tmp_path: Path) -> None:
    prefix, d = "cond_stage_model.model.", 64
    names: dict[str, tuple[int, ...]] = {
        f"{prefix}token_embedding.weight": (100, d),
        f"{prefix}positional_embedding": (77, d),
    }
    names |= {f"{prefix}ln_final.weight": (d,), f"{prefix}ln_final.bias": (d,), f"{prefix}text_projection": (d, d)}
    for i in range(2):
        block = f"{prefix}transformer.resblocks.{i}."
        names |= {block + "attn.in_proj_weight": (3 * d, d), block + "attn.in_proj_bias": (3 * d,)}
        for layer in ("attn.out_proj", "ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj"):
            names |= {f"{block}{layer}.weight": (d, d), f"{block}{layer}.bias": (d,)}
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=d))
    assert same(numbered(names), lambda tensors: convert.convert_open_clip_checkpoint(model, tensors), tmp_path) == 36


def test_an_old_attention_of_convolutions_becomes_layers(tmp_path: Path) -> None:
    names: dict[str, tuple[int, ...]] = {}
    for layer in ("q", "k", "v", "proj_out"):
        names |= {f"first_stage_model.decoder.mid.attn_1.{layer}.weight": (8, 8, 1, 1)}
        names |= {f"first_stage_model.decoder.mid.attn_1.{layer}.bias": (8,)}
    config = {"down_block_types": ["x"] * 4, "up_block_types": ["x"] * 4}
    assert same(numbered(names), lambda tensors: convert.convert_ldm_vae_checkpoint(tensors, config), tmp_path) == 8


def test_names_of_another_model_are_told(tmp_path: Path) -> None:
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(6, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match="not those of the model it seems to be"):
        converted(read_index(tmp_path / "x.safetensors"), convert.convert_flux_transformer_checkpoint_to_diffusers)
