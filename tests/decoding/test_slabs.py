"""A picture decoded or encoded in slabs: the bytes of one process, however it is cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.decoding.test_frozen import smooth_latents
from tiler.decoding import FACTOR, exact, lockstep, scratch
from tiler.decoding.directions import DECODER, ENCODER, Direction
from tiler.decoding.lockstep import Lost, SlabWork, Team, rows_of_slabs
from tiler.decoding.messages import Begin, Orders, Piece, Report
from tiler.decoding.rows import Latents, Pixels
from tiler.decoding.scratch import Scratch
from tiler.decoding.slabs import SlabRun, cuts_of
from tiler.decoding.sources import Source
from tiler.decoding.spool import Spool
from tiler.models import family as families
from tiler.run import streamed
from tiler.weights.checkpoint import resolve

PIECE = 20_000  # bytes
BOTH = pytest.mark.parametrize("direction", [DECODER, ENCODER], ids=["decode", "encode"])


class Resized:
    """Pixels (8h, 8w, 3) uint8 for so many latents, whose bits depend on the rows that are read together."""

    def __init__(self, height: int, width: int) -> None:
        self.shape = FACTOR * height, FACTOR * width, 3
        smooth = smooth_latents(height, width)[0, :3].permute(1, 2, 0).repeat_interleave(FACTOR, 0)
        noise = torch.rand(self.shape, generator=torch.Generator().manual_seed(0))
        self._pixels = (60 * smooth.repeat_interleave(FACTOR, 1) + 40 * noise + 100).clamp(0, 200).to(torch.uint8)

    def __getitem__(self, rows: slice) -> np.ndarray:
        first, last, _ = rows.indices(self.shape[0])
        found: np.ndarray = self._pixels[first:last].numpy() + np.uint8((last - first) % 50)
        return found


def picture_of(direction: Direction, height: int, width: int) -> Latents | Pixels:
    """What is decoded or encoded, of so many latents."""
    return smooth_latents(height, width) if direction is DECODER else Resized(height, width)


@contextmanager
def opened(model: Path) -> Iterator[tuple[Any, exact.Hold]]:
    """The autoencoder of a model, and how its layers are held."""
    family = families.read_family(resolve(str(model)))
    vae = families.build_vae(family.autoencoder)
    with streamed(vae, family.autoencoder.weights, families.vae_names) as streamer:
        yield vae, streamer.hold_transformed


class Here:
    """Slabs of processes that are all this one: each has its own autoencoder. One is lost after `most` reports and
    pieces."""

    def __init__(
        self, direction: Direction, model: Path, folder: Path, dtype: torch.dtype, shares: Sequence[float],
        most: int = 10**6,
    ) -> None:  # fmt: skip
        self.direction = direction
        self.model, self.folder, self.dtype, self.shares, self.most = model, folder, dtype, tuple(shares), most
        self.runs: list[SlabRun] = []
        self.reports: list[Report] = []
        self.opened = ExitStack()

    def begin(self, begun: Sequence[Begin]) -> list[Report]:
        for each in begun:
            assert type(each.frame) is tuple, "a scheduler that reads a message must not import torch"
            vae, hold = self.opened.enter_context(opened(self.model))
            disk = Scratch(self.folder, self.dtype)
            run = SlabRun(self.direction, vae, disk, each, hold=hold, check=lambda where: None)
            self.opened.callback(run.close)
            self.runs.append(run)
        return [run.go_on() for run in self.runs]

    def go_on(self, orders: Sequence[Orders]) -> list[Report]:
        self.count()
        found = [run.go_on(order) for run, order in zip(self.runs, orders, strict=True)]
        self.reports += found
        return found

    def pieces(self) -> Iterator[Piece]:
        for run in self.runs[1:]:
            run.compute_ahead()
        for run in self.runs:
            is_last = False
            while not is_last:
                self.count()
                yield (piece := run.piece(PIECE))
                is_last = piece.is_last
        self.opened.close()

    def count(self) -> None:
        self.most -= 1
        if self.most < 0:
            self.opened.close()
            raise Lost("worker a had a part of the picture")


@torch.no_grad()
def check_equal(
    direction: Direction, folder: Path, where: Path, size: tuple[int, int], cuts: Sequence[Sequence[float]], *,
    dtype: torch.dtype = torch.float16, margin: tuple[int, int] = (0, 0), attend_to: int | None = None,
) -> list[Here]:  # fmt: skip
    """Decode or encode in one process and in slabs with these shares: the strips must be equal."""
    picture = picture_of(direction, *size)
    found, frame = list[Here](), direction.frame(picture, margin)
    with opened(folder) as (vae, hold):
        whole: list[Tensor] = list(
            exact.run(
                direction, vae, picture, Scratch(where, dtype), hold=hold, check=lambda where: None, margin=margin,
                attend_to=attend_to,
            )
        )  # fmt: skip
        for shares in cuts:
            here = Here(direction, folder, where, dtype, shares)
            strips = list(rows_of_slabs(here, direction, picture, frame, attend_to, lambda work: None))
            assert [strip.shape for strip in strips] == [strip.shape for strip in whole]
            assert all(torch.equal(one, other) for one, other in zip(strips, whole, strict=True))
            found.append(here)
    assert list(where.iterdir()) == []
    return found


TWO, THREE = (0.5, 0.5), (0.2, 0.5, 0.3)


@pytest.fixture
def small_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many strips, of a few rows."""
    monkeypatch.setitem(Source.of.__func__.__kwdefaults__, "strip_bytes", 2**15)


