"""A transformer's block consists of a few operations, each a product with what surrounds it, whichever kernel computes
them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from safetensors.torch import save_file
from torch import Tensor, nn

from tiler.compute import cpu
from tiler.compute.choose import KERNELS
from tiler.compute.int8 import quantize_rows
from tiler.compute.kernels import (
    Epilogue,
    Group,
    Input,
    Kernel,
    Kind,
    Op,
    Operands,
    Place,
    Policy,
    Prepared,
    Shape,
    Weight,
    read_pieces,
)
from tiler.compute.layers import StreamedLayer, linear, linear_layers, rows_of, stream_layers
from tiler.compute.onednn import Geometry
from tiler.compute.stream import Streamer
from tiler.models.blocks import attention, feed_forward
from tiler.weights.changes import LowRank
from tiler.weights.index import read_index
from tiler.weights.rotation import rotate_
from tiler.weights.store import SCALE, WeightStore

WIDTH = 320  # such layers are streamed


class Whole(Kernel):
    """Linear layers of a group as one product in fp64, with norm, activation and residual."""

    name = "whole"

    def __init__(self) -> None:
        self.seen: list[tuple[tuple[str, ...], bool, bool, bool]] = []

    def suits(self, op: Op, shape: Shape | None, policy: Policy) -> bool:
        return op.kind is Kind.LINEAR

    def prepare(self, store: WeightStore | None, op: Op, shape: Shape, place: Place) -> Iterator[Prepared]:
        assert store is not None
        pieces = [rows.clone() for weight in op.group.weights for _, _, rows in read_pieces(store, weight, place)]
        yield Prepared(0, op.group.shape[0], (torch.cat(pieces).double(),))

    def begin(self, op: Op, x: Operands) -> Operands:
        (made,), norm = x.parts, op.input.norm
        if norm is not None:
            assert isinstance(norm, nn.LayerNorm) and norm.bias is not None
            made = F.layer_norm(made.double(), norm.normalized_shape, norm.weight.double(), norm.bias.double())
        return x._replace(made=made.double())

    def apply(self, op: Op, x: Operands, prepared: Iterable[Prepared]) -> tuple[Tensor, ...]:
        after, weights = op.epilogue, op.group.weights
        names = tuple(weight.name.removesuffix(".weight") for weight in weights)
        self.seen.append((names, op.input.norm is not None, after.activation is not None, after.residual))
        ((_, _, (matrix,), _),) = prepared
        out = x.made @ matrix.T
        if weights[0].bias is not None:
            out += torch.cat([weight.bias for weight in weights if weight.bias is not None])
        if after.activation is not None:
            approximate = getattr(after.activation, "approximate", "none")
            first, second = out.chunk(2, dim=-1) if after.glu else (1, out)
            out = first * F.gelu(second, approximate=approximate)
        if x.residual is not None:
            out += x.residual
        return tuple(part.float() for part in out.split(out.shape[-1] // len(weights), dim=-1))


def block(activation: str = "geglu") -> BasicTransformerBlock:
    torch.manual_seed(3)
    made = BasicTransformerBlock(WIDTH, 5, 64, cross_attention_dim=208, activation_fn=activation).eval()
    for parameter in made.parameters():
        parameter.requires_grad_(False).add_(0.02 * torch.randn(parameter.shape))
    return made


@contextmanager
def streamed(module: nn.Module, meta: nn.Module, folder: Path, *prefer: Kernel) -> Iterator[nn.Module]:
    """`meta` with the weights of `module` streamed."""
    save_file(dict(module.state_dict()), folder / "w.safetensors")
    with WeightStore(read_index(folder / "w.safetensors")) as store:
        stream_layers(meta, Streamer(store, prefer=prefer))
        yield meta


def run(made: BasicTransformerBlock, tokens: Tensor, text: Tensor) -> Tensor:
    tokens = attention(made.attn1, made.norm1, tokens)
    tokens = attention(made.attn2, made.norm2, tokens, text)
    feed_forward(made.ff, made.norm3, 6, tokens)
    return tokens


@torch.no_grad()
@pytest.mark.parametrize("activation", ["geglu", "gelu", "gelu-approximate"])
@pytest.mark.parametrize("samples", [1, 2])
def test_a_transformer_block_is_seven_operations(tmp_path: Path, activation: str, samples: int) -> None:
    plain, kernel = block(activation), Whole()
    tokens, text = torch.randn(samples, 12, WIDTH), torch.randn(samples, 7, 208)
    exact = block(activation).double()(tokens.double(), encoder_hidden_states=text.double())
    with streamed(plain, block(activation).to("meta"), tmp_path, kernel) as module:
        got = run(module, tokens, text)  # type: ignore[arg-type]
    assert (got - exact).norm() < 1e-6 * exact.norm()
    feed = (("ff.net.0.proj",), True, True, False), (("ff.net.2",), False, False, True)
    assert kernel.seen == [
        (("attn1.to_q", "attn1.to_k", "attn1.to_v"), True, False, False),
        (("attn1.to_out.0",), False, False, True),
        (("attn2.to_q",), True, False, False),
        (("attn2.to_k", "attn2.to_v"), False, False, False),
        (("attn2.to_out.0",), False, False, True),
        *feed,  # 6 of 12 tokens at a time
        *feed,
    ]
    with streamed(plain, block(activation).to("meta"), tmp_path) as module:
        step_by_step = run(module, tokens, text)  # type: ignore[arg-type]
    assert (step_by_step - exact).norm() < 2e-6 * exact.norm()
    assert (run(plain, tokens, text) - exact).norm() < 2e-6 * exact.norm()  # layers that are not streamed


def stored(folder: Path, kernel: str, *weights: Tensor) -> tuple[WeightStore, Group]:
    """The weights in the form that `kernel` takes."""
    tensors: dict[str, Tensor] = {}
    for i, weight in enumerate(weights):
        rows, scale = quantize_rows(weight)
        tensors |= {f"{i}": rows, f"{i}{SCALE}": scale} if kernel != "fp32" else {f"{i}": weight}
    save_file(tensors, folder / "w.safetensors")
    group = Group(weights=tuple(Weight(name=f"{i}", meta=weight.to("meta")) for i, weight in enumerate(weights)))
    return WeightStore(read_index(folder / "w.safetensors")), group


def apply(store: WeightStore, kernel: str, op: Op, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, ...]:
    streamer = Streamer(store, prefer=[KERNELS[kernel]])
    begun = KERNELS[kernel].begin(op, Operands((x,), residual))
    return KERNELS[kernel].apply(op, begun, streamer.prepared(op, KERNELS[kernel], x.shape))


products = pytest.mark.skipif(not cpu.int8().products, reason="no 8-bit products here")
with_kernels = pytest.mark.parametrize("kernel", ["fp32", pytest.param("native-int8", marks=products)])


# Of a low-rank path, relative to what it adds: half as much again as normally distributed factors have.
PATH_ERROR = 0.03 if cpu.int8().adds_fours else 0.02


def factors(rank: int, outputs: int, *inputs: int) -> LowRank:
    """Random ones: `down` (rank, *inputs) has rows of very different sizes, as beside one another those of several
    files have, and one of zeros."""
    down = torch.randn(rank, *inputs) * torch.logspace(-2, 2, rank).view(-1, *(1,) * len(inputs))
    down[1:2] = 0
    up = torch.randn(outputs, rank) / torch.logspace(-2, 2, rank)
    return LowRank(rank, lambda: (down.clone(), up.clone()))


@torch.no_grad()
@products
@pytest.mark.parametrize("rank", [1, 4, 20])
@pytest.mark.parametrize("rotated", [False, True])
def test_a_low_rank_path_is_added_to_int8_weights(tmp_path: Path, rank: int, *, rotated: bool) -> None:
    """Before the activation; another weight of the group has none."""
    kernel = "native-int8"
    torch.manual_seed(4)
    x, weight, bias = torch.randn(2, 9, 128), torch.randn(48, 128), torch.randn(48)
    path = factors(rank, 48, 128)
    store, plain = stored(tmp_path, kernel, rotate_(weight.clone()) if rotated else weight, weight)
    with store:
        first, second = (replace(one, bias=bias, rotated=rotated) for one in plain.weights)
        groups = [Group(weights=(first, second)), Group(weights=(replace(first, low_rank=path), second))]
        without, got = (apply(store, kernel, Op(kind=Kind.LINEAR, weights=group), x) for group in groups)
        after = Epilogue(activation=nn.SiLU())
        activated = apply(store, kernel, Op(kind=Kind.LINEAR, weights=groups[1], epilogue=after), x)
    down, up = path.load()
    added = x.double() @ (up.double() @ down.double()).T
    assert (got[0] - without[0] - added).norm() < PATH_ERROR * added.norm()
    assert torch.equal(got[1], without[1])
    assert (activated[0] - F.silu(got[0])).norm() < 1e-6 * got[0].norm()


@torch.no_grad()
@products
@pytest.mark.parametrize(("side", "stride"), [(3, 1), (3, 2), (1, 1)])
def test_a_low_rank_path_is_added_to_int8_convolutions(tmp_path: Path, side: int, stride: int) -> None:
    kernel = "native-int8"
    torch.manual_seed(6)
    x, weight, path = torch.randn(2, 48, 10, 10), torch.randn(48, 48, side, side), factors(20, 48, 48, side, side)
    store, plain = stored(tmp_path, kernel, weight)
    geometry = Geometry((side // 2,) * 2, (stride,) * 2, (1, 1), 1)
    with store:
        (one,) = plain.weights
        groups = [Group(weights=(replace(one, low_rank=low_rank),)) for low_rank in (None, path)]
        without, got = (
            apply(store, kernel, Op(kind=Kind.CONVOLUTION, weights=group, geometry=geometry), x)[0] for group in groups
        )
    down, up = path.load()
    delta = (up.double() @ down.double().flatten(1)).view(weight.shape)
    added = F.conv2d(x.double(), delta, stride=stride, padding=side // 2)
    assert (got - without - added).norm() < PATH_ERROR * added.norm()


@torch.no_grad()
@products
@pytest.mark.parametrize("whose", [(0,), (1,), (0, 1), None])
def test_a_low_rank_path_is_added_before_the_gates(tmp_path: Path, whose: tuple[int, ...] | None) -> None:
    """To one weight that is halved, or to these of two."""
    kernel = "native-int8"
    torch.manual_seed(7)
    x, residual, weight = torch.randn(2, 37, 64), torch.randn(2, 37, 128), torch.randn(256, 64)
    weights = weight.chunk(1 if whose is None else 2)
    paths = [factors(4 + 16 * i, len(part), 64) for i, part in enumerate(weights)]
    store, plain = stored(tmp_path, kernel, *weights)
    with store:
        changed = [
            replace(one, low_rank=path) if whose is None or i in whose else one
            for i, (one, path) in enumerate(zip(plain.weights, paths, strict=True))
        ]
        without = apply(store, kernel, Op(kind=Kind.LINEAR, weights=plain), x)
        after = Epilogue(activation=nn.GELU(), glu=True, residual=True)
        op = Op(kind=Kind.LINEAR, weights=Group(weights=tuple(changed)), epilogue=after)
        (got,) = apply(store, kernel, op, x, residual)
        x[0, 3, 5] = float("nan")
        (lost,) = apply(store, kernel, op, x, residual)
    assert lost[0, 3].isnan().all()
    assert torch.equal(lost[1], got[1])
    x[0, 3, 5] = 0
    parts = []
    for one, before in zip(changed, without, strict=True):
        parts.append(before.double())
        if one.low_rank is not None:
            down, up = one.low_rank.load()
            parts[-1] = parts[-1] + x.double() @ (up.double() @ down.double()).T
    first, second = torch.cat(parts, dim=-1).chunk(2, dim=-1)
    want = first * F.gelu(second) + residual
    got[0, 3] = want[0, 3]
    assert (got - want).norm() < PATH_ERROR * want.norm()


@torch.no_grad()
@with_kernels
def test_a_glu_halves_one_weight_or_takes_two(tmp_path: Path, kernel: str) -> None:
    torch.manual_seed(5)
    x, first, second, residual = torch.randn(1, 9, 48), torch.randn(64, 48), torch.randn(64, 48), torch.randn(1, 9, 64)
    op = {"kind": Kind.LINEAR, "epilogue": Epilogue(activation=nn.SiLU(), glu=True, residual=True), "input": Input()}
    results = []
    for weights in ((first, second), (torch.cat([first, second]),)):
        store, group = stored(tmp_path, kernel, *weights)
        with store:
            results.append(apply(store, kernel, Op(weights=group, **op), x, residual))  # type: ignore[arg-type]
    (two,), (one,) = results
    y = x.double()
    want = (y @ first.double().T) * F.silu(y @ second.double().T) + residual
    assert (one - want).norm() < (1e-6 if kernel == "fp32" else 3e-2) * want.norm()
    assert (two - one).norm() < 1e-6 * want.norm()


@torch.no_grad()
@pytest.mark.parametrize("int8", [False, True])
def test_rows_of_a_layer_are_a_layer(tmp_path: Path, int8: bool) -> None:
    torch.manual_seed(6)
    plain, x = nn.Linear(256, 320), torch.randn(1, 5, 256)
    rows, scale = quantize_rows(plain.weight)
    tensors = {"weight": rows, "weight" + SCALE: scale} if int8 else {"weight": plain.weight}
    save_file({**tensors, "bias": plain.bias}, tmp_path / "w.safetensors")
    layer = nn.Linear(256, 320, device="meta")
    with WeightStore(read_index(tmp_path / "w.safetensors")) as store:
        stream_layers(layer, Streamer(store))
        want = linear(layer, x)
        parts = [rows_of(layer, 0, 96), rows_of(rows_of(layer, 32, 320), 64, 288)]
        assert parts[1].weight.shape == (224, 256)
        got = torch.cat(linear_layers(parts, x), dim=-1)
    assert (got - want).abs().max() < 1e-5
    assert torch.equal(linear(rows_of(plain, 96, 320), x), F.linear(x, plain.weight[96:], plain.bias[96:]))


@pytest.mark.parametrize(("in_denoiser", "least"), [(True, 48), (False, 16)])
def test_narrow_layers_are_streamed_and_the_narrowest_stay(in_denoiser: bool, least: int) -> None:
    layers = nn.ModuleDict({str(width): nn.Conv2d(width, width, 3, device="meta") for width in (8, 16, 32, 48, 64)})
    stream_layers(layers, Streamer(None, transform=in_denoiser))
    assert {int(width) for width, layer in layers.items() if isinstance(layer, StreamedLayer)} == {
        width for width in (8, 16, 32, 48, 64) if width >= least
    }
