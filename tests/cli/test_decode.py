"""`tiler decode`: its methods, its scratch files, and what remains after a kill or on a full disk."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tiler.native import library

PROGRAM = [sys.executable, "-c", "from tiler.cli.main import main; main()"]


def test_decode_exactly_through_a_scratch_folder(in_process, tiny: Path, tmp_path: Path) -> None:
    common = ("--model", tiny, "--size", 136, "--steps", 1, "--no-guide", "--seed", 1)
    ran = in_process("render", "x", *common, "-o", "a.png", "--save-latents", "z.safetensors")
    assert "decoder: exact in fp32 (there is room" in ran.err
    (tmp_path / "s").mkdir()
    for mode, dtype in (("exact", "fp32"), ("exact", "fp16"), ("frozen", "fp16")):
        options = ("--decode", mode, "--scratch", "s", "--scratch-dtype", dtype)
        ran = in_process("decode", "z.safetensors", "--model", tiny, *options, "-o", f"{mode}-{dtype}.png", "--json")
        assert ran.json["decode"] == mode
    a, b, c = (np.asarray(Image.open(tmp_path / f"{n}.png"), int) for n in ("a", "exact-fp32", "frozen-fp16"))
    assert abs(a - b).max() <= 2
    assert abs(c - b).max() <= 2  # the sample is all of so small a picture
    assert list((tmp_path / "s").iterdir()) == []
    ran = in_process(
        "decode", "z.safetensors", "--model", tiny, "--decode", "exact", "--scratch", "none", "-o", "n.png"
    )
    assert ran.code == 6
    assert "--scratch" in ran.err


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="files without a name are Linux's")
@pytest.mark.parametrize(("mode", "width"), [("exact", 300), ("frozen", 520)])  # which is two bands
def test_a_kill_in_mid_decode_leaves_nothing(tiny: Path, tmp_path: Path, mode: str, width: int) -> None:
    save_file({"latents": torch.randn(1, 4, 40, width)}, tmp_path / "z.safetensors")
    (tmp_path / "s").mkdir()
    code = f"""
import os, sys
from tiler.cli import main
import tiler.pixels
real, strips = tiler.pixels.to_uint8, []
def to_uint8(strip):
    strips.append(0)
    if len(strips) == 2:
        names = [os.readlink(f"/proc/self/fd/{{n}}") for n in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{{n}}")]
        print(*(name for name in names if {str(tmp_path)!r} in name), sep="\\n", flush=True)
        os.kill(os.getpid(), 9)
    return real(strip)
tiler.pixels.to_uint8 = to_uint8
sys.argv = ["tiler", "decode", "z.safetensors", "--model", {str(tiny)!r}, "--decode", {mode!r}, "--scratch", "s", "-o", "x.png"]
main.main()
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == -9, ran.stderr
    assert f"{tmp_path}/s/" in ran.stdout  # activations were on the disk
    assert len(ran.stdout.split("(deleted)")) > 2  # as was the picture, begun
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["s", "z.safetensors"]
    assert list((tmp_path / "s").iterdir()) == []


@pytest.mark.parametrize("where", ["scratch", "output"])
def test_a_tiny_file_system_is_exit_6(tiny: Path, tmp_path: Path, where: str) -> None:
    """A tmpfs of 1 MB, in a mount namespace of this process's own."""
    if subprocess.run(
        ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"], check=False, capture_output=True
    ).returncode:
        pytest.skip("no mounts in a user namespace here")
    save_file({"latents": torch.randn(1, 4, 100, 100)}, tmp_path / "z.safetensors")
    (tmp_path / "small").mkdir()
    place = ["--scratch", "small", "-o", "x.png"] if where == "scratch" else ["--scratch", ".", "-o", "small/x.png"]
    command = shlex.join(
        [*PROGRAM, "decode", "z.safetensors", "--model", str(tiny), "--decode", "exact", "--quiet", *place]
    )
    mounted = f"mount -t tmpfs -o size=1m none small && {command}; code=$?; ls -A small; exit $code"
    ran = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mounted], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 6, ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1
    assert ("needs 31 MB" if where == "scratch" else "No space left") in ran.stderr
    assert ran.stdout == ""
    assert not (tmp_path / "x.png").exists()


