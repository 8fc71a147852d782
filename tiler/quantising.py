"""Write a model's folder with fewer bits per weight: the denoiser's weights, and the text encoders' if asked for, in
optimum-quanto's layout, everything else as it was.

These weights stay as they are stored: the ones that `Part.quantise` leaves out (embedders, norms, modulation layers,
the last projection, the second CLIP encoder of SDXL and Stable Diffusion 3), the ones the user excludes, and the
autoencoder's.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from tiler.errors import ModelError, StorageError, UsageError
from tiler.events import OnEvent, PhaseDone, PhaseStarted, percent
from tiler.memory.budget import Budget
from tiler.memory.policy import at_layer
from tiler.models.built import Models
from tiler.models.family import Part, Role
from tiler.request import QuantizeRequest
from tiler.request.choices import Weights
from tiler.weights.checkpoint import QUANTO_MAP, Checkpoint
from tiler.weights.flavours import WEIGHTS, find_weights, flavour_of, names_in
from tiler.weights.hub import DEFAULTS, INDEX
from tiler.weights.quanto import write_quanto
from tiler.weights.store import match_index

_FILES = {Role.DENOISER: "diffusion_pytorch_model", Role.TEXT_ENCODER: "model"}


def write_folder(request: QuantizeRequest, models: Models, budget: Budget, on_event: OnEvent) -> dict[str, int]:
    """Write the folder `request.output`, complete or not at all. Return the bytes of each part's weights in it. Raises
    TilerError."""
    checkpoint, output = models.family.checkpoint, request.output
    assert output is not None
    if checkpoint.file is not None or checkpoint.sources:
        raise ModelError(
            f"{checkpoint.name}: a single file cannot be quantised into a folder; give the model's folder or hub id"
        )
    kinds = _kinds(request, models)
    _check_place(checkpoint, output, force=request.force)
    _check_room(checkpoint, models, output.absolute().parent)
    with budget.phase("quantize") as use:
        on_event(PhaseStarted(name="quantize", total=100))
        tell, check = percent(on_event, "quantize"), at_layer(budget, planned_bytes=budget.max_bytes)
        total = sum(info.nbytes for name in kinds for info in checkpoint.weights(name).values())
        read = 0

        def progress(nbytes: int) -> None:
            nonlocal read
            read += nbytes
            tell(min(1.0, read / total))
            check("quantize")

        with _whole(output) as folder:
            _copy(checkpoint.folder, folder, models, kinds)
            for part in models.family.parts:
                if part.name in kinds:
                    _quantise(request, models, part, kinds[part.name], folder / part.name, progress)
            sizes = {
                part.name: sum(file.stat().st_size for file in (folder / part.name).glob("*.safetensors"))
                for part in models.family.parts
            }
    on_event(PhaseDone(name="quantize", seconds=use.seconds, peak_rss_bytes=use.peak_rss_bytes))
    return sizes


def _kinds(request: QuantizeRequest, models: Models) -> dict[str, Weights]:
    """How the weights of each quantised part are stored. Raises UsageError."""
    assert request.weights is not None
    encoders, asked = models.family.encoders, request.encoder_weights
    if asked.keys() - {0} and max(asked) > len(encoders):
        raise UsageError(
            f"--text-encoder-weights names encoder {max(asked)}, but {models.family.traits.title} has {len(encoders)}"
        )
    kinds = {models.family.part(Role.DENOISER).name: request.weights}
    for number, part in enumerate(encoders, 1):
        kind = asked.get(number, asked.get(0))
        if kind is None:
            continue
        if part.int8_weights(models.module(part)):
            kinds[part.name] = kind
        elif number in asked:
            raise UsageError(
                f"--text-encoder-weights: encoder {number} ({part.name}) would lose too much quality; leave {number}= out"
            )
    return kinds


def _check_place(checkpoint: Checkpoint, output: Path, *, force: bool) -> None:
    own, target = checkpoint.folder.resolve(), output.resolve()
    if target == own or own in target.parents or target in own.parents:
        raise UsageError(f"{output} is the model's own folder, or lies within or around it; give another --output")
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output} is a file; --output takes the name of a folder")
    if output.is_dir() and any(output.iterdir()) and not (force and (output / INDEX).is_file()):
        raise UsageError(f"{output} is not empty; give another --output, or --force to replace a model's folder")
    if not output.absolute().parent.is_dir():
        raise UsageError(f"{output.absolute().parent} does not exist; create it first")


def _check_room(checkpoint: Checkpoint, models: Models, parent: Path) -> None:
    most = sum(info.nbytes for part in models.family.parts for info in checkpoint.weights(part.name).values())
    if (free := shutil.disk_usage(parent).free) < most:
        raise StorageError(
            f"{parent} has {free / 1e6:,.0f} MB free, and the model's weights take {most / 1e6:,.0f} MB before they are "
            "quantised; choose another --output"
        )


@contextmanager
def _whole(output: Path) -> Iterator[Path]:
    """A temporary folder beside `output` that replaces it if the block succeeds and is removed otherwise. Raises
    StorageError."""
    temp = output.absolute().with_name(f".{output.name}.tiler")
    try:
        shutil.rmtree(temp, ignore_errors=True)
        temp.mkdir()
        yield temp
        if output.is_dir():
            shutil.rmtree(output)
        temp.rename(output)
    except OSError as error:
        raise StorageError(f"{output}: writing failed ({error.strerror}); choose another --output") from error
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def _copy(source: Path, target: Path, models: Models, kinds: Mapping[str, Weights]) -> None:
    """Copy everything except weights that will be quantised and files of parts that tiler does not read."""
    for name in names_in(source):
        if name in (INDEX, DEFAULTS):
            shutil.copyfile(source / name, target / name)
        elif name.startswith(("tokenizer", "scheduler")) and (source / name).is_dir():
            shutil.copytree(source / name, target / name)
    variant = models.family.checkpoint.variant
    for part in models.family.parts:
        folder = source / part.name
        (target / part.name).mkdir()
        found = None if part.name in kinds else find_weights(folder, variant)
        weights, flavour = ((), None) if found is None else (found.files, found.flavour)
        for name in names_in(folder):
            path, of = folder / name, flavour_of(name)
            if path.is_dir() or (name.endswith(WEIGHTS) and path not in weights) or (of is not None and of != flavour):
                continue
            shutil.copyfile(path, target / part.name / name)


def _quantise(
    request: QuantizeRequest, models: Models, part: Part, kind: Weights, folder: Path,
    progress: Callable[[int], None],
) -> None:  # fmt: skip
    module, checkpoint = models.module(part), models.family.checkpoint
    index = match_index(module, checkpoint.weights(part.name), part.aliases)
    names = part.int8_weights(module)
    for pattern in request.exclusions:
        names = frozenset(name for name in names if not fnmatch(name.removesuffix(".weight"), pattern))
    made = f"tiler quantize {checkpoint.name}: {part.name} {kind}"
    made += "".join(f", without {pattern}" for pattern in request.exclusions)
    layers = write_quanto(folder / f"{_FILES[part.role]}.safetensors", index, names, kind, made, progress)
    (folder / QUANTO_MAP).write_text(json.dumps(layers, indent=4) + "\n")
