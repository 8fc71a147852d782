"""A decode that is stopped anywhere continues at a pass with the same bits. Saved passes that are damaged or belong to
another picture are never used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tiler.decoding import exact, spool
from tiler.decoding.scratch import Scratch
from tiler.decoding.spool import JOURNAL, Spool
from tiler.errors import StorageError
from tiler.models import family as families
from tiler.run import streamed
from tiler.weights.checkpoint import resolve


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


class _Stopped(Exception):
    pass


class Decoder:
    """Decodes `latents` of the tiny model; each call builds everything from scratch, as another process would."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.family, self.folder = families.read_family(resolve(str(model))), folder
        generator = torch.Generator().manual_seed(1)
        self.latents = torch.randn(1, 4, 40, 30, generator=generator) * torch.linspace(0.2, 3, 30)
        self.checks = self.attended = 0

    def __call__(self, kept: Spool | None, stop: int = -1, *, attending: int = -1) -> torch.Tensor:
        """Raises _Stopped at the check with that number, or at the check of attention."""
        self.checks = self.attended = 0

        def check(where: str) -> None:
            self.checks += 1
            self.attended += where == "decode.Attend"
            if self.checks == stop or self.attended == attending:
                raise _Stopped

        vae, spec = families.build_vae(self.family.autoencoder), self.family.autoencoder
        with streamed(vae, spec.weights, families.vae_names) as streamer:
            disk = Scratch(self.folder, torch.float16, kept)
            rows = exact.decode(vae, self.latents, disk, hold=streamer.hold_transformed, check=check, attend_to=None)
            return torch.cat(list(rows), dim=1)


@pytest.fixture
def decode(tiny: Path, tmp_path: Path) -> Decoder:
    return Decoder(tiny, tmp_path)


def test_stopped_again_and_again_it_gives_the_same_bits(
    decode: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each run gets a little further, attention strip by strip, and no complete pass is run again."""
    monkeypatch.setattr(spool, "_PART_EVERY", 0.0)
    monkeypatch.setattr(exact, "QUERIES", 120)  # ten strips
    want = decode(None)
    in_all, runs, told = decode.checks, 0, list[str]()
    while True:
        runs += 1
        try:
            got = decode(Spool(tmp_path / "spool", "the decoder", "x", told.append), stop=12)
            break
        except _Stopped:
            assert runs < in_all
    assert torch.equal(got, want)
    assert runs > in_all / 20 and told == [f"pass {n + 1} of the decoder" for n in range(len(told))]
    assert len(list((tmp_path / "spool").glob("*.rows"))) <= 3  # the rest has been read
    spool.clear(tmp_path / "spool")
    assert list(tmp_path.iterdir()) == []


def test_attention_goes_on_at_a_strip(decode: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "_PART_EVERY", 0.0)
    monkeypatch.setattr(exact, "QUERIES", 120)
    want = decode(None)
    assert decode.attended == 10
    with pytest.raises(_Stopped):
        decode(Spool(tmp_path / "spool", "the decoder", "x"), attending=7)
    assert torch.equal(decode(Spool(tmp_path / "spool", "the decoder", "x")), want)
    assert decode.attended == 4


def _flip(folder: Path) -> None:
    content = bytearray((folder / JOURNAL).read_bytes())
    content[len(content) * 2 // 3] ^= 4
    (folder / JOURNAL).write_bytes(bytes(content))


def _tear(folder: Path) -> None:
    content = (folder / JOURNAL).read_bytes()
    (folder / JOURNAL).write_bytes(content[: len(content) - 9])


def _shorten(folder: Path) -> None:
    newest = max(folder.glob("*.rows"))
    with newest.open("r+b") as file:
        file.truncate(newest.stat().st_size // 2)


@pytest.mark.parametrize("damage", [_flip, _tear, _shorten, lambda folder: min(folder.glob("*.rows")).unlink()])
def test_a_damaged_spool_costs_work_and_never_the_picture(
    decode: Decoder, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    want = decode(None)
    with pytest.raises(_Stopped):
        decode(Spool(tmp_path / "spool", "the decoder", "x"), stop=decode.checks * 2 // 3)
    damage(tmp_path / "spool")
    assert torch.equal(decode(Spool(tmp_path / "spool", "the decoder", "x")), want)


def test_after_a_power_cut_only_what_was_synced_counts(
    decode: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk may have lost the files of lines from another boot."""
    want, whole = decode(None), decode.checks
    for synced in (False, True):
        monkeypatch.setattr(spool, "_SYNC_EVERY", 0.0 if synced else 1e9)
        with pytest.raises(_Stopped):
            decode(Spool(tmp_path / "spool", "the decoder", "x"), stop=whole * 2 // 3)
        with monkeypatch.context() as patch:
            patch.setattr(spool, "_boot", lambda: "another")
            assert torch.equal(decode(Spool(tmp_path / "spool", "the decoder", "x")), want)
        assert (decode.checks < whole) is synced
        spool.clear(tmp_path / "spool")


def test_the_passes_of_another_picture_are_not_taken(decode: Decoder, tmp_path: Path) -> None:
    want, whole = decode(None), decode.checks
    with pytest.raises(_Stopped):
        decode(Spool(tmp_path / "spool", "the decoder", "another"), stop=whole * 2 // 3)
    assert torch.equal(decode(Spool(tmp_path / "spool", "the decoder", "x")), want)
    assert decode.checks == whole


def test_a_spool_that_another_made_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder that everyone may write to, a predictable name may lead elsewhere."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(StorageError, match="belongs to another user"):
        Spool(tmp_path / "link", "the decoder", "x")
    kept = Spool(tmp_path / "own", "the decoder", "x")
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "own/00.rows").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic links"):
        kept.open(0)
    monkeypatch.setattr("os.geteuid", lambda: 12345)
    with pytest.raises(StorageError, match="belongs to another user"):
        Spool(tmp_path / "own", "the decoder", "x")
    assert (tmp_path / "victim").read_text() == "mine"
