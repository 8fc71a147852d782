"""Convolutions of a picture that arrives row by row. Their input is kept in lines of the kernel's own type: rows are
normalised, activated and cast into them in one go, and the last lines are reused for the next rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tiler.compute import layers
from tiler.compute.kernels import Epilogue, HeldNorm, Input, Op
from tiler.compute.layers import StreamedConv2d
from tiler.compute.native_float import NativeFp32
from tiler.compute.native_inputs import write_lines
from tiler.compute.steps import made_input
from tiler.native import library

_SILU = nn.SiLU()


class Window:
    """A convolution that pads columns only, and the operations on its input: `norm`, then SiLU if `silu`. The choice of
    kernel must not change while its lines are in use.

    `scale` is 2 if the kernel enlarges its lines, whose result then has twice as many rows and columns, else 1."""

    def __init__(self, conv: nn.Conv2d, norm: HeldNorm | None, *, silu: bool) -> None:
        self.conv, self.norm, self.silu = conv, norm, silu
        self._op: Op | None = None
        self._native: NativeFp32 | None = None
        if isinstance(conv, StreamedConv2d):
            self._op = conv.op()
            kernel = conv.streamer.kernel(self._op, None)
            self._native = kernel if isinstance(kernel, NativeFp32) else None
        self.scale = 2 if isinstance(conv, StreamedConv2d) and conv.takes_small else 1

    def lines(self, like: Tensor, count: int, width: int) -> Tensor:
        """Allocate uninitialised lines (count, places, inputs) for rows of `width` pixels on the device of `like`."""
        frame, dtype = 0, torch.float32
        if self._native is not None:
            frame, dtype = int(self.conv.padding[1]), self._native.dtype
        return like.new_empty(count, width + 2 * frame, self.conv.in_channels, dtype=dtype)

    def write(self, x: Tensor, lines: Tensor) -> None:
        """Fill `lines`, one for each row, with the rows of x, (1, C, n, width) fp32."""
        if library.library() is not None:
            write_lines(x, lines, self.norm, silu=self.silu)
        elif not x.is_meta:
            made_of = Input(norm=self.norm, activation=_SILU if self.silu else None)
            lines.copy_(made_input(made_of, (x,))[0].permute(1, 2, 0))

    def compute(self, lines: Tensor, out: Tensor, residual: Tensor | None) -> None:
        """Fill `out`, (1, outputs, scale · n, scale · width) fp32 channels-last, with the convolution of the lines,
        plus `residual`."""
        if self._native is None or self._op is None:
            result = self.conv(lines.permute(2, 0, 1)[None])
            out.copy_(result if residual is None else result.add_(residual))
            return
        assert isinstance(self.conv, StreamedConv2d)
        op = Op(
            kind=self._op.kind, weights=self._op.weights, geometry=self._op.geometry,
            epilogue=Epilogue(residual=residual is not None),
        )  # fmt: skip
        x = self._native.begun(op, lines)._replace(residual=residual, out=out)
        layers.computed([self.conv], op, self._native, x, x.made.shape)
