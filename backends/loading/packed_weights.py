"""Weights kept in 8, 4 or 2 bits and unpacked as a layer uses them. Weight-only: what the layer
computes stays in its own dtype.

A parametrization of the layer, so that the layer remains an nn.Linear or nn.Conv2d to everything
that looks at it: LoRA, the parallel methods, torch.compile.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

GROUP = 64
"""Weights of a row that share a scale and an offset, below 8 bits."""
FLOAT8_MAX = 448.0

Packed = Literal["float8", "int8", "int4", "int2"]


def pack_layer(layer: nn.Module, kind: Packed) -> None:
    """Replace `layer.weight` by its packed form. The layer must be frozen: nothing flows back to
    the packed weight.
    """
    layer.weight.requires_grad_(False)
    is_row_scaled = kind in ("float8", "int8")
    unpack = (
        RowScaled(kind) if is_row_scaled else Grouped(int(kind.removeprefix("int")), layer.weight)
    )
    # unsafe: torch would compare the unpacked weight with the original, and they differ on purpose
    parametrize.register_parametrization(layer, "weight", unpack, unsafe=True)


class RowScaled(nn.Module):
    """8 bits per weight and one scale per row (output channel): float8 e4m3 or symmetric int8."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self._is_float = kind == "float8"

    def forward(self, values: Tensor, scale: Tensor) -> Tensor:
        """values (out, ...) in 8 bits, scale (out, 1, ...) -> weight (out, ...) in the dtype of the
        scale.
        """
        values = values.view(torch.float8_e4m3fn) if self._is_float else values
        return values.to(scale.dtype) * scale

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        top = FLOAT8_MAX if self._is_float else 127.0
        largest = (
            weight.float()
            .abs()
            .amax(dim=tuple(range(1, weight.dim())), keepdim=True)
            .clamp(min=1e-12)
        )
        scaled = weight.float() / largest * top
        # as plain bytes: module.to(dtype) converts whatever is a floating type, float8 too
        values = (
            scaled.to(torch.float8_e4m3fn).view(torch.uint8)
            if self._is_float
            else scaled.round().to(torch.int8)
        )
        return values, (largest / top).to(weight.dtype)


class Grouped(nn.Module):
    """`bits` per weight, several in a byte; each GROUP of a row has a step and a lowest value."""

    def __init__(self, bits: int, weight: Tensor) -> None:
        super().__init__()
        self._bits = bits
        self._shape = tuple(weight.shape)
        self._row = weight[0].numel()

    def forward(self, packed: Tensor, step: Tensor, lowest: Tensor) -> Tensor:
        """packed uint8 (out, groups, GROUP * bits / 8), step and lowest (out, groups, 1) -> weight
        (out, ...).
        """
        mask = 2**self._bits - 1
        codes = torch.stack(
            [(packed >> shift) & mask for shift in range(0, 8, self._bits)], dim=-1
        ).flatten(2)
        weight = codes.to(step.dtype) * step + lowest
        return weight.flatten(1)[:, : self._row].reshape(self._shape)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = weight.float().flatten(1)
        padding = -rows.shape[1] % GROUP
        groups = nn.functional.pad(rows, (0, padding), mode="constant", value=0.0).unflatten(
            1, (-1, GROUP)
        )
        lowest, highest = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        step = ((highest - lowest) / (2**self._bits - 1)).clamp(min=1e-12)
        codes = (
            ((groups - lowest) / step).round().to(torch.uint8).unflatten(-1, (-1, 8 // self._bits))
        )
        packed = sum(codes[..., place] << (place * self._bits) for place in range(8 // self._bits))
        return packed, step.to(weight.dtype), lowest.to(weight.dtype)
