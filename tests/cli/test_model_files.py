"""`tiler models`, `tiler cache`, `tiler doctor --model`, and models found by name in folders."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import make_checkpoint
import pytest
import torch
from checkpoints._single import single_tensors
from safetensors.torch import load_file, save_file

import tiler
from tiler.models.listing import list_models
from tiler.models.single_file import tiny_of_file
from tiler.weights.caches import INT8_VERSION


@pytest.fixture(scope="module")
def webui(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like AUTOMATIC1111's: a model without its autoencoder, a LoRA, an autoencoder, a folder, a damaged
    file."""
    root = tmp_path_factory.mktemp("webui")
    folder = make_checkpoint.make("tiny-plain", root / "models/diffusers")
    tensors = single_tensors(folder)
    places = {name: root / "models" / name for name in ("Stable-diffusion", "VAE", "Lora")}
    for place in places.values():
        place.mkdir()
    parts = {name: tensor for name, tensor in tensors.items() if not name.startswith("first_stage_model.")}
    save_file(parts, places["Stable-diffusion"] / "dreamy sky.safetensors")
    save_file({"lora_unet_x.lora_up.weight": torch.ones(2, 2)}, places["Lora"] / "style.safetensors")
    save_file({k: v for k, v in tensors.items() if k not in parts}, places["VAE"] / "soft.safetensors")
    (places["Stable-diffusion"] / "cut.safetensors").write_bytes(b"\0" * 20)
    return root


