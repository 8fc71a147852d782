"""The number of threads changes no bit, neither of a single step nor of a render."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

from tiler.compute import onednn, steps
from tiler.compute.kernels import Epilogue


@pytest.fixture(params=["library", "torch"])
def by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With tiler's library and without."""
    if request.param == "torch":
        monkeypatch.setattr(steps, "library", lambda: None)


@torch.no_grad()
@pytest.mark.usefixtures("by")
def test_steps_of_odd_sizes() -> None:
    def digest(threads: int) -> str:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        results = []
        for channels, height, width in (320, 64, 64), (48, 37, 41), (96, 301, 7), (64, 1, 1):
            for layout in torch.contiguous_format, torch.channels_last:
                x = torch.randn(2, channels, height, width).contiguous(memory_format=layout)
                results.append(steps.group_norm(nn.GroupNorm(16, channels), x))
                results += [steps.activated(act, x.clone()) for act in (nn.SiLU(), nn.GELU(), nn.GELU("tanh"))]
            for side in (1, 3):
                geometry = onednn.Geometry((side // 2,) * 2, (1, 1), (1, 1), 1)
                kernel = torch.randn(40, channels, side, side)
                results.append(onednn.plain_convolution(x, kernel, torch.randn(40), geometry))
        results += [steps.product(torch.randn(1, n, 64), torch.randn(48, 64), torch.randn(48)) for n in range(1, 20)]
        products = torch.randn(1, 1517, 398)
        results += steps.finished(Epilogue(activation=nn.GELU(), glu=True), [products], None)
        return hashlib.sha256(b"".join(x.contiguous().numpy().tobytes() for x in results)).hexdigest()

    before = torch.get_num_threads()
    try:
        assert len({digest(threads) for threads in (1, 2, 3)}) == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "options",
    [
        ("--model", "mini", "-W", 288, "-H", 256, "--precision", "int8", "--decode", "frozen"),
        ("--model", "tiny", "-W", 104, "-H", 72, "--decode", "exact"),
    ],
    ids=["mini", "tiny"],
)
def test_a_render(in_process: Any, tmp_path: Path, tiny: Path, options: tuple[object, ...]) -> None:
    results = []
    for threads in (1, 2):  # neither takes prompts or int8 weights of the other
        command = ["render", "a red lighthouse", *(tiny if word == "tiny" else word for word in options)]
        outputs = ("-o", f"{threads}.png", "--save-latents", f"{threads}.safetensors", "--cache-dir", f"cache{threads}")
        ran = in_process(*command, "--steps", 2, "--seed", 7, *outputs, "--threads", threads)
        assert ran.code == 0, ran.err
        latents = load_file(tmp_path / f"{threads}.safetensors")["latents"]
        results.append((latents, (tmp_path / f"{threads}.png").read_bytes()))
    (latents, picture), (same_latents, same_picture) = results
    assert np.array_equal(latents, same_latents)
    assert picture == same_picture  # metadata and profile too


@torch.no_grad()
@pytest.mark.usefixtures("by")
@pytest.mark.parametrize("shape", [(2, 96, 13, 7), (1, 320, 64, 64), (1, 64, 1, 1)])
@pytest.mark.parametrize("affine", [True, False])
def test_group_norm_is_torchs(shape: tuple[int, ...], affine: bool) -> None:
    """Also with a mean far from zero, and in both memory layouts; of each sample by itself, bit for bit."""
    torch.manual_seed(1)
    norm = nn.GroupNorm(32, shape[1], affine=affine)
    for parameter in norm.parameters():
        parameter.copy_(torch.randn(parameter.shape))
    exact = nn.GroupNorm(32, shape[1], affine=affine).double()
    exact.load_state_dict(norm.state_dict())
    for layout in torch.contiguous_format, torch.channels_last:
        x = (torch.randn(shape) + 100 * torch.randn(1, shape[1], 1, 1)).contiguous(memory_format=layout)
        got, want = steps.group_norm(norm, x), exact(x.double())
        expected = torch.channels_last if steps.library() is not None and onednn.convolves() else layout
        assert got.is_contiguous(memory_format=expected)
        assert (got - want).abs().max() < 1e-4 * want.abs().max()
        assert torch.equal(got, torch.cat([steps.group_norm(norm, one) for one in x.split(1)]))


@torch.no_grad()
@pytest.mark.usefixtures("by")
def test_a_group_norm_gives_not_a_number_back() -> None:
    x = torch.randn(1, 64, 5, 5)
    x[0, 3, 2, 2] = torch.nan
    broken = steps.group_norm(nn.GroupNorm(32, 64), x)[0].isnan().flatten(1).all(1)
    assert broken.nonzero().flatten().tolist() == [2, 3]  # its group
