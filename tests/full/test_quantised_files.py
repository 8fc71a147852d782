"""Flux's transformer at full width (2 + 2 blocks, random weights) in single files: as Black Forest Labs publish it, as
stable-diffusion.cpp writes it in blocks of 8 and 4 bits, and in fp8."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import NamedTuple

import build_sdcpp
import gguf
import numpy as np
import pytest
import torch
from checkpoints import _single_dit
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.full.marks import made, planned, render_peak, tiny_decoder
from tiler.models.family import Role, open_family
from tiler.request.model import ModelOptions
from tiler.weights.store import WeightStore, match_index

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif("TILER_TEST_WIDE" not in os.environ, reason="minutes, and 5 GB; TILER_TEST_WIDE=1 runs them"),
]
KINDS = "q8_0", "q4_K", "fp8"
# A tensor of each kind of block, whose rows become several parameters, and one of these.
STACKED = {
    "double_blocks.1.img_attn.qkv.weight": ("transformer_blocks.1.attn.to_k.weight", 3072, 6144),
    "single_blocks.0.linear1.weight": ("single_transformer_blocks.0.proj_mlp.weight", 9216, 21504),
    "single_blocks.1.linear2.weight": ("single_transformer_blocks.1.proj_out.weight", 0, 3072),
}


class Rendered(NamedTuple):
    """One step at 256²: the kernel's own mark, and the latents."""

    peak: int
    latents: Tensor


def rendered(folder: Path, *options: str) -> Rendered:
    """Under the smallest ceiling that does for the folder in fp16, and 10 MB: there is no room for weights that stay,
    whose number would differ."""
    model, saved = made("wide-flux"), folder / "x.safetensors"
    common = ["--size", "256", "--steps", "1", "--no-guide", *tiny_decoder(folder, 16)]
    smallest = planned(model, folder, "fp32", *common)["smallest_max_ram_bytes"]
    common += ["--precision", "fp32", "--max-ram", f"{smallest // 10**6 + 11}MB", "--force"]
    peak, _ = render_peak(folder, "--model", model, *common, "--save-latents", str(saved), *options)
    return Rendered(peak, load_file(saved)["latents"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Rendered:
    return rendered(tmp_path_factory.mktemp("folder"))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("original") / "flux.safetensors"
    return _single_dit.write_transformer(Path(made("wide-flux")), path, "flux")


def quantised(original: Path, kind: str, folder: Path) -> Path:
    if kind == "fp8":
        tensors = {
            name: tensor.to(torch.float8_e4m3fn) if tensor.ndim == 2 else tensor
            for name, tensor in load_file(original).items()
        }
        save_file(tensors, folder / "fp8.safetensors")
        return folder / "fp8.safetensors"
    if not build_sdcpp.program().exists():
        pytest.skip(f"no {build_sdcpp.program()}: `python scripts/build_sdcpp.py` builds it in three minutes")
    file = folder / f"{kind}.gguf"
    command = build_sdcpp.program(), "-M", "convert", "-m", original, "-o", file, "--type", kind
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0 and file.exists(), done.stdout + done.stderr
    return file


def meant(file: Path) -> dict[str, Tensor]:
    """What the libraries of these formats say that some tensors are, in fp32."""
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as tensors:
            return {name: tensors.get_tensor(name).float() for name in STACKED}
    found = {}
    for tensor in gguf.GGUFReader(file).tensors:
        name = tensor.name.removeprefix("model.diffusion_model.")
        if name in STACKED:
            assert tensor.tensor_type.name.lower() == file.stem.lower()
            found[name] = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
    return found


def test_the_original_file_draws_what_the_folder_draws(folder: Rendered, original: Path, tmp_path: Path) -> None:
    made_of_it = rendered(tmp_path, "--diffusion-model", str(original))
    assert folder.latents.isfinite().all()
    assert torch.equal(made_of_it.latents, folder.latents)
    assert made_of_it.peak - folder.peak <= 20_000_000, (made_of_it.peak, folder.peak)


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_file_takes_no_more_memory(folder: Rendered, original: Path, tmp_path: Path, kind: str) -> None:
    """Than fp16 and 10 MB; rows of its tensors are what the format's own library says."""
    file = quantised(original, kind, tmp_path)
    family = open_family(ModelOptions(model=made("wide-flux"), diffusion_model=str(file)))
    part = family.part(Role.DENOISER)
    index = match_index(part.build(), family.checkpoint.weights(part.name), part.aliases)
    values = meant(file)
    assert values.keys() == STACKED.keys()
    with WeightStore(index) as store:
        for name, (parameter, first, last) in STACKED.items():
            assert torch.equal(store.load(parameter), values[name][first:last]), name
    made_of_it = rendered(tmp_path, "--diffusion-model", str(file))
    assert made_of_it.latents.isfinite().all()
    assert 0 < (made_of_it.latents - folder.latents).norm() < 0.5 * folder.latents.norm()
    assert made_of_it.peak - folder.peak <= 10_000_000, (made_of_it.peak, folder.peak)
