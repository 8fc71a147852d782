"""Configs that diffusers corrects are corrected the same way when a checkpoint is read, and a note says so."""

from __future__ import annotations

from pathlib import Path

import make_checkpoint
import pytest

from tiler.models.family import read_family
from tiler.weights.checkpoint import resolve


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_old_checkpoint_is_read_as_diffusers_reads_it(tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    make_checkpoint.make("tiny-old", tmp_path)
    pipe = StableDiffusionPipeline.from_pretrained(
        tmp_path / "tiny-old", variant="fp16", safety_checker=None, feature_extractor=None
    )
    family = read_family(resolve(str(tmp_path / "tiny-old")))
    assert family.native == pipe.unet.config.sample_size == 64
    assert any("sample_size" in note for note in family.notes)
