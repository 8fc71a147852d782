"""Choose the way an autoencoder processes a picture, `exact`, `sampled` or `frozen`, and run it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from tiler.compute.shapes import MetaMeter
from tiler.compute.stream import Streamer
from tiler.compute.tuning import NARROW
from tiler.decoding import FACTOR, frozen, lockstep, rehearsal, tiny
from tiler.decoding.apart import Elsewhere
from tiler.decoding.attention import spacing
from tiler.decoding.directions import DECODER, ENCODER, Direction
from tiler.decoding.frozen import Part
from tiler.decoding.lockstep import SlabsElsewhere
from tiler.decoding.rows import REACH, Check, Latents, Pixels
from tiler.decoding.scratch import Scratch
from tiler.decoding.spool import Spool
from tiler.decoding.work import BY_ROWS, of_picture
from tiler.errors import StorageError
from tiler.files import named
from tiler.request import Decode, Precision, ScratchDtype, Wrap

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

ATTENTION_SHARE = 0.25  # relative to the convolutions' work: the limit for attention to every token under `auto`
TOKENS = 128 * 128  # the most tokens that `sampled` attends to: as many as a picture of 1024² has
DTYPES = {ScratchDtype.FP16: torch.float16, ScratchDtype.FP32: torch.float32}


class ScratchSpace(NamedTuple):
    """The folder of scratch files, its free bytes, and the dtype in which activations are stored."""

    folder: Path
    free_bytes: int
    dtype: ScratchDtype = ScratchDtype.FP16


@dataclass(frozen=True, kw_only=True)
class DecodePlan:
    """How one picture is decoded or encoded. Bytes: `memory_bytes` of activations and weights in use, `scratch_bytes`
    on disk at once, `written_bytes` to disk in total. `flops` of an AutoencoderKL's convolutions."""

    kind: Decode  # never AUTO
    encoding: bool
    precision: Precision = Precision.FP32  # or bf16
    why: str
    memory_bytes: int
    folder: Path
    dtype: ScratchDtype
    scratch_bytes: int = 0
    written_bytes: int = 0
    apart_bytes: int = 0  # on disk at once if a job remembers what is done
    flops: int = 0
    width: int = NARROW  # the fewest channels of a layer
    attention: float = 0.0  # layer by layer: its share of the operations
    margin: tuple[int, int] = (0, 0)  # latents above and below, left and right, that repeat the opposite side

    def __str__(self) -> str:
        disk = f"; {self.scratch_bytes / 1e6:,.0f} MB of scratch in {named(self.folder)}" if self.scratch_bytes else ""
        return f"{self.name} in {self.precision} ({self.why}{disk})"

    @property
    def direction(self) -> Direction:
        return ENCODER if self.encoding else DECODER

    @property
    def name(self) -> str:
        """The method as --decode spells it."""
        return self.kind.value

    @property
    def margin_pixels(self) -> tuple[int, int]:
        """`margin` in pixels."""
        return FACTOR * self.margin[0], FACTOR * self.margin[1]

    @property
    def attention_flops(self) -> int:
        """Floating-point operations of the attention, in addition to `flops`."""
        return int(self.flops * self.attention / (1 - self.attention))

    @property
    def by_layers(self) -> bool:
        """Whether each layer processes the whole picture before the next one, so that its weights are read once."""
        return self.kind in (Decode.EXACT, Decode.SAMPLED)

    @property
    def attend_to(self) -> int | None:
        """The largest number of tokens that attention sees; None for all."""
        return TOKENS if self.kind is Decode.SAMPLED else None


