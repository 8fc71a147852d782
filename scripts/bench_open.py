"""What opening a single file costs beside the folder that it was made from: CPU seconds, which a busy machine changes
little, and the peak of the process, of `tiler plan` and of `tiler encode`.

    python scripts/bench_open.py sd15 sd21 sdxl      of these sizes: folder and file are sparse and take no room
    python scripts/bench_open.py --model FOLDER --file FILE
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

# Nothing that imports torch: a process's peak is at least what its parent held when it began.
ROOT = Path(__file__).parents[1]


class Cost(NamedTuple):
    """Of one process: user and system CPU seconds, and bytes."""

    seconds: float
    peak: int


def cost(*arguments: object) -> Cost:
    """What the program takes in a process of its own."""
    command = [sys.executable, "-m", "tiler", *map(str, arguments)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"tiler {' '.join(map(str, arguments))} failed")
    return Cost(used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)


def write_sparse(kind: str, folder: Path) -> None:
    """A checkpoint of full size, whose weights read as zeros, and the single file beside it."""
    import make_checkpoint
    import torch
    from checkpoints import sdxl
    from checkpoints._files import write_weights
    from checkpoints._single import single_tensors
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from tiler.models.vocabulary import END, clip_tokenizer

    small = {"sd15": "tiny-plain", "sd21": "tiny-plain-sd2", "sdxl": "tiny-plain-sdxl"}[kind]
    make_checkpoint.make(small, folder.parent).rename(folder)
    for part, config in (sdxl.configs("full") if kind == "sdxl" else make_checkpoint.configs(kind)).items():
        if part == "scheduler":
            continue
        make_checkpoint.write_json(folder / part / "config.json", config)
        with torch.device("meta"):
            if part == "unet":
                model = UNet2DConditionModel.from_config(config)
            elif part == "vae":
                model = AutoencoderKL.from_config(config)
            else:
                text = CLIPTextModelWithProjection if part == "text_encoder_2" else CLIPTextModel
                model = text(CLIPTextConfig(**config))
        (path,) = (folder / part).glob("*.safetensors")
        names = [name for name, _ in model.named_parameters()]
        bare = part.startswith("text") and not any(name.startswith("text_model.") for name in names)
        prefix = "text_model." if bare else ""
        write_weights(path, {prefix + name: value.shape for name, value in model.named_parameters()}, sparse=True)
    for name, pad in (("tokenizer", "!" if kind == "sd21" else END), ("tokenizer_2", "!")):
        for path in clip_tokenizer(pad).iterdir() if (folder / name).is_dir() else ():
            shutil.copy(path, folder / name)  # the words of published checkpoints, as a file gets them
    shapes = {name: tensor.shape for name, tensor in single_tensors(folder).items()}
    write_weights(folder.with_suffix(".safetensors"), shapes, sparse=True)


def compare(folder: Path, file: Path, rounds: int, commands: Sequence[str]) -> None:
    """Print the medians of both, by turns; the first round, which fills caches, is not counted."""
    for command in commands:
        runs: dict[Path, list[Cost]] = {folder: [], file: []}
        for number in range(rounds + 1):
            for model, costs in runs.items():
                with tempfile.TemporaryDirectory() as scratch:
                    more = (
                        ["--json"] if command == "plan" else ["-o", f"{scratch}/x.safetensors", "--cache-dir", scratch]
                    )
                    costs += [cost(command, "a lighthouse", "--model", model, *more)][: number > 0]
        seconds = [statistics.median(one.seconds for one in costs) for costs in runs.values()]
        peaks = [statistics.median(one.peak for one in costs) for costs in runs.values()]
        print(
            f"{folder.name} {command}: folder {seconds[0]:.2f} s, {peaks[0] / 1e6:.0f} MB; "
            f"file {seconds[1] - seconds[0]:+.2f} s, {(peaks[1] - peaks[0]) / 1e6:+.1f} MB",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="sd15|sd21|sdxl")
    parser.add_argument("--model", type=Path, help="a folder")
    parser.add_argument("--file", type=Path, help="the single file made from it")
    parser.add_argument("--commands", nargs="+", choices=["plan", "encode"], default=["plan", "encode"])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if args.model is not None:
        compare(args.model, args.file, args.rounds, args.commands)
    for kind in args.kinds:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / kind
            writer = get_context("spawn").Process(target=write_sparse, args=(kind, folder))
            writer.start()
            writer.join()
            compare(folder, folder.with_suffix(".safetensors"), args.rounds, args.commands)


if __name__ == "__main__":
    main()
