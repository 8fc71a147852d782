"""Prompts that were encoded before: kept for the next render, or carried in a file to where no text encoder is."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.models.rendering import ask, edit, rendered
from tiler import Budget, EncodeRequest, encode, plan
from tiler.memory.process import read_rss
from tiler.models import embeds
from tiler.models.embeds import read_words
from tiler.request import Precision

KINDS = "tiny", "tiny-sdxl", "tiny-sd3", "tiny-pixart", "tiny-flux", "tiny-auraflow"
LONG = 'A lighthouse, "Fastnet", on a cliff, WAVES, dramatic light, ' * 30


@pytest.fixture(scope="module", params=KINDS)
def model(request: Any, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import make_checkpoint

    return tiny if request.param == "tiny" else make_checkpoint.make(request.param, tmp_path_factory.mktemp("made"))


def encoded(model: Path, output: Path, *prompts: str, **values: Any) -> dict[str, Any]:
    request = EncodeRequest(prompts=prompts, model=str(model), output=output, **values)
    return encode(request, Budget(read_rss().now + 10**9)).report


def bytes_read(report: dict[str, Any]) -> int:
    """Of what is no denoiser."""
    return report["weight_bytes_read"] - report["denoiser_bytes_read"]


def test_a_machine_without_text_encoders_renders_the_same_picture(model: Path, tmp_path: Path) -> None:
    """The second render takes its prompts from the cache, the third from a file, and where it runs nothing could encode them."""
    asked: dict[str, Any] = {"negative_prompt": "fog", "num_inference_steps": 1, "cache_dir": tmp_path / "cache", "size": 128}
    want, first = rendered(ask(model, tmp_path, **asked))
    again, second = rendered(ask(model, tmp_path, **asked))
    assert torch.equal(want, again) and bytes_read(second) < bytes_read(first)
    report = encoded(model, tmp_path / "words.safetensors", "a boat", negative_prompts=("fog",))
    assert report["prompts"] == 3
    bare = shutil.copytree(model, tmp_path / "bare", ignore=shutil.ignore_patterns("text_encoder*", "tokenizer*"))
    got, third = rendered(ask(bare, tmp_path, **asked, prompt_embeds=tmp_path / "words.safetensors"))
    assert torch.equal(got, want) and bytes_read(third) == bytes_read(second)
    planned = plan(ask(bare, tmp_path, **asked, prompt_embeds=tmp_path / "words.safetensors")).facts()
    assert list(planned["read_bytes"]) == ["unet" if (model / "unet").is_dir() else "transformer"]
    assert "encode prompts" in {phase["name"] for phase in planned["phases"]}
