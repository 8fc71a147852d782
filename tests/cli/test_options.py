"""Bad options and regions end with exit code 2 and one line, and write nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

BAD_OPTIONS = [
    (["--size", "0"], "--size 0"),
    (["--size", "-64"], "--size -64"),
    (["--size", "1000000"], "--size 1000000"),
    (["--size", "56", "--wrap", "x"], "cannot make a side of 56 pixels; take 64"),
    (["--report", "tiler.png"], "same file"),
    (["-o", "a.png", "--save-latents", "a.png"], "same file"),
    (["--steps", "0"], "--steps 0"),
    (["--steps", "1000000"], "steps"),
    (["--cfg-scale", "nan"], "guidance-scale"),
    (["--cfg-scale", "-1"], "guidance-scale"),
    (["--strength", "1.5"], "--strength 1.5"),
    (["--seed", "-2"], "seed"),
    (["--overlap", "64"], "overlap"),
    (["--overlap", "7"], "overlap"),
    (["--scheduler", "dpm fast"], "unknown scheduler"),
    (["--canvas-prompt", "x <lora:nope:abc>"], "'abc' is not a number"),  # rather than about a folder
    (["--mask", "square"], "mask"),
    (["--max-ram", "lots"], "800MB"),
    (["--max-ram", "1"], "--max-ram '1' is an amount of bytes"),
    (["--lora-dir", "none"], "--lora-dir none: no such folder"),
    (["--model-dir", "none"], "--model-dir none: no such folder"),
    (["--threads", "0"], "threads"),
    (["--guide", "none.png"], "none.png"),
    (["--guide", "."], ". is a folder; --guide takes"),
    (["--scale", "2"], "give that with --guide IMG"),
    (["--repaint", "mask.png"], "give that with --guide IMG"),
    (["--steps", "abc"], "--steps abc: not a whole number"),
    (["--cfg-scale", "abc"], "--guidance-scale abc: not a number"),
    (["--nice", "20"], "--nice 20: must be at most 19"),
    (["--guide", "none.png", "--no-guide"], "does not go with"),
    (["-o", "no/such/folder/x.png"], "does not exist"),
    (["-o", "."], "is a folder"),
    (["-o", "x.gif"], ".png"),
    (["--regions", "none.toml"], "none.toml"),
    (["--nonsense"], "nonsense"),
    (["--size", "512x768"], "give -W 512 -H 768"),
    (["--prompt", "a boat"], 'tiler render "a boat"'),
    (["--sampler", "Euler a"], "--scheduler names the sampler"),
    (["--batch-size", "4"], "--count makes several"),
    (["boat"], "extra argument(s) (boat); put a prompt of several words in quotes"),
    (["-o", f"{__file__}/x.png"], "test_options.py is a file, not a folder"),
    (["--preview", "x.gif"], "give --preview a name that ends so"),
    (["--save-latents", "x.png"], "this file holds no picture; give it a name like x.safetensors"),
    (["--wrap", "x", "--width", "130"], "multiples of 8"),
    (["--wrap", "z"], "wrap"),
    (["--guide-upscale", "none"], "guide-upscale"),
    (["--paper", "A2"], "--paper sets the size"),
    (["--bleed", "3mm"], "need a sheet"),
    (["--dpi", "0"], "--dpi 0"),
    (["--decode", "best"], "decode"),
    (["--guidance-interval", "0.8-0.2"], "rising"),
    (["--guidance-interval", "half"], "0.2-0.8"),
    (["--attention-window", "1"], "--attention-window 1"),
    (["--layout", "shift", "--overlap", "16"], "leave out --overlap"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_bad_options_are_exit_2_and_one_line(
    in_process, tiny: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    ran = in_process("render", "x", "--model", tiny, "--size", "128", *options)
    assert ran.code == 2, ran.err
    assert message in ran.err
    assert "Traceback" not in ran.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("prompt = 'x'", "no [[region]]"),
        ("[[region]]\nprompt = 'x'", "has no"),
        ("[[region]]\nprompt = 'x'\nrows = [0, 64]\ncols = [0, 64]\ncolour = 1", "colour"),
        ("[[region]]\nprompt = 'x'\nrows = [0, 64]\ncols = [0, 'a']", "cols"),
        ("[[region]]\nprompt = 'x'\nrows = [0, 256]\ncols = [0, 64]", "outside"),
        ("[[region]]\nprompt = 'x'\nrows = [0, 32]\ncols = [0, 64]", "smaller than a tile"),
        ("[[region]]\nprompt = 'x'\nrows = [0, 128]\ncols = [0, 64]\nmask = 'round'", "mask"),
        ("region = 3", "no [[region]]"),
        ("region = [1, 2]", "not a table"),
        ("= broken", "not valid TOML"),
    ],
)
def test_bad_regions(in_process, tiny: Path, tmp_path: Path, toml: str, message: str) -> None:
    (tmp_path / "r.toml").write_text(toml)
    ran = in_process("render", "sea", "--model", tiny, "--size", "128", "--regions", "r.toml")
    assert ran.code == 2, ran.err
    assert message in ran.err


def test_regions_without_a_prompt_must_cover_the_canvas(in_process, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text("[[region]]\nprompt = 'x'\nrows = [0, 128]\ncols = [0, 64]")
    ran = in_process("render", "--model", tiny, "--size", "128", "--regions", "r.toml")
    assert ran.code == 2
    assert "no region covers the canvas" in ran.err


def test_an_existing_output_is_kept(in_process, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "tiler.png").write_text("precious")
    ran = in_process("render", "x", "--model", tiny, "--size", "64")
    assert ran.code == 2
    assert "--force" in ran.err
    assert (tmp_path / "tiler.png").read_text() == "precious"
