"""How much detail of each wavelength a picture has, place by place: what the decoder learns beside pixels."""

from __future__ import annotations

import torch
from torch import Tensor

_SIDE, _STRIDE = 16, 8  # px of a window, and between two
_FAINT = 0.01  # of a coefficient; the rounding of pixels to 8 bits is a tenth of it


def spectral_error(got: Tensor, want: Tensor) -> Tensor:
    """Mean difference of the logarithms of power, of two (n, 3, H, W) in [-1, 1], over the Fourier coefficients of
    windows. Where single pixels cannot be predicted, the mean has the least error, so a loss on pixels teaches blur;
    the strength of a texture can be predicted."""
    return (_log_power(got) - _log_power(want)).abs().mean()


def _log_power(x: Tensor) -> Tensor:
    """(n, 3, windows down, windows across, coefficients), without constants."""
    window = torch.hann_window(_SIDE, periodic=False, device=x.device)
    windows = x.unfold(2, _SIDE, _STRIDE).unfold(3, _SIDE, _STRIDE) * (window[:, None] * window)
    spectrum = torch.fft.rfft2(windows, norm="ortho")
    return (spectrum.real.square() + spectrum.imag.square() + _FAINT**2).log().flatten(-2)[..., 1:]
