"""`--preview FILE`: a small picture of the canvas while it is denoised, one pixel for each latent or for several.

Colours are an affine function of a latent's channels, fitted to the autoencoder by least squares: the mean colours of
8×8 pixels of a decoded picture against its latents. That picture is the first guide that is decoded, or, without a
guide, a small one made up for the purpose.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import closing, suppress
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tiler.decoding import FACTOR, method
from tiler.decoding.method import ScratchSpace
from tiler.decoding.rows import to_uint8
from tiler.diffusion.schedulers import DiffusersSchedule
from tiler.errors import StorageError, UsageError
from tiler.files import check_writable, replace_durably
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
from tiler.request.choices import STDOUT, Format
from tiler.run import Run, measure
from tiler.weights.identity import model_id

LONGEST = 512  # the longer side of a preview in pixels; at least about half of that
_SHARE = 100  # between two previews, this many times a preview's own duration passes: 1 % of the time
_SIDE = 16  # latents per side of the made-up picture
_SAYS = {"parameters": "a preview by tiler"}  # distinguishes a preview from the user's pictures


class Preview:
    """An open preview. `colours` (C + 1, 3) maps latents to 0–255, its last row is the constant; None until it is
    known."""

    def __init__(self, request: ResolvedRequest, spec: VaeSpec) -> None:
        """Raises UsageError, and StorageError if the file cannot be written."""
        assert request.preview is not None
        self.path, self.interval, self.spec = request.preview, request.preview_interval, spec
        check(self.path, request)
        self._is_png = format_of(self.path) is Format.PNG
        folder = prompts_folder(request.cache_dir).with_name("previews")
        self._cache = folder / f"{model_id(spec.checkpoint, [spec.part])}.json"
        self.colours = _read(self._cache, int(spec.config.get("latent_channels", 4)))
        self._next, self._failed = 0.0, False

    def remember(self) -> None:
        """Store the colours for later runs with this autoencoder."""
        assert self.colours is not None
        with suppress(OSError, StorageError):  # if this fails, the next run learns them again
            self._cache.parent.mkdir(parents=True, exist_ok=True)
            replace_durably(self._cache, [json.dumps(self.colours.tolist()).encode()])

    def is_due(self, steps: int) -> bool:
        """Whether to show the canvas after `steps` of its steps."""
        return steps % self.interval == 0 and time.monotonic() >= self._next

    def show(self, latents: Tensor, note: Callable[[str], None]) -> None:
        assert self.colours is not None
        start = time.monotonic()
        pixels, buffer = paint(latents, self.colours), BytesIO()
        height, width = pixels.shape[:2]
        writer = (
            PngWriter(buffer, width, height, _SAYS)
            if self._is_png
            else JpegWriter(buffer, width, height, _SAYS, None, QUALITY)
        )
        writer.write(pixels)
        writer.close()
        temp = self.path.with_name(f".{self.path.name[:200]}.new")
        try:
            temp.write_bytes(buffer.getbuffer())
            os.replace(temp, self.path)
        except OSError as error:
            if not self._failed:
                note(f"{self.path}: the preview could not be written ({error.strerror})")
            self._failed = True
            with suppress(OSError):
                temp.unlink()
        self._next = time.monotonic() + _SHARE * (time.monotonic() - start)


def open_preview(request: ResolvedRequest, models: Models) -> Preview | None:
    """The preview that the request asks for, or None. Raises UsageError, StorageError."""
    return None if request.preview is None else Preview(request, models.family.autoencoder)


def learn(preview: Preview | None, latents: Tensor, pixels: np.ndarray) -> None:
    """Learn the colours from a decoded picture (8h, 8w, 3) uint8 and its scaled latents (1, C, h, w), unless they are
    known."""
    if preview is not None and preview.colours is None:
        preview.colours = fit_colours(latents, pixels)
        preview.remember()


def watch(preview: Preview | None, schedule: DiffusersSchedule, begin: int, note: Callable[[str], None]) -> None:
    """Show the canvas from step `begin` of its schedule on; the last step is always shown."""
    if preview is None:
        return

    def after(step: int, denoised: Callable[[], Tensor]) -> None:
        if preview.is_due(step + 1 - begin) or step + 1 == schedule.calls.steps:
            preview.show(denoised(), note)

    schedule.on_step = after


def check(path: Path, request: ResolvedRequest) -> None:
    """Check that the preview can be written. An older preview is replaced; any other file only with --force. Raises
    UsageError, StorageError."""
    if path == STDOUT or format_of(path) not in (Format.PNG, Format.JPEG):
        raise UsageError(f"{path}: previews are written as .png or .jpg; give --preview a name that ends so")
    ours = False
    if path.is_file():
        with suppress(UsageError):
            ours = read_texts(path) == _SAYS
    check_writable(path, force=request.force or ours, option="--preview")


def fit_colours(latents: Tensor, pixels: np.ndarray) -> Tensor:
    """Fit colours to latents (1, C, h, w) and their picture (8h, 8w, 3) uint8. Return (C + 1, 3) fp32, from the normal
    equations in fp64."""
    _, channels, height, width = latents.shape
    blocks = pixels[: FACTOR * height, : FACTOR * width].reshape(height, FACTOR, width, FACTOR, 3)
    means = blocks.mean(axis=(1, 3), dtype=np.float32).reshape(-1, 3)
    known = torch.cat([latents[0].reshape(channels, -1), torch.ones(1, height * width)]).numpy().astype(np.float64)
    # Without BLAS and LAPACK: their code and buffers would take 20 MB.
    gram, right = np.einsum("in,jn->ij", known, known), np.einsum("in,nk->ik", known, means)
    gram += np.eye(channels + 1) * gram.diagonal().mean() * 1e-6  # keeps it regular for a picture of one colour
    for row in range(channels + 1):  # Gauss and Jordan; the matrix is positive definite
        right[row] /= gram[row, row]
        gram[row] /= gram[row, row]
        for other in range(channels + 1):
            if other != row:
                factor = gram[other, row]
                gram[other] -= factor * gram[row]
                right[other] -= factor * right[row]
    return torch.from_numpy(right).float()


def paint(latents: Tensor, colours: Tensor) -> np.ndarray:
    """Turn latents (1, C, h, w) into a picture (H, W, 3) uint8 with about LONGEST pixels on its longer side. Only a few
    rows are in memory at a time."""
    _, channels, height, width = latents.shape
    many = -(-max(height, width) // LONGEST)  # latents per pixel
    times = max(1, LONGEST // max(height, width))  # pixels per latent
    rows, columns = max(1, height // many), max(1, width // many)
    painted = np.empty((rows, columns, 3), np.uint8)
    for row in range(rows):
        band = latents[0, :, row * many : (row + 1) * many, : columns * many]
        mean = band.reshape(channels, -1, columns, band.shape[2] // columns).mean(dim=(1, 3))
        colour = mean.T @ colours[:-1] + colours[-1]
        painted[row] = colour.nan_to_num().clamp(0, 255).round().to(torch.uint8).numpy()
    return painted.repeat(times, 0).repeat(times, 1)


def learn_by_decoding(run: Run, preview: Preview | None, request: ResolvedRequest, planned_bytes: int) -> None:
    """Decode a small picture of smooth, made-up latents to learn the colours, if they are still unknown. This takes
    less memory than decoding the canvas, for which `planned_bytes` are planned."""
    if preview is None or preview.colours is not None:
        return
    spec, folder = preview.spec, request.scratch_folder
    vae = run.models.vae(spec)
    channels, generator = int(vae.config.latent_channels), torch.Generator("cpu").manual_seed(0)
    coarse = torch.randn(1, channels, _SIDE // 4, _SIDE // 4, generator=generator)
    latents = torch.nn.functional.interpolate(coarse, size=(_SIDE, _SIDE), mode="bicubic")
    facts = measure(folder)
    space = ScratchSpace(folder, facts.scratch_free_bytes, request.scratch_dtype)
    plan = VaePeaks(run.models, spec, facts).choose(Decode.EXACT, (_SIDE, _SIDE), space, wrap=Wrap.NONE)
    with run.phase("preview", 1), run.streamed(vae, spec.weights, families.vae_names) as streamer:
        check_memory = at_rows(run.budget, planned_bytes)
        unscaled = spec.unscale_(latents.clone())
        strips = method.decode(plan, vae, streamer, unscaled, check=check_memory, progress=lambda share: None)
        with closing(strips):
            pixels = np.concatenate([to_uint8(strip) for strip in strips])
    learn(preview, latents, pixels)


def _read(path: Path, channels: int) -> Tensor | None:
    """The colours that an earlier run stored, or None."""
    try:
        colours = torch.tensor(json.loads(path.read_text()), dtype=torch.float32)
    except (OSError, ValueError, TypeError, RuntimeError, RecursionError):
        return None
    return colours if colours.shape == (channels + 1, 3) and bool(colours.isfinite().all()) else None
