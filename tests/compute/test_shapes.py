"""The meter, which measures what a computation on meta tensors would take."""

from __future__ import annotations

import torch
from torch import nn

from tiler.compute.shapes import MetaMeter, repeated


def test_meter_counts_what_is_alive() -> None:
    with MetaMeter() as meter, torch.device("meta"), torch.no_grad():
        x = torch.empty(1000)
        y = x + 1
        del x
        z = torch.cat([y, y])
        view = z[10:]
        del y, z
        assert meter.live_bytes == 8000
        del view
    assert meter.live_bytes == 0
    assert meter.peak_bytes == 4000 + 8000


def test_meter_knows_a_convolutions_scratch_and_not_its_weights() -> None:
    with torch.device("meta"):
        conv = nn.Conv2d(4, 8, 3, padding=1, bias=False)
    with MetaMeter() as meter, torch.no_grad():
        out = conv(torch.empty(1, 4, 16, 16, device="meta"))
    x_bytes, out_bytes = 4 * 256 * 4, 8 * 256 * 4
    assert out.shape == (1, 8, 16, 16)
    assert meter.peak_bytes == x_bytes + out_bytes + (x_bytes + out_bytes + conv.weight.nbytes)


def test_meter_looks_up_rows_without_data() -> None:
    with torch.device("meta"):
        table = nn.Embedding(100, 8)
    rows, cols = torch.zeros(2, 5, dtype=torch.int64), torch.zeros(5, dtype=torch.int64)
    with MetaMeter() as meter, torch.no_grad():
        out = table(rows)
        assert out.shape == (2, 5, 8) and out.is_meta
        assert meter.peak_bytes == out.nbytes
        assert table.weight[rows].shape == (2, 5, 8)
        assert table.weight[rows, cols].shape == (2, 5)


def test_meter_counts_attention_whose_arguments_are_named() -> None:
    """Attention scores are never in memory as a whole: only the result is counted."""
    queries, keys = torch.empty(1, 2, 100, 16, device="meta"), torch.empty(1, 2, 300, 16, device="meta")
    with MetaMeter() as meter:
        out = nn.functional.scaled_dot_product_attention(query=queries, key=keys, value=keys)
    assert out.shape == queries.shape
    assert meter.peak_bytes == out.nbytes
    assert meter.attention_flops == 2 * (2 * 2 * 100 * 300 * 16)


def test_meter_counts_arithmetic_as_often_as_it_will_run() -> None:
    with torch.device("meta"):
        layer = nn.Linear(8, 4)
    with MetaMeter() as meter, torch.no_grad(), repeated(3), repeated(2.5):
        out = layer(torch.empty(10, 8, device="meta"))
    assert meter.linear_flops == 7.5 * 2 * 10 * 8 * 4
    assert meter.peak_bytes == 4 * 10 * (8 + 4) and out.shape == (10, 4)
