"""Group norms of a patch: its own statistics, and its values under those of the whole image. Both
are computed in float32.
"""

import torch
from torch import Tensor

MOST_WIDENED = 1 << 24
"""Elements that are copied in float32 at once: 64 MB."""


def moments(x: Tensor) -> Tensor:
    """Return (2, N, G), mean and biased variance of x (N, G, M) over its last dimension, in float32
    or wider.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    parts = [_wide_moments(x[:, part].to(wide)) for part in _parts(x)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _wide_moments(x: Tensor) -> Tensor:
    if x.device.type != "cpu":
        var, mean = torch.var_mean(x, dim=-1, correction=0)
        return torch.stack((mean, var))
    mean = x.mean(dim=-1)  # on a CPU torch.var_mean takes ten times as long
    return torch.stack((mean, (x - mean[..., None]).square_().mean(dim=-1)))


def _parts(x: Tensor) -> list[slice]:
    """Return the groups of x (N, G, ...) that are computed at once. In half precision each part is
    copied in float32, and of all of a decoder's activations that would be a gigabyte.
    """
    groups = x.shape[1]
    if x.element_size() >= 4 or x.numel() <= MOST_WIDENED:
        return [slice(0, groups)]
    count = max(1, groups * MOST_WIDENED // x.numel())
    return [slice(first, first + count) for first in range(0, groups, count)]


def normalized(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Return (x - mean) / sqrt(var + eps) * weight + bias, in one pass over x, in its dtype.

    mean, var: (N, G), float32, or float64 if x is.
    """
    groups = mean.shape[1], x.shape[1] // mean.shape[1]
    mean, scale = mean[..., None], torch.rsqrt(var + eps)[..., None]
    if weight is not None:
        scale = scale * weight.view(groups)
    shift = mean * -scale if bias is None else bias.view(groups) - mean * scale
    ones = [1] * (x.dim() - 2)
    shift, scale = (part.view(*part.shape, *ones) for part in (shift, scale))
    grouped = x.unflatten(1, groups)
    parts = _parts(grouped)
    if len(parts) == 1:
        return torch.addcmul(shift, grouped, scale).flatten(1, 2).to(x.dtype)
    output = torch.empty_like(x)
    for part in parts:
        output.unflatten(1, groups)[:, part] = torch.addcmul(
            shift[:, part], grouped[:, part], scale[:, part]
        )
    return output
