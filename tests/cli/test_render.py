"""`tiler render` in a process of its own: pictures, reports, and errors that stop a run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image


def test_render_plan_and_decode(tiler, in_process, tiny: Path, tmp_path: Path) -> None:
    common = ("--model", tiny, "--width", 136, "--height", 72, "--steps", 3, "--seed", 4)
    ran = tiler("render", "a boat", *common, "-o", "a.png", "--report", "r.json", "--save-latents", "z.safetensors")
    assert ran.code == 0, ran.err
    assert "seed 4" in ran.err
    assert "denoiser in fp32 (int8 has" in ran.err
    assert "a.png: 136×72, seed 4, peak" in ran.out
    report = json.loads((tmp_path / "r.json").read_text())
    assert {
        "peak_rss_bytes",
        "predicted_peak_bytes",
        "max_ram_bytes",
        "phases",
        "denoiser_calls",
        "denoiser_samples",
        "weight_bytes_read",
        "seed",
        "versions",
    } <= report.keys()
    assert {"name", "seconds", "peak_rss_bytes", "anon_bytes", "file_bytes"} <= report["phases"][0].keys()
    assert report["peak_rss_bytes"] < report["max_ram_bytes"] == 800_000_000
    assert report["predicted_peak_bytes"] == pytest.approx(report["peak_rss_bytes"], rel=0.10)
    planned = in_process("plan", "a boat", *common, "--json").json
    assert planned["denoiser_calls"] == report["denoiser_calls"]
    assert planned["denoiser_samples"] == report["denoiser_samples"]
    assert in_process("decode", "z.safetensors", "--model", tiny, "-o", "b.png").code == 0
    assert Image.open(tmp_path / "a.png").tobytes() == Image.open(tmp_path / "b.png").tobytes()


def test_a_sheet_of_paper_is_rendered_to_the_pixel(in_process, tiny: Path, tmp_path: Path) -> None:
    sheet = ("--paper", "100x70mm", "--bleed", "2mm", "--dpi", 40)
    ran = in_process("render", "x", "--model", tiny, *sheet, "--steps", 1, "-o", "x.png")
    assert ran.code == 0, ran.err
    image = Image.open(tmp_path / "x.png")
    assert image.size == (164, 117)
    assert image.info["dpi"] == pytest.approx((40, 40), abs=0.02)
    assert in_process("plan", "--model", tiny, "--paper", "A5", "--json").json["canvas"] == "1752×2480"


def test_json_is_one_object_on_stdout_and_quiet_is_quiet(in_process, tiny: Path) -> None:
    ran = in_process("render", "x", "--model", tiny, "--size", 64, "--steps", 1, "--json", "--quiet")
    assert ran.json["output"] == "tiler.png"
    assert ran.err == ""


def test_a_random_seed_is_printed_and_stored(in_process, tiny: Path) -> None:
    ran = in_process("render", "x", "--model", tiny, "--size", 64, "--steps", 1, "--json")
    assert f"seed {ran.json['seed']}\n" in ran.err


def test_regions_file(in_process, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(
        'prompt = "sea"\n[[region]]\nprompt = "boat"\nrows = [0, 64]\ncols = [64, 128]\nmask = "quartic"\nseed = 3\n'
    )
    assert in_process("render", "--model", tiny, "--size", 128, "--steps", 1, "--regions", "r.toml").code == 0


@pytest.mark.skipif(__import__("os").geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_exit_6(in_process, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    assert in_process("render", "x", "--model", tiny, "--size", "64", "-o", "locked/x.png").code == 6


@pytest.mark.parametrize(("megabytes", "said"), [(300, "was reached at unet"), (1200, "refused an allocation")])
def test_a_runaway_allocation_in_mid_run_is_exit_5(tiny: Path, tmp_path: Path, megabytes: int, said: str) -> None:
    """300 MB too much are noticed at the next layer; the allocator refuses 1.2 GB."""
    code = f"""
import sys, numpy
from tiler.cli import main
import tiler.memory.process
tiler.memory.process.frugal_allocator()
import tiler.models.sd
real, hog = tiler.models.sd.predict_noise, []
def predict(unet, streamer, latents, *args):
    import torch
    if not latents[0].is_meta:  # the plan is done
        hog.append(torch.ones({megabytes} * 250_000))
    return real(unet, streamer, latents, *args)
tiler.models.sd.predict_noise = predict
sys.argv = ["tiler", "render", "x", "--model", {str(tiny)!r}, "--size", "64", "--steps", "1", "--no-guide", "--max-ram", "500MB", "--quiet"]
main.main()
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 5, ran.stderr
    message, job = ran.stderr.splitlines()
    assert said in message and "--max-ram" in message
    assert job.startswith("the job is saved at canvas step 0/1")
    assert [path.name for path in tmp_path.iterdir()] == ["tiler.png.tiler"]
