"""Closeness of two results."""

import math

from torch import Tensor


def psnr(got: Tensor, want: Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB; 200 for equal tensors.

    The peak is the range of `want`.
    """
    error = float(((got.double() - want.double()) ** 2).mean())
    peak = float(want.max() - want.min())
    return round(min(200.0, 10 * math.log10(peak**2 / error)), 1) if error > 0 else 200.0
