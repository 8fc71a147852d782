"""The walk that transformers share, against diffusers' blocks: chunks, head groups and streaming change only
rounding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_flux import (
    FluxPosEmbed,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from safetensors.torch import save_file
from torch import Tensor, nn

from tiler.compute.layers import stream_layers
from tiler.compute.shapes import MetaMeter
from tiler.compute.stream import Streamer
from tiler.models import dit
from tiler.models.family import plain_names
from tiler.models.flux_blocks import joint_block, single_block
from tiler.models.meta import on_meta
from tiler.models.modulation import modulations
from tiler.run import streamed
from tiler.weights.index import read_index
from tiler.weights.layouts import understood

WIDTH, HEADS, TEXT, IMAGE = 320, 8, 37, 100  # heads that six groups do not divide, tokens that chunks do not
KINDS = {"joint": FluxTransformerBlock, "single": FluxSingleTransformerBlock}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(dit, "CHUNK", 32)
    monkeypatch.setattr(dit, "QUERIES", 48)
    with torch.no_grad():
        yield


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def block_of(kind: str) -> Any:
    block = KINDS[kind](dim=WIDTH, num_attention_heads=HEADS, attention_head_dim=WIDTH // HEADS).eval()
    for seed, parameter in enumerate(block.parameters()):
        spread = parameter.shape[1] ** -0.5 if parameter.ndim > 1 else 0.2
        parameter.data = normal(*parameter.shape, seed=seed) * spread + (parameter.ndim == 1)
    return block


@contextmanager
def on_disk(block: nn.Module, kind: str, folder: Path, **options: Any) -> Iterator[tuple[Any, Streamer]]:
    save_file(block.state_dict(), folder / "block.safetensors")
    with on_meta():
        empty = KINDS[kind](dim=WIDTH, num_attention_heads=HEADS, attention_head_dim=WIDTH // HEADS).eval()
    with streamed(empty, understood(read_index(folder / "block.safetensors")), plain_names, **options) as streamer:
        yield empty, streamer


def want(kind: str, block: Any, x: Tensor, temb: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    text, image = block(x[:, TEXT:], x[:, :TEXT], temb, rotary)
    return torch.cat([text, image], 1)


def got(kind: str, streamer: Streamer, block: Any, x: Tensor, temb: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    norms = [block.norm1, block.norm1_context] if kind == "joint" else [block.norm]
    conditioning = nn.functional.silu(temb)
    values = modulations(streamer, [norm.linear for norm in norms], conditioning, ["row"], None).read("row")
    rotation = torch.complex(*(part[:, ::2].contiguous() for part in rotary))[:, None]
    x = x.clone()
    if kind == "joint":
        joint_block(streamer, block, x, slice(0, TEXT), slice(TEXT, TEXT + IMAGE), values[0], values[1], rotation)
    else:
        single_block(streamer, block, x, values[0], rotation)
    return x


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_diffusers_own(kind: str, tmp_path: Path) -> None:
    """Resident, streamed with room for every layer, and streamed with room for none: always the same bits."""
    block, x, temb = block_of(kind), normal(1, TEXT + IMAGE, WIDTH, seed=100), normal(1, WIDTH, seed=101)
    rotary = FluxPosEmbed(10_000, [8, 16, 16])(normal(TEXT + IMAGE, 3, seed=102) * 10)
    reference = want(kind, block, x, temb, rotary)
    resident = got(kind, Streamer(None), block, x, temb, rotary)
    assert (resident - reference).abs().max() < 1e-5
    results = []
    for arena in (2**26, 2**20, 2**16):
        with on_disk(block, kind, tmp_path, arena_bytes=arena) as (empty, streamer):
            results.append(got(kind, streamer, empty, x, temb, rotary))
            assert streamer.store is not None
            read = streamer.store.bytes_read
    assert (results[0] - reference).abs().max() < 5e-5  # of values up to 10: the kernels add in another order
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert read > 4 * sum(p.numel() for p in block.parameters())  # of the feed-forward, in turns


@pytest.mark.parametrize("kind", KINDS)
def test_planning_counts_what_a_block_does(kind: str) -> None:
    """On shapes: the arithmetic of every chunk is counted although only the first is run, and at most three states
    beside the state."""
    with on_meta():
        block = KINDS[kind](dim=WIDTH, num_attention_heads=HEADS, attention_head_dim=WIDTH // HEADS)
        x, row = torch.empty(1, TEXT + IMAGE, WIDTH), torch.empty(6 * WIDTH)
    streamer = Streamer(None, arena_bytes=2**16)
    stream_layers(block, streamer)
    with MetaMeter() as meter:
        if kind == "joint":
            joint_block(streamer, block, x, slice(0, TEXT), slice(TEXT, TEXT + IMAGE), row, row, None)
        else:
            single_block(streamer, block, x, row[: 3 * WIDTH], None)
    tokens = TEXT + IMAGE
    # Of each token: q, k, v, out, and a feed-forward four times as wide; a single block has no layer for out alone.
    assert meter.linear_flops == pytest.approx(2 * tokens * WIDTH**2 * 12, rel=1e-6)
    assert meter.attention_flops == pytest.approx(4 * tokens**2 * WIDTH, rel=1e-6)
    piece = 4 * WIDTH * 4 * WIDTH  # bytes of the widest weight that is held here at once
    assert meter.peak_bytes < 3 * x.nbytes + 3 * piece  # one of them while it is brought into a kernel's order


def test_modulations_are_kept_for_every_step_and_prompt(tmp_path: Path) -> None:
    layers = [nn.Linear(16, 48), nn.Linear(16, 32)]
    inputs = normal(150, 16, seed=1)  # more rows than one product
    found = modulations(Streamer(None), layers, inputs, list(range(150)), tmp_path)
    for row in (0, 63, 64, 149):
        for layer, values in zip(layers, found.read(row), strict=True):
            assert torch.allclose(values, layer(inputs[row]), atol=1e-6)
    assert list(tmp_path.iterdir()) == []  # the file has no name
