"""Attention by tiler's own kernels: chosen by width and policy, correct for views with any strides, and counted from
shapes alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tiler.compute.choose import choose_kernel
from tiler.compute.cpu import Isa
from tiler.compute.kernels import Input, Kind, Op, Operands, Policy
from tiler.compute.layers import attend, attend_in_parts
from tiler.compute.native_attention import NativeAttention, NativeAttentionBf16
from tiler.compute.shapes import MetaMeter
from tiler.native import library

LIBRARY = library.library()
needs_library = pytest.mark.skipif(LIBRARY is None, reason=f"the library is {library.fault()}")
ATTENTION = Op(kind=Kind.ATTENTION, input=Input(parts=3))
INT8 = Policy(int8=frozenset({"w"}))


def heads(samples: int, tokens: int, count: int, width: int, device: str = "cpu") -> Tensor:
    """(n, heads, tokens, width) as layers produce it: a view of (n, tokens, heads · width)."""
    return torch.randn(samples, tokens, count * width, device=device).unflatten(-1, (count, -1)).transpose(1, 2)


def apart(x: Tensor, want: Tensor) -> float:
    return float((x.double() - want).norm() / want.norm())


def test_views_of_any_strides_are_taken_as_they_lie() -> None:
    torch.manual_seed(64)
    q, k, v = heads(2, 100, 3, 64), heads(2, 77, 3, 64), heads(2, 77, 3, 64)
    want = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert apart(attend(q, k, v), want) < 2e-6
    shared = v[:, :1].expand_as(v)  # one head's values for all
    want = F.scaled_dot_product_attention(q.double(), k.double(), shared.double())
    assert apart(attend(q.contiguous(), k, shared), want) < 2e-6
    columns = q.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(attend(columns, k, v), attend(q, k, v))


@pytest.mark.parametrize("by_torch", [False, True])
def test_keys_may_come_some_at_a_time(monkeypatch: pytest.MonkeyPatch, by_torch: bool) -> None:
    """As in an autoencoder: one head of 512, and one part with scores far above the others'."""
    if by_torch:
        monkeypatch.setattr("tiler.compute.native_attention.library.library", lambda: None)
    torch.manual_seed(1)
    q, k, v = heads(1, 70, 1, 512), heads(1, 130, 1, 512), heads(1, 130, 1, 512)
    k[:, :, 60:90] *= 4
    want = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    parts = zip(k.split(60, dim=2), v.split(60, dim=2), strict=True)
    assert apart(attend_in_parts(q, parts), want) < 3e-6


@needs_library
def test_what_follows_takes_the_heads_as_they_lie() -> None:
    out = attend(heads(1, 64, 4, 40), heads(1, 77, 4, 40), heads(1, 77, 4, 40))
    assert out.shape == (1, 4, 64, 40)
    assert out.transpose(1, 2).flatten(2).data_ptr() == out.data_ptr()


@needs_library
@pytest.mark.parametrize("isa", [Isa.AVX512_VNNI, Isa.AVX2_VNNI, Isa.AVX2])
def test_width_and_policy_choose(isa: Isa) -> None:
    assert LIBRARY is not None
    beside_int8 = "native-attention"
    if LIBRARY.has_bf16 and isa is Isa.AVX512_VNNI:
        beside_int8 = "native-attention-bf16"
    for policy, name in ((Policy(), "native-attention"), (INT8, beside_int8)):
        assert choose_kernel(ATTENTION, (1, 8, 4096, 256), policy, isa).name == name
        assert choose_kernel(ATTENTION, (1, 1, 4096, 528), policy, isa).name == "fp32"


def test_without_the_library_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_find", lambda: "not built")
    assert choose_kernel(ATTENTION, (1, 8, 64, 40), INT8, Isa.AVX512_VNNI).name == "fp32"


@pytest.mark.skipif(LIBRARY is None or not LIBRARY.has_bf16, reason="no bf16 products here")
def test_bf16_rounds_and_no_more() -> None:
    q, k, v = heads(1, 200, 2, 40), heads(1, 300, 2, 40), heads(1, 300, 2, 40)
    want = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    (out,) = NativeAttentionBf16().apply(ATTENTION, Operands((q, k, v)), ())
    assert 1e-4 < apart(out, want) < 8e-3


@needs_library
def test_shapes_alone_count_the_arithmetic() -> None:
    with MetaMeter() as meter:
        q, k = heads(1, 64, 4, 40, "meta"), heads(1, 77, 4, 40, "meta")
        (out,) = NativeAttention().apply(ATTENTION, Operands((q, k, k)), ())
    assert out.shape == q.shape and out.is_meta
    assert meter.attention_flops == 4 * 4 * 64 * 77 * 40
