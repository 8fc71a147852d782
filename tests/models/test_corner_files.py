"""Odd files: incomplete, of another kind, or not a model at all. Each is read, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import make_checkpoint
import pytest
import torch
from checkpoints._single import single_tensors
from safetensors.torch import load_file, save_file

from tests.models.test_denoiser_files import assert_same_weights
from tiler.errors import ModelError
from tiler.models.family import Family, open_family, read_family
from tiler.models.part_files import WeightFile
from tiler.request.model import ModelOptions, Prediction
from tiler.weights.checkpoint import resolve
from tiler.weights.identity import model_id
from tiler.weights.store import WeightStore, match_index

Tensors = dict[str, torch.Tensor]
UNET, TEXT, VAE = "model.diffusion_model.", "cond_stage_model.transformer.", "first_stage_model."
TO_K = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn1.to_k"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint.make("tiny-plain", tmp_path_factory.mktemp("corners"))


@pytest.fixture(scope="module")
def whole(folder: Path) -> Tensors:
    return single_tensors(folder)


@pytest.fixture(scope="module")
def clean(whole: Tensors, folder: Path) -> Family:
    return read_family(resolve(str(save(whole, folder.parent / "clean.safetensors"))))


def save(tensors: Tensors, path: Path, words: dict[str, str] | None = None) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=words)
    return path


def without(tensors: Tensors, prefix: str) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}


def test_bytes_behind_the_last_tensor(tmp_path: Path, whole: Tensors, clean: Family) -> None:
    path = save(whole, tmp_path / "x.safetensors")
    with path.open("ab") as file:
        file.write(b"abc")
    family = read_family(resolve(str(path)))
    assert "x.safetensors: 3 bytes behind its last tensor are not read" in family.checkpoint.notes
    assert_same_weights(clean, family)


def test_text_names_of_old_files(tmp_path: Path, whole: Tensors, clean: Family) -> None:
    """Names without text_model., and positions that became fractions in a merge."""
    tensors = {name.replace("text_model.", ""): tensor for name, tensor in whole.items()}
    tensors[f"{TEXT}embeddings.position_ids"] = torch.arange(77).half()[None]
    assert_same_weights(clean, read_family(resolve(str(save(tensors, tmp_path / "x.safetensors")))))


def test_moving_averages_are_left_out(tmp_path: Path, whole: Tensors, clean: Family) -> None:
    averages = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): tensor + 1
        for name, tensor in whole.items()
        if name.startswith(UNET)
    }
    path = save(whole | averages, tmp_path / "x.safetensors")
    family = read_family(resolve(str(path)))
    assert_same_weights(clean, family)
    assert WeightFile(path).contents.ignored["model_ema"] == len(averages)


@pytest.mark.parametrize(
    ("prefix", "flag", "part"), [(VAE, "--vae", "vae"), ("cond_stage_model.", "--text-encoder", "text_encoder")]
)
def test_a_part_that_is_missing(
    in_process: Any, tmp_path: Path, whole: Tensors, folder: Path, prefix: str, flag: str, part: str
) -> None:
    path = save(without(whole, prefix), tmp_path / "x.safetensors")
    ran = in_process("plan", "x", "--model", path, "--size", 512)
    assert ran.code == 3
    assert f"give {flag} FILE or FOLDER" in ran.err
    found = open_family(ModelOptions(model=str(path), **{flag[2:].replace("-", "_"): str(folder / part)}))
    assert {info.path.parent for info in found.checkpoint.weights(part).values()} == {folder / part}


def test_an_autoencoder_beside_the_model(tmp_path: Path, whole: Tensors, clean: Family) -> None:
    path = save(whole, tmp_path / "x.safetensors")
    own = {name.removeprefix(VAE): tensor for name, tensor in whole.items() if name.startswith(VAE)}
    beside = save(own, tmp_path / "x.vae.safetensors")
    family = read_family(resolve(str(path)))
    assert "x.vae.safetensors beside the model is its autoencoder; --vae chooses another" in family.checkpoint.notes
    assert {info.path for info in family.checkpoint.weights("vae").values()} == {beside}
    assert_same_weights(clean, family)


def test_parts_from_known_folders(tmp_path: Path, whole: Tensors, clean: Family) -> None:
    """The only part that fits is used, with a note; of two, the user must choose one."""
    path = save(without(whole, VAE), tmp_path / "x.safetensors")
    own = {name.removeprefix(VAE): tensor for name, tensor in whole.items() if name.startswith(VAE)}
    (tmp_path / "webui/models/VAE").mkdir(parents=True)
    first = save(own, tmp_path / "webui/models/VAE/one.safetensors")
    save(own, tmp_path / "webui/models/VAE/sdxl.safetensors")  # of another family, by its name
    options = ModelOptions(model=str(path), model_dirs=(tmp_path / "webui",))
    family = open_family(options)
    assert f"the autoencoder is {first}, the only one in the model folders that fits" in family.checkpoint.notes
    assert_same_weights(clean, family)
    second = save(own, tmp_path / "webui/models/VAE/two.safetensors")
    with pytest.raises(ModelError, match="several files would fit; choose one with --vae") as error:
        open_family(options)
    assert str(first) in str(error.value) and str(second) in str(error.value)


def test_prediction_by_keys_words_files_and_flag(tmp_path: Path, whole: Tensors) -> None:
    def scheduler(tensors: Tensors, words: dict[str, str] | None = None, **said: Any) -> dict[str, Any]:
        path = save(tensors, tmp_path / "x.safetensors", words)
        return open_family(ModelOptions(model=str(path), **said)).scheduler

    none = torch.empty(0)
    assert scheduler(whole)["prediction_type"] == "epsilon"
    assert scheduler(whole, prediction=Prediction.V)["prediction_type"] == "v_prediction"
    assert scheduler(whole, {"modelspec.prediction_type": "v"})["prediction_type"] == "v_prediction"
    found = scheduler(whole | {"v_pred": none, "ztsnr": none})
    assert found["prediction_type"] == "v_prediction"
    assert found["rescale_betas_zero_snr"] and found["timestep_spacing"] == "trailing"
    found = scheduler(whole | {"v_pred": none, "ztsnr": none}, prediction=Prediction.EPSILON)
    assert found["prediction_type"] == "epsilon" and "rescale_betas_zero_snr" not in found
    (tmp_path / "x.yaml").write_text('model:\n  params:\n    parameterization: "v"\n')
    assert scheduler(whole)["prediction_type"] == "v_prediction"


def test_prediction_of_a_folder(folder: Path) -> None:
    own = read_family(resolve(str(folder))).scheduler
    said = open_family(ModelOptions(model=str(folder), prediction=Prediction.V)).scheduler
    assert said == own | {"prediction_type": "v_prediction"}


@pytest.mark.parametrize(("key", "what"), [("edm_mean", "Playground 2.5"), ("edm_vpred.sigma_max", "CosXL")])
def test_models_with_a_noise_of_their_own(tmp_path: Path, whole: Tensors, key: str, what: str) -> None:
    with pytest.raises(ModelError, match=f"{key} says that this is {what}"):
        read_family(resolve(str(save(whole | {key: torch.zeros(4)}, tmp_path / "x.safetensors"))))


@pytest.mark.parametrize("naming", ["raw", "scale_weight", "weight_scale", "none"])
def test_fp8(tmp_path: Path, whole: Tensors, naming: str) -> None:
    eight = (whole[f"{TO_K}.weight"].float() * 8).to(torch.float8_e4m3fn)
    tensors, factor = whole | {f"{TO_K}.weight": eight}, 1.0
    if naming != "raw":
        factor = 0.125
        tensors["scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
    if naming in ("scale_weight", "weight_scale"):
        tensors[f"{TO_K}.{naming}"] = torch.tensor(factor)
    if naming == "weight_scale":
        tensors.pop("scaled_fp8")
    path = save(tensors, tmp_path / "x.safetensors")
    if naming == "none":
        with pytest.raises(ModelError, match="scale"):
            read_family(resolve(str(path)))
        return
    family = read_family(resolve(str(path)))
    part = next(part for part in family.parts if part.name == "unet")
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k.weight"
    with WeightStore(match_index(part.build(), family.checkpoint.weights("unet"), part.aliases)) as store:
        assert torch.equal(store.load(name), eight.float() * factor)


def inpainting(tensors: Tensors) -> Tensors:
    first = f"{UNET}input_blocks.0.0.weight"
    return tensors | {first: tensors[first].repeat(1, 3, 1, 1)[:, :9]}


def refiner(tensors: Tensors) -> Tensors:
    wide = {name: t.repeat(1, 2)[:, :1280] for name, t in tensors.items() if "attn2.to_k.weight" in name}
    return tensors | wide


REFUSED: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "inpainting": (inpainting, "an inpainting model"),
    "refiner": (refiner, "SDXL's refiner"),
    "lcm": (lambda t: t | {f"{UNET}time_embed.cond_proj.weight": torch.zeros(4, 4)}, "an LCM with embedded guidance"),
    "nvfp4": (lambda t: t | {f"{TO_K}.weight_scale_2": torch.ones(1)}, "NVFP4"),
    "both namings": (
        lambda t: t | {f"{UNET}conv_in.weight": torch.zeros(2), f"{UNET}down_blocks.0.x": torch.zeros(2)},
        "both the original's and diffusers' names of tensors",
    ),
    "two denoisers": (
        lambda t: t | {"conv_in.weight": torch.zeros(2), "down_blocks.0.x": torch.zeros(2)},
        "two denoisers",
    ),
    "a missing weight": (
        lambda t: without(t, f"{TO_K}.weight"),
        f"tensor '{TO_K}.weight' is missing; download the file again",
    ),
    "a missing bias": (
        lambda t: without(t, f"{UNET}input_blocks.1.0.in_layers.2.bias"),
        f"tensor '{UNET}input_blocks.1.0.in_layers.2.bias' is missing; download the file again",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_by_name(in_process: Any, tmp_path: Path, whole: Tensors, name: str) -> None:
    change, says = REFUSED[name]
    save(change(whole), tmp_path / "x.safetensors")
    ran = in_process("plan", "x", "--model", "x.safetensors", "--size", 512)
    assert ran.code == 3, ran.err
    assert says in ran.err
    assert len(ran.err.strip().splitlines()) == 1, ran.err


def test_a_unet_alone_with_the_names_of_diffusers(tmp_path: Path, folder: Path) -> None:
    (file,) = (folder / "unet").glob("*.safetensors")
    path = save(load_file(file), tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match="this file has no autoencoder; give --vae"):
        read_family(resolve(str(path)))
    flags = {"vae": str(folder / "vae"), "text_encoder": str(folder / "text_encoder")}
    assert_same_weights(read_family(resolve(str(folder))), open_family(ModelOptions(model=str(path), **flags)))


NO_MODELS = {
    "pickle": (b"\x80\x02}q\x00" + b"." * 20, "this is a pickle checkpoint"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "Git LFS pointer"),
    "web page": (b"<!DOCTYPE html><html><body>404</body></html>", "web page"),
    "cut": (None, "bytes short"),
    "GGUF": (b"GGUF\x03\0\0\0............", "rename it to NAME.gguf"),
}


@pytest.mark.parametrize("name", NO_MODELS)
def test_what_is_no_model(in_process: Any, tmp_path: Path, name: str) -> None:
    content, says = NO_MODELS[name]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content or save({"a": torch.ones(9)}, path).read_bytes()[:-3])
    ran = in_process("plan", "x", "--model", "x.safetensors")
    assert ran.code == 3
    assert says in ran.err and len(ran.err.strip().splitlines()) == 1, ran.err


def test_words_of_a_gguf_are_not_asked_for(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "sd")
    writer.add_tensor("double_blocks.0.img_attn.qkv.weight", torch.zeros(4, 4).numpy())
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    assert WeightFile(tmp_path / "x.gguf").words == {} and WeightFile(tmp_path / "x.gguf").notes == ()


def test_the_id_of_a_model_knows_its_other_files(tmp_path: Path, whole: Tensors, folder: Path, clean: Family) -> None:
    names = [part.name for part in clean.parts]
    own = {name.removeprefix(VAE): tensor for name, tensor in whole.items() if name.startswith(VAE)}
    ids = [model_id(clean.checkpoint, names)]
    for path, factor in ((clean.checkpoint.file, 1), (clean.checkpoint.file, 2), (folder, 1), (folder, 2)):
        vae = save({name: factor * tensor for name, tensor in own.items()}, tmp_path / f"{factor}.safetensors")
        ids.append(model_id(open_family(ModelOptions(model=str(path), vae=str(vae))).checkpoint, names))
    ids.append(model_id(read_family(resolve(str(folder))).checkpoint, names))
    assert len(set(ids)) == len(ids)
