"""Folders that are incomplete, damaged or of another kind of model: each is refused before any work, in one line that
says what is wrong and what to do, with the exit code for models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import make_checkpoint
import pytest
import torch
from safetensors.torch import load_file, save_file

from tiler.errors import ModelError
from tiler.weights.checkpoint import resolve

Damage = Callable[[Path], object]
KINDS = "tiny-sdxl", "tiny-sd3", "tiny-flux", "tiny-pixart", "tiny-auraflow"


@pytest.fixture(scope="module")
def folders(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("families")
    return {"tiny": tiny} | {kind: make_checkpoint.make(kind, base) for kind in KINDS}


def linked(folder: Path, to: Path) -> Path:
    """A copy of a folder, made of links, which can be replaced one by one."""
    shutil.copytree(folder, to, copy_function=lambda source, target: Path(target).symlink_to(source))
    return to


def put(path: Path, data: str | bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)


def without(name: str) -> Damage:
    def lose(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return lose


def says(file: str, **values: object) -> Damage:
    def edit(folder: Path) -> None:
        put(folder / file, json.dumps(json.loads((folder / file).read_text()) | values))

    return edit


def weights(folder: Path, part: str) -> Path:
    return next((folder / part).glob("*.safetensors"))


def changed(part: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def save(folder: Path) -> None:
        path = weights(folder, part)
        tensors = load_file(path)
        change(tensors)
        path.unlink()
        save_file(tensors, path)

    return save


def sharded(folder: Path, *, lose: bool = False, cut: bool = False) -> None:
    """The UNet's weights in two files, the second of which is missing or cut."""
    path = weights(folder, "unet")
    tensors, stem = load_file(path), path.name.split(".")[0]
    path.unlink()
    files = [f"{stem}-0000{number}-of-00002.safetensors" for number in (1, 2)]
    where = {name: files[number % 2] for number, name in enumerate(sorted(tensors))}
    for file in files:
        save_file({name: tensor for name, tensor in tensors.items() if where[name] == file}, folder / "unet" / file)
    put(folder / f"unet/{stem}.safetensors.index.json", json.dumps({"weight_map": where}))
    second = folder / "unet" / files[1]
    if cut:
        put(second, second.read_bytes()[:-100])
    if lose:
        second.unlink()


MISSING = {
    "tiny": ("scheduler", "text_encoder", "tokenizer", "vae"),
    "tiny-sdxl": ("scheduler", "text_encoder_2", "tokenizer_2"),
    "tiny-sd3": ("scheduler", "text_encoder_2", "tokenizer_3"),
    "tiny-flux": ("scheduler", "text_encoder_2", "tokenizer"),
    "tiny-pixart": ("scheduler", "text_encoder", "tokenizer"),
    "tiny-auraflow": ("scheduler", "text_encoder", "tokenizer"),
}


@pytest.mark.parametrize(("kind", "part"), [(kind, part) for kind, parts in MISSING.items() for part in parts])
def test_a_missing_part_is_named_with_the_command_that_fetches_it(
    in_process: Any, folders: dict[str, Path], tmp_path: Path, kind: str, part: str
) -> None:
    folder = linked(folders[kind], tmp_path / "model")
    without(part)(folder)
    ran = in_process("plan", "x", "--model", folder, "--size", 64)
    assert ran.code == 3 and len(ran.err.splitlines()) == 1, ran.err
    assert f"{folder}/{part}" in ran.err and f"--include '{part}/*' --local-dir {folder}" in ran.err


