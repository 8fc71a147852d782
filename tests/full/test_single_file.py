"""A single file of the size of SD 1.5, 2 GB, draws the same picture as the folder it was made from; on request, files
of SD 2.1's size and of SDXL's width do too."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.full.marks import made, render_peak
from tiler.models.vocabulary import END, clip_tokenizer

pytestmark = pytest.mark.full
ON_REQUEST = pytest.mark.skipif(
    "TILER_TEST_WIDE" not in os.environ, reason="minutes, and 5 GB; TILER_TEST_WIDE=1 runs them"
)


@pytest.mark.parametrize(
    ("kind", "pads", "said"),
    [
        ("sd15", {"tokenizer": END}, ()),
        # Random weights do not show what they predict.
        pytest.param("sd21", {"tokenizer": "!"}, ("--prediction", "v"), marks=ON_REQUEST),
        pytest.param("wide-sdxl", {"tokenizer": END, "tokenizer_2": "!"}, (), marks=ON_REQUEST),
    ],
)
def test_latents_and_pixels_are_the_folders(
    tmp_path: Path, kind: str, pads: dict[str, str], said: tuple[str, ...]
) -> None:
    """No scheduler is given. The file takes at most 20 MB more than the folder."""
    from checkpoints._single import write_single

    whole, folder = Path(made(kind)), tmp_path / kind
    folder.mkdir()
    for path in whole.iterdir():
        if path.name not in pads:
            (folder / path.name).symlink_to(path)
    for name, pad in pads.items():
        shutil.copytree(whole / name, folder / name)
        for path in clip_tokenizer(pad).iterdir():  # the words of published checkpoints
            shutil.copy(path, folder / name)
    file = write_single(folder, tmp_path / "single.safetensors")
    common = "--size", "128", "--steps", "1", "--no-guide", "--cfg-scale", "1", "--precision", "fp32", "--force"
    options = *common, *said
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
