"""However a decode ends, it leaves no open file and no used disk space, and its inputs are unchanged."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

from tiler.decoding import exact, frozen, method, scratch
from tiler.decoding.pictures import to_tensor
from tiler.decoding.scratch import Rows, Scratch
from tiler.errors import NumericalError, StorageError
from tiler.models import family as families
from tiler.pixels import decode_pixels
from tiler.request import Decode, ScratchDtype
from tiler.run import streamed
from tiler.weights.checkpoint import resolve

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc here")


def files_in(folder: Path) -> list[int]:
    """The bytes on disk of each file of `folder` that this process has open, named or nameless."""
    sizes = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue  # the one that listed them
        if target.startswith(f"{folder}/"):
            sizes.append(512 * os.stat(f"/proc/self/fd/{fd}").st_blocks)
    return sizes


@pytest.fixture(params=[Decode.EXACT, Decode.SAMPLED, Decode.FROZEN])
def decoding(
    request: pytest.FixtureRequest, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Any]]:
    """A function that starts to decode 90 × 90 latents; its argument is called at every layer."""
    monkeypatch.setattr(frozen, "BAND", 60)  # or no band waits in the scratch
    kind = families.read_family(resolve(str(tiny))).autoencoder
    vae = families.build_vae(kind)
    with streamed(vae, kind.weights, families.vae_names) as streamer:
        how = method.DecodePlan(
            kind=request.param, encoding=False, why="", memory_bytes=0, folder=tmp_path, dtype=ScratchDtype.FP16
        )
        latents = torch.randn(1, 4, 90, 90, generator=torch.Generator().manual_seed(0))
        yield lambda check: decode_pixels(how, vae, streamer, latents, check, lambda share: None)


def test_a_generator_that_is_closed_early_leaves_no_file_open(decoding: Callable[..., Any], tmp_path: Path) -> None:
    strips = decoding(lambda where: None)
    next(strips)
    assert sum(files_in(tmp_path)) > 0
    strips.close()
    assert files_in(tmp_path) == []


def test_a_generator_that_is_forgotten_leaves_no_file_open(decoding: Callable[..., Any], tmp_path: Path) -> None:
    strips = decoding(lambda where: None)
    next(strips)
    del strips
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("when", [1, 30])
def test_an_error_in_the_middle_leaves_no_file_open(decoding: Callable[..., Any], tmp_path: Path, when: int) -> None:
    calls = 0
    most = []

    def check(where: str) -> None:
        nonlocal calls
        calls += 1
        most.append(sum(files_in(tmp_path)))
        if calls == when:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        list(decoding(check))
    assert files_in(tmp_path) == []  # while the traceback still has its frames
    assert caught.value is not None
    assert max(most) > 0 or when == 1


def test_an_error_of_the_writers_leaves_no_file_open(decoding: Callable[..., Any], tmp_path: Path) -> None:
    def write() -> None:
        with closing(decoding(lambda where: None)) as strips:
            for _ in strips:
                assert sum(files_in(tmp_path)) > 0
                raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        write()
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("by_rows", [exact, frozen])
def test_nan_leaves_no_file_open(tmp_path: Path, reference: AutoencoderKL, by_rows: Any) -> None:
    latents, pixels = torch.randn(1, 4, 60, 60), np.zeros((480, 480, 3), dtype=np.uint8)
    broken = copy.deepcopy(reference)
    broken.decoder.up_blocks[1].resnets[0].conv1.weight.data.fill_(float("inf"))
    broken.encoder.down_blocks[1].resnets[0].conv1.weight.data.fill_(float("nan"))
    options: dict[str, Any] = {"hold": lambda module: nullcontext(), "check": lambda where: None}
    with torch.no_grad(), pytest.raises(NumericalError):
        list(by_rows.decode(broken, latents, Scratch(tmp_path), **options))
    assert files_in(tmp_path) == []
    with torch.no_grad(), pytest.raises(NumericalError):
        by_rows.encode(broken, pixels, Scratch(tmp_path), **options)
    assert files_in(tmp_path) == []


def test_a_scratch_closes_what_its_block_leaves_open(tmp_path: Path) -> None:
    with Scratch(tmp_path) as disk:
        for _ in range(3):
            Rows(disk, 3, 5).append(torch.zeros(1, 3, 1, 5))
        rows = Rows(disk, 3, 5)
        over = Rows(disk, 3, 5, over=rows)
        rows.append(torch.zeros(1, 3, 1, 5))
        over.append(torch.zeros(1, 3, 1, 5))
        over.close()
        assert len(files_in(tmp_path)) == 3
    assert files_in(tmp_path) == []
    assert disk.live_bytes == 0 < disk.peak_bytes
    with open(tmp_path / "other", "wb") as other:  # under a number that was theirs
        rows.close()
        over.close()
        other.write(b"x")


def test_a_folder_that_cannot_unlink_leaves_no_file_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(scratch.os, "unlink", refuse)
    with pytest.raises(StorageError, match="Permission denied"):
        Scratch(tmp_path).open()
    assert files_in(tmp_path) == []


def states(model: nn.Module) -> dict[str, dict[str, object]]:
    """All attributes of a model's modules except the parameters."""
    simple = int | float | str | bool | tuple | type(None)
    return {
        name: {"class": type(module), **{k: v for k, v in vars(module).items() if isinstance(v, simple)}}
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("by_rows", [exact, frozen])
def test_an_autoencoder_of_the_callers_still_works(reference: AutoencoderKL, tmp_path: Path, by_rows: Any) -> None:
    """After tiler has used a module, diffusers decodes and encodes with it as before, and tiler can use it again."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 24, 20, generator=generator)
    pixels = np.random.default_rng(0).integers(0, 256, (192, 160, 3), dtype=np.uint8)
    vae, before = copy.deepcopy(reference), states(reference)
    given = latents.clone(), pixels.copy()
    options: dict[str, Any] = {"hold": lambda module: nullcontext(), "check": lambda where: None}
    made = []
    for _ in range(2):
        with torch.no_grad():
            made.append(
                torch.cat(list(by_rows.decode(vae, latents, Scratch(tmp_path, torch.float32), **options)), dim=1)
            )
            made.append(by_rows.encode(vae, pixels, Scratch(tmp_path, torch.float32), **options))
    assert torch.equal(made[0], made[2]) and torch.equal(made[1], made[3])
    assert torch.equal(latents, given[0]) and np.array_equal(pixels, given[1])
    assert states(vae) == before
    with torch.no_grad():
        assert torch.equal(vae.decode(latents).sample, reference.decode(latents).sample)
        fresh, used = (m.encode(to_tensor(pixels)).latent_dist.mean for m in (reference, vae))
        assert torch.equal(fresh, used)
        assert (made[0] - reference.decode(latents).sample[0]).abs().max() <= 1e-4
    for (name, ours), theirs in zip(vae.state_dict().items(), reference.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
