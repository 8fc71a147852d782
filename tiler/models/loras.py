"""The LoRAs of a render: find them, read them, and match them with a model's modules, which gives the changes of each
parameter."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from tiler.errors import ModelError, UsageError
from tiler.models.applied import Applied
from tiler.models.built import Models
from tiler.models.family import Family, Role
from tiler.models.lora_kinds import Scaling, family_of_lora, family_of_model, few_steps
from tiler.models.lora_names import Target, names_of_modules
from tiler.models.reading import ReadAs
from tiler.request import RenderRequest, ResolvedRequest, settings
from tiler.request.loras import Lora, parse_tag, summed
from tiler.request.wording import tags_of
from tiler.weights.changes import Change, Factors, Magnitude
from tiler.weights.index import TensorInfo, read_index, read_metadata
from tiler.weights.lora_files import SUFFIX, digests_of, find_lora
from tiler.weights.lora_keys import Kind, Slot, Tensors, kind_of, read_keys

_SHOWN = 3  # the most names in a note


def find_loras(request: RenderRequest) -> tuple[Lora, ...]:
    """The files that a request names, with --lora and with tags, each once. Raises TilerError."""
    tags = tags_of(request)
    if not tags and not request.loras:
        return ()
    named = [parse_tag(tag) for tag in tags]  # first: what is wrong in a tag is wrong with any folder
    given = () if request.lora_dir is None else (request.lora_dir.expanduser(),)
    found = [replace(lora, file=_file_of(lora.file.expanduser(), given)) for lora in request.loras]
    if tags and not given and not settings.folders(settings.Kind.LORA):
        raise UsageError(f"{tags[0]}: give the folder of your LoRAs with --lora-dir, or the file itself with --lora")
    for lora in named:
        file = find_lora(lora.name, given)
        found.append(Lora(file=file, strength=lora.strength, text_strength=lora.text_strength))
    return summed(found)


def _file_of(path: Path, given: Sequence[Path]) -> Path:
    """The file of --lora, given as a path or by its name in the folders `given`, else in the user's. Raises ModelError,
    UsageError."""
    if path.is_file():
        return path
    if not given and not settings.folders(settings.Kind.LORA):
        raise ModelError(f"--lora {path}: no such file; to give it by name, name its folder with --lora-dir")
    try:
        return find_lora(path.name.removesuffix(SUFFIX), given)
    except ModelError as error:
        raise ModelError(f"--lora {path}: no such file, and {error}") from error


def apply_loras(loras: Sequence[Lora], models: Models) -> Applied:
    """Match every module of the files with the model's. Raises ModelError for files that are no LoRAs or are of another
    family."""
    if not loras:
        return Applied()
    targets = names_of_modules(models)
    changes: dict[str, dict[str, list[Change]]] = {}
    notes: list[str] = []
    for lora in loras:
        notes += _match(_LoraFile.read(lora.file), lora, models, targets, changes)
    return Applied(changes=changes, files=tuple((lora, digests_of(lora.file)) for lora in loras), notes=tuple(notes))


def notes_on_loras(request: ResolvedRequest, models: Models, read_as: ReadAs) -> Iterator[str]:
    """Yield notes for the user: the effect of a few-step LoRA on a render, and LoRAs that have no effect on prompts
    that were encoded with `read_as`."""
    family = models.family
    if models.loras.marks(map(models.changes, family.encoders)) not in ([], list(read_as.loras)):
        yield "the prompts of --prompt-embeds were encoded without these LoRAs; give them to `tiler encode` too"
    found = few_steps((lora for lora, _ in models.loras.files), flow=family.traits.flow)
    if found is None:
        return
    path, recipe = found
    yield (
        f"{path.name} is for few steps ({recipe.title}): {request.num_inference_steps} steps, guidance {request.guidance_scale:g}, "
        f"{request.scheduler.value}; what is given as an option wins"
    )
    if request.guidance_scale > max(2.0, recipe.defaults.get("guidance_scale", math.inf)):
        yield f"guidance {request.guidance_scale:g} is too high for this kind of LoRA and burns colours; take --guidance-scale 1 to 2"


class _LoraFile(NamedTuple):
    """A LoRA file as described by its header."""

    path: Path
    modules: dict[str, Tensors]
    others: list[str]  # keys that do not belong to a LoRA
    header: dict[str, str]

    @classmethod
    def read(cls, path: Path) -> _LoraFile:
        if path.suffix.lower() in (".pt", ".pth", ".bin", ".ckpt", ".pkl"):
            raise ModelError(f"{path}: a pickle can run code when it is opened; take the LoRA as .safetensors")
        if path.is_dir():
            raise ModelError(f"{path}: this is a folder; --lora takes a .safetensors file")
        index = read_index(path)
        modules, others = read_keys(path, index)
        if not modules:
            raise ModelError(f"{path}: none of its keys is a LoRA's; the first is {next(iter(index), 'missing')!r}")
        for slot, info in (item for tensors in modules.values() for item in tensors.by_slot.items()):
            integer = slot is Slot.ALPHA and info.dtype in ("I64", "I32")
            if info.dtype not in ("F32", "F16", "BF16", "F8_E4M3", "F8_E5M2") and not integer:
                raise ModelError(
                    f"{path}: tensor {info.name!r} is stored as {info.dtype}; take the LoRA in fp16 or fp32"
                )
        return cls(path, modules, others, read_metadata(path))


def _match(
    file: _LoraFile, lora: Lora, models: Models, targets: Mapping[str, Sequence[Target]],
    changes: dict[str, dict[str, list[Change]]],
) -> list[str]:  # fmt: skip
    """Add the file's changes to `changes`, and return notes for the user. Raises ModelError."""
    family = models.family
    unknown = [name for name in file.modules if name not in targets]
    if len(unknown) == len(file.modules):
        raise _foreign(file, family)
    alphas, idle = _alphas(file), []
    scaling = Scaling.read(file.header)
    parts = {part.name: (part, models.module(part)) for part in (*family.encoders, family.part(Role.DENOISER))}
    for name, tensors in file.modules.items():
        layers = [(target, parts[target.part][1].get_submodule(target.module)) for target in targets.get(name, ())]
        total = sum(len(layer.weight) for _, layer in layers)
        for target, layer in layers:
            change_of = _Module(file, name, tensors, target, layer, total)
            strength = lora.strength if parts[target.part][0].role is Role.DENOISER else lora.text_strength
            found = {
                "weight": change_of.weight(strength, alphas.get(name), scaling, family),
                "bias": change_of.bias(strength),
            }
            for parameter, change in found.items():
                if change is not None and change.scale == 0:
                    idle.append(name)
                elif change is not None and strength != 0:
                    changes.setdefault(target.part, {}).setdefault(f"{target.module}.{parameter}", []).append(change)
    return [*_notes(file, unknown, idle)]


