"""The autoencoder with fixed statistics, for pictures of any height at constant memory, in both directions.

The statistics come from a sample of the picture itself: small blocks at full resolution from all over it, placed side
by side and processed by `exact` as one picture of at most 128×128 latents. Of its keys and values, 64×64 tokens are
kept for the attention; a picture with no more tokens than that is decoded exactly.

The rows that layers hold back grow with the width, so a wide picture is processed in overlapping bands side by side;
the overlap covers the reach of the convolutions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tiler.decoding import FACTOR, exact
from tiler.decoding.apart import Band, Early, Elsewhere, Waiting, Work, rows_of_all
from tiler.decoding.directions import mean_of
from tiler.decoding.held import recall, remember, to_bytes
from tiler.decoding.pictures import to_tensor
from tiler.decoding.rehearsal import Rehearsal
from tiler.decoding.rows import (
    REACH,
    Check,
    Latents,
    Pixels,
    Stage,
    decoder_stages,
    encoder_stages,
    flow,
    latent_strips,
    strip_before,
    strip_rows,
)
from tiler.decoding.scratch import Scratch
from tiler.decoding.sources import Source
from tiler.decoding.spool import BANDS
from tiler.decoding.statistics import Frame
from tiler.decoding.work import BY_ROWS, of_picture, telling

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    from tiler.decoding.exact import Hold

# Latents. Of eight rendered pictures of 2048², mini, compared with the whole-image decode: 40–60 dB with 128, 33–44
# with 64 (the first three), 44–67 with 160. Of drawn scenes at 1024², blocks of 4 kept 46–55 dB, blocks of 8 39–56 and
# blocks of 16 33–39.
SAMPLE_SIDE, BLOCK = 128, 4
HELD_TOKENS = 64 * 64
BAND = 512  # latents
STRIP = 32  # rows of encoded latents that are read at a time
PROBE = 16  # latents: rows and columns of what processes decode to compare their bits


def sample(height: int, width: int) -> tuple[Tensor, Tensor]:
    """The rows and columns of the latents that are measured: all of a picture of at most SAMPLE_SIDE², else evenly
    spaced blocks of BLOCK, in the picture's aspect ratio."""
    if height * width <= SAMPLE_SIDE**2:
        return torch.arange(height), torch.arange(width)
    short, long = sorted((height, width))
    few = min(short, max(1, round(SAMPLE_SIDE * math.sqrt(short / long) / BLOCK)) * BLOCK)
    taken = few, min(long, SAMPLE_SIDE**2 // few // BLOCK * BLOCK)
    return _blocks(height, taken[height > width]), _blocks(width, taken[height <= width])


def _blocks(length: int, taken: int) -> Tensor:
    if taken == length:
        return torch.arange(length)
    count = taken // BLOCK
    starts = torch.linspace(0, length - BLOCK, count) if count > 1 else torch.tensor([(length - BLOCK) / 2])
    return starts.round().long()[:, None].add(torch.arange(BLOCK)).flatten()


class Part(NamedTuple):
    """A part of the latents, (1, C, h, w), whose first element belongs at this row and column."""

    top: int
    left: int
    latents: Tensor


def bands(width: int) -> list[Band]:
    """Cut `width` latent columns into bands of nearly equal width, at most BAND; at each joint, both bands are pushed
    with REACH columns more than they keep."""
    if width <= BAND:
        return [Band(0, width, slice(0, width))]
    count = math.ceil((width - 2 * REACH) / (BAND - 2 * REACH))
    pushed = math.ceil((width + 2 * REACH * (count - 1)) / count)
    cuts = [0, *(k * (pushed - 2 * REACH) + REACH for k in range(1, count)), width]
    firsts = [max(0, cut - REACH) for cut in cuts[:-1]]
    return [
        Band(first, min(width, right + REACH), slice(left - first, right - first))
        for first, left, right in zip(firsts, cuts, cuts[1:], strict=False)
    ]


Progress = Callable[[float], None]


def _ignore(where: object) -> None:
    pass


def _begun(stages: list[Stage], measured: tuple[int, int], height: int, width: int) -> float:
    """The share that a measurement of so many rows and columns has of the work on a picture of (height, width)."""
    measuring = of_picture(stages, *measured)
    return measuring / (measuring + BY_ROWS * of_picture(stages, height, width, HELD_TOKENS))


def _measure(
    stages: list[Stage],
    part: Tensor,
    scratch: Scratch,
    hold: Hold,
    check: Check,
    progress: Progress = _ignore,
    *,
    scale: int = 1,
) -> None:
    """Measure the stages' statistics on `part`, (1, C, h, w), with `scale` rows and columns per latent."""
    height, width = part.shape[2:]
    frame = Frame(height, width)
    check = telling(check, scratch, of_picture(stages, height, width), progress)
    source = Source(lambda first, last: part[:, :, first:last], height, scale * strip_rows(width // scale))
    for _ in exact.stream(stages, source, frame, scratch, hold=hold, check=check, hold_tokens=HELD_TOKENS):
        pass


def band_strips(
    stages: list[Stage], latents: Latents, band: Band, begin: int, rows: int | None = None, check: Check = _ignore
) -> Iterator[Tensor]:
    """Decode the columns of a band, from the row of pixels `begin` on → (3, n, w) fp32. The stages hold statistics, and
    have been used up to the end of a picture or not at all."""
    each = rows or strip_rows(band.last - band.first)
    first = strip_before(begin, each)
    source = (strip[..., band.first : band.last] for strip in latent_strips(latents, each, first))
    at = FACTOR * first * each
    for strip in _stream(stages, source, latents.shape[2], check, _ignore, row=first * each):
        skipped, at = max(0, begin - at), at + strip.shape[1]
        if skipped < strip.shape[1]:
            yield strip[:, skipped:, FACTOR * band.keep.start : FACTOR * band.keep.stop]


def probe(stages: list[Stage], latents: Tensor) -> Tensor:
    """Decode a few latents, (1, C, h, w), as a picture of their own → (3, 8h, 8w): equal on processes that compute
    equal bits."""
    band = Band(0, latents.shape[3], slice(0, latents.shape[3]))
    return torch.cat(list(band_strips(stages, latents, band, 0)), dim=1)


def decode(
    vae: AutoencoderKL,
    latents: Latents,
    scratch: Scratch,
    *,
    hold: Hold,
    rows: int | None = None,
    check: Check = _ignore,
    progress: Progress = _ignore,
    margin: tuple[int, int] = (0, 0),
    begin: int = 0,
    elsewhere: Elsewhere | None = None,
) -> Generator[Tensor]:
    """latents: (1, C, h, w) fp32, already divided by scaling_factor → strips (3, n, 8w) fp32 in about [-1, 1], from the
    row `begin` on.

    `rows` latent rows are pushed at a time (default `strip_rows`): memory grows with it, and the result depends on it
    only in the last bits of fp32. `margin` latents above and below, and left and right, repeat the opposite side and
    are not measured. All bands but the last wait in the scratch; with a spool, the bands and the measured statistics
    are reused when the decode is resumed. Bands are decoded `elsewhere` as long as anybody is there, and the rest here.
    """
    (y, x), (height, width) = margin, latents.shape[2:]
    stages = decoder_stages(vae.decoder, vae.post_quant_conv)
    down, across = sample(height - 2 * y, width - 2 * x)
    part = torch.cat([latents[:, :, row : row + 1][..., across + x] for row in (down + y).tolist()], dim=2)
    all_bands = bands(width)
    last, total = len(all_bands) - 1, FACTOR * height
    pushed = sum(band.last - band.first for band in all_bands)
    measured = _begun(stages, (len(down), len(across)), height, pushed)

    def here(number: int, row: int) -> Iterator[Tensor]:
        return band_strips(stages, latents, all_bands[number], row, rows, check)

    def tell(done: int) -> None:
        progress(measured + (1 - measured) * done / (total * len(all_bands)))

    with scratch, ExitStack() as stack:
        if not recall(stages, scratch):
            with Scratch(scratch.folder, scratch.dtype) as nameless:
                _measure(stages, part, nameless, hold, check, lambda done: progress(measured * done))
            scratch.count(nameless)
            remember(stages, scratch)
        waiting = [Waiting(scratch, BANDS + n, 3, _pixels(band), total) for n, band in enumerate(all_bands[:-1])]
        apart, early = None, None
        if elsewhere is not None:
            assert scratch.folder is not None
            early = stack.enter_context(closing(Early(scratch.folder, _pixels(all_bands[last]), total - begin)))
            small = latents[:, :, :PROBE][..., :PROBE]
            work = Work(to_bytes(stages), latents, all_bands, small, probe(stages, small))
            apart = stack.enter_context(elsewhere(work))
        row = begin
        for strip in rows_of_all(waiting, begin, total, here, apart, early, tell):
            # Joined in parts of one size, however many bands there are: neither they nor what a writer makes of them
            # grow with the width.
            for part in strip.split(max(1, strip.shape[1] // len(all_bands)), dim=1):
                stored = [band.read(row, row + part.shape[1]) for band in waiting]
                yield torch.cat([*stored, part], dim=2) if stored else part
                row += part.shape[1]


def _pixels(band: Band) -> int:
    """The columns of pixels that a band is kept for."""
    return FACTOR * (band.keep.stop - band.keep.start)


def encode(
    vae: AutoencoderKL,
    pixels: Pixels,
    scratch: Scratch,
    *,
    hold: Hold,
    check: Check = _ignore,
    progress: Progress = _ignore,
    margin: tuple[int, int] = (0, 0),
) -> Tensor:
    """Return the parts of `encode_parts` as one tensor: (1, C, h, w)."""
    parts = list(encode_parts(vae, pixels, scratch, hold=hold, check=check, progress=progress, margin=margin))
    bands = [[part.latents for part in band] for _, band in groupby(parts, key=lambda part: part.left)]
    return torch.cat([torch.cat(band, dim=2) for band in bands], dim=3)


def encode_parts(
    vae: AutoencoderKL,
    pixels: Pixels,
    scratch: Scratch,
    *,
    hold: Hold,
    check: Check = _ignore,
    progress: Progress = _ignore,
    margin: tuple[int, int] = (0, 0),
) -> Iterator[Part]:
    """pixels: (H, W, 3) uint8, sides multiples of FACTOR → parts of the posterior's mean, fp32, unscaled. `margin` as
    for `decode`, in latents. With a spool, the measured statistics and the rows of all bands are reused when the encode
    is resumed."""
    (y, x), height, width = margin, pixels.shape[0] // FACTOR, pixels.shape[1] // FACTOR
    stages = encoder_stages(vae.encoder, vae.quant_conv)
    down, across = sample(height - 2 * y, width - 2 * x)
    all_bands = bands(width)
    pushed = sum(band.last - band.first for band in all_bands)
    measured = _begun(stages, (FACTOR * len(down), FACTOR * len(across)), FACTOR * height, FACTOR * pushed)
    with scratch:
        if not recall(stages, scratch):
            columns = (FACTOR * (across + x)[:, None] + torch.arange(FACTOR)).flatten().numpy()
            blocks = [pixels[top : top + FACTOR][:, columns] for top in (FACTOR * (down + y)).tolist()]
            part = to_tensor(np.concatenate(blocks))
            with Scratch(scratch.folder, scratch.dtype) as nameless:
                _measure(stages, part, nameless, hold, check, lambda done: progress(measured * done), scale=FACTOR)
            remember(stages, scratch)
            del part, blocks

    def shared(number: int) -> Progress:
        return lambda done: progress(measured + (1 - measured) * (number + done) / len(all_bands))

    channels, spool = vae.config.latent_channels, scratch.spool
    with Scratch(scratch.folder, torch.float32, spool) as disk:
        for number, band in enumerate(all_bands):
            left, begin, kept = band.first + band.keep.start, 0, None
            if spool is not None:
                kept = Waiting(disk, BANDS + number, channels, band.keep.stop - band.keep.start, height)
                begin = kept.count
                for row in range(0, begin, STRIP):
                    yield Part(row, left, kept.read(row, min(row + STRIP, begin))[None].contiguous())
            for row, part in _band_means(stages, pixels, band, begin, check, shared(number)):
                if kept is not None:
                    kept.add(part[0])
                yield Part(row, left, part)


def _band_means(
    stages: list[Stage], pixels: Pixels, band: Band, begin: int, check: Check, progress: Progress
) -> Iterator[tuple[int, Tensor]]:
    """Encode the columns of a band from the row of latents `begin` on, which each part, (1, C, n, w) fp32, follows. The
    stages hold statistics, and have been used up to the end of a picture or not at all."""
    height, each = pixels.shape[0], strip_rows(band.last - band.first)
    seen = slice(FACTOR * band.first, FACTOR * band.last)
    if FACTOR * begin == height:
        progress(1.0)
        return
    row, rows = each * strip_before(FACTOR * begin, each), FACTOR * each
    strips = (to_tensor(pixels[top : top + rows][:, seen]) for top in range(FACTOR * row, height, rows))
    for moments in _stream(stages, strips, height, check, progress, row=FACTOR * row):
        skipped, row = max(0, begin - row), row + moments.shape[1]
        if skipped < moments.shape[1]:
            part = mean_of(moments[:, skipped:])[None, :, :, band.keep]
            yield row - part.shape[2], part


def rehearse(
    vae: AutoencoderKL, latents: tuple[int, int], dtype: torch.dtype, hold: Hold, *, encoding: bool
) -> Rehearsal:
    """Run `decode` or `encode` for latents of (height, width) on meta tensors, for planning. Counts no arithmetic."""
    (height, width), scratch, all_bands = latents, Scratch(None, dtype), bands(latents[1])
    pushed = max(band.last - band.first for band in all_bands)
    if encoding:
        stages, channels, scale = encoder_stages(vae.encoder, vae.quant_conv), 3, FACTOR
    else:
        stages, channels, scale = decoder_stages(vae.decoder, vae.post_quant_conv), vae.config.latent_channels, 1
    down, across = sample(height, width)
    part = torch.empty(1, channels, scale * len(down), scale * len(across), device="meta")
    _measure(stages, part, scratch, hold, _ignore, scale=scale)
    rows = scale * strip_rows(pushed)
    strips = (torch.empty(1, channels, rows, scale * pushed, device="meta") for _ in range(8))
    for _ in _stream(stages, strips, 8 * rows, _ignore, _ignore):
        pass
    if not encoding:
        waiting = 3 * FACTOR**2 * height * sum(b.keep.stop - b.keep.start for b in all_bands[:-1]) * dtype.itemsize
        scratch.grow(waiting)
        scratch.written_bytes += waiting
    return Rehearsal(scratch.peak_bytes, scratch.written_bytes, 0)


def _stream(
    stages: list[Stage], strips: Iterator[Tensor], height: int, check: Check, progress: Progress, row: int = 0
) -> Iterator[Tensor]:  # fmt: skip
    """Push `strips`, (1, C, n, W), the rows of a picture of `height` from `row` on → (C', n', W'), top first."""
    for strip in strips:
        row += strip.shape[2]
        for ready in flow(stages, [strip], row >= height, check=check):
            yield ready[0]
        progress(row / height)
