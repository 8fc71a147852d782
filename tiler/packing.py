"""A checkpoint's weights in int8: which of them are quantised, and the phase that packs them into one file."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from tiler import events
from tiler.compute import cpu
from tiler.compute.int8 import quantize_rows
from tiler.events import OnEvent, percent
from tiler.memory.budget import Budget
from tiler.memory.policy import at_layer
from tiler.models import family as families
from tiler.models.family import Family
from tiler.models.unet import int8_weights, order_of_use
from tiler.weights.index import TensorInfo
from tiler.weights.packed import packed_index, write_packed
from tiler.weights.store import match_index

TEXT = "text_encoder."  # before the names of its parameters


def packed_text_names(name: str) -> list[str]:
    """Where a packed file has a text encoder's parameter."""
    return [TEXT + name]


def packed_weights(family: Family, cache: Path, progress: Callable[[float, str], None]) -> dict[str, TensorInfo]:
    """The index of the packed file in `cache`, which is made first if it is not there or does not fit: the UNet's parameters,
    and the text encoder's after `TEXT`.

    `progress` gets the share written and why. Raises StorageError, ModelError, NumericalError.
    """
    text = family.checkpoint.weights("text_encoder")
    files = family.checkpoint.weights("unet") | {TEXT + name: info for name, info in text.items()}

    def write(path: Path, mark: str, reason: str) -> None:
        unet, encoder = families.build_unet(family), families.build_text_encoder(family)
        texts = match_index(encoder, text, families.text_names)
        index = match_index(unet, family.checkpoint.weights("unet"), families.plain_names)
        # The text encoder is computed in fp32: its weights may take all 8 bits on every processor.
        quantised = {name: quantize_rows for name in int8_weights(unet)}
        quantised |= {TEXT + name: partial(quantize_rows, largest=127) for name in int8_weights(encoder)}
        order = [TEXT + name for name in texts] + order_of_use(unet)
        index |= {TEXT + name: info for name, info in texts.items()}
        write_packed(path, mark, order, index, quantised, lambda share: progress(share, reason))

    return packed_index(cache, files, str(cpu.int8().largest), write)


def prepare_int8(family: Family, cache: Path, budget: Budget, on_event: OnEvent) -> dict[str, TensorInfo]:
    """The index of the checkpoint's int8 weights in `cache`, made first where they are missing. Raises TilerError."""
    with budget.phase("quantize") as use:
        tell, check = percent(on_event, "quantize"), at_layer(budget, planned_bytes=budget.max_bytes)
        started = False

        def progress(share: float, reason: str) -> None:
            nonlocal started
            if not started:
                on_event(events.PhaseStarted(name="quantize", total=100))
                on_event(events.Note(text=f"int8 weights are made in {cache} ({reason})"))
                started = True
            tell(share)
            check("quantize")

        index = packed_weights(family, cache, progress)
    if started:
        on_event(events.PhaseDone(name="quantize", seconds=use.seconds, peak_rss_bytes=use.peak_rss_bytes))
    return index