def choose(
    wanted: Decode,
    vae: Any,
    streamer: Streamer,
    latents: tuple[int, int],
    space: ScratchSpace,
    *,
    encoding: bool,
    wrap: Wrap = Wrap.NONE,
    rehearsed: dict[Hashable, Any] | None = None,
) -> DecodePlan:
    """Choose the method for latents of (height, width). `vae` is on the meta device, lent to a planning `streamer`; for
    TINY it is an AutoencoderTiny. The disk is not queried. `rehearsed` remembers the needs of methods that were tried
    before with this `vae`.

    AUTO becomes `exact` while attention to all tokens is a small part of the work, else `sampled`; and `frozen` for
    pictures wider than its bands, or if the scratch folder has too little room for the others. Raises StorageError if
    there is no room for the requested method, or for any.
    """

    (folder, free, dtype), (vertical, horizontal) = space, wrap.axes
    margin = REACH * vertical, REACH * horizontal
    latents = latents[0] + 2 * margin[0], latents[1] + 2 * margin[1]

    known = {} if rehearsed is None else rehearsed

    def made(kind: Decode, why: str, rehearse: Callable[[], rehearsal.Rehearsal | None]) -> DecodePlan:
        key = kind, encoding, latents, dtype, streamer.policy.bf16
        if key not in known:
            with MetaMeter() as meter, torch.no_grad():
                used = rehearse() or rehearsal.Rehearsal(0, 0, 0)
            known[key] = meter.peak_bytes, used
        peak_bytes, used = known[key]
        # Without passes, it is the finished rows: fp32 latents or uint8 pixels.
        finished = (4 * vae.config.latent_channels if encoding else 3 * FACTOR**2) * latents[0] * latents[1]
        channels = vae.config.decoder_block_out_channels if wanted is Decode.TINY else vae.config.block_out_channels
        return DecodePlan(
            kind=kind, encoding=encoding, precision=Precision.BF16 if streamer.policy.bf16 else Precision.FP32, why=why,
            memory_bytes=peak_bytes, folder=folder, dtype=dtype,
            scratch_bytes=used.peak_bytes, written_bytes=used.written_bytes,
            apart_bytes=used.apart_bytes or used.peak_bytes + finished, flops=used.flops, margin=margin,
            width=min(channels),
        )  # fmt: skip

    if wanted is Decode.TINY:
        return made(wanted, "as set", lambda: tiny.rehearse(vae, latents))
    method = made(
        Decode.EXACT, "there is room" if wanted is Decode.AUTO else "as set",
        lambda: rehearsal.rehearse(vae, latents, DTYPES[dtype], streamer.hold_transformed, encoding=encoding),
    )  # fmt: skip

    def lacking(method: DecodePlan) -> str:
        needs = f"{method.kind} decoding needs {method.scratch_bytes / 1e6:,.0f} MB"
        return f"{named(folder)} has {free / 1e6:,.0f} MB free, {needs}"

    def affordable(method: DecodePlan) -> DecodePlan:
        if free < method.scratch_bytes:
            raise StorageError(f"{lacking(method)}; give another folder with --scratch")
        return method

    def take_frozen(why: str) -> DecodePlan:
        taken = made(
            Decode.FROZEN,
            why,
            lambda: frozen.rehearse(vae, latents, DTYPES[dtype], streamer.hold_transformed, encoding=encoding),
        )
        return affordable(replace(taken, flops=method.flops))

    if wanted is Decode.FROZEN:
        return take_frozen("as set")
    mid = (vae.encoder if encoding else vae.decoder).mid_block
    width, tokens = sum(a.to_q.in_features for a in mid.attentions if a is not None), latents[0] * latents[1]

    def work(seen: int) -> float:
        """The work of attention to that many tokens, relative to that of the convolutions."""
        return 4 * width * tokens * seen / method.flops

    kind, why, seen = Decode.EXACT, method.why, tokens
    if wanted is Decode.AUTO and work(tokens) > ATTENTION_SHARE:
        kind, why = Decode.SAMPLED, f"attention to every token would be {work(tokens):.0%} of the other work"
        if latents[1] > frozen.BAND:
            return take_frozen(f"{why}, and rows are wider than {FACTOR * frozen.BAND} pixels")
    elif wanted is Decode.SAMPLED:
        kind = wanted
    if kind is Decode.SAMPLED:
        seen = tokens // spacing(*latents, TOKENS) ** 2
    method = replace(method, kind=kind, why=why, attention=work(seen) / (1 + work(seen)))
    if wanted is Decode.AUTO and free < method.scratch_bytes:
        return take_frozen(lacking(method))
    return affordable(method)


def work_of(method: DecodePlan, vae: AutoencoderKL, latents: tuple[int, int]) -> float:
    """The work on latents of (height, width), in the unit of work.py."""
    height, width = (side + 2 * more for side, more in zip(latents, method.margin, strict=True))
    stages, scale = method.direction.stages(vae), method.direction.reads
    most = method.attend_to if method.by_layers else frozen.HELD_TOKENS
    return (1.0 if method.by_layers else BY_ROWS) * of_picture(stages, scale * height, scale * width, most)


@runtime_checkable
class Around(Latents, Protocol):
    """Latents that can be read beyond their borders, where the opposite side continues."""

    def widened(self, rows: int, cols: int) -> Latents:
        """The latents with this many more rows and columns on each side."""
        ...


class Others(NamedTuple):
    """What opens the connection to other processes that decode bands of `frozen`, or slabs of `exact` and
    `sampled`."""

    bands: Elsewhere
    slabs: SlabsElsewhere


