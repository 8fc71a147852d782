"""What a denoiser's quantised weights cost and save: bytes on disk, bytes read a pass, error and time of a call.

    python scripts/quantised.py sizes FOLDER …              of fp16, int8, fp8 and int4 as `tiler quantize` writes them;
                                                            sparse checkpoints will do
    python scripts/quantised.py errors FOLDER … --side 64   of one call against fp32 arithmetic of the stored weights,
                                                            and of int8 arithmetic, without outliers and with some
    python scripts/quantised.py times FOLDER --rounds 3     processor time of a call in fp32 and in int8, alternated
    python scripts/quantised.py times FOLDER --file x.gguf  and with the denoiser of a file
    python scripts/quantised.py peaks FOLDER --file x.gguf  memory of a process that makes a call with each (VmHWM)

Prompts and latents are random. With outliers, one in a hundred inputs of every int8 layer is thirty times as large as
the others, as in trained transformers, and the weights that meet it are as much smaller, so that the exact result stays
the same. If it changed too, a model of random weights would be chaotic: where whole tokens are as large in every layer,
the state before a layer hardly counts, and any rounding changes these tokens altogether. Such tokens need no trial
here: each has a scale of its own. `--kinds` are the weights to try, none for int8 arithmetic alone. `--side` is that of
the latents: 64 are 512 pixels for most families, 128 are 1024.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from tiler.compute.choose import KERNELS
from tiler.compute.kernels import Kind, Op, Operands
from tiler.compute.lending import lent
from tiler.compute.shapes import MetaMeter
from tiler.compute.stream import Streamer
from tiler.memory import process
from tiler.models.built import Models
from tiler.models.family import Options, Role, open_family, plain_names
from tiler.models.samples import Prompt, Sample
from tiler.packing import packed_weights
from tiler.request.choices import Weights
from tiler.request.model import ModelOptions
from tiler.run import Names, streamed
from tiler.weights.index import TensorInfo, read_index
from tiler.weights.layouts import understood
from tiler.weights.packed import default_cache
from tiler.weights.quanto import write_quanto, written_bytes
from tiler.weights.store import Piece, WeightStore, match_index

SHARE, FACTOR = 100, 30  # one in so many inputs is an outlier, so many times as large


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A checkpoint's denoiser."""

    models: Models
    name: str

    @property
    def part(self) -> Any:
        return self.models.family.part(Role.DENOISER)

    @property
    def module(self) -> Any:
        return self.models.module(self.part)

    @property
    def index(self) -> dict[str, TensorInfo]:
        """The stored tensors by parameter."""
        return match_index(self.module, self.models.family.checkpoint.weights(self.part.name), self.part.aliases)


def opened(folder: str, file: str | None = None) -> Opened:
    family = open_family(ModelOptions(model=folder, diffusion_model=file), reads_text=False)
    alone = tuple(part for part in family.parts if part.role is not Role.TEXT_ENCODER)
    return Opened(models=Models(replace(family, parts=alone)), name=Path(file or folder).name)


def streamed_names(model: Opened) -> list[str]:
    """The weights that a pass reads."""
    family, streamer = model.models.family, Streamer(None)
    with lent(model.module, streamer), MetaMeter(), torch.no_grad():
        samples = family.example([0], (family.granularity, family.granularity))
        prompts = [sample.prompt for sample in samples]
        prepared = family.prepare(model.module, streamer, torch.empty(1, device="meta"), prompts, Options())
        streamer.used.clear()
        family.predict(model.module, streamer, samples, 0, prepared)
    return list(streamer.used)


def sizes(model: Opened) -> None:
    index, read = model.index, streamed_names(model)
    names = model.part.int8_weights(model.module)
    for kind in (None, *Weights):
        nbytes = {name: written_bytes(info, kind if name in names else None) for name, info in index.items()}
        stored = kind or "as stored (" + max({i.dtype for i in index.values()}) + ")"
        total, a_pass = sum(nbytes.values()), sum(nbytes[name] for name in read)
        print(f"{model.name:24} {stored:20} {total / 1e6:9,.0f} MB on disk {a_pass / 1e6:9,.0f} MB a pass", flush=True)


