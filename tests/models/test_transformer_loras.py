"""LoRAs of Flux and AuraFlow with kohya's and PEFT's names: against what diffusers reads in them, and against pictures
of a model with weights changed accordingly."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import make_checkpoint
import pytest
import torch
from diffusers import AuraFlowTransformer2DModel, FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.models.loras import as_kohya, fuse, layers_of, random_lora, save
from tests.models.rendering import ask, rendered
from tiler.models import family as families
from tiler.models.built import Models
from tiler.models.family import Role
from tiler.models.lora_names import Target, names_of_modules
from tiler.models.loras import apply_loras
from tiler.request.loras import Lora
from tiler.weights import checkpoint
from tiler.weights.store import WeightStore, match_index

RANK, ALPHA, STRENGTH = 3, 2.0, 0.8


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    cache = tmp_path_factory.mktemp("transformers")
    return {kind: make_checkpoint.make(f"tiny-{kind}", cache) for kind in ("flux", "auraflow")}


def weights(models: Models, *files: Path, strength: float = 1.0) -> dict[str, Tensor]:
    """All of the transformer's weights, changed by the files."""
    part = models.family.part(Role.DENOISER)
    index = match_index(models.module(part), models.family.checkpoint.weights(part.name), part.aliases)
    applied = apply_loras([Lora(file=file, strength=strength) for file in files], models)
    assert not applied.notes
    with WeightStore(index, changes=applied.of(part.name)) as store:
        return {name: store.load(name) for name in index}


def original_names(models: Models) -> dict[str, tuple[Target, ...]]:
    """The names, in kohya's spelling, of the layers in the blocks of Black Forest Labs' Flux."""
    names = names_of_modules(models)
    return {
        name: found
        for name, found in names.items()
        if name.startswith(("lora_unet_double_blocks_", "lora_unet_single_blocks_"))
    }


def kohyas(models: Models, plain: dict[str, Tensor]) -> dict[str, Tensor]:
    """A LoRA of Flux in kohya's spelling, in which queries, keys and values are one module. The first layer of a single
    block is left out, because diffusers' conversion knows only one size of it."""
    tensors, generator = dict[str, Tensor](), torch.Generator().manual_seed(0)
    for name, targets in original_names(models).items():
        if name.endswith("_linear1"):
            continue
        sides = [plain[f"{target.module}.weight"].shape for target in targets]
        if len(sides[0]) == 1:  # a norm
            continue
        tensors[f"{name}.lora_down.weight"] = torch.randn(RANK, sides[0][1], generator=generator)
        tensors[f"{name}.lora_up.weight"] = 0.1 * torch.randn(sum(out for out, _ in sides), RANK, generator=generator)
        tensors[f"{name}.alpha"] = torch.tensor(ALPHA)
    return tensors


def test_flux_in_kohyas_spelling_is_what_diffusers_reads(folders: dict[str, Path], tmp_path: Path) -> None:
    models = Models(families.read_family(checkpoint.resolve(str(folders["flux"]))))
    plain = weights(models)
    tensors = kohyas(models, plain)
    file = save(tmp_path / "x.safetensors", tensors)
    read: dict[str, Tensor] = FluxPipeline.lora_state_dict(str(file))  # type: ignore[assignment]
    want = dict(plain)
    for key, down in read.items():
        if key.endswith(".lora_A.weight"):
            name = key.removeprefix("transformer.").replace("lora_A.", "")
            want[name] = plain[name] + (read[key.replace("lora_A", "lora_B")].double() @ down.double()).float()
    changed = [name for name in want if want[name] is not plain[name]]
    assert len(changed) > 15
    for name, tensor in weights(models, file).items():
        assert (tensor - want[name]).norm() <= 1e-6 * want[name].norm(), name


