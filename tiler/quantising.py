"""Write a model as a folder with fewer bits per weight: the denoiser's weights, and the text encoders' if asked for, in
optimum-quanto's layout, everything else as it was. The folder of a model in single files has every part, under the
names of diffusers and transformers.

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
from typing import Any

from tiler.errors import StorageError, UsageError
from tiler.events import OnEvent, Phase, PhaseDone, PhaseStarted, percent
from tiler.memory.budget import Budget
from tiler.memory.policy import at_layer
from tiler.models.built import Models
from tiler.models.family import Part, Role
from tiler.request import QuantizeRequest
from tiler.request.choices import Weights
from tiler.weights.checkpoint import QUANTO_MAP, Checkpoint
from tiler.weights.flavours import WEIGHTS, find_weights, flavour_of, names_in, read_json
from tiler.weights.hub import DEFAULTS, INDEX
from tiler.weights.quanto import write_quanto
from tiler.weights.store import match_index

_DIFFUSERS = "diffusion_pytorch_model"
_FILES = {Role.DENOISER: _DIFFUSERS, Role.TEXT_ENCODER: "model", Role.VAE: _DIFFUSERS}
_TOKENIZER_CONFIG = "tokenizer_config.json"
_TOKENIZER_FILES = (
    _TOKENIZER_CONFIG, "vocab.json", "merges.txt", "tokenizer.json", "spiece.model", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip


def write_folder(request: QuantizeRequest, models: Models, budget: Budget, on_event: OnEvent) -> dict[str, int]:
    """Write the folder `request.output`, complete or not at all. Return the bytes of each part's weights in it. Raises
    TilerError."""
    checkpoint, output = models.family.checkpoint, request.output
    assert output is not None
    kinds = _kinds(request, models)
    _check_exclusions(request, models, kinds)
    _check_place(models, output, force=request.force)
    _check_room(checkpoint, models, output.absolute().parent)
    with budget.phase(Phase.QUANTIZE) as use:
        on_event(PhaseStarted(name=Phase.QUANTIZE, total=100))
        tell, check = percent(on_event, Phase.QUANTIZE), at_layer(budget, planned_bytes=budget.max_bytes)
        rewritten = [part for part in models.family.parts if part.name in kinds or part.name in checkpoint.sources]
        total = sum(info.nbytes for part in rewritten for info in checkpoint.weights(part.name).values())
        read = 0

        def progress(nbytes: int) -> None:
            nonlocal read
            read += nbytes
            tell(min(1.0, read / total))
            check(Phase.QUANTIZE)

        with _whole(output) as folder:
            _describe(checkpoint, folder)
            for part in models.family.parts:
                (folder / part.name).mkdir()
                if part.name in checkpoint.sources:
                    (folder / part.name / "config.json").write_text(_json(checkpoint.config(part.name)))
                else:
                    _copy(checkpoint, part, folder / part.name, weights=part not in rewritten)
                if part in rewritten:
                    _rewrite(request, models, part, kinds.get(part.name), folder / part.name, progress)
            sizes = {
                part.name: sum(file.stat().st_size for file in (folder / part.name).glob("*.safetensors"))
                for part in models.family.parts
            }
    on_event(PhaseDone(name=Phase.QUANTIZE, seconds=use.seconds, peak_rss_bytes=use.peak_rss_bytes))
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


def _check_exclusions(request: QuantizeRequest, models: Models, kinds: Mapping[str, Weights]) -> None:
    """Raise UsageError for a pattern that is no layer's name."""
    modules = [(part, models.module(part)) for part in models.family.parts if part.name in kinds]
    layers = {name.removesuffix(".weight") for _, module in modules for name, _ in module.named_parameters()}
    for pattern in request.exclusions:
        if not any(fnmatch(layer, pattern) for layer in layers):
            like = min(name for part, module in modules for name in part.int8_weights(module))
            raise UsageError(
                f"--exclude {pattern}: no layer has such a name; names are like {like.removesuffix('.weight')}"
            )