def factors(width: int) -> Tensor:
    """Those of a layer's inputs: the same channels in all layers of a width, as they share the state."""
    found = torch.ones(width)
    found[torch.randperm(width, generator=torch.Generator().manual_seed(width))[: max(1, width // SHARE)]] = FACTOR
    return found


@contextmanager
def divided(names: frozenset[str]) -> Iterator[None]:
    """These weights are read as outliers of their inputs want them."""
    fetch = WeightStore.fetch

    def changed(self: WeightStore, piece: Piece, out: Tensor, *, in_blocks: bool = False) -> None:
        fetch(self, piece, out, in_blocks=in_blocks)
        if piece.name in names:
            out.div_(factors(out.shape[1]))

    with patch.object(WeightStore, "fetch", changed):
        yield


@contextmanager
def outliers(names: frozenset[str]) -> Iterator[None]:
    """Inputs of the linear layers of these weights have some, whatever kernel computes them."""

    def changed(op: Op, x: Operands) -> Operands:
        if op.kind is not Kind.LINEAR or op.weights is None or not names.issuperset(op.weights.names):
            return x
        (part,) = x.parts
        return x if part.is_meta else x._replace(parts=(part * factors(part.shape[-1]),))

    def wrapped(begin: Callable[[Op, Operands], Operands]) -> Callable[[Op, Operands], Operands]:
        return lambda op, x: begin(op, changed(op, x))

    for kernel in KERNELS.values():
        vars(kernel)["begin"] = wrapped(kernel.begin)
    try:
        yield
    finally:
        for kernel in KERNELS.values():
            del vars(kernel)["begin"]


def sample_of(model: Opened, side: int) -> Sample:
    generator = torch.Generator().manual_seed(1)

    def filled(meta: Tensor) -> Tensor:
        return torch.randn(meta.shape, generator=generator)

    (example,) = model.models.family.example([0], (side, side))
    tokens, pooled = example.prompt
    prompt = Prompt(filled(tokens), None if pooled is None else filled(pooled))
    return example._replace(latents=filled(example.latents), prompt=prompt)


@torch.no_grad()
def call(model: Opened, stored: Mapping[str, TensorInfo], names: Names, sample: Sample) -> tuple[Tensor, float]:
    """The prediction, and the seconds of processor time that it took."""
    family = model.models.family
    with streamed(model.module, dict(stored), names, arena_bytes=model.part.arena_bytes, transform=True) as streamer:
        steps = torch.tensor([500.0]) if family.traits.flow else torch.tensor([500])
        prepared = family.prepare(model.module, streamer, steps, [sample.prompt], Options(guidance=(sample.guidance,)))
        start = os.times()
        made = family.predict(model.module, streamer, [sample], 0, prepared)
        return made, os.times().user - start.user


def packed(model: Opened, cache: Path) -> Callable[[Sample], tuple[Tensor, float]]:
    """A call in int8 arithmetic; the files are made here."""
    stored = packed_weights(model.models, cache, lambda share, why: None)
    return lambda sample: call(model, stored, plain_names, sample)


def errors(model: Opened, side: int, cache: Path, kinds: Sequence[Weights]) -> None:
    index, sample = model.index, sample_of(model, side)
    names = model.part.int8_weights(model.module)
    want, _ = call(model, index, plain_names, sample)

    def tell(what: str, got: Tensor) -> None:
        print(f"{model.name:24} {what:40} {float((got - want).norm() / want.norm()):8.3%}", flush=True)

    for some, said in ((frozenset[str](), ""), (names, " with outliers")):
        for kind in kinds:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "w.safetensors"
                with divided(some):
                    write_quanto(path, index, names, kind, "", lambda nbytes: None)
                stored = understood(read_index(path))
                with outliers(some):
                    tell(f"{kind} weights{said}", call(model, stored, model.part.aliases, sample)[0])
        with tempfile.TemporaryDirectory() as folder:
            with divided(some):
                run = packed(model, Path(folder) if some else cache)
            with outliers(some):
                tell(f"int8 arithmetic{said}", run(sample)[0])


def times(model: Opened, file: str | None, side: int, rounds: int, cache: Path) -> None:
    sample, index = sample_of(model, side), model.index
    if file is None:
        other, what = packed(model, cache), "int8"
    else:
        twin = opened(str(model.models.family.checkpoint.folder), file)
        stored = twin.index
        other, what = (lambda sample: call(twin, stored, plain_names, sample)), Path(file).name
    taken: dict[str, list[float]] = {"as stored": [], what: []}
    for number in range(rounds + 1):  # the first one brings the files into the page cache
        for name, run in (("as stored", lambda s: call(model, index, plain_names, s)), (what, other)):
            seconds = run(sample)[1]
            if number:
                taken[name].append(seconds)
    ratio = statistics.median(b / a for a, b in zip(*taken.values(), strict=True))
    said = ", ".join(f"{name} {statistics.median(values):.2f} s" for name, values in taken.items())
    print(f"{model.name:24} {said}: {ratio:.3f}×", flush=True)


def peaks(folder: str, file: str | None, side: int) -> None:
    """Each in a fresh process, which holds no weights from one call to the next."""
    for more in ((), ("--file", file)) if file is not None else ((),):
        command = sys.executable, __file__, "peak", folder, "--side", str(side), *more
        peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
        print(
            f"{Path(folder).name:24} {Path(more[-1]).name if more else 'as stored':40} {peak / 1e6:8.1f} MB", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["sizes", "errors", "times", "peaks", "peak"])
    parser.add_argument("folders", nargs="+", metavar="FOLDER")
    parser.add_argument("--side", type=int, default=64, help="of the latents (default: 64)")
    parser.add_argument("--kinds", nargs="*", type=Weights, default=list(Weights), metavar="int8|fp8|int4")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--file", help="a file with the denoiser, for times and peaks")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="of int8 weights")
    args = parser.parse_args()
    process.frugal_allocator()
    for folder in args.folders:
        if args.what == "peaks":
            peaks(folder, args.file, args.side)
            continue
        model = opened(folder, args.file if args.what == "peak" else None)
        if args.what == "sizes":
            sizes(model)
        elif args.what == "errors":
            errors(model, args.side, args.cache, args.kinds)
        elif args.what == "peak":
            call(model, model.index, plain_names, sample_of(model, args.side))
            print(process.read_rss().peak)
        else:
            times(model, args.file, args.side, args.rounds, args.cache)


if __name__ == "__main__":
    main()
