"""Bands decoded elsewhere: the bytes of a decode in one process, whoever decodes them and whenever they stop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.decoding.test_frozen import smooth_latents
from tiler.cluster.decoder import Columns
from tiler.decoding import apart as others
from tiler.decoding import frozen, held
from tiler.decoding.apart import Apart, Work
from tiler.decoding.rows import decoder_stages
from tiler.decoding.scratch import Scratch
from tiler.decoding.spool import Spool
from tiler.models import family as families
from tiler.run import streamed
from tiler.weights.checkpoint import resolve

HEIGHT, WIDTH = 22, 80  # latents


class Other:
    """Decodes what it is given, a strip of each band in turn, with stages of its own; leaves after `most` strips."""

    def __init__(self, vae: Any, work: Work, most: int) -> None:
        self._vae, self._work, self._most = vae, work, most
        self._strips: dict[int, Iterator[Tensor]] = {}
        self.begun: list[tuple[int, int]] = []

    def begin(self, number: int, row: int) -> None:
        self.begun.append((number, row))
        band = self._work.bands[number]
        stages = decoder_stages(self._vae.decoder, self._vae.post_quant_conv)
        held.from_bytes(stages, self._work.statistics)
        assert torch.equal(frozen.probe(stages, self._work.small), self._work.probe)
        columns = Columns(self._work.latents[:, :, :][..., band.first : band.last], band.first, WIDTH)
        self._strips[number] = frozen.band_strips(stages, columns, band, row)

    def next(self) -> tuple[int, Tensor] | None:
        while self._most and self._strips:
            number, strips = next(iter(self._strips.items()))
            del self._strips[number]
            if (strip := next(strips, None)) is not None:
                self._strips[number] = strips
                self._most -= 1
                return number, strip
        return None


@torch.no_grad()
@pytest.mark.parametrize("has_room", [True, False])
def test_bands_decoded_elsewhere_have_the_bytes_of_one_process(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_room: bool
) -> None:
    monkeypatch.setattr(frozen, "BAND", 50)
    monkeypatch.setattr(others, "_ROOM", 2 if has_room else 10**12)
    family = families.read_family(resolve(str(tiny)))
    vae, latents = families.build_vae(family.autoencoder), smooth_latents(HEIGHT, WIDTH)
    assert len(frozen.bands(WIDTH)) == 4
    opened: list[Other] = []

    def decoded(most: int | None, folder: Path, **options: Any) -> Iterator[Tensor]:
        @contextmanager
        def elsewhere(work: Work) -> Iterator[Apart | None]:
            opened.append(Other(vae, work, most or 0))
            yield opened[-1] if most else None

        scratch = Scratch(folder, torch.float16, options.pop("spool", None))
        apart = None if most is None else elsewhere
        return frozen.decode(vae, latents, scratch, hold=streamer.hold, elsewhere=apart, **options)

    with streamed(vae, family.autoencoder.weights, families.vae_names) as streamer:
        whole = torch.cat(list(decoded(None, tmp_path)), dim=1)
        done: list[float] = []
        for most in (0, 1, 5, 11, 10**6):
            done.clear()
            assert torch.equal(torch.cat(list(decoded(most, tmp_path, progress=done.append)), dim=1), whole)
            assert done == sorted(done) and done[-1] == 1
        assert [row for _, row in opened[-1].begun] == [0] * 4
        later = torch.cat(list(decoded(10**6, tmp_path, begin=37)), dim=1)
        assert torch.equal(later, whole[:, 37:])
        # Interrupted in the middle, with a job: what is done of each band is not done again.
        spool = Spool(tmp_path / "spool", "a decoder", "of this")
        first = decoded(5, tmp_path, spool=spool)
        next(first)
        first.close()
        again = torch.cat(
            list(decoded(10**6, tmp_path, spool=Spool(tmp_path / "spool", "a decoder", "of this"))), dim=1
        )
        assert torch.equal(again, whole) and len(opened[-1].begun) == 1
