"""torch builds that lack a oneDNN operator: other kernels do the work, and a note says so."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from tiler.compute import cpu, onednn
from tiler.compute.shapes import MetaMeter
from tiler.compute.stream import Streamer


@pytest.fixture
def unsupported(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A processor with all instructions, under a torch without the private operators."""

    def missing(*args: object) -> Tensor:
        raise AttributeError("'_OpNamespace' 'onednn' object has no attribute 'qlinear_pointwise'")

    monkeypatch.setattr(cpu, "flags", lambda: ("avx2", "avx512f", "avx512_vnni"))
    monkeypatch.setattr(onednn, "product", missing)
    monkeypatch.setattr(onednn, "reorder", missing)
    onednn.convolution_fault.cache_clear()
    onednn.product_fault.cache_clear()
    yield
    onednn.convolution_fault.cache_clear()
    onednn.product_fault.cache_clear()


@pytest.mark.skipif(not cpu.prepacks() or not torch.backends.mkldnn.is_available(), reason="oneDNN on x86 only")
def test_what_torch_has_is_used() -> None:
    assert onednn.notes() == []
    assert onednn.prepacks() and onednn.int8() == cpu.int8()


def test_a_missing_operator_is_a_note_and_fp32(unsupported: None) -> None:
    assert cpu.int8().products and not onednn.int8().products
    assert onednn.int8().largest == cpu.int8().largest  # packed files stay what they were
    assert "qlinear_pointwise" in onednn.int8().why
    assert not onednn.prepacks()
    assert len(onednn.notes()) == 2 and all("qlinear_pointwise" in note for note in onednn.notes())
    streamer = Streamer(None, int8_keys=frozenset({"weight"}))
    assert not streamer.int8_keys


def test_a_wrong_result_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert onednn._fault(lambda: True) == ""
    assert onednn._fault(lambda: False) == "its result is wrong"
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert "without oneDNN" in onednn._fault(lambda: True)


def test_geometry_is_in_the_operators_order() -> None:
    layer = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2)
    assert onednn.Geometry.of(layer) == ((1, 1), (2, 2), (1, 1), 2)


@pytest.mark.skipif(not cpu.prepacks() or not torch.backends.mkldnn.is_available(), reason="oneDNN on x86 only")
def test_an_attempt_while_memory_is_metered_succeeds() -> None:
    with MetaMeter():
        assert onednn._fault(onednn._try_convolution) == ""
        assert onednn._fault(onednn._try_product) == ""
