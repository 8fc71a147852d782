"""Encoded prompts: cached for the next render, or carried in a file to machines without text encoders."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.models.rendering import ask, rendered
from tiler import Budget, EncodeRequest, encode, plan
from tiler.memory.process import read_rss
from tiler.models.embeds import prune
from tiler.output.texts import read_texts
from tiler.planning.summary import read_bytes
from tiler.request import Precision

KINDS = "tiny", "tiny-sdxl", "tiny-sd3", "tiny-pixart", "tiny-flux", "tiny-auraflow"


@pytest.fixture(scope="module", params=KINDS)
def model(request: Any, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import make_checkpoint

    return tiny if request.param == "tiny" else make_checkpoint.make(request.param, tmp_path_factory.mktemp("made"))


def encoded(model: Path, output: Path, *prompts: str, **values: Any) -> dict[str, Any]:
    request = EncodeRequest(prompts=prompts, model=str(model), output=output, **values)
    return encode(request, Budget(read_rss().now + 10**9)).report


def bytes_read(report: dict[str, Any]) -> int:
    """The bytes read that do not belong to the denoiser."""
    return report["weight_bytes_read"] - report["denoiser_bytes_read"]


def test_a_machine_without_text_encoders_renders_the_same_picture(model: Path, tmp_path: Path) -> None:
    """Also with weights, prompts that change between steps, and joined prompts."""
    prompt = "a (boat:1.3) on a [lake:sea:0.5] AND gulls"
    asked = {"prompt": prompt, "negative_prompt": "fog", "num_inference_steps": 2, "size": 64}
    want, first = rendered(ask(model, tmp_path, **asked, cache_dir=tmp_path / "cache"))
    words = tmp_path / "words.safetensors"
    encoded(model, words, prompt, negative_prompts=("fog",), cache_dir=tmp_path / "another")
    bare = shutil.copytree(model, tmp_path / "bare", ignore=shutil.ignore_patterns("text_encoder*", "tokenizer*"))
    asked |= {"prompt": None, "negative_prompt": None, "prompt_embeds": words}  # the file says both
    got, second = rendered(ask(bare, tmp_path, **asked))
    assert torch.equal(got, want) and bytes_read(second) < bytes_read(first)


def test_what_decides_the_embeddings_decides_whether_they_are_taken(tiny: Path, tmp_path: Path) -> None:
    """If all prompts are cached, the plan has no text encoder and the render reads none."""
    copy = shutil.copytree(tiny, tmp_path / "copy")
    asked: dict[str, Any] = {"size": 64, "cache_dir": tmp_path / "cache", "num_inference_steps": 1}

    def known(**values: Any) -> bool:
        return plan(ask(copy, tmp_path, **asked | values)).plan.encoded

    assert not known()
    want, first = rendered(ask(tiny, tmp_path, **asked))
    assert known()  # the same model in another folder
    got, second = rendered(ask(copy, tmp_path, **asked))
    assert torch.equal(got, want) and bytes_read(second) < bytes_read(first)
    planned = plan(ask(copy, tmp_path, **asked))
    assert list(read_bytes(planned.models, Precision.FP32, encoded=planned.plan.encoded)) == ["unet"]
    peaks = {phase.name: {term.name for term in phase.terms} for phase in planned.plan.memory.phases}
    assert peaks["encode prompts"] == {"python + libraries", "prompts"}

    others = {"prompt": "a boat "}, {"precision": "int8"}, {"clip_skip": 2}, {"emphasis": "none"}
    assert [known(**values) for values in others] == [False] * len(others)
    settings = copy / "tokenizer/tokenizer_config.json"
    said = settings.read_text()
    settings.write_text(said + " ")
    assert not known()
    settings.write_text(said)
    path = next((copy / "text_encoder").glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert not known()


def test_a_prompt_that_was_cut_is_told_of_again(tiny: Path, tmp_path: Path) -> None:
    from checkpoints import pixart

    pixart.write(tmp_path / "pixart", "tiny")
    long = 'A Lighthouse, "Fastnet", on a cliff, waves, dramatic light, ' * 30
    asked = {"prompt": long, "num_inference_steps": 1, "size": 64, "cache_dir": tmp_path / "cache"}
    for model in (tiny, tmp_path / "pixart"):
        told: list[list[str]] = [[], []]
        for said in told:
            rendered(ask(model, tmp_path, **asked), said)
        cut = [[note for note in said if "was cut" in note] for said in told]
        assert len(cut[0]) == 1 and cut[0] == cut[1]


def test_a_damaged_file_in_the_cache_is_made_again(tiny: Path, tmp_path: Path) -> None:
    asked = {"num_inference_steps": 1, "size": 64, "cache_dir": tmp_path / "cache"}
    want, _ = rendered(ask(tiny, tmp_path, **asked))
    for path in (tmp_path / "cache/prompts").iterdir():
        path.write_bytes(path.read_bytes()[:-8])
    got, _ = rendered(ask(tiny, tmp_path, **asked))
    assert torch.equal(got, want)
    assert plan(ask(tiny, tmp_path, **asked)).plan.encoded


def test_a_cache_that_cannot_be_written_is_a_note(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("no folder")
    said: list[str] = []
    rendered(ask(tiny, tmp_path, num_inference_steps=1, size=64, cache_dir=tmp_path / "cache"), said)
    assert any("not stored for the next render" in note for note in said)


def test_the_files_that_were_not_used_for_longest_go_first(tmp_path: Path) -> None:
    for age, name in enumerate("abc"):
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(bytes(100))
        os.utime(path, (1000 - age, 1000 - age))
    prune(tmp_path, 250)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_a_file_that_does_not_go_with_the_render_is_exit_2(in_process: Any, tiny: Path, tmp_path: Path) -> None:
    import make_checkpoint

    words = tmp_path / "words.safetensors"
    assert in_process("encode", "a boat", "a pier", "-m", tiny, "-o", words, "-q").code == 0
    assert "exists" in in_process("encode", "a boat", "-m", tiny, "-o", words).err
    (tmp_path / "text.safetensors").write_text("no tensors")
    sdxl = make_checkpoint.make("tiny-sdxl", tmp_path / "made")
    other = next((tiny / "vae").glob("*.safetensors"))
    for options, message in (
        (
            ("a gull", "-m", tiny, "--prompt-embeds", words),
            "'a gull' is not in this file, which holds 'a boat', 'a pier'",
        ),
        (("a boat", "-n", "fog", "-m", tiny, "--prompt-embeds", words), "'fog' is not in this file"),
        (
            ("a boat", "-m", sdxl, "--prompt-embeds", words),
            "these prompts are for StableDiffusion, 77 tokens of width 32",
        ),
        (
            ("a boat", "-m", tiny, "--prompt-embeds", words, "--clip-skip", 2),
            "leave out --clip-skip 2, or give it to `tiler encode`",
        ),
        (("a boat", "-m", tiny, "--prompt-embeds", "nowhere"), "no such file; `tiler encode PROMPT -o"),
        (("a boat", "-m", tiny, "--prompt-embeds", "text.safetensors"), "not a safetensors file"),
        (("a boat", "-m", tiny, "--prompt-embeds", other), "holds no encoded prompts"),
    ):
        ran = in_process("render", *options, "--size", 64)
        assert ran.code == 2 and message in ran.err and len(ran.err.strip().splitlines()) == 1, ran.err


def test_prompts_are_read_as_a_render_reads_them(in_process: Any, tiny: Path, tmp_path: Path) -> None:
    """The file holds every text of a prompt that changes, and says how the texts were read."""
    said = "a [boat|ship] at (sea:1.4) AND [fog:sun:0.5] <knot> " + "and gulls, " * 30
    folder = tmp_path / "embeddings"
    folder.mkdir()
    save_file({"emb_params": torch.ones(3, 32)}, folder / "knot.safetensors")
    options: dict[str, Any] = {"clip_skip": 2, "emphasis": "no-norm", "embd_dir": folder}
    asked: dict[str, Any] = {"prompt": said, "negative_prompt": "[fog]", "size": 64, "num_inference_steps": 2}
    asked |= {"metadata": True, "output": tmp_path / "want.png"}
    want, _ = rendered(ask(tiny, tmp_path, cache_dir=tmp_path / "a", **asked | options))
    words = tmp_path / "words.safetensors"
    encoded(tiny, words, said, negative_prompts=("[fog]",), cache_dir=tmp_path / "b", **options)
    bare = shutil.copytree(tiny, tmp_path / "bare", ignore=shutil.ignore_patterns("text_encoder*", "tokenizer*"))
    asked |= {"output": tmp_path / "got.png", "prompt_embeds": words}
    got, _ = rendered(ask(bare, tmp_path, cache_dir=tmp_path / "c", **asked))
    assert torch.equal(got, want)
    told = [read_texts(tmp_path / name)["parameters"] for name in ("want.png", "got.png")]
    assert "Clip skip: 2" in told[1] and "knot" in told[1] and "No norm" in told[1]
    assert told[0].replace("Model: tiny", "Model: bare").partition("Version")[0] == told[1].partition("Version")[0]
    for flag, other, here in (("--clip-skip", "1", "2"), ("--emphasis", "ignore", "no-norm")):
        ran = in_process("render", said, "-m", bare, "--prompt-embeds", words, flag, other, "--size", 64)
        assert ran.code == 2 and f"encoded with {flag} {here}; leave out {flag} {other}" in ran.err