@pytest.mark.parametrize("spelling", ["kohya", "peft"])
def test_flux_is_changed_as_peft_changes_it(folders: dict[str, Path], tmp_path: Path, spelling: str) -> None:
    """By diffusers' `load_lora_weights`, whose layers are PEFT's and merged with the weights by PEFT."""
    pytest.importorskip("accelerate")
    pytest.importorskip("peft")
    models = Models(families.read_family(checkpoint.resolve(str(folders["flux"]))))
    plain = weights(models)
    module = opened(folders["flux"], FluxTransformer2DModel)
    random = random_lora(module, layers_of(module, every=2), rank=RANK)
    file = save(tmp_path / "x.safetensors", kohyas(models, plain) if spelling == "kohya" else peft(random))
    others = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    pipe: Any = FluxPipeline(transformer=module, **dict.fromkeys(others))
    pipe.load_lora_weights(str(file))
    pipe.fuse_lora(components=["transformer"], lora_scale=STRENGTH)
    want = {name.replace(".base_layer.", "."): value.detach() for name, value in module.named_parameters()}
    got = weights(models, file, strength=STRENGTH)
    changed = [name for name in got if not torch.equal(got[name], plain[name])]
    assert len(changed) >= 15
    for name, tensor in got.items():
        assert (tensor - want[name]).norm() <= 1e-6 * want[name].norm(), name


def test_a_single_blocks_first_layer_is_four_of_diffusers(folders: dict[str, Path], tmp_path: Path) -> None:
    models = Models(families.read_family(checkpoint.resolve(str(folders["flux"]))))
    plain, name = weights(models), "lora_unet_single_blocks_0_linear1"
    layers = "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"
    paths = [f"single_transformer_blocks.0.{layer}.weight" for layer in layers]
    down, up = torch.randn(RANK, plain[paths[0]].shape[1]), torch.randn(sum(len(plain[p]) for p in paths), RANK)
    file = save(tmp_path / "x.safetensors", {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up})
    got = torch.cat([weights(models, file)[path] for path in paths])
    want = torch.cat([plain[path] for path in paths]) + up @ down
    assert (got - want).norm() <= 1e-6 * want.norm()


def opened(folder: Path, cls: Any) -> Any:
    """The checkpoint's transformer, as diffusers has it, in fp32."""
    (file,) = (folder / "transformer").glob("*.safetensors")
    module = cls.from_config(cls.load_config(folder / "transformer"))
    module.load_state_dict({name: tensor.float() for name, tensor in load_file(file).items()})
    return module


def peft(lora: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Without an alpha: the up matrices include its effect."""
    tensors = {}
    for path, (down, up) in lora.items():
        tensors |= {f"transformer.{path}.lora_A.weight": down, f"transformer.{path}.lora_B.weight": up * ALPHA / RANK}
    return tensors


@pytest.mark.parametrize(("kind", "cls"), [("flux", FluxTransformer2DModel), ("auraflow", AuraFlowTransformer2DModel)])
def test_the_picture_is_that_of_a_model_with_changed_weights(
    folders: dict[str, Path], tmp_path: Path, kind: str, cls: Any
) -> None:
    folder, common = folders[kind], {"size": 64, "num_inference_steps": 1}
    (file,) = (folder / "transformer").glob("*.safetensors")
    module = opened(folder, cls)
    lora = random_lora(module, layers_of(module, every=2), rank=RANK)
    spellings = {"kohya": as_kohya("lora_unet", lora, ALPHA), "peft": peft(lora)}
    plain, _ = rendered(ask(folder, tmp_path, **common))
    fuse(module, lora, STRENGTH * ALPHA / RANK)
    shutil.copytree(folder, changed := tmp_path / "changed")
    save_file(module.state_dict(), changed / "transformer" / file.name)
    want, _ = rendered(ask(changed, tmp_path, **common))
    assert (plain - want).abs().max() > 0.02 * want.abs().max()
    for name, tensors in spellings.items():
        said = f"{save(tmp_path / f'{name}.safetensors', tensors)}={STRENGTH}"
        got, _ = rendered(ask(folder, tmp_path, loras=(said,), **common))
        assert (got - want).abs().max() <= 1e-4 * want.abs().max(), name
