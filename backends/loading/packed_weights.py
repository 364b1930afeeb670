"""Weights stored in 8, 4 or 2 bits and unpacked when a layer runs. Activations keep their dtype.

Implemented as a parametrization, so the layer is still an nn.Linear or nn.Conv2d for LoRA, the
parallel methods and torch.compile.
"""

from typing import Any, Literal

import torch
from diffusers.quantizers.gguf.utils import GGUFLinear
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from backends.parallel import hooks

GROUP = 64
"""Weights of a row that share a scale and an offset, below 8 bits."""
FLOAT8_MAX = 448.0
KEPT_CONSTANTS = "kept constants"
MAKES_CONSTANTS = torch.tensor

Packed = Literal["float8", "int8", "int4", "int2"]


def pack_layer(layer: nn.Module, kind: Packed) -> None:
    """Replace `layer.weight` by its packed form and freeze it, as gradients cannot reach it."""
    layer.weight.requires_grad_(False)
    is_row_scaled = kind in ("float8", "int8")
    unpack = (
        RowScaled(kind) if is_row_scaled else Grouped(int(kind.removeprefix("int")), layer.weight)
    )
    # unsafe: skip torch's check that unpacking restores the weight; quantisation changes it
    parametrize.register_parametrization(layer, "weight", unpack, unsafe=True)


class RowScaled(nn.Module):
    """8 bits per weight and one scale per row (output channel): float8 e4m3 or symmetric int8."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self._is_float = kind == "float8"

    def forward(self, values: Tensor, scale: Tensor) -> Tensor:
        """Return the weight (out, ...) in the dtype of `scale`.

        values: (out, ...) in 8 bits. scale: (out, 1, ...).
        """
        values = values.view(torch.float8_e4m3fn) if self._is_float else values
        return values.to(scale.dtype) * scale

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Pack the weight (out, ...) to (values, scale)."""
        top = FLOAT8_MAX if self._is_float else 127.0
        largest = (
            weight.float()
            .abs()
            .amax(dim=tuple(range(1, weight.dim())), keepdim=True)
            .clamp(min=1e-12)
        )
        scaled = weight.float() / largest * top
        # as plain bytes: module.to(dtype) would convert float8, which is a floating type
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
        """Return the weight (out, ...).

        packed: uint8 (out, groups, GROUP * bits / 8). step, lowest: (out, groups, 1).
        """
        mask = 2**self._bits - 1
        codes = torch.stack(
            [(packed >> shift) & mask for shift in range(0, 8, self._bits)], dim=-1
        ).flatten(2)
        weight = codes.to(step.dtype) * step + lowest
        return weight.flatten(1)[:, : self._row].reshape(self._shape)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pack the weight (out, ...) to (packed, step, lowest)."""
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


class _Constants(TorchFunctionMode):
    """Creates each tensor of given numbers once and reuses it."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[str, torch.Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not MAKES_CONSTANTS:
            return func(*args, **kwargs)
        key = repr((args, sorted(kwargs.items())))
        if key not in self._made:
            self._made[key] = func(*args, **kwargs)
        return self._made[key]


def keep_constants(network: nn.Module) -> None:
    """Keep the constants of all GGUF layers in a network that is on its device and not compiled.

    diffusers creates the constants of its unpacking again in every call of every layer. Each is a
    copy from pageable memory, which blocks the host until all enqueued work is done.
    """
    constants = _Constants()

    def around(forward: Any, *args: Any, **kwargs: Any) -> Any:
        with constants:
            return forward(*args, **kwargs)

    for module in network.modules():
        if isinstance(module, GGUFLinear):
            hooks.attach(module, KEPT_CONSTANTS, around)
