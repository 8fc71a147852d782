"""Folders that are not an SDXL model, or lack a part of one: one line and exit code 3."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import make_checkpoint

    return make_checkpoint.make("tiny-sdxl", tmp_path_factory.mktemp("checkpoints"))


def change(folder: Path, file: str, **values: object) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


BAD_MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "refiner": (lambda f: change(f, "model_index.json", text_encoder=[None, None]), "SDXL's refiner"),
    "refiner's scores": (lambda f: change(f, "model_index.json", requires_aesthetics_score=True), "SDXL's refiner"),
    "refiner's UNet": (lambda f: change(f, "unet/config.json", cross_attention_dim=1280), "SDXL's refiner"),
    "inpainting": (lambda f: change(f, "unet/config.json", in_channels=9), "inpainting"),
    "inpainting pipeline": (
        lambda f: change(f, "model_index.json", _class_name="StableDiffusionXLInpaintPipeline"), "inpainting",
    ),
    "no second encoder": (
        lambda f: shutil.rmtree(f / "text_encoder_2"),
        "text_encoder_2/config.json is missing; run: hf download stabilityai/stable-diffusion-xl-base-1.0 --include "
        "'text_encoder_2/*' --local-dir",
    ),
    "no second tokenizer": (
        lambda f: shutil.rmtree(f / "tokenizer_2"),
        "run: hf download stabilityai/stable-diffusion-xl-base-1.0 --include 'tokenizer_2/*' --local-dir",
    ),
    "text width": (lambda f: change(f, "text_encoder_2/config.json", hidden_size=64), "text width 80"),
    "pooled width": (
        lambda f: change(f, "text_encoder_2/config.json", projection_dim=32),
        "projection_class_embeddings_input_dim = 72",
    ),
    "encoder of another kind": (lambda f: change(f, "text_encoder_2/config.json", model_type="t5"), "'t5'"),
    "foreign UNet": (lambda f: change(f, "unet/config.json", class_embed_type="timestep"), "class_embed_type"),
    "SD class": (lambda f: change(f, "model_index.json", _class_name="StableDiffusionPipeline"), "this UNet is SDXL's"),
    "latents_std": (lambda f: change(f, "vae/config.json", latents_std=[1.0, 1.0]), "latents_std"),
    "LoRA": (lambda f: only(f, "pytorch_lora_weights.safetensors"), "this is a LoRA"),
    "ControlNet": (
        lambda f: (only(f, "diffusion_pytorch_model.safetensors"), config(f, "ControlNetModel")),
        "this is a ControlNet",
    ),
}  # fmt: skip


def only(folder: Path, file: str) -> None:
    """The folder of a single model."""
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / file).write_bytes(b"")


def config(folder: Path, cls: str) -> None:
    (folder / "config.json").write_text(json.dumps({"_class_name": cls}))


@pytest.mark.parametrize("name", BAD_MODELS)
def test_bad_models_are_exit_3_and_one_line(in_process: Any, sdxl: Path, tmp_path: Path, name: str) -> None:
    spoil, message = BAD_MODELS[name]
    folder = shutil.copytree(sdxl, tmp_path / "model")
    spoil(folder)
    ran = in_process("plan", "x", "--model", folder, "--size", 128)
    assert ran.code == 3, ran.err
    assert message in ran.err
    assert len(ran.err.strip().splitlines()) == 1
