"""`--preview`: the canvas as it will look, one pixel for each latent or for several, in a file or in the terminal.

Colours are an affine function of a latent's channels (decoding/colours.py). If the model brings none, the first guide
that is decoded tells it; without a guide, a small made-up picture is decoded. With --tiny-vae, that autoencoder decodes
the canvas at reduced size instead.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import closing, suppress
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tiler.decoding import method, tiny
from tiler.decoding.colours import fit_colours, paint, reduced
from tiler.decoding.method import ScratchSpace
from tiler.decoding.pictures import to_uint8
from tiler.diffusion.schedulers import DiffusersSchedule
from tiler.errors import BudgetExceeded, StorageError, UsageError
from tiler.events import Phase, Shown
from tiler.files import check_writable, replace_file
from tiler.memory import process
from tiler.memory.policy import at_rows
from tiler.models import family as families
from tiler.models.built import Models
from tiler.models.embeds import prompts_folder
from tiler.models.family import VaeSpec
from tiler.output.jpeg import JpegWriter
from tiler.output.picture import QUALITY, format_of
from tiler.output.png import PngWriter
from tiler.output.texts import read_texts
from tiler.planning.peaks import VaePeaks
from tiler.request import Decode, ResolvedRequest, Wrap
from tiler.request.choices import FORMATS, STDOUT, Format
from tiler.run import Run, measure
from tiler.weights.identity import model_id

SHIPPED = "preview.json"  # colours in an autoencoder's folder
_SHARE = 100  # between two previews, this many times a preview's own duration passes: 1 % of the time
_HEAP = 4_000_000  # freed bytes that stay in the process while a tiny autoencoder decodes
_SIDE = 16  # latents per side of the made-up picture
_SAYS = {"parameters": "a preview by tiler"}  # distinguishes a preview from the user's pictures


class Preview:
    """An open preview. `colours` (C + 1, 3) maps latents to 0–255, its last row is the constant; None until it is
    known."""

    def __init__(self, request: ResolvedRequest, spec: VaeSpec, tiny_vae: VaeSpec | None) -> None:
        """Raises UsageError, and StorageError if the file cannot be written."""
        assert request.preview is not None
        self.path, self.interval, self.spec, self.tiny_vae = request.preview, request.preview_interval, spec, tiny_vae
        check(self.path, request)
        folder = prompts_folder(request.cache_dir).with_name("previews")
        self._cache = folder / f"{model_id(spec.checkpoint, [spec.part])}.json"
        self.colours = _known(spec, self._cache)
        self._next, self._failed, self._ended = 0.0, False, False

    @property
    def needs_colours(self) -> bool:
        """Whether they must still be learnt."""
        return self.tiny_vae is None and self.colours is None

    def remember(self) -> None:
        """Store the colours for later runs with this autoencoder."""
        assert self.colours is not None
        with suppress(OSError, StorageError):  # if this fails, the next run learns them again
            self._cache.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self._cache, [json.dumps(self.colours.tolist()).encode()], durable=True)

    def is_due(self, steps: int) -> bool:
        """Whether to show the canvas after `steps` of its steps."""
        return steps % self.interval == 0 and time.monotonic() >= self._next

    def show(self, run: Run, latents: Tensor) -> None:
        """If the preview cannot be made, a note says so, and there are no more. Raises BudgetExceeded."""
        if self._ended:
            return
        start = time.monotonic()
        try:
            pixels = self._pixels(run, latents)
        except BudgetExceeded:
            raise
        except Exception as error:  # whatever it is, it must not end a render of hours
            self._ended = True
            run.note(f"the preview could not be made, and there are no more: {error}")
            return
        if self.path == STDOUT:
            run.on_event(Shown(pixels=pixels))
        else:
            self._write(pixels, run.note)
        self._next = time.monotonic() + _SHARE * (time.monotonic() - start)

    def _pixels(self, run: Run, latents: Tensor) -> np.ndarray:
        if self.tiny_vae is not None:
            return _decode(run, self.tiny_vae, latents)
        assert self.colours is not None
        return paint(latents, self.colours)

    def _write(self, pixels: np.ndarray, note: Callable[[str], None]) -> None:
        buffer, (height, width) = BytesIO(), pixels.shape[:2]
        writer = (
            PngWriter(buffer, width, height, _SAYS)
            if format_of(self.path) is Format.PNG
            else JpegWriter(buffer, width, height, _SAYS, None, QUALITY)
        )
        writer.write(pixels)
        writer.close()
        try:
            replace_file(self.path, [buffer.getbuffer()], durable=False)
        except StorageError as error:
            if not self._failed:
                note(f"the preview could not be written: {error}")
            self._failed = True


def open_preview(request: ResolvedRequest, models: Models) -> Preview | None:
    """The preview that the request asks for, or None. Raises UsageError, StorageError."""
    if request.preview is None:
        return None
    return Preview(request, models.family.autoencoder, models.tiny)


def learn(preview: Preview | None, latents: Tensor, pixels: np.ndarray) -> None:
    """Learn the colours from a decoded picture (8h, 8w, 3) uint8 and its scaled latents (1, C, h, w), unless they are
    known."""
    if preview is not None and preview.needs_colours:
        preview.colours = fit_colours(latents, pixels)
        preview.remember()


def watch(run: Run, preview: Preview | None, schedule: DiffusersSchedule, begin: int) -> None:
    """Show the canvas from step `begin` of its schedule on; the last step is always shown."""
    if preview is None:
        return

    def after(step: int, denoised: Callable[[], Tensor]) -> None:
        if preview.is_due(step + 1 - begin) or step + 1 == schedule.calls.steps:
            preview.show(run, denoised())

    schedule.on_step = after


def check(path: Path, request: ResolvedRequest) -> None:
    """Check that the preview can be written. An older preview is replaced; any other file only with --force. Raises
    UsageError, StorageError."""
    if path == STDOUT:
        return
    if FORMATS.get(path.suffix.lower()) not in (Format.PNG, Format.JPEG):
        raise UsageError(
            f"{path}: previews are written as .png or .jpg; give --preview a name that ends so, or - for the terminal"
        )
    ours = False
    if path.is_file():
        with suppress(UsageError):
            ours = read_texts(path) == _SAYS
    check_writable(path, force=request.force or ours, option="--preview")


def _decode(run: Run, spec: VaeSpec, latents: Tensor) -> np.ndarray:
    """Scaled latents (1, C, h, w) → (H, W, 3) uint8 by a tiny autoencoder, at most 256 pixels on a side."""
    vae, small = run.models.vae(spec), spec.unscale_(reduced(latents, tiny.PREVIEW_SIDE))

    def check(where: str) -> None:
        if process.free_heap() > _HEAP:
            process.release_heap()
        run.budget.check(where)

    with run.streamed(vae, spec.weights, families.vae_names):
        strips = tiny.decode(vae, small, check=check, rows=tiny.PREVIEW_ROWS)
        pixels = np.concatenate([to_uint8(strip.nan_to_num()) for strip in strips])
    process.release_heap()  # the next pass finds the memory as the last one left it
    process.release_code()
    return pixels


def learn_by_decoding(run: Run, preview: Preview | None, request: ResolvedRequest, planned_bytes: int) -> None:
    """Decode a small picture of smooth, made-up latents to learn the colours, if they are still unknown. This takes
    less memory than decoding the canvas, for which `planned_bytes` are planned."""
    if preview is None or not preview.needs_colours:
        return
    spec, folder = preview.spec, request.scratch_folder
    vae = run.models.vae(spec)
    channels, generator = int(vae.config.latent_channels), torch.Generator("cpu").manual_seed(0)
    coarse = torch.randn(1, channels, _SIDE // 4, _SIDE // 4, generator=generator)
    latents = torch.nn.functional.interpolate(coarse, size=(_SIDE, _SIDE), mode="bicubic")
    facts = measure(folder)
    space = ScratchSpace(folder, facts.scratch_free_bytes, request.scratch_dtype)
    plan = VaePeaks(run.models, spec, facts).choose(Decode.EXACT, (_SIDE, _SIDE), space, wrap=Wrap.NONE)
    with run.phase(Phase.PREVIEW, 1), run.streamed(vae, spec.weights, families.vae_names) as streamer:
        check_memory = at_rows(run.budget, planned_bytes)
        unscaled = spec.unscale_(latents.clone())
        strips = method.decode(plan, vae, streamer, unscaled, check=check_memory, progress=lambda share: None)
        with closing(strips):
            pixels = np.concatenate([to_uint8(strip) for strip in strips])
    learn(preview, latents, pixels)


def _known(spec: VaeSpec, cache: Path) -> Tensor | None:
    """The colours that lie beside an autoencoder's weights, as `mini`'s do, or that an earlier run learnt."""
    channels = int(spec.config.get("latent_channels", 4))
    beside = None if spec.checkpoint.file is not None else spec.checkpoint.folder / spec.part / SHIPPED
    found = None if beside is None else _read(beside, channels)
    return _read(cache, channels) if found is None else found


def _read(path: Path, channels: int) -> Tensor | None:
    """The colours in a file, or None."""
    try:
        colours = torch.tensor(json.loads(path.read_text()), dtype=torch.float32)
    except (OSError, ValueError, TypeError, RuntimeError, RecursionError):
        return None
    return colours if colours.shape == (channels + 1, 3) and bool(colours.isfinite().all()) else None