def _notes(file: _LoraFile, unknown: Sequence[str], idle: Sequence[str]) -> list[str]:
    def some(names: Sequence[str]) -> str:
        return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")

    name, total, notes = file.path.name, len(file.modules), []
    if unknown:
        notes.append(f"{name}: {total - len(unknown)} of {total} modules applied; this model has no {some(unknown)}")
    if file.others:
        notes.append(f"{name}: {len(file.others)} keys are not read: {some(file.others)}")
    if idle:
        notes.append(f"{name}: alpha or rank is 0 in {len(idle)} modules, which change nothing: {some(idle)}")
    return notes


def _foreign(file: _LoraFile, family: Family) -> ModelError:
    own, model = family_of_lora(file.modules, file.header), family_of_model(family)
    if own is None or own == model:
        first, what = next(iter(file.modules)), f"a LoRA of {own}" if own else "a LoRA"
        return ModelError(f"{file.path}: this is {what}, but no name in it is one of {model}; the first is {first!r}")
    return ModelError(
        f"{file.path}: this is a LoRA of {own}, and {family.checkpoint.name} is {model}; take one that was made for it"
    )


def _alphas(file: _LoraFile) -> dict[str, float]:
    infos = {name: t.by_slot[Slot.ALPHA] for name, t in file.modules.items() if Slot.ALPHA in t.by_slot}
    for name, info in infos.items():
        if math.prod(info.shape) != 1:
            raise ModelError(f"{file.path}: the alpha of {name!r} is no single number; the file is damaged")
    with closing(Factors([file.path])) as read:
        return {name: float(read.whole(info)) for name, info in infos.items()}


