"""The rotation against its matrix, and int8 weights that were rotated before quantisation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.native.kernel_cases import walsh_hadamard
from tiler.compute.int8 import quantize_rows
from tiler.weights.index import TensorInfo, read_index
from tiler.weights.layouts import understood
from tiler.weights.packed import write_packed
from tiler.weights.rotation import GROUP, can_rotate, rotate_
from tiler.weights.store import Piece, WeightStore, match_index


def packed(weight: Tensor, folder: Path, *, in_blocks: bool, largest: int = 127) -> dict[str, TensorInfo]:
    """The index of a packed file with a rotated `w.weight` of integers up to `largest`, or as
    the processor multiplies them (0), as a model has it."""
    save_file({"w.weight": weight}, folder / "plain.safetensors")
    name = frozenset({"w.weight"})
    write_packed(
        folder / "packed.safetensors", "mark", list(name), read_index(folder / "plain.safetensors"),
        {"w.weight": lambda rows: quantize_rows(rotate_(rows), largest)}, lambda share: None,
        in_blocks=name if in_blocks else frozenset(), rotated=name,
    )  # fmt: skip
    module = nn.ModuleDict({"w": nn.Linear(weight.shape[1], len(weight), bias=False, device="meta")})
    return match_index(module, understood(read_index(folder / "packed.safetensors")), lambda name: [name])


def test_it_is_the_matrix_and_its_own_inverse() -> None:
    rows = torch.randn(5, 3 * GROUP)
    want = (rows.double().view(5, 3, GROUP) @ walsh_hadamard(GROUP)).view(5, -1)
    turned = rotate_(rows.clone())
    torch.testing.assert_close(turned.double(), want, rtol=0, atol=1e-6)
    torch.testing.assert_close(rotate_(turned), rows, rtol=0, atol=1e-6)
    assert can_rotate((7, 128)) and not can_rotate((7, 96)) and not can_rotate((8, 64, 3, 3))


@pytest.mark.parametrize("in_blocks", [True, False])
def test_a_rotated_weight_is_read_in_fp32_as_it_was(in_blocks: bool, tmp_path: Path) -> None:
    """As a whole and by rows, from the file and from memory."""
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(0))
    index = packed(weight, tmp_path, in_blocks=in_blocks)
    assert index["w.weight"].rotated and index["w.weight"].blocked == in_blocks
    for kept in (False, True):
        with WeightStore(index) as store:
            if kept:
                store.keep("w.weight", torch.int8)
            whole, some = torch.empty(96, 128), torch.empty(40, 128)
            store.fetch(Piece("w.weight", 0, 96), whole)
            store.fetch(Piece("w.weight", 8, 48), some)
            assert (whole - weight).norm() < 0.01 * weight.norm()
            assert torch.equal(some, whole[8:48])
