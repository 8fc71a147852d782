"""`render`, then `--from` without other options: the same bytes, for every option."""

from __future__ import annotations

import shutil
from pathlib import Path

import make_checkpoint
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tiler.request import RenderRequest
from tiler.request.render import OF_THE_RUN

GROUPS = {
    "wallpaper": "--negative-prompt= --canvas-prompt sea --emphasis no-norm -W 80 -H 72 --wrap xy --dpi 150 --guidance-scale 2 "
    "--guidance-interval 0.1-0.7 --strength 0.6 --clip-skip 2 --scheduler euler-a --mask quartic --overlap 16 "
    "--attention-window 4 --guide-upscale latent --precision fp32 --scratch-dtype fp32 --steps 2 --variant fp16 --seed 18446744073709551615",
    "sheet": "--paper A10 --landscape --bleed 1mm --dpi 60 --preset fast --steps 2 --no-guide --decode frozen --tile-conditioning none --seed 4",
    "regions": "--size 80 --regions regions.toml --scheduler DPM++2M --schedule-type karras --layout grid --steps 2 --vae soft "
    "--text-encoder words --prediction epsilon -n fog --tile-size 64 --decode-precision fp32",
    "upscaled": "--guide guide.png --scale 2 --guide-sharpen 70 --steps 2 --strength 0.5 --lora ink.safetensors=0.5:0.25 --clip_l words --quality 70",
    "tiny decoder": "--size 72 --steps 2 --layout shift --decode tiny --tiny-vae taesd",
    "spot": "--guide guide.png --repaint mask.png --steps 2 --strength 0.8",
}
ELSEWHERE = {"prompt", "model", "revision", "diffusion_model", "clip_g", "t5xxl"}
"""Every picture's own; and parts of other families, of which test_repeat.py has the fields."""


@pytest.fixture(scope="module")
def kit(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all files that the options above name."""
    folder = tmp_path_factory.mktemp("kit")
    make_checkpoint.make("taesd", folder)
    shutil.copytree(tiny / "vae", folder / "soft")
    shutil.copy(next((tiny / "text_encoder").glob("*.fp16.safetensors")), folder / "words.safetensors")
    tensors = {"lora_down": torch.ones(2, 32), "lora_up": torch.ones(32, 2) / 8}
    save_file(
        {f"lora_te_text_model_encoder_layers_0_self_attn_q_proj.{k}.weight": v for k, v in tensors.items()},
        folder / "ink.safetensors",
    )
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (48, 56, 3), np.uint8)).save(folder / "guide.png")
    mask = Image.new("L", (56, 48))
    mask.paste(255, (10, 10, 30, 30))
    mask.save(folder / "mask.png")
    (folder / "regions.toml").write_text('[[region]]\nprompt = "boat"\nrows = [0, 72]\ncols = [0, 64]\nseed = 3\n')
    return folder


def test_every_option_is_in_a_group() -> None:
    offered = {
        name: field.metadata["option"].names
        for name, field in RenderRequest.__dataclass_fields__.items()
        if "option" in field.metadata
    }
    typed = {word.partition("=")[0] for group in GROUPS.values() for word in group.split() if word.startswith("-")}
    missing = {name for name, flags in offered.items() if typed.isdisjoint(flags)}
    assert missing - ELSEWHERE - set(OF_THE_RUN) == set()


@pytest.mark.parametrize("group", GROUPS)
def test_a_picture_is_repeated_to_the_byte(
    in_process, tiny: Path, kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: str
) -> None:
    for path in kit.iterdir():
        shutil.copytree(path, tmp_path / path.name) if path.is_dir() else shutil.copy(path, tmp_path)
    for kind in ("MODEL", "VAE", "TEXT_ENCODER", "LORA"):
        monkeypatch.setenv(f"TILER_{kind}_DIRS", f"{tiny.parent}:{tmp_path}" if kind == "MODEL" else str(tmp_path))
    spelt = {"words": tmp_path / "words.safetensors", "DPM++2M": "DPM++ 2M", "euler-a": "Euler a"}
    words = [spelt.get(word, word) for word in GROUPS[group].split()]
    suffix = "jpg" if "--quality" in words else "png"
    ran = in_process("render", "a boat", "--model", tiny, *words, "-o", f"a.{suffix}")
    assert ran.code == 0, ran.err
    ran = in_process("render", "--from", f"a.{suffix}", "-o", f"b.{suffix}")
    assert ran.code == 0, ran.err
    assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()
