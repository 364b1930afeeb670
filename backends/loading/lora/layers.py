"""One LoRA on one layer, as a peft adapter: factors of any form, and DoRA.

Base weights are not modified. peft's own DoRA recomputes the norms at each call and counts another
adapter's effect as the base layer's. Here norms are computed when a scale is set, and all adapters
see the base layer alone, so their order does not matter.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.utils import align_module_device
from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor
from peft.tuners.lora.layer import LoraVariant
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn

from backends.loading.lora.formats import Update
from backends.parallel.gathered_weights import whole_weights
from backends.parallel.weight_shards import change_weight, is_placeholder, settle_parameter

_CONVOLUTIONS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


class Kronecker(nn.Module):
    """Multiplies by left (x) weight without materialising it."""

    def __init__(self, left: Tensor, weight: Tensor) -> None:
        super().__init__()
        self.left = nn.Parameter(left, requires_grad=False)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in) to (..., out)."""
        grid = x.unflatten(-1, (self.left.shape[1], self.weight.shape[1]))
        return (self.left @ nn.functional.linear(grid, self.weight)).flatten(-2)


class Decomposition(nn.Module):
    """DoRA: weight plus change, rescaled to a magnitude per row or column (arXiv:2402.09353)."""

    def __init__(self, update: Update, *, device: torch.device) -> None:
        super().__init__()
        self._by_column = update.by_column
        self._scales_norm = update.scales_norm
        self.register_buffer("magnitude", update.magnitude.to(device))
        self.register_buffer("base_share", torch.zeros_like(self.magnitude))
        self.register_buffer("change_share", torch.zeros_like(self.magnitude))

    def set_scale(self, weight: Tensor, change: Tensor, scale: float) -> None:
        """Compute the norms. weight, change: (out, in, ...), float32, `change` not yet scaled."""
        merged = weight + (scale if self._scales_norm else 1.0) * change
        lines = merged.transpose(0, 1) if self._by_column else merged
        self.magnitude = self.magnitude.to(weight.device)  # an offloaded layer's is elsewhere
        gain = self.magnitude / lines.flatten(1).norm(dim=1).clamp(
            min=torch.finfo(torch.float32).tiny
        )
        self.base_share = gain - 1 if self._scales_norm else scale * (gain - 1)
        self.change_share = scale * gain

    def merged(self, weight: Tensor, change: Tensor) -> Tensor:
        """Return the change of the weight at the current scale."""
        shape = [1] * weight.dim()
        shape[1 if self._by_column else 0] = -1
        return self.base_share.view(shape) * weight + self.change_share.view(shape) * change

    def forward(self, layer: Any, name: str, x: Tensor, base: Tensor) -> Tensor:
        """Return the adapter's part of the layer's output. base: the base layer's, without bias."""
        base_share, change_share = (
            _along_channels(share.to(x.dtype), layer)
            for share in (self.base_share, self.change_share)
        )
        first, second = layer.lora_A[name], layer.lora_B[name]
        if not self._by_column:
            return base * base_share + second(first(x)) * change_share
        return _without_bias(layer.base_layer(x * base_share), layer) + second(
            first(x * change_share)
        )


class _Decomposed(LoraVariant):
    """Makes peft call a layer's decompositions, all of them when the first is due."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        names = [name for name in module.active_adapters if name in module.lora_magnitude_vector]
        if active_adapter != names[0]:
            return result
        base = _without_bias(result, module)
        return result + sum(
            module.lora_magnitude_vector[name](module, name, x, base) for name in names
        )


def fits(update: Update, layer: nn.Module) -> bool:
    """Return whether the update matches the size of the layer's weight."""
    size = weight_size(layer)
    if size is None or (update.up is not None and update.up.shape[1] != update.down.shape[0]):
        return False
    num_lines = (
        size[1] // math.prod(getattr(layer, "kernel_size", ())) if update.by_column else size[0]
    )
    return update.shape == size and (
        update.magnitude is None or update.magnitude.numel() == num_lines
    )


def weight_size(layer: nn.Module) -> tuple[int, int] | None:
    """Return (out, in * kernel size) of a layer that a LoRA can change, else None.

    Read from the layer's attributes, because packed weights have other shapes.
    """
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    if isinstance(layer, tuple(_CONVOLUTIONS.values())) and layer.groups == 1:
        return layer.out_channels, layer.in_channels * math.prod(layer.kernel_size)
    return None


def install(
    layer: Any, name: str, update: Update, *, device: torch.device, dtype: torch.dtype
) -> None:
    """Replace the empty adapter `name` of a peft layer by the update."""
    base = layer.get_base_layer()
    if isinstance(base, nn.Linear) and update.left is not None:
        first: nn.Module = Kronecker(update.left.to(device, dtype), update.down.to(device, dtype))
        second: nn.Module = nn.Identity()
    elif update.up is None:
        first, second = _layer_like(base, update.dense().to(device, dtype)), nn.Identity()
    else:
        first, second = (
            _layer_like(base, update.down.to(device, dtype)),
            _pointwise(base, update.up.to(device, dtype)),
        )
    layer.lora_A[name], layer.lora_B[name] = first, second
    if update.magnitude is not None:
        layer.lora_magnitude_vector[name] = Decomposition(update, device=device)
        layer.lora_variant[name] = _Decomposed()