class _Module(NamedTuple):
    """A module of a file, and one layer that it changes; `total` counts the outputs of all layers that it changes."""

    file: _LoraFile
    name: str
    tensors: Tensors
    target: Target
    layer: Any
    total: int

    def weight(self, strength: float, alpha: float | None, scaling: Scaling, family: Family) -> Change | None:
        """The change of the weight, None if there is none. Raises ModelError if shapes do not fit."""
        path, slots = self.file.path, self.tensors.by_slot
        kind = kind_of(path, self.name, self.tensors)
        if kind is None:
            return None
        outputs, row, rank = _shape(path, self.name, kind, slots)
        sides = self.layer.weight.shape
        if (outputs, row) != (self.total, math.prod(sides[1:])):
            raise self._misshapen(outputs, row, family)
        if rank is None:
            scale = 1.0
        elif rank == 0:
            scale = 0.0
        else:
            scale = scaling.of(self.target.part, self.target.module, rank) if alpha is None else alpha / rank
        return Change(
            kind=kind, tensors={slot: info for slot, info in slots.items() if slot not in _BESIDE}, scale=scale,
            strength=strength, first=self.target.first, rows=len(self.layer.weight), magnitude=self._magnitude(),
        )  # fmt: skip

    def bias(self, strength: float) -> Change | None:
        """The change of the bias, None if there is none. Raises ModelError."""
        info, bias = self.tensors.by_slot.get(Slot.DIFF_BIAS), getattr(self.layer, "bias", None)
        if info is None:
            return None
        if bias is None or info.shape != (self.total,):
            raise ModelError(
                f"{self.file.path}: {self.name!r} changes a bias of {list(info.shape)}, and this model's module has no such bias"
            )
        return Change(
            kind=Kind.FULL,
            tensors={Slot.DIFF: info},
            scale=1.0,
            strength=strength,
            first=self.target.first,
            rows=len(bias),
        )

    def _misshapen(self, outputs: int, row: int, family: Family) -> ModelError:
        file, model = self.file, family_of_model(family)
        if (own := family_of_lora(file.modules, file.header)) not in (None, model):
            return ModelError(
                f"{file.path}: this is a LoRA of {own}, and {family.checkpoint.name} is {model}; take one that was made for it"
            )
        return ModelError(
            f"{file.path}: {self.name!r} changes a weight of {outputs} × {row}, this model's has {self.total} × "
            f"{math.prod(self.layer.weight.shape[1:])}; the LoRA is of another model"
        )

    def _magnitude(self) -> Magnitude | None:
        """DoRA's norms: of rows if the first dimension is the outputs, of inputs if the second dimension is the
        inputs."""
        info = self.tensors.by_slot.get(Slot.DORA)
        if info is None:
            return None
        inputs, count = self.layer.weight.shape[1], math.prod(info.shape)
        if self.tensors.magnitude_of_rows or (info.shape[:1] == (count,) != (1,) and len(info.shape) > 1):
            fits, of_rows = count == self.total, True
        elif len(info.shape) > 1:
            fits, of_rows = count == inputs and self.total == len(self.layer.weight), False
        else:
            fits, of_rows = self.total != inputs and count in (self.total, inputs), count == self.total
        if not fits:
            raise ModelError(
                f"{self.file.path}: the dora_scale of {self.name!r} has shape {list(info.shape)}, which does not say of which "
                f"side of {self.total} × {inputs} it holds the norms"
            )
        return Magnitude(info=info, of_rows=of_rows)


_BESIDE = (Slot.ALPHA, Slot.DORA, Slot.DIFF_BIAS)


def _shape(path: Path, name: str, kind: Kind, slots: Mapping[Slot, TensorInfo]) -> tuple[int, int, int | None]:
    """The outputs, elements per row, and rank of a difference; no rank if alpha has no meaning. Raises ModelError for
    tensors that cannot be multiplied."""
    sides = {slot: info.shape for slot, info in slots.items()}
    try:
        if kind is Kind.FULL:
            outputs, *rest = sides[Slot.DIFF]
            return outputs, math.prod(rest), None
        if kind is Kind.LORA:
            (outputs, rank, *ones), (low, *rest) = sides[Slot.UP], sides[Slot.DOWN]
            taps = 1
            if Slot.MID in sides:
                mid_out, mid_in, *window = sides[Slot.MID]
                _must(mid_out == rank and mid_in == low and math.prod(rest[1:]) == 1)
                taps, low = math.prod(window), rank
            _must(rank == low and math.prod(ones) == 1)
            return outputs, math.prod(rest) * taps, rank
        if kind is Kind.LOHA:
            first = _product_sides(sides, Slot.W1_A, Slot.W1_B, Slot.T1)
            _must(first == _product_sides(sides, Slot.W2_A, Slot.W2_B, Slot.T2))
            return first
        factored: int | None = None
        if Slot.W1 in sides:
            out1, in1 = sides[Slot.W1]
        else:
            out1, in1, factored = _product_sides(sides, Slot.W1_A, Slot.W1_B, Slot.T1)
        if Slot.W2 in sides:
            out2, *rest = sides[Slot.W2]
            in2 = math.prod(rest)
        else:
            out2, in2, factored = _product_sides(sides, Slot.W2_A, Slot.W2_B, Slot.T2)
        return out1 * out2, in1 * in2, factored
    except ValueError:
        shapes = ", ".join(f"{slot} {list(shape)}" for slot, shape in sides.items())
        raise ModelError(
            f"{path}: the tensors of {name!r} do not go together ({shapes}); the file is damaged"
        ) from None


def _product_sides(sides: Mapping[Slot, Sequence[int]], a: Slot, b: Slot, core: Slot) -> tuple[int, int, int]:
    """The outputs, elements per row, and rank of a · b."""
    (first, second), (rank, *rest) = sides[a], sides[b]
    if core not in sides:
        _must(second == rank)
        return first, math.prod(rest), rank
    i, j, *window = sides[core]
    _must(i == first and j == rank and len(rest) == 1)
    return second, rest[0] * math.prod(window), rank


def _must(fits: bool) -> None:
    if not fits:
        raise ValueError
