"""What surrounds a product, step by step in fp32, for layers that are not streamed and kernels that do not fuse it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiler.compute.kernels import Epilogue, Group, Input


def made_input(made_of: Input, parts: tuple[Tensor, ...]) -> Tensor:
    """The parts joined, normalised and activated."""
    x = joined(parts)
    if made_of.norm is not None:
        x = normed(made_of.norm, x)
    if made_of.activation is not None:
        # In place only where the tensor is ours.
        x = activated(made_of.activation, x.clone() if x is parts[0] else x)
    return x


def add_low_rank(group: Group, x: Tensor, products: Sequence[Tensor]) -> None:
    """The low-rank paths' share added to the products; x: the input of the product."""
    for weight, product in zip(group.weights, products, strict=True):
        if weight.low_rank is not None:
            down, up = weight.low_rank
            product += F.linear(F.linear(x, down), up)


def finished(after: Epilogue, products: Sequence[Tensor], residual: Tensor | None) -> tuple[Tensor, ...]:
    """The products, one for each weight, with all that follows their bias; in place where that is possible."""
    outs = list(products)
    if after.glu:
        assert after.activation is not None
        first, second = outs if len(outs) == 2 else outs.pop().chunk(2, dim=-1)
        outs = [first * after.activation(second)]
    elif after.activation is not None:
        outs = [activated(after.activation, out) for out in outs]
    if residual is not None:
        (out,) = outs
        out += residual
    return tuple(outs)


def joined(parts: tuple[Tensor, ...]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def normed(norm: nn.Module, x: Tensor) -> Tensor:
    """A GroupNorm of each sample by itself: of several, torch cuts its sums between threads where that depends on their number."""
    if len(x) == 1 or not isinstance(norm, nn.GroupNorm):
        whole: Tensor = norm(x)
        return whole
    out = torch.empty_like(x)
    for sample, filled in zip(x.split(1), out.split(1), strict=True):
        filled.copy_(norm(sample))
    return out


def activated(act: nn.Module, x: Tensor) -> Tensor:
    """`x` activated in place, each sample by itself: torch computes the last few values of a thread's share in another way,
    and shares depend on the number of samples."""
    for sample in x.split(1):
        if isinstance(act, nn.SiLU):
            F.silu(sample, inplace=True)
        else:
            sample.copy_(act(sample))
    return x