def _layer_like(base: nn.Module, matrix: Tensor) -> nn.Module:
    """Return a layer without bias, with the base layer's stride and padding."""
    if isinstance(base, nn.Linear):
        return _with_weight(nn.Linear(*reversed(matrix.shape), bias=False, device="meta"), matrix)
    weight = matrix.view(matrix.shape[0], -1, *base.kernel_size)
    convolution = _CONVOLUTIONS[weight.dim()](
        weight.shape[1],
        weight.shape[0],
        base.kernel_size,
        stride=base.stride,
        padding=base.padding,
        dilation=base.dilation,
        padding_mode=base.padding_mode,
        bias=False,
        device="meta",
    )
    return _with_weight(convolution, weight)


def _pointwise(base: nn.Module, matrix: Tensor) -> nn.Module:
    if isinstance(base, nn.Linear):
        return _layer_like(base, matrix)
    ones = (1,) * len(base.kernel_size)
    convolution = _CONVOLUTIONS[2 + len(ones)](
        *reversed(matrix.shape), ones, bias=False, device="meta"
    )
    return _with_weight(convolution, matrix.view(*matrix.shape, *ones))


def _with_weight(layer: nn.Module, weight: Tensor) -> nn.Module:
    layer.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    return layer


def set_adapters(layer: Any, scales: dict[str, float]) -> None:
    """Activate exactly these adapters of a peft layer."""
    present = sorted(
        (name for name in scales if name in layer.scaling),
        key=lambda name: name not in layer.lora_magnitude_vector,
    )
    layer.enable_adapters(bool(present))
    if not present:
        return
    layer.set_adapter(present, inference_mode=True)
    for name in present:
        layer.set_scale(name, scales[name])
        if name in layer.lora_magnitude_vector:
            weight = plain_weight(layer.get_base_layer())
            layer.lora_magnitude_vector[name].set_scale(
                weight, _change(layer, name, weight), scales[name]
            )


def merge(layer: Any) -> None:
    """Add all active adapters to the base weight for good. One that is not read yet is changed
    when it is.
    """
    if not layer.disable_adapters:
        change_weight(layer.get_base_layer().weight, lambda weight: merged_weight(layer, weight))


def merged_weight(layer: Any, weight: Tensor) -> Tensor:
    """Return the base layer's weight, of any float dtype, plus all active adapters, in float32."""
    base, changes = weight.float(), []
    for name in () if layer.disable_adapters else layer.active_adapters:
        change = _change(layer, name, base)
        is_decomposed = name in layer.lora_magnitude_vector
        changes.append(
            layer.lora_magnitude_vector[name].merged(base, change)
            if is_decomposed
            else layer.scaling[name] * change
        )
    return base + sum(changes)


def _change(layer: Any, name: str, weight: Tensor) -> Tensor:
    """Return the adapter's change of the weight, without its scale."""
    first, second = layer.lora_A[name], layer.lora_B[name]
    change = first.weight.float().flatten(1)
    if isinstance(first, Kronecker):
        change = torch.kron(first.left.float(), change)
    if not isinstance(second, nn.Identity):
        change = second.weight.float().flatten(1) @ change
    return change.to(weight.device).view_as(weight)


def plain_weight(layer: nn.Module) -> Tensor:
    """Return the weight in float32, unpacked, also if it is offloaded."""
    with align_module_device(layer), whole_weights(layer):
        weight = layer.weight
        if hasattr(weight, "quant_type") and is_placeholder(weight):
            return torch.zeros(weight.quant_shape)  # until the ranks are known, see whole_weights
        if hasattr(weight, "quant_type"):
            return dequantize_gguf_tensor(weight).float()
        if type(weight).__name__ in ("Params4bit", "Int8Params"):
            return dequantize_bnb_weight(weight, state=getattr(layer, "state", None)).float()
        return weight.detach().float().clone()


def _without_bias(result: Tensor, layer: Any) -> Tensor:
    bias = getattr(layer.get_base_layer(), "bias", None)
    return result if bias is None else result - _along_channels(bias.to(result.dtype), layer)


def _along_channels(values: Tensor, layer: Any) -> Tensor:
    """Reshape one value per channel so that it broadcasts with the layer's inputs and outputs."""
    base = layer.get_base_layer()
    return values if isinstance(base, nn.Linear) else values.view(-1, *(1,) * len(base.kernel_size))


class ParameterDifferences:
    """Changes of single parameters (biases, norms, modulations).

    Active ones replace the module's parameter.
    """

    def __init__(self) -> None:
        self._originals: dict[tuple[nn.Module, str], nn.Parameter] = {}
        self._differences: dict[str, dict[tuple[nn.Module, str], Tensor]] = {}

    def add(self, name: str, differences: dict[tuple[nn.Module, str], Tensor]) -> None:
        """Add a file's changes: (module, attribute) -> difference."""
        if differences:
            self._differences[name] = differences
        for module, attribute in differences:
            original = self._originals.setdefault((module, attribute), getattr(module, attribute))
            settle_parameter(original)  # it may be out of its module when the others are read

    def has(self, name: str) -> bool:
        """Return whether this adapter's file changes single parameters."""
        return name in self._differences

    def forget(self, name: str) -> None:
        """Remove a file's changes."""
        self._differences.pop(name, None)

    def use(self, scales: dict[str, float]) -> None:
        """Activate exactly these. Without any, each module gets its own parameter back."""
        for (module, attribute), original in self._originals.items():
            key = (module, attribute)
            acting = [
                scale * self._differences[name][key]
                for name, scale in scales.items()
                if key in self._differences.get(name, {})
            ]
            with whole_weights(module) if acting else nullcontext():
                new = _changed(original, acting) if acting else original
            setattr(module, attribute, new)


def _changed(original: nn.Parameter, differences: Sequence[Tensor]) -> nn.Parameter:
    total = original.detach().float() + sum(
        difference.to(original.device) for difference in differences
    ).view_as(original)
    return nn.Parameter(total.to(original.dtype), requires_grad=False)