def decode(
    method: DecodePlan,
    vae: Any,
    streamer: Streamer,
    latents: Latents,
    *,
    check: Check,
    progress: Callable[[float], None],
    spool: Spool | None = None,
    begin: int = 0,
    others: Others | None = None,
) -> Generator[Tensor]:
    """latents: (1, C, h, w) fp32, already divided by scaling_factor → strips (3, n, 8w) fp32 in about [-1, 1], top
    first. Methods that do not work layer by layer start at the row `begin`. `others`, if there are any, decode bands of
    `frozen`, and slabs of `exact` and `sampled`.

    `progress` gets the share done, 0 to 1. Raises StorageError and NumericalError.
    """
    (y, x), (height, width) = method.margin, latents.shape[2:]
    if (y or x) and isinstance(latents, Around):
        latents = latents.widened(y, x)
    elif y or x:  # columns repeat too: rows of a file become a tensor first
        latents = latents[:, :, :][
            :, :, (torch.arange(-y, height + y) % height)[:, None], torch.arange(-x, width + x) % width
        ]
    scratch = Scratch(method.folder, DTYPES[method.dtype], spool)
    options: dict[str, Any] = {"hold": streamer.hold_transformed, "margin": method.margin}
    row = 0 if method.by_layers or not begin else begin + FACTOR * y
    if method.by_layers:
        slabs = None if others is None else others.slabs
        strips = lockstep.run(
            DECODER, vae, latents, scratch, slabs, check=check, progress=progress, attend_to=method.attend_to, **options
        )
    elif method.kind is Decode.FROZEN:
        strips = frozen.decode(
            vae,
            latents,
            scratch,
            check=check,
            progress=progress,
            begin=row,
            elsewhere=None if others is None else others.bands,
            **options,
        )
    else:
        strips = tiny.decode(vae, latents, check=check, progress=progress, begin=row)
    with closing(strips):  # removes the scratch files, also if the caller stops early
        for strip in strips:
            first, last = max(0, FACTOR * y - row), min(strip.shape[1], FACTOR * (y + height) - row)
            row += strip.shape[1]
            if first < last:
                yield strip[:, first:last, FACTOR * x : FACTOR * (x + width)]
    progress(1.0)


def encode(
    method: DecodePlan,
    vae: AutoencoderKL,
    streamer: Streamer,
    pixels: Pixels,
    *,
    check: Check,
    progress: Callable[[float], None],
    spool: Spool | None = None,
    slabs: SlabsElsewhere | None = None,
) -> Tensor:
    """pixels: (H, W, 3) uint8, sides multiples of FACTOR, surrounded by `method.margin_pixels` of the opposite side →
    the posterior's mean without the margin, (1, C, h, w) fp32, unscaled. Others may encode `slabs` for methods that
    work layer by layer.

    `progress` gets the share done, 0 to 1. Raises StorageError and NumericalError.
    """
    y, x = method.margin
    scratch = Scratch(method.folder, DTYPES[method.dtype], spool)
    options: dict[str, Any] = {"hold": streamer.hold_transformed, "margin": method.margin}
    if method.by_layers:
        strips = lockstep.run(
            ENCODER, vae, pixels, scratch, slabs, check=check, progress=progress, attend_to=method.attend_to, **options
        )
        mean = torch.cat(list(strips), dim=1)[None]
    else:
        mean = frozen.encode(vae, pixels, scratch, check=check, progress=progress, **options)
    progress(1.0)
    return mean[:, :, y : mean.shape[2] - y, x : mean.shape[3] - x]


def encode_parts(
    method: DecodePlan,
    vae: AutoencoderKL,
    streamer: Streamer,
    pixels: Pixels,
    *,
    check: Check,
    progress: Callable[[float], None],
    spool: Spool | None = None,
    slabs: SlabsElsewhere | None = None,
) -> Iterator[Part]:
    """Yield the result of `encode`, a part at a time if the method works in bands."""
    if method.by_layers:
        mean = encode(method, vae, streamer, pixels, check=check, progress=progress, spool=spool, slabs=slabs)
        yield Part(0, 0, mean)
        return
    y, x = method.margin
    height, width = pixels.shape[0] // FACTOR - 2 * y, pixels.shape[1] // FACTOR - 2 * x
    scratch = Scratch(method.folder, DTYPES[method.dtype], spool)
    options: dict[str, Any] = {"hold": streamer.hold_transformed, "margin": method.margin}
    for top, left, part in frozen.encode_parts(vae, pixels, scratch, check=check, progress=progress, **options):
        above, before = max(0, y - top), max(0, x - left)
        part = part[:, :, above : max(above, y + height - top), before : max(before, x + width - left)]
        if part.numel():
            yield Part(max(0, top - y), max(0, left - x), part)
