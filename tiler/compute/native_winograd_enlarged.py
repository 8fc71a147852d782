"""3 × 3 convolutions of images that are enlarged first, both sides doubled by nearest neighbours, in fp32 with a sixth
of the multiplications, by tiler's own library (tiler/native/transform.h).

What a tile of 4 × 4 pixels sees are 4 × 4 pixels of the small image, and 25 products instead of 36 give its result. The
rounding error is that of a direct convolution or less. The result for a tile does not depend on other tiles.
"""

from __future__ import annotations

from torch import Tensor

from tiler.compute.kernels import Input, Op, Operands, Policy, Shape, input_shape
from tiler.compute.native import Made
from tiler.compute.native_inputs import Quantized, quantize_images
from tiler.compute.native_winograd import NativeWinograd
from tiler.native.library import ENLARGED_POINTS, ENLARGED_SEEN


class NativeWinogradEnlarged(NativeWinograd):
    name = "native-winograd-enlarged"
    enlarges = True
    points, seen = ENLARGED_POINTS, ENLARGED_SEEN

    def suits(self, op: Op, shape: Shape | None, policy: Policy) -> bool:
        return op.input == Input(enlarged=True) and super().suits(op, shape, policy)

    def begin(self, op: Op, x: Operands) -> Operands:
        values = quantize_images(x.parts, (1, 1), None, silu=False, out_type=self.out_type).values
        return x._replace(parts=(), made=Made(Quantized(values, values, values), input_shape(op, x.parts)))

    def begun(self, op: Op, lines: Tensor) -> Operands:
        """`lines`, (n, places, inputs), are those of the small image in a frame of 1; the result has twice as many as
        lie inside."""
        count, places, inputs = lines.shape
        shape = 1, inputs, 2 * (count - 2) + 2, 2 * (places - 2)
        return Operands((), made=Made(Quantized(lines[None], lines, lines), shape))
