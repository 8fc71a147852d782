"""Weights changed by LoRA files, read row by row, against closed formulas in float64; files that cannot be applied."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.loras import as_kohya, kohya, save
from tiler.errors import ModelError, NumericalError
from tiler.models import family as families
from tiler.models.built import Models
from tiler.models.family import Part, Role
from tiler.models.lora_names import names_of_modules
from tiler.models.loras import Applied, apply_loras
from tiler.request.loras import Lora
from tiler.weights import checkpoint
from tiler.weights.changes import Change
from tiler.weights.index import read_index
from tiler.weights.lora_keys import Kind, Slot
from tiler.weights.store import Piece, WeightStore, match_index

LINEAR = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
WIDE = "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj"
CONV = "up_blocks.0.resnets.0.conv1"
POINT = "up_blocks.0.resnets.0.conv_shortcut"
DOWN = "down_blocks.0.downsamplers.0.conv"
NORM = "mid_block.attentions.0.norm"


@pytest.fixture(scope="module")
def models(tiny: Path) -> Models:
    return Models(families.read_family(checkpoint.resolve(str(tiny))))


@pytest.fixture(scope="module")
def weights(models: Models) -> dict[str, Tensor]:
    """The UNet's weights in float64."""
    with WeightStore(index_of(models)) as store:
        return {name: store.load(name).double() for name in store.index}


def denoiser(models: Models) -> Part:
    return models.family.part(Role.DENOISER)


def index_of(models: Models) -> dict[str, Any]:
    part = denoiser(models)
    return match_index(models.module(part), models.family.checkpoint.weights(part.name), part.aliases)


def applied(models: Models, *files: Path, strength: float = 1.0) -> Applied:
    return apply_loras([Lora(file=file, strength=strength, text_strength=strength) for file in files], models)


def merged(models: Models, some: Applied, name: str, rows: int | None = None) -> Tensor:
    """A changed parameter, read as a whole or some rows at a time."""
    with WeightStore(index_of(models), changes=some.of("unet")) as store:
        if rows is None:
            return store.load(name)
        shape = store.index[name].shape
        out = torch.empty(shape)
        for first in range(0, shape[0], rows):
            last = min(first + rows, shape[0])
            store.fetch(Piece(name, first, last), out[first:last])
        return out


def close(got: Tensor, want: Tensor) -> bool:
    return bool((got.double() - want).norm() <= 1e-6 * want.norm())


torch_random = Callable[..., Tensor]


def draw(seed: int) -> torch_random:
    generator = torch.Generator().manual_seed(seed)
    return lambda *sides: 0.3 * torch.randn(*sides, generator=generator)


def sides_of(weights: Mapping[str, Tensor], path: str) -> tuple[int, int, list[int]]:
    out, inputs, *taps = weights[f"{path}.weight"].shape
    return out, inputs, taps


Made = tuple[dict[str, Tensor], Tensor]
"""A file's tensors by slot, and the difference (out, in, *taps) in float64, alpha counted."""


def lora(out: int, inputs: int, taps: list[int]) -> Made:
    new, alpha, rank = draw(1), 1.5, 4
    down, up = new(rank, inputs, *taps), new(out, rank, *(1 for _ in taps))
    delta = alpha / rank * up.double().flatten(1) @ down.double().flatten(1)
    tensors = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(alpha)}
    return tensors, delta.view(out, inputs, *taps)


def lora_tucker(out: int, inputs: int, taps: list[int]) -> Made:
    new, alpha, rank = draw(2), 3.0, 4
    down, mid, up = new(rank, inputs, 1, 1), new(rank, rank, *taps), new(out, rank, 1, 1)
    delta = torch.einsum("om,mnhw,nj->ojhw", up.double()[..., 0, 0], mid.double(), down.double()[..., 0, 0])
    tensors = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up, "alpha": torch.tensor(alpha)}
    return tensors, alpha / rank * delta


def loha(out: int, inputs: int, taps: list[int]) -> Made:
    new, alpha, rank, row = draw(3), 2.0, 3, inputs * math.prod(taps)
    w1a, w1b, w2a, w2b = new(out, rank), new(rank, row), new(out, rank), new(rank, row)
    delta = (w1a.double() @ w1b.double()) * (w2a.double() @ w2b.double()) * alpha / rank
    tensors = {"hada_w1_a": w1a, "hada_w1_b": w1b, "hada_w2_a": w2a, "hada_w2_b": w2b, "alpha": torch.tensor(alpha)}
    return tensors, delta.view(out, inputs, *taps)


