"""The program in a process of its own: the main paths, and one line and the right exit code for bad input."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

Tiler = Callable[..., "object"]
PROGRAM = [sys.executable, "-c", "from tiler.cli.main import main; main()"]


def test_help_names_every_command(tiler) -> None:
    ran = tiler("--help")
    assert ran.code == 0
    for command in ("render", "plan", "decode", "quantize", "doctor"):
        assert command in ran.out


def test_doctor(tiler) -> None:
    facts = tiler("doctor", "--json").json
    assert {"ram", "cgroup limit", "cores", "cpu", "compute dtype", "versions", "free disk"} <= facts.keys()
    assert "weights" in facts["--precision int8"] or "activations" in facts["--precision int8"]


def test_render_plan_and_decode(tiler, tiny: Path, tmp_path: Path) -> None:
    common = ("--model", tiny, "--width", 136, "--height", 72, "--steps", 3, "--seed", 4)
    ran = tiler("render", "a boat", *common, "-o", "a.png", "--report", "r.json", "--save-latents", "z.safetensors")
    assert ran.code == 0, ran.err
    assert "seed 4" in ran.err
    assert "UNet in fp32 (int8 is no faster with 32 channels" in ran.err
    assert "a.png: 136×72, seed 4, peak" in ran.out
    report = json.loads((tmp_path / "r.json").read_text())
    assert {
        "peak_rss_bytes",
        "predicted_peak_bytes",
        "max_ram_bytes",
        "phases",
        "unet_calls",
        "unet_samples",
        "weight_bytes_read",
        "seed",
        "versions",
    } <= report.keys()
    assert {"name", "seconds", "peak_rss_bytes", "anon_bytes", "file_bytes"} <= report["phases"][0].keys()
    assert report["peak_rss_bytes"] < report["max_ram_bytes"] == 800_000_000
    assert report["predicted_peak_bytes"] == pytest.approx(report["peak_rss_bytes"], rel=0.10)
    planned = tiler("plan", "a boat", *common, "--json").json
    assert planned["unet_calls"] == report["unet_calls"]
    assert planned["unet_samples"] == report["unet_samples"]
    assert planned["expected_seconds"] >= 0
    assert tiler("decode", "z.safetensors", "--model", tiny, "-o", "b.png").code == 0
    assert Image.open(tmp_path / "a.png").tobytes() == Image.open(tmp_path / "b.png").tobytes()


def test_presets_are_bundles_that_other_options_change(tiler, tiny: Path) -> None:
    common = ("--model", tiny, "--size", 256, "--json")
    quality = tiler("plan", "x", *common).json
    fast = tiler("plan", "x", *common, "--preset", "fast").json
    for work in (*quality["presets"].values(), *fast["presets"].values()):
        assert work.pop("expected_seconds") >= 0  # measured anew each time
    assert quality["presets"] == fast["presets"]
    assert quality["unet_samples"] == quality["presets"]["quality"]["unet_samples"]
    assert fast["unet_samples"] == fast["presets"]["fast"]["unet_samples"]
    bundle = ("--steps", 10, "--strength", 0.4, "--layout", "shift", "--guidance-interval", "0-0.5")
    assert tiler("plan", "x", *common, *bundle).json["unet_samples"] == fast["unet_samples"]
    assert fast["unet_samples"] * 6 < quality["unet_samples"]
    grid = tiler("plan", "x", *common, "--preset", "fast", "--layout", "grid").json
    assert grid["unet_samples"] > fast["unet_samples"]
    # Tiles with an overlap of their own cannot shift: the preset's layout gives way.
    assert tiler("plan", "x", *common, "--preset", "fast", "--overlap", 16).code == 0


def test_a_sheet_of_paper_is_rendered_to_the_pixel(tiler, tiny: Path, tmp_path: Path) -> None:
    sheet = ("--paper", "100x70mm", "--bleed", "2mm", "--dpi", 40)
    ran = tiler("render", "x", "--model", tiny, *sheet, "--steps", 1, "-o", "x.png")
    assert ran.code == 0, ran.err
    image = Image.open(tmp_path / "x.png")
    assert image.size == (164, 117)
    assert image.info["dpi"] == pytest.approx((40, 40), abs=0.02)
    assert tiler("plan", "--model", tiny, "--paper", "A5", "--json").json["canvas"] == "1752×2480"


def test_decode_exactly_through_a_scratch_folder(tiler, tiny: Path, tmp_path: Path) -> None:
    common = ("--model", tiny, "--size", 528, "--steps", 1, "--no-guide", "--seed", 1)
    ran = tiler("render", "x", *common, "-o", "a.png", "--save-latents", "z.safetensors")
    assert "decoder: exact (there is room" in ran.err
    (tmp_path / "s").mkdir()
    for mode, dtype in (("exact", "fp32"), ("exact", "fp16"), ("frozen", "fp16")):
        options = ("--decode", mode, "--scratch", "s", "--scratch-dtype", dtype)
        ran = tiler("decode", "z.safetensors", "--model", tiny, *options, "-o", f"{mode}-{dtype}.png", "--json")
        assert ran.json["decode"] == mode
    a, b, c = (np.asarray(Image.open(tmp_path / f"{n}.png"), int) for n in ("a", "exact-fp32", "frozen-fp16"))
    assert abs(a - b).max() <= 2
    assert abs(c - b).max() <= 4  # held statistics, of a sample that is nearly all of the picture
    assert list((tmp_path / "s").iterdir()) == []
    ran = tiler("decode", "z.safetensors", "--model", tiny, "--decode", "exact", "--scratch", "none", "-o", "n.png")
    assert ran.code == 6
    assert "--scratch" in ran.err


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="files without a name are Linux's")
@pytest.mark.parametrize("mode", ["exact", "frozen"])
def test_a_kill_in_mid_decode_leaves_nothing(tiny: Path, tmp_path: Path, mode: str) -> None:
    save_file({"latents": torch.randn(1, 4, 100, 600)}, tmp_path / "z.safetensors")
    (tmp_path / "s").mkdir()
    code = f"""