def test_models_are_listed_with_what_they_need(in_process: Any, webui: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILER_MODEL_DIRS", str(webui))
    ran = in_process("models", "--json")
    assert ran.code == 0, ran.err
    found = {Path(model["path"]).name: model for model in ran.json["models"]}
    assert set(found) == {"dreamy sky.safetensors", "cut.safetensors", "soft.safetensors", "tiny-plain"}
    sky = found["dreamy sky.safetensors"]
    assert (sky["family"], sky["fits"], sky["lacks"]) == ("Stable Diffusion 1.x", True, ["--vae"])
    assert (found["soft.safetensors"]["family"], found["soft.safetensors"]["fits"]) == ("an autoencoder", None)
    assert found["tiny-plain"]["lacks"] == []
    assert "cannot be read" in found["cut.safetensors"]["family"]
    monkeypatch.setattr("tiler.cli.models.columns", lambda: 80)
    head, *lines = in_process("models", webui, "--max-ram", "400MB").out.splitlines()
    assert head.split() == ["SIZE", "NEEDS", "FITS", "KIND", "NAME"] and lines[0].endswith("/Stable-diffusion")
    listed = [line for line in lines if not line.startswith("/")]
    cut, *_ = (line for line in listed if "cut.safe" in line)
    (sky,) = (line for line in listed if line.endswith("  dreamy sky.safetensors (add --vae)"))
    assert sky.split()[2:5] == ["415", "MB", "no"] and sky.index("Stable") == head.index("KIND")
    assert cut.index("cut.safe") == sky.index("dreamy") == head.index("NAME") and max(map(len, listed)) <= 80


@pytest.mark.parametrize(("layers", "needed"), [(24, 444_000_000), (38, 464_000_000)])
def test_the_smallest_ceiling_is_the_models_not_its_familys(
    in_process: Any, tmp_path: Path, layers: int, needed: int
) -> None:
    """Stable Diffusion 3 medium and 3.5 large, as a folder and as a single file."""
    (tmp_path / "folder/transformer").mkdir(parents=True)
    index = {"_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "SD3Transformer2DModel"]}
    (tmp_path / "folder/model_index.json").write_text(json.dumps(index))
    (tmp_path / "folder/transformer/config.json").write_text(json.dumps({"num_layers": layers}))
    blocks = {f"joint_blocks.{n}.context_block.attn.qkv.weight": torch.ones(2, 2) for n in range(layers)}
    save_file(
        {
            "model.diffusion_model." + name: tensor
            for name, tensor in (blocks | {"x_embedder.proj.weight": torch.ones(2, 16, 2, 2)}).items()
        },
        tmp_path / "file.safetensors",
    )
    found = in_process("models", ".", "--json").json["models"]
    assert [model["floor_bytes"] for model in found] == [needed, needed], found


def test_a_unet_of_larger_latents_is_no_instructpix2pix(in_process: Any) -> None:
    file = Path(tiler.__file__).parent / "models/mini/unet/diffusion_pytorch_model.safetensors"
    ran = in_process("plan", "x", "--model", "mini", "--diffusion-model", file, "--size", 64)
    assert ran.code == 3 and "the UNet computes latents of 8 channels" in ran.err and "Pix2Pix" not in ran.err


def test_of_a_hundred_models_only_the_headers_are_read(tmp_path: Path) -> None:
    """Each is a sparse file of 2 GB; the kernel counts what is read."""
    shapes = {
        "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
        "first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3),
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (1_300_000, 768),
    }
    header, end = {}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end := end + 2 * math.prod(shape)]}
    text = json.dumps(header).encode()
    for number in range(100):
        with (tmp_path / f"model{number:02}.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)

    def read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    before = read()
    found = list_models([tmp_path])
    assert read() - before < 100 * (len(text) + 4096)
    assert len(found) == 100 and {model.family for model in found} == {"Stable Diffusion 1.x"}
    assert all(model.fits(800_000_000) and not model.fits(400_000_000) and not model.lacks for model in found)


def test_models_without_a_folder(in_process: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TILER_MODEL_DIRS", raising=False)
    ran = in_process("models")
    assert ran.code == 2 and "TILER_MODEL_DIRS" in ran.err


def test_folders_of_the_environment_are_searched(in_process: Any, webui: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILER_MODEL_DIRS", str(webui))
    ran = in_process("plan", "x", "--model", "dreamy sky", "--size", 512)
    assert ran.code == 0, ran.err
    ran = in_process("plan", "x", "--model", "nothing")
    assert ran.code == 3 and f"no model of this name in {webui}; `tiler models` lists what is there." in ran.err
    monkeypatch.delenv("TILER_MODEL_DIRS")
    ran = in_process("plan", "x", "--model", "nothing")
    assert ran.code == 3 and "names folders to look in" in ran.err


def test_a_model_by_name(in_process: Any, webui: Path) -> None:
    """The only autoencoder that fits is used; a similar name is suggested; two models of one name are listed."""
    ran = in_process("plan", "x", "--model", "dreamy sky", "--model-dir", webui, "--size", 512)
    assert ran.code == 0, ran.err
    assert "soft.safetensors, the only one in the model folders that fits" in ran.err
    ran = in_process("plan", "x", "--model", "dreamysky", "--model-dir", webui)
    assert ran.code == 3 and "did you mean dreamy sky?" in ran.err and "hf download" in ran.err
    other = webui / "models/Stable-diffusion/old"
    other.mkdir()
    shutil.copy(webui / "models/VAE/soft.safetensors", other / "dreamy sky.safetensors")
    try:
        ran = in_process("plan", "x", "--model", "dreamy sky", "--model-dir", webui)
        assert ran.code == 3 and ran.err.count("dreamy sky.safetensors") == 2
    finally:
        shutil.rmtree(other)


def test_doctor_tells_what_was_decided(in_process: Any, webui: Path) -> None:
    model = webui / "models/Stable-diffusion/dreamy sky.safetensors"
    ran = in_process(
        "doctor", "--model", model, "--vae", webui / "models/VAE/soft.safetensors", "--prediction", "v", "--json"
    )
    assert ran.code == 0, ran.err
    assert ran.json["prediction"] == "v (as --prediction says)"
    assert ran.json["vae"].endswith("soft.safetensors (--vae)") and "F16" in ran.json["vae"]
    assert "a UNet (original names" in ran.json["in the file"]
    ran = in_process("doctor", "--model", model)
    assert ran.code == 3
    assert "family              Stable Diffusion 1.x" in ran.out and "missing or wrong    " in ran.out
    assert "give --vae FILE or FOLDER (run: hf download " in ran.err


def test_cache_lists_and_cleans(in_process: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def packed(name: str, version: str) -> Path:
        words = {"format": "tiler-int8", "version": version}
        if version != "0":
            words["model"] = "/models/a long way down/dream"
        save_file({"a": torch.ones(3)}, tmp_path / "c" / f"{name * 32}.safetensors", metadata=words)
        return tmp_path / "c" / f"{name * 32}.safetensors"

    (tmp_path / "c/prompts").mkdir(parents=True)
    current, old = packed("a", INT8_VERSION), packed("b", "0")
    prompt, other = (tmp_path / "c/prompts" / f"{letter * 32}.safetensors" for letter in "ce")
    for path in (prompt, other):
        save_file({"a": torch.ones(3)}, path, metadata={"model": "mini"})
    mine = tmp_path / "c/my model.safetensors"
    save_file({"a": torch.ones(3)}, mine)
    leftover = tmp_path / "c" / f".{'d' * 32}.safetensors.x"
    leftover.write_bytes(b"x")
    os.utime(leftover, (0, time.time() - 10**6))
    files = in_process("cache", "list", "--cache-dir", "c", "--json").json["files"]
    listed = {Path(file["path"]).name: file for file in files}
    assert listed[current.name]["name"] == "/models/a long way down/dream" and not listed[old.name]["name"]
    monkeypatch.setattr("tiler.cli.cache.columns", lambda: 80)
    lines = in_process("cache", "list", "--cache-dir", "c").out.splitlines()
    assert any("int8 weights" in line and line.endswith("  /models/a long way down/dream") for line in lines)
    assert any("encoded prompts" in line and line.endswith("  mini (2)") for line in lines)
    assert set(listed) == {current.name, old.name, prompt.name, other.name, leftover.name}
    assert listed[old.name]["stale"] == "of another version of tiler" and not listed[current.name]["stale"]
    monkeypatch.setenv("TILER_CACHE_DIR", str(tmp_path / "c"))
    assert len(in_process("cache", "list", "--json").json["files"]) == len(files)
    monkeypatch.delenv("TILER_CACHE_DIR")
    (tmp_path / "config.toml").write_text('cache_dir = "c"')
    monkeypatch.setenv("TILER_CONFIG", str(tmp_path / "config.toml"))
    assert len(in_process("cache", "list", "--json").json["files"]) == len(files)
    assert in_process("cache", "clean", "--cache-dir", "c", "--dry-run").code == 0 and old.exists()
    assert in_process("cache", "clean", "--cache-dir", "c").code == 0
    assert (current.exists(), old.exists(), prompt.exists(), leftover.exists()) == (True, False, True, False)
    assert in_process("cache", "clean", "--cache-dir", "c", "--all").code == 0
    assert (current.exists(), prompt.exists(), mine.exists()) == (False, False, True)


def test_a_taesd_file_of_16_channels(tmp_path: Path) -> None:
    """Like those for SD 3 and Flux."""
    from diffusers import AutoencoderTiny

    widths = dict.fromkeys(("encoder_block_out_channels", "decoder_block_out_channels"), (8, 8, 8, 8))
    made = AutoencoderTiny(latent_channels=16, **widths)
    save_file(made.state_dict(), tmp_path / "taef1.safetensors")
    found = tiny_of_file(tmp_path / "taef1.safetensors")
    assert found.config("")["latent_channels"] == 16
    assert found.weights("").keys() == made.state_dict().keys()


@pytest.mark.parametrize("half", ["whole", "decoder"])
def test_a_taesd_file_decodes_as_its_folder(in_process: Any, tiny: Path, tmp_path: Path, half: str) -> None:
    from diffusers import AutoencoderTiny
    from PIL import Image

    widths = dict.fromkeys(("encoder_block_out_channels", "decoder_block_out_channels"), (8, 8, 8, 8))
    AutoencoderTiny(**widths).save_pretrained(tmp_path / "taesd")
    tensors = load_file(tmp_path / "taesd/diffusion_pytorch_model.safetensors")
    if half == "decoder":  # as its author publishes it: a clamp before the first layer
        found = {n.removeprefix("decoder.layers."): t for n, t in tensors.items() if n.startswith("decoder.")}
        tensors = {f"{int(n.split('.', 1)[0]) + 1}.{n.split('.', 1)[1]}": t for n, t in found.items()}
    save_file(tensors, tmp_path / "taesd.safetensors")
    latents = {"latents": torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))}
    save_file(latents, tmp_path / "l.safetensors")
    for name, vae in (("a", "taesd"), ("b", "taesd.safetensors")):
        ran = in_process(
            "decode", "l.safetensors", "--model", tiny, "--decode", "tiny", "--tiny-vae", vae, "-o", f"{name}.png"
        )
        assert ran.code == 0, ran.err
    assert Image.open(tmp_path / "a.png").tobytes() == Image.open(tmp_path / "b.png").tobytes()


@pytest.mark.parametrize("command", [("models", "."), ("cache", "list"), ("cache", "clean", "--dry-run")])
def test_looking_into_files_imports_no_torch(command: tuple[str, ...], tmp_path: Path) -> None:
    """A hundred headers, GGUF's included, are read in the time that importing torch would take."""
    import subprocess
    import sys

    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "flux")
    writer.add_tensor("img_in.weight", np.zeros((64, 64), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    code = (
        "import atexit, sys; from tiler.cli.main import main; "
        "atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr)); main()"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr.splitlines()[-1] == "False", done.stderr
    assert "x.gguf" in done.stdout or command[0] == "cache"