@BOTH
@pytest.mark.parametrize(
    ("size", "dtype", "cuts"),
    [
        ((70, 30), torch.float16, [TWO, THREE]),
        ((131, 9), torch.float32, [(0.01, 0.5, 0.49)]),
        ((45, 20), torch.bfloat16, [TWO]),
    ],
)
def test_slabs_have_the_bytes_of_one_process(
    direction: Direction, tiny: Path, tmp_path: Path, small_strips: None, size: tuple[int, int], dtype: torch.dtype,
    cuts: list[tuple[float, ...]],
) -> None:  # fmt: skip
    check_equal(direction, tiny, tmp_path, size, cuts, dtype=dtype)


@BOTH
def test_slabs_without_any_strip_have_nothing_to_do(direction: Direction, tiny: Path, tmp_path: Path) -> None:
    """Of the widest layers, there are fewer strips than slabs."""
    check_equal(direction, tiny, tmp_path, (33, 20), [(0.25,) * 4])


@BOTH
def test_rows_that_are_computed_together_stay_together(
    direction: Direction, tiny: Path, tmp_path: Path, small_strips: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a full-size autoencoder: rows come in fours, and upsampling is a pass of its own."""
    monkeypatch.setattr("tiler.compute.layers.SMALL", 100)
    monkeypatch.setattr("tiler.decoding.exact.ALONE", 1000)
    monkeypatch.setattr("tiler.compute.winograd.CHANNELS", 8)
    for channels in ("NATIVE_WINOGRAD_CHANNELS", "NATIVE_WINOGRAD_BF16_CHANNELS"):
        monkeypatch.setattr(f"tiler.compute.native_winograd.{channels}", 8)
    check_equal(direction, tiny, tmp_path, (67, 18), [TWO, THREE])


@BOTH
def test_rows_that_are_stored_scaled_and_attention_to_some_tokens(
    direction: Direction, tiny: Path, tmp_path: Path, small_strips: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch, "FP16_ROOM", 0.5)
    monkeypatch.setattr(lockstep, "EDGE_BYTES", 2000)  # several reports before some passes
    (here, _) = check_equal(direction, tiny, tmp_path, (58, 21), [TWO, THREE], attend_to=150)
    scales = [scale for report in here.reports for edge in report.edges for scale in edge.rows.scales]
    assert max(scales) > 1 and any(report.has_more for report in here.reports)


@BOTH
def test_a_margin_is_not_measured_in_slabs_either(
    direction: Direction, tiny: Path, tmp_path: Path, small_strips: None
) -> None:
    check_equal(direction, tiny, tmp_path, (50, 40), [THREE], margin=(18, 18), attend_to=100)


def decoded(
    model: Path, where: Path, latents: Latents | Pixels, elsewhere: lockstep.SlabsElsewhere | None,
    spool: Spool | None = None, progress: Callable[[float], None] = lambda share: None, direction: Direction = DECODER,
) -> list[Tensor]:  # fmt: skip
    """The strips of a picture that `elsewhere` may decode, or encode."""
    with torch.no_grad(), opened(model) as (vae, hold):
        return list(
            lockstep.run(
                direction, vae, latents, Scratch(where, torch.float16, spool), elsewhere, hold=hold,
                check=lambda where: None, progress=progress, margin=(0, 0), attend_to=None,
            )
        )  # fmt: skip


@pytest.mark.parametrize(
    ("direction", "most", "again"),
    [(DECODER, 0, True), (DECODER, 20, False), (DECODER, 30, False), (DECODER, 10**6, False), (ENCODER, 16, False)],
)
def test_a_lost_slab_changes_no_byte(
    direction: Direction, tiny: Path, tmp_path: Path, small_strips: None, most: int, again: bool
) -> None:
    """Lost in an early pass, a late one, and while its rows come; never."""
    picture, lost, done = picture_of(direction, 65, 20), list[bool](), list[float]()

    class One(Team):
        def gather(self, most_slabs: int) -> Here | None:
            assert most_slabs == 2
            return None if lost else Here(direction, tiny, tmp_path, torch.float16, TWO, most)

        def lose(self, why: Lost, *, again: bool) -> None:
            lost.append(again)

    @contextmanager
    def elsewhere(work: SlabWork) -> Iterator[Team]:
        assert work.size == (65, 20) and work.probes > 4
        assert work.probe.shape == ((3, 128, 128) if direction is DECODER else (4, 16, 16))
        yield One()

    whole = decoded(tiny, tmp_path, picture, None, direction=direction)
    strips = decoded(tiny, tmp_path, picture, elsewhere, progress=done.append, direction=direction)
    assert all(torch.equal(one, other) for one, other in zip(strips, whole, strict=True))
    assert lost == ([] if most == 10**6 else [again]) and done == sorted(done)
    assert list(tmp_path.iterdir()) == []


def test_a_small_picture_and_one_whose_passes_are_remembered_are_decoded_here(tiny: Path, tmp_path: Path) -> None:
    def elsewhere(work: SlabWork) -> AbstractContextManager[Team]:
        raise AssertionError("nobody else decodes these")

    low = 2 * lockstep.LEAST_ROWS - 1
    assert sum(strip.shape[1] for strip in decoded(tiny, tmp_path, smooth_latents(low, 8), elsewhere)) == 8 * low
    latents = smooth_latents(64, 8)

    def stop(share: float) -> None:
        if share > 0.5:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        decoded(tiny, tmp_path, latents, None, Spool(tmp_path / "spool", "the decoder", "x"), progress=stop)
    whole = decoded(tiny, tmp_path, latents, None)
    rest = decoded(tiny, tmp_path, latents, elsewhere, Spool(tmp_path / "spool", "the decoder", "x"))
    assert all(torch.equal(one, other) for one, other in zip(rest, whole, strict=True))


@pytest.mark.parametrize(
    ("count", "shares", "lead", "cuts"),
    [(10, (0.5, 0.5), 0, [0, 5, 10]), (11, (0.5, 0.5), 1, [0, 6, 11]), (1, (0.2, 0.3, 0.5), 0, [0, 0, 1, 1]),
     (3, (0.5, 0.5), 5, [0, 3, 3])],
)  # fmt: skip
def test_slabs_are_cut_by_their_shares(count: int, shares: tuple[float, ...], lead: int, cuts: list[int]) -> None:
    """A slab computes some strips of the one above it too, so that the first is larger."""
    assert cuts_of(count, shares, lead) == cuts
