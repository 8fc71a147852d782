"""Model folders that are damaged, of another kind, missing or in the cache: one line and the right exit code."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest


def damage(folder: Path, part: str, change: Callable[[Path], None]) -> None:
    change(next((folder / part).glob("*.safetensors")))


def cut(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def config(folder: Path, part: str, **values: object) -> None:
    path = folder / part / ("config.json" if part else "model_index.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


BAD_MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda f: damage(f, "unet", cut), "bytes short"),
    "empty file": (lambda f: damage(f, "vae", lambda p: p.write_bytes(b"")), "header too small"),
    "huge header": (
        lambda f: damage(f, "unet", lambda p: p.write_bytes(struct.pack("<Q", 2**62) + b"{}")),
        "not a safetensors file",
    ),
    "pickle only": (lambda f: damage(f, "unet", lambda p: p.rename(p.with_suffix(".bin"))), "pickle"),
    "no weights": (lambda f: damage(f, "text_encoder", lambda p: p.unlink()), "no *.safetensors here"),
    "no index": (lambda f: (f / "model_index.json").unlink(), "model_index.json"),
    "broken json": (lambda f: (f / "unet/config.json").write_text("{"), "not valid JSON"),
    "inpainting": (lambda f: config(f, "unet", in_channels=9), "inpainting"),
    "sdxl": (lambda f: config(f, "", _class_name="StableDiffusionXLPipeline"), "does not belong to the pipeline"),
    "flux": (lambda f: config(f, "", _class_name="FluxPipeline"), "transformer"),
    "sdxl unet": (lambda f: config(f, "unet", addition_embed_type="text_time"), "this UNet is SDXL's"),
    "distilled": (lambda f: config(f, "unet", time_cond_proj_dim=256), "time_cond_proj_dim"),
    "foreign blocks": (lambda f: config(f, "unet", mid_block_type="UNetMidBlock2DSimpleCrossAttn"), "SimpleCrossAttn"),
    "foreign class": (lambda f: config(f, "unet", _class_name="os.system"), "os.system"),
    "auto_map": (lambda f: config(f, "unet", auto_map={"x": "y"}), "auto_map"),
    "absurd width": (lambda f: config(f, "unet", block_out_channels=[10**9, 10**9, 10**9]), "out of range"),
    "text width": (lambda f: config(f, "unet", cross_attention_dim=64), "text width 64"),
    "wrong shape": (lambda f: config(f, "vae", block_out_channels=[8, 16, 16, 24]), "shape"),
    "bad tokenizer": (lambda f: (f / "tokenizer/vocab.json").write_text("{"), "tokenizer"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "tokenizer"),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_bad_models_are_exit_3_and_one_line(in_process, tiny: Path, tmp_path: Path, name: str) -> None:
    change, message = BAD_MODELS[name]
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    change(folder)
    ran = in_process("render", "x", "--model", folder, "--size", "64", "--steps", "1", "--quiet")
    assert ran.code == 3, ran.err
    assert message in ran.err
    assert len(ran.err.strip().splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_pickle_is_never_opened(in_process, tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    next((folder / "unet").glob("*.safetensors")).unlink()
    canary = tmp_path / "canary"
    (folder / "unet/diffusion_pytorch_model.bin").write_bytes(
        b"cos\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR."
    )
    assert in_process("render", "x", "--model", folder, "--size", "64").code == 3
    assert not canary.exists()


def test_models_that_are_not_there(tiler, in_process, tmp_path: Path) -> None:
    assert in_process("render", "x", "--model", "./nowhere").code == 3
    (tmp_path / "old.ckpt").write_bytes(b"\x80\x02")
    assert "pickle" in in_process("render", "x", "--model", "old.ckpt").err
    (tmp_path / "boat.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    ran = in_process("render", "x", "--model", "boat.png")
    assert ran.code == 3 and "boat.png: this is a picture, not a safetensors file; --from repeats" in ran.err
    ran = tiler(
        "render", "x", "--model", "org/never-downloaded", env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    )
    assert ran.code == 9 and len(ran.err.splitlines()) == 1
    assert "cannot be reached (HF_HUB_OFFLINE is set); check the name" in ran.err
    assert "hf download org/never-downloaded" in ran.err


@pytest.mark.parametrize("content", [b"", b"GGU", bytes(64), b"\xff" * 64])
def test_a_damaged_gguf_is_not_called_a_safetensors_file(in_process, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    ran = in_process("plan", "x", "--model", "x.gguf")
    assert ran.code == 3 and "x.gguf: not a GGUF file" in ran.err and "safetensors" not in ran.err


def test_a_hub_cache_is_read_offline(tiler, tiny: Path, tmp_path: Path) -> None:
    sha = "0" * 40
    repo = tmp_path / "hf/hub/models--org--tiny"
    shutil.copytree(tiny, repo / "snapshots" / sha)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text(sha)
    ran = tiler(
        "render",
        "x",
        "--model",
        "org/tiny",
        "--size",
        64,
        "--steps",
        1,
        "--no-guide",
        "--json",
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")},
    )
    assert ran.code == 0, ran.err
    assert ran.json["revision"] == sha


def test_nan_weights_are_exit_7(in_process, tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)

    def poke(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[-400:-200] = b"\xff\x7f" * 100
        path.write_bytes(data)

    damage(folder, "unet", poke)
    ran = in_process("render", "x", "--model", folder, "--size", "64", "--steps", "1", "--quiet")
    assert ran.code == 7
    assert "NaN" in ran.err