def test_doctor_shows_what_is_there_and_fetches_all_that_is_missing(
    in_process: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = linked(folders["tiny-sdxl"], tmp_path / "model")
    for part in ("text_encoder_2", "tokenizer_2", "vae"):
        without(part)(folder)
    ran = in_process("doctor", "--model", folder)
    said = " ".join(ran.out.split())
    assert ran.code == 3 and "unet " in said and " MB" in said and "vae missing" in said, said
    fetch = "--include 'text_encoder_2/*' --include 'tokenizer_2/*' --include 'vae/*'"
    assert "run: hf download stabilityai/stable-diffusion-xl-base-1.0" in said
    assert all(word in said for word in fetch.split("--include "))
    assert len(ran.err.splitlines()) == 1


def test_doctor_shows_the_parts_beside_a_broken_config(
    in_process: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = linked(folders["tiny"], tmp_path / "model")
    (folder / "unet/config.json").unlink()
    (folder / "unet/config.json").write_text("{")
    ran = in_process("doctor", "--model", folder)
    said = " ".join(ran.out.split())
    assert ran.code == 3 and "vae " in said and " MB" in said and "unet/config.json: not valid JSON" in said, said


BAD: dict[str, tuple[str, Damage, str]] = {
    "no UNet": ("tiny", without("unet"), "unet/config.json is missing; copy it there, or download the model again"),
    "no weights": ("tiny", lambda f: weights(f, "unet").unlink(), "no *.safetensors here, but config.json; copy it"),
    "refiner": ("tiny-sdxl", says("model_index.json", text_encoder=[None, None]), "SDXL's refiner"),
    "inpainting": ("tiny", says("unet/config.json", in_channels=9), "this is an inpainting model"),
    "depth": ("tiny", says("unet/config.json", in_channels=5), "this is a depth-to-image model"),
    "pix2pix": ("tiny-sdxl", says("unet/config.json", in_channels=8), "this is an InstructPix2Pix model"),
    "channels": (
        "tiny",
        says("unet/config.json", in_channels=8, out_channels=8),
        "latents of 8 channels, the VAE's have 4; these parts do not belong together",
    ),
    "video": ("tiny", says("model_index.json", _class_name="AnimateDiffPipeline"), "this is a video model"),
    "ControlNet": ("tiny", says("unet/config.json", _class_name="ControlNetModel"), "the class is 'ControlNetModel'"),
    "JSON": ("tiny", lambda f: put(f / "scheduler/scheduler_config.json", "{"), "not valid JSON; download it again"),
    "a list": ("tiny", lambda f: put(f / "vae/config.json", "[1]"), "not a JSON object; download it again"),
    "type": ("tiny", says("scheduler/scheduler_config.json", beta_start="x"), "beta_start = 'x'"),
    "shift": ("tiny-flux", says("scheduler/scheduler_config.json", max_shift="x"), "max_shift = x"),
    "end mark": ("tiny", says("text_encoder/config.json", eos_token_id=[1]), "eos_token_id = [1] is out of range"),
    "gate": ("tiny-sd3", says("text_encoder_3/config.json", feed_forward_proj="x"), "no model can be built from it"),
    "width": ("tiny-flux", says("transformer/config.json", joint_attention_dim=48), "joint_attention_dim"),
    "shard": ("tiny-sdxl", lambda f: sharded(f, lose=True), "00002-of-00002.safetensors cannot be found beside it"),
    "cut": ("tiny-sdxl", lambda f: sharded(f, cut=True), "the file is 100 bytes short (a cut download?)"),
    "dtype": (
        "tiny-sdxl",
        changed("unet", lambda t: t.update({"conv_in.weight": t["conv_in.weight"].to(torch.int64)})),
        "tensor 'conv_in.weight' is stored as I64; tiler reads F32, F16",
    ),
    "tensor": ("tiny-sdxl", changed("unet", lambda t: t.pop("conv_in.bias")), "tensor 'conv_in.bias' is missing"),
    "shape": (
        "tiny-sdxl",
        changed("vae", lambda t: t.update({"decoder.conv_in.bias": torch.zeros(3)})),
        "tensor 'decoder.conv_in.bias' has shape [3], config.json asks for",
    ),
    "LFS": (
        "tiny",
        lambda f: put(weights(f, "vae"), "version https://git-lfs.github.com/spec/v1\n"),
        "a Git LFS pointer, not the file itself; run `git lfs pull`",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_said_in_one_line(
    in_process: Any, folders: dict[str, Path], tmp_path: Path, case: str
) -> None:
    kind, damage, text = BAD[case]
    folder = linked(folders[kind], tmp_path / "model")
    damage(folder)
    ran = in_process("plan", "x", "--model", folder, "--size", 64)
    assert ran.code == 3 and text in ran.err and len(ran.err.splitlines()) == 1, ran.err


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_nan_in_the_weights_is_blamed_on_their_own_file(
    in_process: Any, folders: dict[str, Path], tmp_path: Path, precision: str
) -> None:
    folder = linked(folders["tiny-sdxl"], tmp_path / "model")
    changed("unet", lambda t: t["conv_in.bias"].fill_(float("nan")))(folder)
    options = ("--size", 64, "--steps", 1, "--precision", precision, "--cache-dir", tmp_path / "cache", "-q")
    ran = in_process("render", "x", "--model", folder, *options)
    assert ran.code == 7 and len(ran.err.splitlines()) == 1, ran.err
    assert f"{folder}/unet" in ran.err and "'conv_in.bias' holds NaN or Inf; download the file again" in ran.err
    assert not list((tmp_path / "cache").glob("packed/*")) and not list((tmp_path / "cache").glob("*.safetensors"))


def test_a_damaged_tokenizer_is_said_without_another_programs_advice(folders: dict[str, Path], tmp_path: Path) -> None:
    from tiler.models.t5 import load_tokenizer

    folder = linked(folders["tiny-flux"], tmp_path / "model")
    put(folder / "tokenizer_2/spiece.model", b"xyz")
    with pytest.raises(ModelError, match=r"tokenizer_2: the tokenizer cannot be read \(its files are damaged\)"):
        load_tokenizer(resolve(str(folder)), "tokenizer_2")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("control_model.input_hint_block.0.weight", "a ControlNet"),
        ("controlnet_cond_embedding.conv_in.weight", "a ControlNet"),
        ("ip_adapter.1.to_k_ip.weight", "an IP-Adapter"),
        ("emb_params", "a textual inversion"),
        ("lora_unet_mid_block.lora_down.weight", "a LoRA"),
        ("x", "not a model that tiler knows (x…)"),
    ],
)
def test_files_that_are_no_model(in_process: Any, tmp_path: Path, name: str, what: str) -> None:
    save_file({name: torch.zeros(2, 2)}, tmp_path / "one.safetensors")
    ran = in_process("plan", "x", "--model", "one.safetensors")
    assert ran.code == 3 and f"this is {what}" in ran.err and "model" in ran.err.partition(what)[2], ran.err
    assert len(ran.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("kind", "what"), [("AutoencoderTiny", "a tiny autoencoder"), ("AutoencoderKL", "an autoencoder")]
)
def test_an_autoencoders_folder_is_no_model(tmp_path: Path, kind: str, what: str) -> None:
    put(tmp_path / "config.json", json.dumps({"_class_name": kind}).encode())
    flag = "--tiny-vae" if kind == "AutoencoderTiny" else "--vae"
    with pytest.raises(ModelError, match=f"this is {what}, which goes with a model; give it with {flag}$"):
        resolve(str(tmp_path))


def test_what_a_family_is_not_told_is_a_note(in_process: Any, folders: dict[str, Path]) -> None:
    asked = ("plan", "x", "--size", 128, "--tile-conditioning", "none", "--model")
    for kind, told in (("tiny-flux", True), ("tiny-sdxl", False)):
        ran = in_process(*asked, folders[kind])
        assert ran.code == 0 and ("--tile-conditioning has no effect" in ran.err) == told, ran.err
