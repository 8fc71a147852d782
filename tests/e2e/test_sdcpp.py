"""GGUF files written by stable-diffusion.cpp: each renders like its fp32 twin, whose values come from GGUF's own
library."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import build_sdcpp
import gguf
import make_checkpoint
import numpy as np
import pytest
import torch
from checkpoints import _single, _single_dit
from safetensors.torch import save_file

from tests.e2e.test_quantised_files import assert_alike, picture
from tests.models.test_denoiser_files import assert_same_weights
from tiler.models.built import Models
from tiler.models.family import open_family
from tiler.packing import packed_names, packed_parts, packed_weights
from tiler.request.model import ModelOptions
from tiler.weights.codecs import CODECS
from tiler.weights.gguf import read_gguf
from tiler.weights.store import WeightStore, match_index

# Of each tensor's name a part, and the type that it gets; of these blocks of 256 channels stable-diffusion.cpp leaves
# nothing as it is.
TYPES = {
    "blocks.0.x_block.attn.qkv": "q4_K", "blocks.0.x_block.attn.proj": "q2_K", "blocks.0.x_block.mlp.fc1": "q3_K",
    "blocks.0.x_block.mlp.fc2": "q5_K", "blocks.0.context_block.attn.qkv": "q6_K", "blocks.0.context": "iq4_xs",
    "blocks.1.x_block.attn.qkv": "q4_0", "blocks.1.x_block.attn.proj": "q4_1", "blocks.1.x_block.mlp.fc1": "q5_0",
    "blocks.1.x_block.mlp.fc2": "q5_1", "blocks.1.context_block.attn.qkv": "iq4_nl", "blocks.1.context": "bf16",
    "blocks.2.x_block.attn.qkv": "f16", "blocks.2.x_block.attn.proj": "f32",
}  # fmt: skip


@pytest.fixture(scope="module")
def sd_cli() -> Path:
    if not build_sdcpp.program().exists() and os.environ.get("TILER_BUILD_SDCPP") != "1":
        pytest.skip(f"no {build_sdcpp.program()}: `python scripts/build_sdcpp.py` builds it in three minutes")
    return build_sdcpp.build()


def converted(sd_cli: Path, file: Path, kind: str, rules: dict[str, str] | None = None) -> Path:
    """The file as GGUF, with `kind` for tensors without a rule of their own."""
    target = file.with_name(f"{file.stem}-{kind}.gguf")
    command = [sd_cli, "-M", "convert", "-m", file, "-o", target, "--type", kind]
    if rules:
        command += ["--tensor-type-rules", ",".join(f"{part}={own}" for part, own in rules.items())]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0 and target.exists(), done.stdout + done.stderr
    return target


def twin_of(file: Path) -> Path:
    """The file's values in fp32, with the same names."""
    tensors = {}
    for tensor in gguf.GGUFReader(file).tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        shape = [int(side) for side in reversed(tensor.shape)]
        tensors[tensor.name] = torch.from_numpy(np.array(values, dtype=np.float32).reshape(shape))
    save_file(tensors, file.with_suffix(".safetensors"))
    return file.with_suffix(".safetensors")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint.make("tiny-sd3", tmp_path_factory.mktemp("sdcpp"))


def test_a_denoiser_and_t5_in_blocks_of_every_type(sd_cli: Path, model: Path, tmp_path: Path) -> None:
    file = _single_dit.write_transformer(model, tmp_path / "sd3.safetensors", "sd3", "model.diffusion_model.")
    made = converted(sd_cli, file, "q8_0", TYPES)
    kinds = {info.dtype for info in read_gguf(made).tensors.values()}
    assert kinds == {name for name, codec in CODECS.items() if codec.values > 1} | {"F16", "BF16", "F32"}
    assert "general.architecture" not in read_gguf(made).keys
    (text,) = (model / "text_encoder_3").glob("*.safetensors")
    (tmp_path / "t5.safetensors").symlink_to(text)
    t5 = converted(sd_cli, tmp_path / "t5.safetensors", "q8_0")
    assert "Q8_0" in {info.dtype for info in read_gguf(t5).tensors.values()}
    (tmp_path / "spiece.model").symlink_to(next((model / "tokenizer_3").glob("spiece.model")))
    files = {"diffusion_model": made, "t5xxl": t5}
    twins = {name: str(twin_of(path)) for name, path in files.items()}
    given = {name: str(path) for name, path in files.items()}
    assert_alike(*(picture(model, tmp_path / "out", **options) for options in (given, twins)))


@pytest.mark.parametrize("kind", ["tiny-plain", "tiny-plain-sdxl"])
def test_a_whole_checkpoint(sd_cli: Path, kind: str, tmp_path: Path) -> None:
    """Matrices and norms in 8-bit blocks, one of them transposed: read as fp32, and packed as int8."""
    folder = make_checkpoint.make(kind, tmp_path)
    made = converted(sd_cli, _single.write_single(folder, tmp_path / "whole.safetensors"), "q8_0")
    assert "general.architecture" not in read_gguf(made).keys
    families = [open_family(ModelOptions(model=str(path))) for path in (made, twin_of(made))]
    assert_same_weights(*families)
    packed = [packed_weights(Models(family), tmp_path / "packed", lambda share, why: None) for family in families]
    for part in packed_parts(families[0]):
        indexes = [match_index(part.build(), stored, packed_names(part)) for stored in packed]
        with WeightStore(indexes[0]) as one, WeightStore(indexes[1]) as other:
            assert all(torch.equal(one.load(name), other.load(name)) for name in indexes[0]), part.name
