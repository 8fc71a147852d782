"""`--precision bf16` from the command line and the library: a picture close to the one in fp32, or one clear line."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tiler import Budget, RenderRequest, render
from tiler.native import library
from tiler.request import Precision


def test_it_is_refused_where_nothing_computes_with_it(in_process, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiler.run.has_bf16", lambda: False)
    refused = in_process("plan", "x", "-m", tiny, "--size", 64, "--precision", "bf16")
    assert refused.code == 2
    assert "BF16 instructions" in refused.err and "int8, fp32 or auto" in refused.err


@pytest.mark.skipif(not library.has_bf16(), reason="no bf16 here")
def test_a_picture_is_nearly_the_one_in_fp32(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiler.compute.layers.SMALL", 100)
    latents = {}
    for precision in Precision.FP32, Precision.BF16:
        file = tmp_path / f"{precision}.safetensors"
        request = RenderRequest(
            prompt="x", model=str(tiny), size=64, num_inference_steps=1, seed=1, precision=precision, guide=False,
            save_latents=file, output=tmp_path / f"{precision}.png",
        )  # fmt: skip
        with Budget(2_000_000_000) as budget:
            report = render(request, budget).report
        assert report["precision"] == precision
        latents[precision] = load_file(file)["latents"]
    apart = (latents[Precision.BF16] - latents[Precision.FP32]).norm() / latents[Precision.FP32].norm()
    assert 1e-5 < apart < 2e-2
