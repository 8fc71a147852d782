"""A canvas in files against one in memory: equal bits, also after interruptions, and memory that does not grow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.diffusion.test_canvas import CONFIG, request
from tiler.diffusion import flow, schedulers, stored, stored_canvas
from tiler.diffusion.canvas import Denoising, initial_noise
from tiler.diffusion.layouts import Steps, plan_tiles
from tiler.diffusion.runner import Tile
from tiler.diffusion.schedulers import DiffusersSchedule
from tiler.diffusion.stored import StoredArray, TileLog, chunks
from tiler.diffusion.stored_canvas import Seeded, StoredDenoising
from tiler.diffusion.stored_files import clear, has_begun
from tiler.errors import JobError, StorageError
from tiler.events import NoJournal
from tiler.files import make_own_folder
from tiler.memory.process import read_rss
from tiler.request import Layout, Region, Scheduler, Wrap

SIDES = (29, 37)  # neither chunks nor bands end with a row
STEPS = 4


class MadeUp:
    """A runner that can be stopped before its n-th tile."""

    def __init__(self, stop_at: int = -1) -> None:
        self.stop_at, self.tiles = stop_at, 0

    def predict(self, step: int, tiles: Iterable[Tile]) -> Iterator[Tensor]:
        for tile in tiles:
            if self.tiles == self.stop_at:
                raise KeyboardInterrupt
            self.tiles += 1
            yield torch.tanh(tile.latents[0] + 0.01 * step) * 0.7 + 1e-3 * tile.region.top


def schedule_of(scheduler: Scheduler, *, flowing: bool = False) -> DiffusersSchedule:
    if flowing:
        return flow.build(scheduler, {"num_train_timesteps": 1000, "shift": 3.0}, STEPS)
    return schedulers.build(scheduler, CONFIG, STEPS)


def steps_of(**values: Any) -> Steps:
    asked = request(height=8 * SIDES[0], width=8 * SIDES[1], num_inference_steps=STEPS, **values)
    tiles = plan_tiles(asked, canvas=SIDES, tile=(12, 12), overlap=5)
    return Steps(tiles, asked, range(STEPS))


def in_memory(
    scheduler: Scheduler, steps: Steps, reference: Tensor | None = None, begin: int = 0, **more: Any
) -> Tensor:
    reseeded = [((s.rows, s.cols), s.seed) for s in more.get("reseeded", ())]
    noise, generator = initial_noise((1, 4, *SIDES), 7, reseeded)
    schedule = schedule_of(scheduler, flowing=more.get("flowing", False))
    latents = schedule.start(noise, reference, begin)
    denoising = Denoising(latents, steps[begin:], schedule, generator, begin=begin)
    for _ in denoising.run(MadeUp()):
        pass
    return denoising.latents


def in_files(
    folder: Path, scheduler: Scheduler, steps: Steps, reference: Tensor | None = None, begin: int = 0,
    stop_at: int = -1, **more: Any,
) -> Tensor:  # fmt: skip
    given = None
    if reference is not None:
        given = StoredArray(folder / "reference", (1, 4, *SIDES), new=True)
        given.put(reference, 0, 0)
    schedule = schedule_of(scheduler, flowing=more.get("flowing", False))
    with StoredDenoising(
        folder, (1, 4, *SIDES), steps[begin:], schedule, 7, reference=given, begin=begin,
        reseeded=more.get("reseeded", ()),
    ) as denoising:  # fmt: skip
        for _ in denoising.run(MadeUp(stop_at), NoJournal()):
            pass
        assert denoising.samples_done == steps[begin:].samples
        return denoising.latents[:, :, : denoising.latents.shape[2]]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks and bands so small that a small canvas has many of them."""
    monkeypatch.setattr(stored_canvas, "chunks", lambda count: chunks(count, 16 * 17))
    monkeypatch.setattr(stored, "BAND", 4 * SIDES[1] * 5)


@pytest.mark.parametrize("scheduler", [s for s in Scheduler if s is not Scheduler.AUTO])
def test_every_scheduler_gives_equal_bits(scheduler: Scheduler, tmp_path: Path) -> None:
    steps = steps_of()
    found, wanted = in_files(tmp_path, scheduler, steps), in_memory(scheduler, steps)
    if scheduler is Scheduler.UNIPC:  # takes matrix products, whose last bit knows where in a row a value lies
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("scheduler", [Scheduler.EULER, Scheduler.DPMPP_2M, Scheduler.LCM])
def test_flow_matching_too(scheduler: Scheduler, tmp_path: Path) -> None:
    steps, given = steps_of(), torch.randn(1, 4, *SIDES)
    found = in_files(tmp_path, scheduler, steps, given, 1, flowing=True)
    assert torch.equal(found, in_memory(scheduler, steps, given, 1, flowing=True))


@pytest.mark.parametrize("scheduler", [Scheduler.DPMPP_2M_KARRAS, Scheduler.EULER_A])
def test_a_guide_regions_with_seeds_and_tiles_that_go_around(scheduler: Scheduler, tmp_path: Path) -> None:
    given = torch.randn(1, 4, *SIDES)
    regions = (Region(prompt="x", rows=(0, 120), cols=(80, 200), seed=3),)
    more = {"reseeded": [Seeded(slice(0, 15), slice(10, 25), 3)]}
    for steps in (steps_of(layout=Layout.SHIFT), steps_of(regions=regions), steps_of(wrap=Wrap.XY)):
        found = in_files(tmp_path, scheduler, steps, given, 2, **more)
        assert torch.equal(found, in_memory(scheduler, steps, given, 2, **more))
        clear(tmp_path)
        tmp_path.mkdir()


