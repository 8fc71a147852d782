"""A single file of the size of SD 1.5, 2 GB, draws the same picture as the folder it was made from."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.full.marks import made, render_peak
from tiler.models.vocabulary import END, clip_tokenizer

pytestmark = pytest.mark.full


def test_latents_and_pixels_are_the_folders(tmp_path: Path) -> None:
    """No scheduler is given. The file takes at most 20 MB more than the folder."""
    from checkpoints._single import write_single

    whole, folder = Path(made("sd15")), tmp_path / "sd15"
    folder.mkdir()
    for path in whole.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "tokenizer").unlink()
    shutil.copytree(whole / "tokenizer", folder / "tokenizer")
    for path in clip_tokenizer(END).iterdir():  # the words of published checkpoints
        shutil.copy(path, folder / "tokenizer")
    file = write_single(folder, tmp_path / "single.safetensors")
    options = "--size", "256", "--steps", "1", "--no-guide", "--cfg-scale", "1", "--precision", "fp32", "--force"
    latents, pixels, peaks = [], [], []
    for model in (folder, file):
        save = "--save-latents", str(tmp_path / "x.safetensors")
        peak, _ = render_peak(tmp_path, "--model", str(model), *options, *save)
        peaks.append(peak)
        latents.append(load_file(tmp_path / "x.safetensors")["latents"])
        with Image.open(tmp_path / "x.png") as picture:
            pixels.append(picture.tobytes())
    file.unlink()
    assert torch.equal(*latents)
    assert pixels[0] == pixels[1]
    assert peaks[1] - peaks[0] <= 20_000_000, peaks
