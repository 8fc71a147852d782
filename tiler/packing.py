"""A checkpoint's weights in int8: which weights are quantised, and the phase that packs them into one file."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiler import events
from tiler.compute import cpu
from tiler.compute.int8 import quantize_rows
from tiler.compute.lending import lent
from tiler.compute.native import reads_blocks
from tiler.compute.shapes import MetaMeter
from tiler.compute.stream import Streamer
from tiler.events import OnEvent, Phase, percent
from tiler.memory.budget import Budget
from tiler.memory.policy import at_layer
from tiler.models.built import Models
from tiler.models.family import Family, Options, Part, Role
from tiler.weights.blocks import can_block
from tiler.weights.changes import Changes
from tiler.weights.index import TensorInfo
from tiler.weights.packed import Quantise, packed_index, write_packed
from tiler.weights.rotation import can_rotate, rotate_
from tiler.weights.store import match_index


def packed_parts(family: Family) -> list[Part]:
    """The parts whose weights a packed file holds, in order of use. Text encoders are included if the checkpoint has
    them."""
    return [*family.encoders, family.part(Role.DENOISER)]


def packed_names(part: Part) -> Callable[[str], list[str]]:
    """A function from a parameter's name to its names in a packed file: the denoiser's parameters keep their names, the
    others' are prefixed with their part's."""
    prefix = _prefix(part)
    return lambda name: [prefix + name]


def _prefix(part: Part) -> str:
    return "" if part.role is Role.DENOISER else f"{part.name}."


def packed_changes(models: Models) -> Changes:
    """The changes by LoRAs to the denoiser's int8 weights that have no low-rank form and so cannot be computed beside
    them: they are packed with the weights."""
    part = models.family.part(Role.DENOISER)
    changes = models.changes(part)
    integers = part.int8_weights(models.module(part)) if changes else frozenset[str]()
    packed = [name for name in changes if name in integers and not part.once(name)]
    whole = {name: [one for one in changes[name] if one.rank is None] for name in packed}
    return {name: some for name, some in whole.items() if some}


def beside_packed(models: Models, part: Part) -> Changes:
    """The other changes to the denoiser's weights, which are added when weights are read, or computed beside them."""
    inside = packed_changes(models)
    return {
        name: [one for one in some if name not in inside or one.rank is not None]
        for name, some in models.changes(part).items()
    }


def packed_weights(models: Models, cache: Path, progress: Callable[[float, str], None]) -> dict[str, TensorInfo]:
    """The index of the packed file in `cache`: the parameters of text encoders and denoiser, named by `packed_names`.
    The file is made first if it is missing or does not fit. Parameters that a run reads only once stay in the
    checkpoint's own files, and come last in the index.

    `progress` receives the share written and the reason. Raises StorageError, ModelError, NumericalError.
    """
    family = models.family
    parts = packed_parts(family)
    stored = {part.name: family.checkpoint.weights(part.name) for part in parts}
    files = {_prefix(part) + name: info for part in parts for name, info in stored[part.name].items()}
    matched = {part.name: match_index(models.module(part), stored[part.name], part.aliases) for part in parts}
    integers = {part.name: part.int8_weights(models.module(part)) for part in parts}
    part = family.part(Role.DENOISER)
    name = part.name
    rotated = frozenset(weight for weight in integers[name] if part.rotate and can_rotate(matched[name][weight].shape))
    changes, rules = packed_changes(models), "fours" if cpu.int8().adds_fours else "127"
    if changes:
        rules += " " + ", ".join(models.loras.marks([changes]))
    if rotated:
        rules += " rotated"
    in_blocks = reads_blocks() and any(can_block(matched[name][weight].shape) for weight in integers[name])

    def write(path: Path, mark: str, reason: str) -> None:
        order: list[str] = []
        index: dict[str, TensorInfo] = {}
        quantised: dict[str, Quantise] = {}
        to_block: set[str] = set()
        for part in parts:
            module, prefix = models.module(part), _prefix(part)
            packed = {name: info for name, info in matched[part.name].items() if not part.once(name)}
            denoiser = part.role is Role.DENOISER
            # A text encoder is computed in fp32: its weights may take all 8 bits on every processor.
            rule = quantize_rows if denoiser else partial(quantize_rows, largest=127)
            quantised |= {prefix + name: rule for name in integers[part.name]}
            quantised |= dict.fromkeys(rotated if denoiser else (), _quantize_rotated)
            to_block |= integers[part.name] if denoiser and in_blocks else set()
            index |= {prefix + name: info for name, info in packed.items()}
            names = order_of_use(family, module) if denoiser else packed
            order += [prefix + name for name in names if name in packed]
        write_packed(
            path, mark, order, index, quantised, lambda share: progress(share, reason), in_blocks=frozenset(to_block),
            rotated=rotated, changes=changes, model=family.checkpoint.known_as,
        )  # fmt: skip

    own = {_prefix(part) + name: info for part in parts for name, info in matched[part.name].items() if part.once(name)}
    return packed_index(cache, files, rules, write, in_blocks=in_blocks) | own


def _quantize_rotated(rows: Tensor) -> tuple[Tensor, Tensor]:
    return quantize_rows(rotate_(rows))


def order_of_use(family: Family, denoiser: Any) -> list[str]:
    """All parameter names of a denoiser on the meta device: first those loaded once at the start, then those that a
    pass streams, in order of use."""
    streamer = Streamer(None)
    everything = [name for name, _ in denoiser.named_parameters()]
    with lent(denoiser, streamer), MetaMeter(), torch.no_grad():
        samples = family.example([0], (family.granularity, family.granularity))
        timesteps, prompts = torch.empty(1, device="meta"), [sample.prompt for sample in samples]
        prepared = family.prepare(denoiser, streamer, timesteps, prompts, Options())
        family.predict(denoiser, streamer, samples, 0, prepared)
    return [name for name in everything if name not in streamer.used] + list(streamer.used)


def prepare_int8(models: Models, cache: Path, budget: Budget, on_event: OnEvent) -> dict[str, TensorInfo]:
    """The index of the checkpoint's int8 weights in `cache`; missing ones are made first. Raises TilerError."""
    with budget.phase(Phase.QUANTIZE) as use:
        tell, check = percent(on_event, Phase.QUANTIZE), at_layer(budget, planned_bytes=budget.max_bytes)
        started = False

        def progress(share: float, reason: str) -> None:
            nonlocal started
            if not started:
                on_event(events.PhaseStarted(name=Phase.QUANTIZE, total=100))
                on_event(events.Note(text=f"int8 weights are made in {cache} ({reason})"))
                started = True
            tell(share)
            check(Phase.QUANTIZE)

        index = packed_weights(models, cache, progress)
    if started:
        on_event(events.PhaseDone(name=Phase.QUANTIZE, seconds=use.seconds, peak_rss_bytes=use.peak_rss_bytes))
    return index
