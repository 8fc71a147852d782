"""Files as LyCORIS writes them, against the weights that LyCORIS merges."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris.modules.full import FullModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from torch import Tensor, nn

from tests.models.loras import kohya, save
from tiler.errors import ModelError
from tiler.models import family as families
from tiler.models.built import Models
from tiler.models.family import Role
from tiler.models.loras import apply_loras
from tiler.request.loras import Lora
from tiler.weights import checkpoint
from tiler.weights.store import WeightStore, match_index

LINEAR = "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj"
CONV = "up_blocks.0.resnets.0.conv1"
POINT = "up_blocks.0.resnets.0.conv_shortcut"
NORM = "mid_block.attentions.0.norm"

# The kind, the layers that can be of it, and what LyCORIS is told.
KINDS: dict[str, tuple[Any, tuple[str, ...], dict[str, Any]]] = {
    "LoRA": (LoConModule, (LINEAR,), {}),
    "LoCon": (LoConModule, (CONV, POINT), {}),
    "LoCon, rs": (LoConModule, (LINEAR, CONV), {"rs_lora": True}),
    "LoCon, Tucker": (LoConModule, (CONV,), {"use_tucker": True}),
    "LoHa": (LohaModule, (LINEAR, CONV, POINT), {}),
    "LoHa, Tucker": (LohaModule, (CONV,), {"use_tucker": True}),
    "LoKr": (LokrModule, (LINEAR, CONV, POINT), {}),
    "LoKr, whole": (LokrModule, (LINEAR, CONV), {"full_matrix": True}),
    "LoKr, both factored": (LokrModule, (LINEAR, CONV), {"decompose_both": True, "factor": 8, "lora_dim": 1}),
    "LoKr, Tucker": (LokrModule, (CONV,), {"use_tucker": True, "lora_dim": 2}),
}
# 4.1.3 merges LoHa and LoKr with alpha / rank squared, where its layers compute with alpha / rank: of the two below the
# first has them with 1 alone, the second with both.
SQUARED = LohaModule, LokrModule
DORA = {"": {}, "rows": {"weight_decompose": True}, "inputs": {"weight_decompose": True, "wd_on_out": False}}


@pytest.fixture(scope="module")
def models(tiny: Path) -> Models:
    return Models(families.read_family(checkpoint.resolve(str(tiny))))


def stored(models: Models, loras: tuple[Lora, ...], name: str) -> Tensor:
    """A parameter of the UNet as a render reads it."""
    part = models.family.part(Role.DENOISER)
    index = match_index(models.module(part), models.family.checkpoint.weights(part.name), part.aliases)
    with WeightStore(index, changes=apply_loras(loras, models).of(part.name)) as store:
        return store.load(name)


def layer(models: Models, path: str) -> Any:
    """The layer that holds the weights."""
    module: Any = models.module(models.family.part(Role.DENOISER)).get_submodule(path)
    values = {name: stored(models, (), f"{path}.{name}") for name, _ in module.named_parameters()}
    there = copy.deepcopy(module).to_empty(device="cpu")
    there.load_state_dict(values)
    return there.requires_grad_(False)


def trained(kind: Any, path: str, org: nn.Module, told: dict[str, Any]) -> Any:
    """A LyCORIS module in which every parameter differs from its initial value."""
    made = kind(kohya("lora_unet", path), org, **{"lora_dim": 4, "alpha": 3} | told)
    if kind is FullModule:
        made.apply_to()  # else its file would be made of weights that it does not have
    generator = torch.Generator().manual_seed(len(path))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name == "dora_scale":
                parameter.mul_(0.5 + torch.rand(parameter.shape, generator=generator))
            else:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return made


def file_of(made: Any, folder: Path) -> Path:
    said = made.custom_state_dict() or made.state_dict()
    return save(folder / "x.safetensors", {f"{made.lora_name}.{key}": t.detach() for key, t in said.items()})


@pytest.mark.parametrize("dora", DORA)
@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_are_lycoris_own(models: Models, tmp_path: Path, kind: str, dora: str) -> None:
    """DoRA is tested at strength 1, at which all programs agree."""
    module, paths, told = KINDS[kind]
    if module in SQUARED:
        told = told | {"alpha": told.get("lora_dim", 4)}
    for path in paths:
        org = layer(models, path)
        made = trained(module, path, org, told | DORA[dora])
        assert not dora or hasattr(made, "dora_scale")
        file = file_of(made, tmp_path)
        for strength in (1.0,) if dora else (1.0, -0.4):
            want = made.get_merged_weight(strength, org.weight.shape)[0].detach()
            got = stored(models, (Lora(file=file, strength=strength),), f"{path}.weight")
            assert (got - want).norm() <= 1e-6 * want.norm(), path
            assert (want - org.weight).norm() > 0.01 * want.norm()


@pytest.mark.parametrize("dora", DORA)
@pytest.mark.parametrize("kind", [kind for kind, (_, paths, _) in KINDS.items() if LINEAR in paths])
def test_layers_compute_what_lycoris_own_do(models: Models, tmp_path: Path, kind: str, dora: str) -> None:
    module, _, told = KINDS[kind]
    made = trained(module, LINEAR, org := layer(models, LINEAR), told | DORA[dora])
    file = file_of(made, tmp_path)
    made.apply_to()
    x = torch.randn(20, org.in_features, generator=torch.Generator().manual_seed(0))
    weight, bias = (stored(models, (Lora(file=file),), f"{LINEAR}.{name}") for name in ("weight", "bias"))
    want = org(x).detach()
    assert (nn.functional.linear(x, weight, bias) - want).norm() <= 1e-6 * want.norm()


@pytest.mark.parametrize(("kind", "path"), [(FullModule, LINEAR), (FullModule, CONV), (NormModule, NORM)])
def test_whole_differences_are_lycoris_own(models: Models, tmp_path: Path, kind: Any, path: str) -> None:
    org = layer(models, path)
    before = {name: tensor.clone() for name, tensor in org.state_dict().items()}
    made = trained(kind, path, org, {})
    file = file_of(made, tmp_path)
    for name, want in zip(("weight", "bias"), made.get_merged_weight(1.0), strict=True):
        got = stored(models, (Lora(file=file),), f"{path}.{name}")
        assert (got - want).norm() <= 1e-6 * want.norm()
        assert (want - before[name]).norm() > 0.1 * want.norm()


def test_ia3_as_lycoris_writes_it_is_refused(models: Models, tmp_path: Path) -> None:
    file = file_of(trained(IA3Module, LINEAR, layer(models, LINEAR), {}), tmp_path)
    with pytest.raises(ModelError, match=r"x\.safetensors: .* is of a kind that tiler does not apply \(IA³\)"):
        apply_loras((Lora(file=file),), models)