def test_bad_latents(in_process, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("no")
    save_file({"other": torch.zeros(1)}, tmp_path / "other.safetensors")
    save_file({"latents": torch.zeros(1, 8, 8, 8)}, tmp_path / "wide.safetensors")
    save_file({"latents": torch.full((1, 4, 8, 8), float("nan"))}, tmp_path / "nan.safetensors")
    for name, code in (("text", 2), ("other", 2), ("wide", 2), ("missing", 2), ("nan", 7)):
        ran = in_process("decode", f"{name}.safetensors", "--model", tiny)
        assert ran.code == code, (name, ran.err)
        assert len(ran.err.strip().splitlines()) == 1


def test_a_tiny_autoencoder_makes_the_picture(in_process, tiny: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderTiny
    from safetensors.torch import load_file

    torch.manual_seed(0)
    vae = AutoencoderTiny(decoder_block_out_channels=(16,) * 4, encoder_block_out_channels=(16,) * 4).eval()
    vae.save_pretrained(tmp_path / "taesd")
    common = ("--model", tiny, "--width", 136, "--height", 72, "--steps", 1, "--seed", 1, "--no-guide")
    decoder = ("--decode", "tiny", "--tiny-vae", "taesd")
    ran = in_process("render", "x", *common, *decoder, "-o", "a.png", "--save-latents", "z.safetensors")
    assert ran.code == 0, ran.err
    assert "decoder: tiny" in ran.err
    with torch.no_grad():
        want = vae.decode(load_file(tmp_path / "z.safetensors")["latents"]).sample[0]
    want = ((want / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()
    assert abs(np.asarray(Image.open(tmp_path / "a.png"), float) - want).max() <= 1
    assert in_process("decode", "z.safetensors", "--model", tiny, *decoder, "-o", "b.png").code == 0
    assert Image.open(tmp_path / "a.png").tobytes() == Image.open(tmp_path / "b.png").tobytes()
    for options, code, message in (
        (("--decode", "tiny"), 2, "--tiny-vae"),
        (("--tiny-vae", "taesd"), 2, "--decode tiny"),
        (("--decode", "tiny", "--tiny-vae", tiny / "vae"), 3, "AutoencoderTiny"),
        (("--decode", "tiny", "--tiny-vae", "none"), 3, "none"),
    ):
        ran = in_process("decode", "z.safetensors", "--model", tiny, *options, "-o", "c.png")
        assert (ran.code, message in ran.err) == (code, True), ran.err


@pytest.mark.skipif(not library.has_bf16(), reason="no bf16 here")
@pytest.mark.parametrize("decode", ["exact", "frozen"])
def test_bf16_is_near_fp32_and_is_taken_where_the_render_took_it(
    in_process, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decode: str
) -> None:
    monkeypatch.setattr("tiler.compute.layers.SMALL", 100)
    for channels in ("NATIVE_WINOGRAD_CHANNELS", "NATIVE_WINOGRAD_BF16_CHANNELS"):
        monkeypatch.setattr(f"tiler.compute.native_winograd.{channels}", 16)
    common = ("--model", tiny, "--decode", decode, "--json")
    drawing = ("--size", 136, "--steps", 1, "--no-guide", "--seed", 1, "--precision", "bf16")
    ran = in_process("render", "x", *common, *drawing, "-o", "a.png", "--save-latents", "z.safetensors")
    assert ran.json["decode_precision"] == "bf16" and f"decoder: {decode} in bf16" in ran.err
    pictures = {"a": np.asarray(Image.open(tmp_path / "a.png"), int)}
    for said, taken in (("auto", "bf16"), ("fp32", "fp32")):
        ran = in_process("decode", "z.safetensors", *common, "--decode-precision", said, "-o", f"{said}.png")
        assert ran.json["decode_precision"] == taken
        pictures[said] = np.asarray(Image.open(tmp_path / f"{said}.png"), int)
    assert np.array_equal(pictures["auto"], pictures["a"])
    apart = pictures["fp32"] - pictures["a"]
    assert 0 < np.square(apart).mean() < 255**2 / 10**5  # 50 dB


def test_bf16_is_refused_where_nothing_computes_with_it(
    in_process, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiler.compute.precisions.has_bf16", lambda: False)
    refused = in_process("plan", "x", "-m", tiny, "--size", 64, "--decode-precision", "bf16")
    assert refused.code == 2
    assert "--decode-precision bf16: this needs" in refused.err and "fp32 or auto" in refused.err
    planned = in_process("plan", "x", "-m", tiny, "--size", 64, "--precision", "int8", "--json")
    assert planned.json["decode_precision"] == "fp32"