def _check_place(models: Models, output: Path, *, force: bool) -> None:
    checkpoint, target = models.family.checkpoint, output.resolve()
    own = checkpoint.folder.resolve()
    weights = (checkpoint.weights(part.name).values() for part in models.family.parts)
    read = {info.path.resolve() for index in weights for info in index}
    within = checkpoint.file is None and (target == own or own in target.parents)
    if within or any(target in path.parents for path in read):
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


def _describe(checkpoint: Checkpoint, folder: Path) -> None:
    """Write what belongs to no part with weights: the pipeline's index, its scheduler, its tokenizers, and a folder's
    own defaults."""
    source, index = checkpoint.folder, checkpoint.config("", INDEX)
    for name in names_in(source) if checkpoint.file is None else ():
        if name == DEFAULTS:
            shutil.copyfile(source / name, folder / name)
        elif name.startswith(("tokenizer", "scheduler")) and (source / name).is_dir():
            shutil.copytree(source / name, folder / name)
    for name, part in checkpoint.sources.items():
        if name:
            index[name] = _class_of(part.config)
    for name, path in checkpoint.tokenizers.items():
        (folder / name).mkdir(exist_ok=True)
        for file in _TOKENIZER_FILES:
            if (path / file).is_file():
                shutil.copyfile(path / file, folder / name / file)
        own = read_json(path / _TOKENIZER_CONFIG) if (path / _TOKENIZER_CONFIG).is_file() else {}
        index[name] = ["transformers", own.get("tokenizer_class", "T5Tokenizer")]
    if (scheduler := checkpoint.sources.get("scheduler")) is not None:
        (folder / "scheduler").mkdir(exist_ok=True)
        (folder / "scheduler/scheduler_config.json").write_text(_json(scheduler.config))
    (folder / INDEX).write_text(_json(index))


def _class_of(config: Mapping[str, Any]) -> list[str]:
    """A part's library and class, as model_index.json names them."""
    if "_class_name" in config:
        return ["diffusers", config["_class_name"]]
    encoder = f"{str(config.get('model_type', '')).upper()}EncoderModel"  # T5's, whose configs name no class
    return ["transformers", *config.get("architectures", [encoder])[:1]]


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"


def _copy(checkpoint: Checkpoint, part: Part, target: Path, *, weights: bool) -> None:
    """Copy the files of a part's folder, of its weights only those that tiler reads, or none."""
    folder = checkpoint.folder / part.name
    found = find_weights(folder, checkpoint.variant) if weights else None
    files, flavour = ((), None) if found is None else (found.files, found.flavour)
    for name in names_in(folder):
        path, of = folder / name, flavour_of(name)
        if path.is_dir() or (name.endswith(WEIGHTS) and path not in files) or (of is not None and of != flavour):
            continue
        shutil.copyfile(path, target / name)


def _rewrite(
    request: QuantizeRequest, models: Models, part: Part, kind: Weights | None, folder: Path,
    progress: Callable[[int], None],
) -> None:  # fmt: skip
    """Write a part's weights, quantised unless `kind` is None."""
    module, checkpoint = models.module(part), models.family.checkpoint
    index = match_index(module, checkpoint.weights(part.name), part.aliases)
    if part.name in checkpoint.sources:
        index = {name: info._replace(name=part.aliases(name)[0]) for name, info in index.items()}
    names = part.int8_weights(module) if kind is not None else frozenset()
    for pattern in request.exclusions:
        names = frozenset(name for name in names if not fnmatch(name.removesuffix(".weight"), pattern))
    made = f"tiler quantize {checkpoint.name}: {part.name}"
    if kind is not None:
        made = " ".join((made, kind)) + "".join(f", without {pattern}" for pattern in request.exclusions)
    layers = write_quanto(folder / f"{_FILES[part.role]}.safetensors", index, names, kind, made, progress)
    if kind is not None:
        (folder / QUANTO_MAP).write_text(json.dumps(layers, indent=4) + "\n")