def loha_tucker(out: int, inputs: int, taps: list[int]) -> Made:
    new, alpha, rank = draw(4), 2.0, 3
    halves = [(new(rank, rank, *taps), new(rank, out), new(rank, inputs)) for _ in range(2)]
    first, second = (torch.einsum("ijhw,io,jn->onhw", t.double(), a.double(), b.double()) for t, a, b in halves)
    tensors = {"alpha": torch.tensor(alpha)}
    for number, (t, a, b) in enumerate(halves, 1):
        tensors |= {f"hada_t{number}": t, f"hada_w{number}_a": a, f"hada_w{number}_b": b}
    return tensors, first * second * alpha / rank


def lokr(out: int, inputs: int, taps: list[int], factored: str = "") -> Made:
    """`factored`: "" for two complete matrices, "w2", "w1 w2", or "t2" with Tucker's core."""
    new, alpha, rank, ones = draw(5), 1.0, 2, [1 for _ in taps]
    (p, q), (r, s) = (4, 2), (out // 4, inputs // 2)
    tensors, scale = {"alpha": torch.tensor(alpha)}, 1.0
    if "w1" in factored:
        a, b = new(p, rank), new(rank, q)
        tensors, w1 = tensors | {"lokr_w1_a": a, "lokr_w1_b": b}, a.double() @ b.double()
    else:
        tensors["lokr_w1"] = new(p, q)
        w1 = tensors["lokr_w1"].double()
    if "t2" in factored:
        core, a, b = new(rank, rank, *taps), new(rank, r), new(rank, s)
        tensors |= {"lokr_t2": core, "lokr_w2_a": a, "lokr_w2_b": b}
        w2 = torch.einsum("ijhw,io,jn->onhw", core.double(), a.double(), b.double())
    elif "w2" in factored:
        a, b = new(r, rank), new(rank, s, *taps)
        tensors |= {"lokr_w2_a": a, "lokr_w2_b": b}
        w2 = (a.double() @ b.double().flatten(1)).view(r, s, *taps)
    else:
        tensors["lokr_w2"] = new(r, s, *taps)
        w2 = tensors["lokr_w2"].double()
    if factored:
        scale = alpha / rank
    return tensors, scale * torch.kron(w1.view(p, q, *ones), w2.contiguous())


def full(out: int, inputs: int, taps: list[int]) -> Made:
    diff = draw(6)(out, inputs, *taps)
    return {"diff": diff}, diff.double()


KINDS: Mapping[str, tuple[Callable[[int, int, list[int]], Made], tuple[str, ...]]] = {
    "LoRA": (lora, (LINEAR, WIDE, CONV, POINT, DOWN)),
    "Tucker": (lora_tucker, (CONV,)),
    "LoHa": (loha, (WIDE, CONV)),
    "LoHa, Tucker": (loha_tucker, (CONV,)),
    "LoKr": (lokr, (WIDE, CONV)),
    "LoKr, w2 factored": (partial(lokr, factored="w2"), (WIDE, CONV)),
    "LoKr, both factored": (partial(lokr, factored="w1 w2"), (WIDE, CONV)),
    "LoKr, Tucker": (partial(lokr, factored="t2"), (CONV,)),
    "full": (full, (LINEAR, CONV)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dora", [None, "of rows", "of inputs"])
def test_every_kind_is_added_as_its_formula_says(
    models: Models, weights: dict[str, Tensor], tmp_path: Path, kind: str, dora: str | None
) -> None:
    make, paths = KINDS[kind]
    strength = 0.7 if dora is None else 0.6
    for path in paths:
        out, inputs, taps = sides_of(weights, path)
        tensors, delta = make(out, inputs, taps)
        weight = weights[f"{path}.weight"]
        want = weight + strength * delta
        if dora is not None:
            changed, axis = weight + delta, 0 if dora == "of rows" else 1
            others = tuple(i for i in range(weight.ndim) if i != axis)
            scale = 0.5 + draw(7)(*(n if i == axis else 1 for i, n in enumerate(weight.shape))).abs()
            tensors["dora_scale"] = scale
            turned = changed * scale.double() / changed.square().sum(others, keepdim=True).sqrt()
            want = weight + strength * (turned - weight)
        name = kohya("lora_unet", path)
        file = save(tmp_path / "x.safetensors", {f"{name}.{slot}": tensor for slot, tensor in tensors.items()})
        some = applied(models, file, strength=strength)
        assert close(merged(models, some, f"{path}.weight"), want), path
        assert close(merged(models, some, f"{path}.weight", rows=32), want), path
        assert not some.notes


def test_norms_and_biases_are_changed(models: Models, weights: dict[str, Tensor], tmp_path: Path) -> None:
    new, count = draw(8), len(weights[f"{NORM}.weight"])
    tensors = {f"{kohya('lora_unet', NORM)}.w_norm": new(count), f"{kohya('lora_unet', NORM)}.b_norm": new(count)}
    some = applied(models, save(tmp_path / "x.safetensors", tensors), strength=0.5)
    for parameter, tensor in zip(("weight", "bias"), tensors.values(), strict=True):
        want = weights[f"{NORM}.{parameter}"] + 0.5 * tensor.double()
        assert close(merged(models, some, f"{NORM}.{parameter}"), want)


def test_several_files_add_up_and_rows_do_not_depend_on_cuts(
    models: Models, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    files, want = [], weights[f"{WIDE}.weight"].clone()
    for number, make in enumerate((lora, loha, lora)):
        tensors, delta = make(*sides_of(weights, WIDE))
        named = {f"{kohya('lora_unet', WIDE)}.{slot}": tensor for slot, tensor in tensors.items()}
        files.append(save(tmp_path / f"{number}.safetensors", named))
        want += 0.5 * delta
    some = applied(models, *files, strength=0.5)
    got = merged(models, some, f"{WIDE}.weight")
    assert close(got, want)
    for rows in (32, 64, 96):
        assert torch.equal(merged(models, some, f"{WIDE}.weight", rows=rows), got)


@pytest.mark.parametrize("inputs", [36, 40])
def test_threads_change_no_bit_of_narrow_weights(tmp_path: Path, inputs: int) -> None:
    new, before, got = draw(10), torch.get_num_threads(), []
    index = read_index(save(tmp_path / "w.safetensors", {"w": new(1280, inputs)}))
    factors = read_index(save(tmp_path / "x.safetensors", {"down": new(16, inputs), "up": new(1280, 16)}))
    change = Change(
        kind=Kind.LORA, tensors={Slot.DOWN: factors["down"], Slot.UP: factors["up"]}, scale=1, strength=1, first=0,
        rows=1280,
    )  # fmt: skip
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            with WeightStore(index, changes={"w": [change]}) as store:
                got.append(store.load("w"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, got[0]) for one in got)


SPELLINGS: Mapping[str, Callable[[str, Tensor, Tensor], dict[str, Tensor]]] = {
    "PEFT": lambda path, down, up: {f"unet.{path}.lora_A.weight": down, f"unet.{path}.lora_B.weight": up},
    "PEFT's own": lambda path, down, up: {
        f"base_model.model.{path}.lora_A.default.weight": down, f"base_model.model.{path}.lora_B.default.weight": up
    },
    "diffusers": lambda path, down, up: {f"unet.{path}.lora.down.weight": down, f"unet.{path}.lora.up.weight": up},
    "diffusers, old": lambda path, down, up: {
        f"unet.{path.replace('.to_', '.processor.to_')}_lora.down.weight": down,
        f"unet.{path.replace('.to_', '.processor.to_')}_lora.up.weight": up,
    },
    "LyCORIS": lambda path, down, up: {
        f"{kohya('lycoris', path)}.lora_down.weight": down, f"{kohya('lycoris', path)}.lora_up.weight": up
    },
    "LDM": lambda path, down, up: {
        "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.lora_down.weight": down,
        "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.lora_up.weight": up,
    },
    "LDM, dotted": lambda path, down, up: {
        "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.lora_A.weight": down,
        "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.lora_B.weight": up,
    },
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_the_same_lora(
    models: Models, weights: dict[str, Tensor], tmp_path: Path, spelling: str
) -> None:
    ((path, (down, up)),) = random_lora_of(weights, LINEAR).items()
    file = save(tmp_path / "x.safetensors", SPELLINGS[spelling](path, down, up))
    got = merged(models, applied(models, file), f"{path}.weight")
    assert close(got, weights[f"{path}.weight"] + up.double() @ down.double())


def random_lora_of(weights: Mapping[str, Tensor], path: str) -> dict[str, tuple[Tensor, Tensor]]:
    out, inputs, _ = sides_of(weights, path)
    new = draw(9)
    return {path: (new(4, inputs), new(out, 4))}


def test_ldm_names_are_those_of_diffusers_own_conversion(models: Models) -> None:
    """diffusers converts a checkpoint with these names into exactly the modules that they stand for here."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    part = denoiser(models)
    module, prefix = models.module(part), "model.diffusion_model."
    ldm = {
        name.removeprefix(prefix): target.module
        for name, (target, *_) in names_of_modules(models).items()
        if name.startswith(
            (f"{prefix}input_blocks", f"{prefix}middle_block", f"{prefix}output_blocks", f"{prefix}out.")
        )
        or name.startswith(f"{prefix}time_embed.")
    }
    real = [
        name
        for name in ldm
        if not (name.startswith("input_blocks") and name.endswith("0.conv")) and "processor" not in name
    ]
    stand_ins = {f"{prefix}{name}.weight": torch.full((1,), float(i)) for i, name in enumerate(real)}
    biases = {name.replace(".weight", ".bias"): torch.zeros(1) for name in stand_ins}
    back = convert_ldm_unet_checkpoint(biases | stand_ins, dict(module.config))
    by_value = {int(value): name for name, value in back.items() if name.endswith(".weight")}
    for i, name in enumerate(real):
        assert by_value[i] == f"{ldm[name]}.weight", name
    assert len(stand_ins) > 100


def test_alpha_comes_from_the_header_where_no_tensor_has_it(
    models: Models, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    ((path, (down, up)),) = random_lora_of(weights, LINEAR).items()
    tensors, delta = SPELLINGS["PEFT"](path, down, up), up.double() @ down.double()
    for said, scale in (
        ({"unet.lora_alpha": "8", "unet.r": "4"}, 2.0),
        ({"lora_adapter_metadata": '{"unet.lora_alpha": 8, "unet.r": 4, "unet.use_rslora": true}'}, 4.0),
        ({"lora_adapter_metadata": '{"unet.lora_alpha": 8, "unet.alpha_pattern": {"attn1.to_q": 4}}'}, 1.0),
        ({"lora_adapter_metadata": "no json"}, 1.0),
        ({"lora_adapter_metadata": "[" * 100_000}, 1.0),
        ({"lora_adapter_metadata": '{"unet.lora_alpha": NaN, "unet.alpha_pattern": {"attn1.to_q": null}}'}, 1.0),
        ({"lora_adapter_metadata": '{"unet.alpha_pattern": {"attn1.to_q": "much"}}'}, 1.0),
        ({"unet.lora_alpha": "inf"}, 1.0),
    ):
        some = applied(models, save(tmp_path / "x.safetensors", tensors, **said))
        assert close(merged(models, some, f"{path}.weight"), weights[f"{path}.weight"] + scale * delta)


def test_alpha_0_and_rank_0_change_nothing_and_are_told(models: Models, tmp_path: Path) -> None:
    for rank, alpha in ((2, 0.0), (0, 1.0)):
        down, up = torch.ones(rank, 32), torch.ones(32, rank)
        tensors = as_kohya("lora_unet", {LINEAR: (down, up)}, alpha)
        some = applied(models, save(tmp_path / "x.safetensors", tensors))
        assert not some.of("unet")
        assert "change nothing" in some.notes[0]


def test_ranks_dtypes_and_sides_may_differ_by_layer(models: Models, weights: dict[str, Tensor], tmp_path: Path) -> None:
    """fp32 beside bf16, a different rank in each layer, a 1×1 convolution whose factors have two dimensions, no
    alpha."""
    new, tensors, want = draw(11), dict[str, Tensor](), dict[str, Tensor]()
    for rank, (path, dtype) in enumerate(((LINEAR, torch.float32), (WIDE, torch.bfloat16), (POINT, torch.float16)), 1):
        out, inputs, taps = sides_of(weights, path)
        down, up = new(rank, inputs).to(dtype), new(out, rank)
        name = kohya("lora_unet", path)
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        want[path] = weights[f"{path}.weight"] + (up.double() @ down.double()).view(out, inputs, *taps)
    some = applied(models, save(tmp_path / "x.safetensors", tensors))
    assert not some.notes
    for path, weight in want.items():
        assert close(merged(models, some, f"{path}.weight"), weight), path


def test_what_matches_nothing_is_named(models: Models, weights: dict[str, Tensor], tmp_path: Path) -> None:
    tensors = as_kohya("lora_unet", random_lora_of(weights, LINEAR), 1)
    tensors |= {k.replace("down_blocks_0", "down_blocks_9"): v.clone() for k, v in tensors.items()} | {
        "x": torch.ones(1)
    }
    notes = applied(models, save(tmp_path / "x.safetensors", tensors)).notes
    assert "1 of 2 modules applied; this model has no lora_unet_down_blocks_9" in notes[0]
    assert notes[1] == "x.safetensors: 1 keys are not read: x"


TO_K = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


def pair(name: str, rank: int = 2, inputs: int = 32, out: int = 32) -> dict[str, Tensor]:
    return {f"{name}.lora_down.weight": torch.ones(rank, inputs), f"{name}.lora_up.weight": torch.ones(out, rank)}


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        (pair(TO_K, inputs=2048), "this is a LoRA of Stable Diffusion XL"),
        (pair("lora_unet_double_blocks_0_img_attn_qkv"), "this is a LoRA of Flux"),
        (pair("transformer.joint_transformer_blocks.0.attn.to_q"), "this is a LoRA of AuraFlow"),
        (pair("something"), "this is a LoRA, but no name in it is one of Stable Diffusion .*; the first is 'something'"),
        (pair(kohya("lora_unet", LINEAR), inputs=31), "changes a weight of 32 × 31, this model's has 32 × 32"),
        ({f"{TO_K}.lora_down.weight": torch.ones(2, 32)}, "has only down"),
        ({f"{TO_K}.lora_down.weight": torch.ones(2, 32), f"{TO_K}.lora_up.weight": torch.ones(32, 3)}, "do not go together"),
        ({f"{TO_K}.on_input": torch.ones(1), f"{TO_K}.weight": torch.ones(32)}, "IA³"),
        ({f"{TO_K}.oft_blocks": torch.ones(4, 8, 8)}, "OFT"),
        ({f"{TO_K}.a1.weight": torch.ones(4, 8)}, "GLoRA"),
        ({"double_blocks.0.processor.qkv_lora1.down.weight": torch.ones(4, 8)}, "XLabs"),
        ({"emb_params": torch.ones(2, 32)}, "a textual inversion embedding"),
        ({"x": torch.ones(2)}, "none of its keys is a LoRA's"),
        (pair(TO_K) | {f"{TO_K}.alpha": torch.ones(3)}, "no single number"),
        (pair(TO_K) | {f"{TO_K}.dora_scale": torch.ones(32)}, "which does not say of which side"),
        (pair(TO_K) | {f"{TO_K}.lora_A.weight": torch.ones(2, 32)}, "the file holds two LoRAs"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_applied(models: Models, tmp_path: Path, tensors: dict[str, Tensor], says: str) -> None:
    with pytest.raises(ModelError, match=says):
        applied(models, save(tmp_path / "x.safetensors", tensors))


def test_nan_names_file_and_key(models: Models, weights: dict[str, Tensor], tmp_path: Path) -> None:
    tensors = as_kohya("lora_unet", random_lora_of(weights, LINEAR), 1)
    key = next(name for name in tensors if name.endswith("lora_up.weight"))
    tensors[key][0, 0] = torch.nan
    some = applied(models, save(tmp_path / "x.safetensors", tensors))
    with pytest.raises(NumericalError, match=rf"x\.safetensors: tensor '{key}' holds NaN"):
        merged(models, some, f"{LINEAR}.weight")
