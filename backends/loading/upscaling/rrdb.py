"""ESRGAN's network, and the names under which its weights are published.

Source: ESRGAN (arXiv:1809.00219) and Real-ESRGAN (arXiv:2107.10833).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

SLOPE, RESIDUAL = 0.2, 0.2
"""Of leaky ReLUs, and of what each block adds."""
DENSE_CONVS = 5
UPS = 2
"""Convolutions that follow a doubling of the size."""
NAMES = (
    # the first repository's, as a list of layers
    (r"model\.0\.", "conv_first."),
    (r"model\.1\.sub\.(\d+)\.RDB(\d)\.conv(\d)\.0\.", r"body.\1.rdb\2.conv\3."),
    (r"model\.1\.sub\.\d+\.(weight|bias)", r"conv_body.\1"),
    (r"model\.3\.", "conv_up1."),
    (r"model\.6\.", "conv_up2."),
    (r"model\.8\.", "conv_hr."),
    (r"model\.10\.", "conv_last."),
    # the first repository's, by name
    (r"RRDB_trunk\.(\d+)\.RDB(\d)\.", r"body.\1.rdb\2."),
    (r"trunk_conv\.", "conv_body."),
    (r"upconv(\d)\.", r"conv_up\1."),
    (r"HRconv\.", "conv_hr."),
)
"""Published names -> Real-ESRGAN's, which are ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The sizes of a network, as its weights tell them."""

    num_blocks: int
    channels: int
    growth: int
    """Channels that each convolution of a dense block adds."""
    fold: int
    """Pixels of a side that become channels at first: 1, 2 or 4."""

    @property
    def scale(self) -> int:
        return 2**UPS // self.fold


class DenseBlock(nn.Module):
    """Five convolutions, each of which sees what all before it have made."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        for index in range(DENSE_CONVS):
            made = channels if index == DENSE_CONVS - 1 else growth
            conv = nn.Conv2d(channels + index * growth, made, 3, padding=1)
            self.add_module(f"conv{index + 1}", conv)

    def forward(self, x: Tensor) -> Tensor:
        seen = x
        for index in range(1, DENSE_CONVS):
            made = functional.leaky_relu(self.get_submodule(f"conv{index}")(seen), SLOPE)
            seen = torch.cat([seen, made], dim=1)
        return x + RESIDUAL * self.get_submodule(f"conv{DENSE_CONVS}")(seen)


class ResidualBlock(nn.Module):
    """Three dense blocks in a row (RRDB)."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.rdb1 = DenseBlock(channels, growth)
        self.rdb2 = DenseBlock(channels, growth)
        self.rdb3 = DenseBlock(channels, growth)

    def forward(self, x: Tensor) -> Tensor:
        return x + RESIDUAL * self.rdb3(self.rdb2(self.rdb1(x)))


class RRDBNet(nn.Module):
    """(B, 3, H, W) in [0, 1] -> (B, 3, scale * H, scale * W). H and W are multiples of `fold`."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape, channels = shape, shape.channels
        self.conv_first = nn.Conv2d(3 * shape.fold**2, channels, 3, padding=1)
        blocks = (ResidualBlock(channels, shape.growth) for _ in range(shape.num_blocks))
        self.body = nn.Sequential(*blocks)
        self.conv_body = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_up1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_up2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_hr = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_last = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_first(functional.pixel_unshuffle(x, self.shape.fold))
        x = x + self.conv_body(self.body(x))
        for conv in (self.conv_up1, self.conv_up2):
            x = functional.leaky_relu(
                conv(functional.interpolate(x, scale_factor=2, mode="nearest")), SLOPE
            )
        return self.conv_last(functional.leaky_relu(self.conv_hr(x), SLOPE))


def with_our_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {_our_name(name): tensor for name, tensor in weights.items()}


def _our_name(name: str) -> str:
    for theirs, ours in NAMES:
        renamed, count = re.subn(f"^{theirs}", ours, name)
        if count:
            return renamed
    return name


def shape_of(weights: Mapping[str, Tensor]) -> Shape | None:
    """Return the sizes of a network with these weights, in our names; None if it is another."""
    first, dense = weights.get("conv_first.weight"), weights.get("body.0.rdb1.conv1.weight")
    if first is None or dense is None or first.ndim != 4 or dense.ndim != 4:
        return None
    fold = {3: 1, 12: 2, 48: 4}.get(first.shape[1])
    if fold is None:
        return None
    blocks = {int(found[1]) for name in weights if (found := re.match(r"body\.(\d+)\.", name))}
    return Shape(num_blocks=len(blocks), channels=first.shape[0], growth=dense.shape[0], fold=fold)
