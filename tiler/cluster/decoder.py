"""The worker's side of decoding: bands of a picture, by an autoencoder that is open under the worker's own ceiling.
This module imports torch, so a worker imports it late."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tiler import phases
from tiler.cluster.shared import BandPlace, SharedJob
from tiler.decoding import frozen, held
from tiler.decoding.apart import ANSWER_BYTES, PIECE_BYTES, Band
from tiler.decoding.method import ScratchSpace
from tiler.decoding.rows import Stage, decoder_stages
from tiler.denoiser import decoder_id
from tiler.errors import BudgetRefused, ClusterError
from tiler.memory.budget import Budget, format_mb
from tiler.memory.policy import at_rows
from tiler.models import family as families
from tiler.planning.peaks import vae_streaming
from tiler.planning.precision import choose_decode_precision
from tiler.planning.render import plan_decode
from tiler.request import Decode, Precision, ResolvedRequest, Wrap
from tiler.run import measure, streamed


class Columns:
    """Some columns of latents of `width`, as the whole of which a band is cut: the others are zero, and nobody reads
    them."""

    def __init__(self, columns: Tensor, first: int, width: int) -> None:
        self._columns, self._first = columns, first
        self.shape = (*columns.shape[:3], width)

    def __getitem__(self, rows: tuple[slice, slice, slice]) -> Tensor:
        some = self._columns[rows]
        whole = some.new_zeros(*some.shape[:3], self.shape[3])
        whole[..., self._first : self._first + some.shape[3]] = some
        return whole


class Decoder:
    """The autoencoder of a job, for bands of a picture with `statistics_bytes` of held statistics, and the band under
    way. `size` is that of its largest band in latents, (height, width). Raises TilerError."""

    def __init__(
        self, job: SharedJob, request: ResolvedRequest, statistics_bytes: int, size: tuple[int, int], budget: Budget
    ) -> None:
        self.job, self._statistics = job.name, b""
        models = phases.open_models(families.open_family(request, reads_text=False))
        spec = models.decoder
        if (found := decoder_id(models)) != job.model_id:
            raise ClusterError(f"{request.model} has another decoder here (its id is {found}, not {job.model_id})")
        self._vae = models.vae(spec)
        facts = measure(request.scratch_folder)
        precision = choose_decode_precision(request.decode_precision, Precision.FP32, bf16=facts.arithmetic.bf16)
        # The columns as they came and as they are read, the statistics, and an answer: its strips, joined, and sent.
        own = 8 * spec.config["latent_channels"] * size[0] * size[1] + statistics_bytes + 3 * ANSWER_BYTES
        space = ScratchSpace(request.scratch_folder, facts.scratch_free_bytes, request.scratch_dtype)
        _, plan, resident = plan_decode(
            models, size, facts, budget.max_bytes - own, decode=Decode.FROZEN, precision=precision, space=space,
            wrap=Wrap.NONE,
        )  # fmt: skip
        if not plan.fits:
            raise BudgetRefused(
                f"its ceiling of {format_mb(budget.max_bytes)} is too low to decode; the smallest --max-ram that works is "
                f"{replace(plan, smallest_bytes=plan.smallest_bytes + own).smallest_text}"
            )
        self._check = at_rows(budget, plan.peak_bytes + own)
        self._stack = ExitStack()
        options = vae_streaming(spec, self._vae, precision)._asdict()
        self._stack.enter_context(streamed(self._vae, spec.weights, families.vae_names, resident, **options))
        self._strips: Iterator[Tensor] = iter(())
        self._at: tuple[int, int] | None = None  # band, and the row of pixels that comes next

    def close(self) -> None:
        self._stack.close()

    def _stages(self) -> list[Stage]:
        stages = decoder_stages(self._vae.decoder, self._vae.post_quant_conv)
        held.from_bytes(stages, self._statistics)
        return stages

    def probe(self, statistics: bytes, latents: np.ndarray) -> np.ndarray:
        """Hold the picture's `statistics`, and decode a few latents, (1, C, h, w), as a picture of their own →
        (3, 8h, 8w) fp32."""
        self._statistics = statistics
        return frozen.probe(self._stages(), torch.from_numpy(latents.copy())).numpy()

    def decode(self, place: BandPlace, row: int, columns: np.ndarray | None) -> np.ndarray | None:
        """The next rows of pixels, (3, n, w) fp32, of a band from `row` on, of whose latents `columns`, (1, C, h, w),
        are sent when it begins. None if they are needed."""
        if columns is not None:
            latents = Columns(torch.from_numpy(np.require(columns, requirements="W")), place.first, place.width)
            band = Band(place.first, place.last, slice(*place.keep))
            self._strips = frozen.band_strips(self._stages(), latents, band, row, None, self._check)
        elif self._at != (place.number, row):
            return None
        found: list[Tensor] = []
        for strip in self._strips:
            found.append(strip)
            if sum(one.nbytes for one in found) >= PIECE_BYTES:
                break
        rows = torch.cat(found, dim=1)
        self._at = place.number, row + rows.shape[1]
        return rows.numpy()
