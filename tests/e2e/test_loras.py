"""Whole renders with LoRAs, against diffusers' pipeline whose weights were changed by a closed formula."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from tests.models.loras import as_kohya, fuse, layers_of, random_lora, save
from tests.models.rendering import ask, rendered
from tiler.request import Precision, Scheduler


class Made:
    """A pipeline, and a LoRA file in kohya's spelling for its UNet and its text encoder."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.model = model
        self.pipe = StableDiffusionPipeline.from_pretrained(
            model, variant="fp16", torch_dtype=torch.float32, safety_checker=None, feature_extractor=None
        )
        self.pipe.scheduler = DDIMScheduler.from_config(self.pipe.scheduler.config)
        self.pipe.set_progress_bar_config(disable=True)
        self.unet = random_lora(self.pipe.unet, layers_of(self.pipe.unet))
        self.text = random_lora(self.pipe.text_encoder, layers_of(self.pipe.text_encoder), seed=1)
        text = {f"text_model.{path.removeprefix('text_model.')}": pair for path, pair in self.text.items()}
        self.file = save(
            folder / "foo.safetensors", as_kohya("lora_unet", self.unet, 2.0) | as_kohya("lora_te", text, 2.0)
        )

    def latents(self, unet: float, text: float) -> Tensor:
        """What the pipeline gives at these strengths; alpha is 2, the rank 3."""
        fuse(self.pipe.unet, self.unet, unet * 2 / 3)
        fuse(self.pipe.text_encoder, self.text, text * 2 / 3)
        settings = {"num_inference_steps": 3, "guidance_scale": 6.0, "width": 64, "height": 64}
        got: Tensor = self.pipe(
            "a boat", generator=torch.Generator().manual_seed(5), output_type="latent", **settings
        ).images
        return got


@pytest.fixture
def made(tiny: Path, tmp_path: Path) -> Made:
    (tmp_path / "loras").mkdir()
    return Made(tiny, tmp_path / "loras")


def boat(made: Made, folder: Path, **values: Any) -> Tensor:
    defaults = {"width": 64, "height": 64, "guidance_scale": 6.0, "scheduler": Scheduler.DDIM}
    latents, _ = rendered(ask(made.model, folder, **(defaults | values)))
    return latents


def test_a_tag_is_what_the_pipeline_gives_with_the_lora_fused(made: Made, tmp_path: Path) -> None:
    plain = boat(made, tmp_path)
    got = boat(made, tmp_path, prompt="a boat<lora:foo:0.8>", lora_dir=tmp_path / "loras")
    want = made.latents(0.8, 0.8)
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()
    assert (plain - want).abs().max() > 0.05 * want.abs().max()  # it is felt
    image: Any = Image.open(tmp_path / "x.png")
    assert image.text["parameters"].startswith("a boat<lora:foo:0.8>\n")
    assert 'Lora hashes: "foo: ' in image.text["parameters"]
    assert list(json.loads(image.text["tiler"])["lora_hashes"]) == ["foo"]


def test_text_encoders_have_a_strength_of_their_own(made: Made, tmp_path: Path) -> None:
    got = boat(made, tmp_path, loras=(f"{made.file}=0.5:1.5",))
    want = made.latents(0.5, 1.5)
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.INT8])
def test_strength_0_changes_no_byte(made: Made, tmp_path: Path, precision: Precision) -> None:
    values = {"precision": precision, "cache_dir": tmp_path / "packed"}
    plain = boat(made, tmp_path, **values)
    assert torch.equal(boat(made, tmp_path, loras=(f"{made.file}=0",), **values), plain)
    assert not torch.equal(boat(made, tmp_path, loras=(f"{made.file}=0.5",), **values), plain)
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) == (
        precision is Precision.INT8
    )  # one packed file for all strengths
