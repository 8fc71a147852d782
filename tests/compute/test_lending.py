"""A module is unchanged after a streamer has used it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tiler.compute.lending import lent
from tiler.compute.stream import Streamer
from tiler.weights.index import read_index
from tiler.weights.store import WeightStore


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(320, 320), nn.LayerNorm(320), nn.Sequential(nn.Linear(320, 320), nn.GELU()))


def everything(module: nn.Module) -> list[object]:
    return [
        (id(m), type(m), sorted(vars(m)), [(n, id(p)) for n, p in m.named_parameters()], list(m._forward_hooks))
        for m in module.modules()
    ]


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_the_streamer_stays(tmp_path: Path, fails: bool) -> None:
    torch.manual_seed(0)
    whole, x = build(), torch.randn(2, 320)
    save_file(whole.state_dict(), tmp_path / "w.safetensors")
    with torch.device("meta"):
        module = build()
    before = everything(module)
    for _ in range(2):  # the same module serves again
        with WeightStore(read_index(tmp_path / "w.safetensors")) as store, torch.no_grad():
            try:
                with lent(module, Streamer(store)):
                    module[2].marked = True
                    module[0].register_forward_hook(lambda *args: None)
                    module[1] = nn.Identity() if fails else module[1]
                    if fails:
                        raise OSError
                    assert torch.allclose(module(x), whole(x), atol=1e-5)
                    assert type(module[0]) is not nn.Linear
            except OSError:
                assert fails
        assert everything(module) == before
    assert all(p.is_meta for p in module.parameters())
    with lent(module, Streamer(None)), pytest.raises(AssertionError, match="lent"), lent(module, Streamer(None)):
        pass