import os, sys
from tiler.cli import main
import tiler.pipeline
real, strips = tiler.pipeline.to_uint8, []
def to_uint8(strip):
    strips.append(0)
    if len(strips) == 3:
        names = [os.readlink(f"/proc/self/fd/{{n}}") for n in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{{n}}")]
        print(*(name for name in names if {str(tmp_path)!r} in name), sep="\\n", flush=True)
        os.kill(os.getpid(), 9)
    return real(strip)
tiler.pipeline.to_uint8 = to_uint8
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


def test_json_is_one_object_on_stdout_and_quiet_is_quiet(tiler, tiny: Path) -> None:
    ran = tiler("render", "x", "--model", tiny, "--size", 64, "--steps", 1, "--json", "--quiet")
    assert ran.json["output"] == "tiler.png"
    assert ran.err == ""


def test_a_random_seed_is_printed_and_stored(tiler, tiny: Path) -> None:
    ran = tiler("render", "x", "--model", tiny, "--size", 64, "--steps", 1, "--json")
    assert f"seed {ran.json['seed']}\n" in ran.err


def test_regions_file(tiler, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(
        'prompt = "sea"\n[[region]]\nprompt = "boat"\nrows = [0, 64]\ncols = [64, 128]\nmask = "quartic"\nseed = 3\n'
    )
    assert tiler("render", "--model", tiny, "--size", 128, "--steps", 1, "--regions", "r.toml").code == 0


BAD_OPTIONS = [
    (["--size", "0"], "width = 0"), (["--size", "-64"], "width = -64"), (["--size", "1000000"], "width = 1000000"), (["--size", "56"], "smaller than a tile"),
    (["--height", "8"], "smaller than a tile"), (["--steps", "0"], "steps = 0"), (["--steps", "1000000"], "steps"), (["--cfg-scale", "nan"], "guidance-scale"),
    (["--cfg-scale", "-1"], "guidance-scale"), (["--strength", "1.5"], "strength = 1.5"), (["--seed", "-2"], "seed"), (["--overlap", "64"], "overlap"),
    (["--overlap", "7"], "overlap"), (["--scheduler", "heun"], "unknown scheduler"), (["--mask", "square"], "mask"), (["--max-ram", "lots"], "800MB"),
    (["--threads", "0"], "threads"), (["--guide", "none.png"], "none.png"), (["--guide", "none.png", "--no-guide"], "exclude"),
    (["-o", "no/such/folder/x.png"], "does not exist"), (["-o", "."], "is a folder"), (["-o", "x.jpg"], ".png"), (["--regions", "none.toml"], "none.toml"), (["--nonsense"], "nonsense"),
    (["--wrap", "x", "--width", "130"], "multiples of 8"), (["--wrap", "z"], "wrap"), (["--guide-upscale", "none"], "guide-upscale"),
    (["--paper", "A2"], "exclude each other"), (["--bleed", "3mm"], "belong to a --paper"), (["--dpi", "0"], "dpi = 0"), (["--decode", "best"], "decode"),
    (["--guidance-interval", "0.8-0.2"], "rising"), (["--guidance-interval", "half"], "0.2-0.8"), (["--attention-window", "1"], "attention-window = 1"),
    (["--layout", "shift", "--overlap", "16"], "leave out --overlap"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_bad_options_are_exit_2_and_one_line(
    tiler, tiny: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    ran = tiler("render", "x", "--model", tiny, "--size", "128", *options)
    assert ran.code == 2, ran.err
    assert message in ran.err
    assert "Traceback" not in ran.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("prompt = 'x'", "no [[region]]"),
        ("[[region]]\nprompt = 'x'", "lacks"),
        ("[[region]]\nprompt = 'x'\nrows = [0, 64]\ncols = [0, 64]\ncolour = 1", "colour"),
        ("[[region]]\nprompt = 'x'\nrows = [0, 64]\ncols = [0, 'a']", "cols"),
        ("[[region]]\nprompt = 'x'\nrows = [0, 256]\ncols = [0, 64]", "outside"),
        ("[[region]]\nprompt = 'x'\nrows = [0, 32]\ncols = [0, 64]", "smaller than a tile"),
        ("[[region]]\nprompt = 'x'\nrows = [0, 128]\ncols = [0, 64]\nmask = 'round'", "mask"),
        ("region = 3", "no [[region]]"),
        ("= broken", "not valid TOML"),
    ],
)
def test_bad_regions(tiler, tiny: Path, tmp_path: Path, toml: str, message: str) -> None:
    (tmp_path / "r.toml").write_text(toml)
    ran = tiler("render", "sea", "--model", tiny, "--size", "128", "--regions", "r.toml")
    assert ran.code == 2, ran.err
    assert message in ran.err


def test_regions_without_a_prompt_must_cover_the_canvas(tiler, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text("[[region]]\nprompt = 'x'\nrows = [0, 128]\ncols = [0, 64]")
    ran = tiler("render", "--model", tiny, "--size", "128", "--regions", "r.toml")
    assert ran.code == 2
    assert "no region covers the canvas" in ran.err


def test_an_existing_output_is_kept(tiler, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "tiler.png").write_text("precious")
    ran = tiler("render", "x", "--model", tiny, "--size", "64")
    assert ran.code == 2
    assert "--force" in ran.err
    assert (tmp_path / "tiler.png").read_text() == "precious"


def test_a_ceiling_below_the_floor_is_exit_4(tiler, tiny: Path, tmp_path: Path) -> None:
    for command in ("render", "plan"):
        ran = tiler(command, "x", "--model", tiny, "--size", "128", "--max-ram", "200MB")
        assert ran.code == 4
        assert "smallest --max-ram that would do is" in ran.err
        assert "python, libraries" in ran.err + ran.out
    assert list(tmp_path.iterdir()) == []


def damage(folder: Path, part: str, change: Callable[[Path], None]) -> None:
    change(next((folder / part).glob("*.safetensors")))


def cut(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def config(folder: Path, part: str, **values: object) -> None:
    path = folder / part / ("config.json" if part else "model_index.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


BAD_MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda f: damage(f, "unet", cut), "bytes short"),
    "empty file": (lambda f: damage(f, "vae", lambda p: p.write_bytes(b"")), "header too small"),
    "huge header": (
        lambda f: damage(f, "unet", lambda p: p.write_bytes(struct.pack("<Q", 2**62) + b"{}")),
        "not a safetensors file",
    ),
    "pickle only": (lambda f: damage(f, "unet", lambda p: p.rename(p.with_suffix(".bin"))), "pickle"),
    "no weights": (lambda f: damage(f, "text_encoder", lambda p: p.unlink()), "no *.safetensors here"),
    "no index": (lambda f: (f / "model_index.json").unlink(), "model_index.json"),
    "broken json": (lambda f: (f / "unet/config.json").write_text("{"), "not valid JSON"),
    "inpainting": (lambda f: config(f, "unet", in_channels=9), "inpainting"),
    "sdxl": (lambda f: config(f, "", _class_name="StableDiffusionXLPipeline"), "this is SDXL"),
    "flux": (lambda f: config(f, "", _class_name="FluxPipeline"), "this is Flux"),
    "sdxl unet": (lambda f: config(f, "unet", addition_embed_type="text_time"), "this is SDXL"),
    "distilled": (lambda f: config(f, "unet", time_cond_proj_dim=256), "time_cond_proj_dim"),
    "foreign blocks": (lambda f: config(f, "unet", mid_block_type="UNetMidBlock2DSimpleCrossAttn"), "SimpleCrossAttn"),
    "foreign class": (lambda f: config(f, "unet", _class_name="os.system"), "os.system"),
    "auto_map": (lambda f: config(f, "unet", auto_map={"x": "y"}), "auto_map"),
    "absurd width": (lambda f: config(f, "unet", block_out_channels=[10**9, 10**9, 10**9]), "out of range"),
    "text width": (lambda f: config(f, "unet", cross_attention_dim=64), "text width 64"),
    "wrong shape": (lambda f: config(f, "vae", block_out_channels=[8, 16, 16, 24]), "shape"),
    "bad tokenizer": (lambda f: (f / "tokenizer/vocab.json").write_text("{"), "tokenizer"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "tokenizer"),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_bad_models_are_exit_3_and_one_line(tiler, tiny: Path, tmp_path: Path, name: str) -> None:
    change, message = BAD_MODELS[name]
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    change(folder)
    ran = tiler("render", "x", "--model", folder, "--size", "64", "--steps", "1", "--quiet")
    assert ran.code == 3, ran.err
    assert message in ran.err
    assert len(ran.err.strip().splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_pickle_is_never_opened(tiler, tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    next((folder / "unet").glob("*.safetensors")).unlink()
    canary = tmp_path / "canary"
    (folder / "unet/diffusion_pytorch_model.bin").write_bytes(
        b"cos\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR."
    )
    assert tiler("render", "x", "--model", folder, "--size", "64").code == 3
    assert not canary.exists()


def test_models_that_are_not_there(tiler, tmp_path: Path) -> None:
    assert tiler("render", "x", "--model", "./nowhere").code == 3
    (tmp_path / "old.ckpt").write_bytes(b"\x80\x02")
    assert "pickle" in tiler("render", "x", "--model", "old.ckpt").err
    ran = tiler(
        "render", "x", "--model", "org/never-downloaded", env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    )
    assert ran.code == 9
    assert "hf download org/never-downloaded" in ran.err


def test_a_hub_cache_is_read_offline(tiler, tiny: Path, tmp_path: Path) -> None:
    sha = "0" * 40
    repo = tmp_path / "hf/hub/models--org--tiny"
    shutil.copytree(tiny, repo / "snapshots" / sha)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text(sha)
    ran = tiler(
        "render",
        "x",
        "--model",
        "org/tiny",
        "--size",
        64,
        "--steps",
        1,
        "--json",
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")},
    )
    assert ran.code == 0, ran.err
    assert ran.json["revision"] == sha


def test_bad_latents(tiler, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("no")
    save_file({"other": torch.zeros(1)}, tmp_path / "other.safetensors")
    save_file({"latents": torch.zeros(1, 8, 8, 8)}, tmp_path / "wide.safetensors")
    save_file({"latents": torch.full((1, 4, 8, 8), float("nan"))}, tmp_path / "nan.safetensors")
    for name, code in (("text", 2), ("other", 2), ("wide", 2), ("missing", 2), ("nan", 7)):
        ran = tiler("decode", f"{name}.safetensors", "--model", tiny)
        assert ran.code == code, (name, ran.err)
        assert len(ran.err.strip().splitlines()) == 1


def test_nan_weights_are_exit_7(tiler, tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)

    def poke(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[-400:-200] = b"\xff\x7f" * 100
        path.write_bytes(data)

    damage(folder, "unet", poke)
    ran = tiler("render", "x", "--model", folder, "--size", "64", "--steps", "1", "--quiet")
    assert ran.code == 7
    assert "NaN" in ran.err


@pytest.mark.skipif(__import__("os").geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_exit_6(tiler, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    assert tiler("render", "x", "--model", tiny, "--size", "64", "-o", "locked/x.png").code == 6


@pytest.mark.parametrize("megabytes", [300, 2000])
def test_a_runaway_allocation_in_mid_run_is_exit_5(tiny: Path, tmp_path: Path, megabytes: int) -> None:
    """300 MB too much are seen at the next layer; 2 GB are refused by the allocator."""
    code = f"""
import sys, numpy
from tiler.cli import main
import tiler.memory.process
tiler.memory.process.frugal_allocator()
import tiler.models.sd
real, hog = tiler.models.sd.predict_noise, []
def predict(*args):
    import torch
    hog.append(torch.ones({megabytes} * 250_000))
    return real(*args)
tiler.models.sd.predict_noise = predict
sys.argv = ["tiler", "render", "x", "--model", {str(tiny)!r}, "--size", "128", "--max-ram", "500MB", "--quiet"]
main.main()
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 5, ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1
    assert "--max-ram" in ran.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_tiny_autoencoder_makes_the_picture(tiler, tiny: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderTiny
    from safetensors.torch import load_file

    torch.manual_seed(0)
    vae = AutoencoderTiny(decoder_block_out_channels=(16,) * 4, encoder_block_out_channels=(16,) * 4).eval()
    vae.save_pretrained(tmp_path / "taesd")
    common = ("--model", tiny, "--width", 136, "--height", 72, "--steps", 1, "--seed", 1, "--no-guide")
    decoder = ("--decode", "tiny", "--tiny-vae", "taesd")
    ran = tiler("render", "x", *common, *decoder, "-o", "a.png", "--save-latents", "z.safetensors")
    assert ran.code == 0, ran.err
    assert "decoder: tiny" in ran.err
    with torch.no_grad():
        want = vae.decode(load_file(tmp_path / "z.safetensors")["latents"]).sample[0]
    want = ((want / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()
    assert abs(np.asarray(Image.open(tmp_path / "a.png"), float) - want).max() <= 1
    assert tiler("decode", "z.safetensors", "--model", tiny, *decoder, "-o", "b.png").code == 0
    assert Image.open(tmp_path / "a.png").tobytes() == Image.open(tmp_path / "b.png").tobytes()
    for options, code, message in (
        (("--decode", "tiny"), 2, "--tiny-vae"),
        (("--tiny-vae", "taesd"), 2, "--decode tiny"),
        (("--decode", "tiny", "--tiny-vae", tiny / "vae"), 3, "AutoencoderTiny"),
        (("--decode", "tiny", "--tiny-vae", "none"), 3, "none"),
    ):
        ran = tiler("decode", "z.safetensors", "--model", tiny, *options, "-o", "c.png")
        assert (ran.code, message in ran.err) == (code, True), ran.err