@pytest.mark.parametrize("stop_at", [0, 3, 16, 17])
def test_what_is_stopped_goes_on_at_the_tile(stop_at: int, tmp_path: Path) -> None:
    steps = steps_of()
    with pytest.raises(KeyboardInterrupt):
        in_files(tmp_path, Scheduler.EULER_A, steps, stop_at=stop_at)
    for log in tmp_path.glob("predictions.*"):  # a power cut tears what was written last
        with log.open("r+b") as file:
            file.seek(max(0, log.stat().st_size - 100))
            file.write(b"\0" * min(100, log.stat().st_size))
    runner = MadeUp()
    with StoredDenoising(tmp_path, (1, 4, *SIDES), steps, schedule_of(Scheduler.EULER_A), 7) as denoising:
        for _ in denoising.run(runner, NoJournal()):
            pass
        assert torch.equal(denoising.latents[:, :, : denoising.latents.shape[2]], in_memory(Scheduler.EULER_A, steps))
    assert runner.tiles <= sum(map(len, steps)) - max(0, stop_at - 1), "one tile was torn"
    clear(tmp_path)
    assert not tmp_path.exists() and not has_begun(tmp_path)


def test_a_damaged_or_another_canvas_is_refused(tmp_path: Path) -> None:
    steps = steps_of()
    in_files(tmp_path, Scheduler.DDIM, steps)
    with pytest.raises(JobError, match="another canvas"):
        StoredDenoising(tmp_path, (1, 4, 8, 8), steps, schedule_of(Scheduler.DDIM), 7)
    (tmp_path / "canvas.json").write_text("{")
    with pytest.raises(JobError, match="damaged"):
        StoredDenoising(tmp_path, (1, 4, *SIDES), steps, schedule_of(Scheduler.DDIM), 7)


@pytest.mark.parametrize("count", [5, 16, 1000, 16 * 64 + 3, 16 * 64 + 16])
def test_noise_in_chunks_is_one_draw(count: int) -> None:
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    whole = torch.randn(count, generator=generators[0])
    parts = [torch.randn(span.last - span.first, generator=generators[1]) for span in chunks(count, 64)]
    assert torch.equal(torch.cat(parts), whole) and torch.equal(*(g.get_state() for g in generators))


def test_predictions_that_are_torn_are_not_counted(tmp_path: Path) -> None:
    tiles = torch.randn(3, 4, 6, 5)
    with TileLog(tmp_path / "log", (4, 6, 5), new=True) as log:
        for tile in tiles:
            log.append(tile)
    with (tmp_path / "log").open("r+b") as file:
        file.seek(2 * (4 * 4 * 6 * 5 + 4) - 20)
        file.write(b"xx")
    with TileLog(tmp_path / "log", (4, 6, 5), new=False) as log:
        assert log.count == 1 and torch.equal(log.rows(0, 2, 5), tiles[0][:, 2:5])
        log.append(tiles[1])
        assert torch.equal(log.rows(1, 0, 6), tiles[1])


def test_memory_does_not_grow_with_the_canvas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_canvas, "chunks", chunks)
    monkeypatch.setattr(stored, "BAND", 2**18)

    def grown(side: int) -> int:
        asked = request(height=8 * side, width=8 * side, num_inference_steps=1)
        steps = Steps(plan_tiles(asked, canvas=(side, side), tile=(side // 2,) * 2, overlap=0), asked, range(1))
        before, most = read_rss().now, 0
        with StoredDenoising(tmp_path / str(side), (1, 4, side, side), steps, schedule_of(Scheduler.DDIM), 7) as canvas:
            for _ in canvas.run(MadeUp(), NoJournal()):
                most = max(most, read_rss().now - before)
        return most

    for side in (512, 1024):
        (tmp_path / str(side)).mkdir()
        assert stored.CHUNK * 4 * 4 > 0
        tile_bytes = 4 * 4 * side * side // 4
        assert grown(side) < 6 * tile_bytes + 30_000_000


def test_links_are_no_part_of_a_canvas(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "latents.0").write_bytes(bytes(4 * 16))
    (tmp_path / "latents.0").symlink_to(mine / "latents.0")
    for new in (False, True):
        with pytest.raises(StorageError, match="cannot be stored there"):
            StoredArray(tmp_path / "latents.0", (1, 1, 4, 4), new=new)
        with pytest.raises(StorageError, match="cannot be stored there"):
            TileLog(tmp_path / "latents.0", (1, 4, 4), new=new)
    (tmp_path / "canvas").symlink_to(mine)
    clear(tmp_path / "canvas")
    assert (mine / "latents.0").stat().st_size == 64
    with pytest.raises(OSError, match="belongs to another user"):
        make_own_folder(tmp_path / "canvas")
    make_own_folder(tmp_path / "own")
    assert (tmp_path / "own").stat().st_mode & 0o777 == 0o700
