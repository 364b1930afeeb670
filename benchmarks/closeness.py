"""How close two results are."""

import math

from torch import Tensor


def psnr(got: Tensor, want: Tensor) -> float:
    """Peak signal to noise ratio in dB; the peak is the range of `want`. 200 for equal tensors."""
    error = float(((got.double() - want.double()) ** 2).mean())
    peak = float(want.max() - want.min())
    return round(min(200.0, 10 * math.log10(peak**2 / error)), 1) if error > 0 else 200.0
