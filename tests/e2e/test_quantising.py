"""`tiler quantize --weights` writes a folder that optimum-quanto and tiler read the same way, complete or not at
all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.models.rendering import ask, edit, rendered
from tiler.models.family import Role, read_family
from tiler.weights.checkpoint import resolve
from tiler.weights.index import read_metadata
from tiler.weights.store import WeightStore, match_index


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import make_checkpoint

    return make_checkpoint.make("tiny-pixart", tmp_path_factory.mktemp("quantising"))


def weights_of(model: Path, role: Role) -> dict[str, torch.Tensor]:
    family = read_family(resolve(str(model)))
    part = family.part(role)
    index = match_index(part.build(), family.checkpoint.weights(part.name), part.aliases)
    with WeightStore(index) as store:
        return {name: store.load(name) for name in index}


@pytest.mark.parametrize("kind", ["int8", "fp8", "int4"])
def test_optimum_quanto_reads_the_weights_that_tiler_reads(
    in_process, quanto, model: Path, tmp_path: Path, kind: str
) -> None:
    from diffusers import PixArtTransformer2DModel

    ran = in_process(
        "quantize", model, "--weights", kind, "-o", "q", "--exclude", "*.attn1.to_k,transformer_blocks.1.*"
    )
    assert ran.code == 0, ran.err
    folder = tmp_path / "q" / "transformer"
    file = folder / "diffusion_pytorch_model.safetensors"
    layers = json.loads((folder / "quanto_qmap.json").read_text())
    assert layers and not any(("to_k" in name and "attn1" in name) or "blocks.1." in name for name in layers)
    assert not any(name.startswith(("proj_out", "pos_embed", "adaln_single", "caption")) for name in layers)
    assert f"transformer {kind}, without *.attn1.to_k" in read_metadata(file)["made"]
    theirs = PixArtTransformer2DModel.from_config(json.loads((folder / "config.json").read_text())).half()
    quanto.requantize(theirs, load_file(file), layers)
    ours, plain = weights_of(tmp_path / "q", Role.DENOISER), weights_of(model, Role.DENOISER)
    parameters: dict[str, Any] = dict(theirs.named_parameters())
    for name, value in ours.items():
        if (module := name.removesuffix(".weight")) in layers:
            assert torch.equal(value, parameters[name].dequantize().float()), name
            step = (plain[name] - value).norm() / plain[name].norm()
            assert 0 < step < {"int8": 0.01, "fp8": 0.04, "int4": 0.15}[kind], name
        else:
            assert torch.equal(value, plain[name]), name
            assert module not in layers


def test_the_folder_renders_much_the_same_picture(in_process, model: Path, tmp_path: Path) -> None:
    assert in_process("quantize", model, "--weights", "fp8", "-o", "q", "-q").code == 0
    got, want = (rendered(ask(m, tmp_path, size=64, num_inference_steps=1))[0] for m in (tmp_path / "q", model))
    assert 0 < (got - want).norm() / want.norm() < 0.2


FAMILIES = {"tiny": "int4", "tiny-sdxl": "fp8", "tiny-sd3": "int8", "tiny-flux": "int4", "tiny-auraflow": "int4"}


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_is_quantised_and_rendered(
    in_process, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The denoiser and the text encoders, except the second one of SDXL and Stable Diffusion 3; small layers too."""
    import make_checkpoint

    monkeypatch.setattr("tiler.models.unet.SMALL", 500)
    model, weights = make_checkpoint.make(kind, tmp_path), FAMILIES[kind]
    ran = in_process("quantize", model, "--weights", weights, "--text-encoder-weights", "int8", "-o", "q", "--json")
    assert ran.code == 0, ran.err
    own, made = (
        sum(file.stat().st_size for file in folder.rglob("*.safetensors")) for folder in (model, tmp_path / "q")
    )
    assert made < own
    quantised = {file.parent.name for file in (tmp_path / "q").glob("*/quanto_qmap.json")}
    encoders = {"text_encoder"} | ({"text_encoder_3"} if kind == "tiny-sd3" else set())
    encoders |= {"text_encoder_2"} if kind == "tiny-flux" else set()
    assert quantised == encoders | {"unet" if kind in ("tiny", "tiny-sdxl") else "transformer"}
    got, want = (rendered(ask(m, tmp_path, size=64, num_inference_steps=1))[0] for m in (tmp_path / "q", model))
    assert 0 < (got - want).norm() / want.norm() < 0.3


def test_text_encoders_are_asked_for_apart(in_process, model: Path, tmp_path: Path) -> None:
    ran = in_process("quantize", model, "--weights", "int8", "--text-encoder-weights", "1=int4", "-o", "q", "--json")
    assert ran.code == 0, ran.err
    assert set(ran.json["part_bytes"]) == {"text_encoder", "transformer", "vae"}
    layers = json.loads((tmp_path / "q/text_encoder/quanto_qmap.json").read_text())
    assert layers and all(entry["weights"] == "qint4" for entry in layers.values())
    ours, plain = weights_of(tmp_path / "q", Role.TEXT_ENCODER), weights_of(model, Role.TEXT_ENCODER)
    assert torch.equal(ours["shared.weight"], plain["shared.weight"])
    vae = [load_file(next((folder / "vae").glob("*.safetensors"))) for folder in (tmp_path / "q", model)]
    assert all(torch.equal(vae[0][name], vae[1][name]) for name in vae[1])


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--weights", "int8"), 2, "name it with --output"),
        (("-o", "q"), 2, "belong to --weights"),
        (("--weights", "int5", "-o", "q"), 2, "int5"),
        (("--weights", "int8", "--text-encoder-weights", "2=int8", "-o", "q"), 2, "names encoder 2, but"),
        (("--weights", "int8", "--text-encoder-weights", "int9", "-o", "q"), 2, "neither int8, fp8, int4"),
        (("--weights", "int8", "-o", "full"), 2, "full is not empty"),
        (("--weights", "int8", "-o", "full/x"), 2, "is a file"),
        (
            ("--weights", "int8", "-o", "q", "--exclude", "*.to_k,nope.*"),
            2,
            "--exclude nope.*: no layer has such a name",
        ),
        (("--weights", "int8", "-o", "model"), 2, "the model's own folder"),
        (("--weights", "int8", "-o", "model/new"), 2, "the model's own folder"),
    ],
)
def test_what_cannot_be_written_is_refused(
    in_process, model: Path, tmp_path: Path, options: Any, code: int, message: str
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").touch()
    (tmp_path / "model").symlink_to(model)
    ran = in_process("quantize", model, *options)
    assert ran.code == code and message in ran.err, ran.err
    assert len(ran.err.strip().splitlines()) == 1, ran.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "model"]


def test_what_is_quantised_is_not_quantised_again(in_process, model: Path, tmp_path: Path) -> None:
    assert in_process("quantize", model, "--weights", "int8", "-o", "q", "-q").code == 0
    ran = in_process("quantize", "q", "--weights", "int4", "-o", "r", "-q")
    assert ran.code == 3 and "is quantised already" in ran.err
    assert len(ran.err.strip().splitlines()) == 1, ran.err
    assert not (tmp_path / "r").exists() and not list(tmp_path.glob(".*"))


def test_a_failure_leaves_nothing(in_process, model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "m")
    edit(tmp_path / "m", "transformer", num_layers=3)  # more layers than there are
    ran = in_process("quantize", "m", "--weights", "int8", "-o", "r")
    assert ran.code == 3 and "is missing" in ran.err
    assert not (tmp_path / "r").exists() and not list(tmp_path.glob(".*"))
