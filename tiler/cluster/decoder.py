"""The worker's side of decoding and encoding: bands or slabs of a picture, by an autoencoder that is open under the
worker's own ceiling. This module imports torch, so a worker imports it late."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from tiler import phases
from tiler.cluster.shared import BandPlace, SharedJob
from tiler.decoding import frozen, held, lockstep
from tiler.decoding.apart import ANSWER_BYTES, PIECE_BYTES, Band
from tiler.decoding.directions import DECODER, Direction
from tiler.decoding.lockstep import EDGE_BYTES
from tiler.decoding.messages import Begin, Fetch, Orders, Piece, Report
from tiler.decoding.method import DTYPES, ScratchSpace
from tiler.decoding.rows import Stage, decoder_stages
from tiler.decoding.scratch import Scratch
from tiler.decoding.slabs import SlabRun
from tiler.denoiser import vae_id
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


class Coder:
    """The autoencoder of a job, opened under the ceiling for at most `size` latents, (height, width), in a `direction`
    by `method`. This process holds `copies` of these beside, and `own_bytes`. Raises TilerError."""

    def __init__(
        self, job: SharedJob, request: ResolvedRequest, direction: Direction, method: Decode, size: tuple[int, int],
        copies: int, own_bytes: int, budget: Budget,
    ) -> None:  # fmt: skip
        self.job = job.name
        models = phases.open_models(families.open_family(request, reads_text=False))
        spec = models.family.autoencoder
        if (found := vae_id(spec)) != job.model_id:
            raise ClusterError(f"{request.model} has another autoencoder here (its id is {found}, not {job.model_id})")
        self._vae = models.vae(spec)
        facts = measure(request.scratch_folder)
        precision = choose_decode_precision(request.decode_precision, Precision.FP32, bf16=facts.arithmetic.bf16)
        own = own_bytes + copies * 4 * spec.config["latent_channels"] * size[0] * size[1]
        space = ScratchSpace(request.scratch_folder, facts.scratch_free_bytes, request.scratch_dtype)
        _, plan, resident = plan_decode(
            models, size, facts, budget.max_bytes - own, decode=method, precision=precision, space=space,
            wrap=Wrap.NONE, encoding=direction is not DECODER,
        )  # fmt: skip
        if not plan.fits:
            raise BudgetRefused(
                f"its ceiling of {format_mb(budget.max_bytes)} is too low to {direction.name}; the smallest --max-ram that "
                f"works is {replace(plan, smallest_bytes=plan.smallest_bytes + own).smallest_text}"
            )
        self._check = at_rows(budget, plan.peak_bytes + own)
        self._stack = ExitStack()
        options = vae_streaming(spec, self._vae, precision)._asdict()
        self._streamer = self._stack.enter_context(
            streamed(self._vae, spec.weights, families.vae_names, resident, **options)
        )

    @property
    def is_under_way(self) -> bool:
        """Whether others wait for what it has."""
        return False

    def close(self) -> None:
        self._stack.close()


class BandDecoder(Coder):
    """For bands of a picture with `statistics_bytes` of held statistics: the band under way. `size` is that of its
    largest band in latents, (height, width). Raises TilerError."""

    def __init__(
        self, job: SharedJob, request: ResolvedRequest, statistics_bytes: int, size: tuple[int, int], budget: Budget
    ) -> None:
        # The latents as they came and as they are read; the statistics, and an answer: its strips, joined, and sent.
        own = statistics_bytes + 3 * ANSWER_BYTES
        super().__init__(job, request, DECODER, Decode.FROZEN, size, 2, own, budget)
        self._statistics = b""
        self._strips: Iterator[Tensor] = iter(())
        self._at: tuple[int, int] | None = None  # band, and the row of pixels that comes next

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


class SlabCoder(Coder):
    """For slabs of a picture, decoded or encoded by `method`: the slab under way. `size` is that of the largest slab in
    latents, (height, width). Raises TilerError."""

    def __init__(
        self, job: SharedJob, request: ResolvedRequest, direction: Direction, method: Decode, size: tuple[int, int],
        budget: Budget,
    ) -> None:  # fmt: skip
        # The rows for and from other slabs, or an answer: its strips, joined, and sent.
        own = max(2 * EDGE_BYTES, 3 * ANSWER_BYTES)
        super().__init__(job, request, direction, method, size, 0, own, budget)
        self._direction = direction
        self._space = request.scratch_folder, DTYPES[request.scratch_dtype]
        self._run: SlabRun | None = None
        self._next = 0  # the number of the message that comes next
        self._stack.callback(self._end)

    @property
    def is_under_way(self) -> bool:
        return self._run is not None

    def _end(self) -> None:
        if self._run is not None:
            self._run.close()
            self._run = None

    def probe(self, small: np.ndarray) -> tuple[np.ndarray, float]:
        """Decode or encode the corner of a picture as a picture of its own → (C, h, w) fp32, and the seconds it
        took."""
        some, hold = torch.from_numpy(small.copy()), self._streamer.hold_transformed
        scratch = Scratch(*self._space)
        result, seconds = lockstep.probe(self._direction, self._vae, some, scratch, hold, self._check)
        return result.numpy(), seconds

    def run(self, number: int, asked: Begin | Orders | Fetch) -> Report | Piece | None:
        """Do what comes next for the slab under way. None if there is none, or if the message with this `number` is not
        the one that follows, which an engine that runs a task twice would cause. Raises TilerError."""
        try:
            if isinstance(asked, Begin):
                self._end()
                hold, scratch = self._streamer.hold_transformed, Scratch(*self._space)
                self._run = SlabRun(self._direction, self._vae, scratch, asked, hold=hold, check=self._check)
                self._next = 1
                return self._run.go_on()
            if self._run is None or number != self._next:
                self._end()
                return None
            self._next += 1
            if isinstance(asked, Orders):
                return self._run.go_on(asked)
            if asked.ahead:
                self._run.compute_ahead()
                return Report(is_ready=True)
            return self._run.piece(PIECE_BYTES)
        except BaseException:
            self._end()  # its scratch files
            raise
