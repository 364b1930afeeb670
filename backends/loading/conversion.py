"""Bring weights to the dtype and device where they are used, one tensor at a time.

Weights are read as they are stored: such tensors are pages of the file, which all ranks share and
which take no memory of their own. Only then is each tensor converted, packed or moved, and its
pages are given back before the next one is read. So loading never takes more than what stays, and
one tensor.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from torch import Tensor, nn
from transformers import PreTrainedModel

from backends.files.weight_headers import Header
from backends.parallel import weight_shards
from backends.parallel.weight_shards import (
    TRIM_EVERY_BYTES,
    is_placeholder,
    placeholder,
    release_memory,
)

STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Names of dtypes in safetensors' headers that diffusers and transformers compute in."""
SCALE = "scale_of_8_bits"
"""Attribute of a parameter in 8 bits: float32 factors, by which it is multiplied when converted."""


def stored_dtype(header: Header | None) -> torch.dtype | None:
    """Return the one floating-point dtype of a file. None if it has several, or none that computes.

    Reading several as one would round some of them twice.
    """
    kinds = {kind for kind in (header.dtypes.values() if header else ()) if kind[0] in "FB"}
    kinds.discard("BOOL")
    return STORED.get(kinds.pop()) if len(kinds) == 1 else None


def convert(module: nn.Module, dtype: torch.dtype, *, device: torch.device | None = None) -> None:
    """Convert the weights of a model in place, and move them, one tensor at a time.

    Integers, packed weights and the modules that the class keeps in float32 keep their dtype.
    device: None leaves the weights where they are.
    """
    keeps, taken, is_converted = float32_parts(module, dtype), 0, False
    for path, part in module.named_modules():
        before = _dtypes(part)
        taken += convert_layer(part, path, dtype, keeps, device=device)
        is_converted = is_converted or _dtypes(part) != before
        if taken > TRIM_EVERY_BYTES:
            taken = release_memory()
    if is_converted:
        _renew_buffers(module, dtype)
    if is_converted and isinstance(module, PreTrainedModel):
        module.config.dtype = dtype
    release_memory()


def defer(module: nn.Module, dtype: torch.dtype, *, device: torch.device) -> None:
    """Do what `convert` does, but leave the weights in their files until they are settled
    (weight_shards.py).
    """
    keeps, is_converted = float32_parts(module, dtype), False
    for path, part in module.named_modules():
        for name, parameter in part._parameters.items():
            if parameter is None or parameter.is_meta or is_placeholder(parameter):
                continue
            wanted = _wanted_dtype(parameter, f"{path}.{name}", dtype, keeps)
            is_converted = is_converted or wanted != parameter.dtype
            read = partial(_read, parameter.data, wanted, device, _scale_of(parameter))
            weight_shards.defer(parameter, placeholder(parameter, device, wanted), read)
    convert(module, dtype, device=device)
    if is_converted:
        _renew_buffers(module, dtype)


def _read(data: Tensor, dtype: torch.dtype, device: torch.device, scale: Tensor | None) -> Tensor:
    return _converted(data, dtype, scale).to(device)


def convert_layer(
    layer: nn.Module,
    path: str,
    dtype: torch.dtype,
    keeps: frozenset[str],
    *,
    device: torch.device | None = None,
) -> int:
    """Convert and move the tensors of one module, not of its children. Return the bytes taken.

    path: the module's name in its model. keeps: see float32_parts.
    """
    taken = 0
    persistent = layer._buffers.keys() - layer._non_persistent_buffers_set
    for tensors in (layer._parameters, layer._buffers):
        for name, tensor in tensors.items():
            if tensor is None or tensor.is_meta:
                continue
            wanted, place = tensor.dtype, device or tensor.device
            if tensors is layer._parameters or name in persistent:
                wanted = _wanted_dtype(tensor, f"{path}.{name}", dtype, keeps)
            if is_placeholder(tensor):
                tensor.data = placeholder(tensor, place, wanted)
            elif wanted != tensor.dtype or place != tensor.device:
                new = _converted(tensor.data, wanted, _scale_of(tensor)).to(place)
                if tensor._is_view():  # torch.compile refuses a view of another dtype or device
                    tensors[name] = new
                else:
                    tensor.data = new
                taken += new.numel() * new.element_size()
    return taken


def _wanted_dtype(
    tensor: Tensor, path: str, dtype: torch.dtype, keeps: frozenset[str]
) -> torch.dtype:
    """Return the dtype in which a stored tensor is used."""
    if tensor.dtype not in STORED.values() and _scale_of(tensor) is None:
        return tensor.dtype
    return dtype if keeps.isdisjoint(path.split(".")) else torch.float32


def is_finite(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Return whether a weight has neither NaN nor infinity in the dtype in which it is used."""
    if tensor.element_size() == 1 and _scale_of(tensor) is None:
        return True
    return bool(torch.isfinite(_converted(tensor.data, dtype, _scale_of(tensor))).all())


def _converted(data: Tensor, dtype: torch.dtype, scale: Tensor | None) -> Tensor:
    if scale is None or data.dtype in STORED.values():
        return data.to(dtype)
    return (data.float() * scale.to(data.device)).to(dtype)


def _scale_of(tensor: Tensor) -> Tensor | None:
    return getattr(tensor, SCALE, None)


def float32_parts(module: nn.Module, dtype: torch.dtype) -> frozenset[str]:
    """Return the names of modules and parameters that this model's class keeps in float32."""
    kept = set(getattr(module, "_keep_in_fp32_modules_strict", None) or ())
    if isinstance(module, ModelMixin) or dtype == torch.float16:
        kept |= set(getattr(module, "_keep_in_fp32_modules", None) or ())
    return frozenset(kept)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Create new floating-point tensors in this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _dtypes(layer: nn.Module) -> list[torch.dtype]:
    return [tensor.dtype for tensor in layer._parameters.values() if tensor is not None]


def _renew_buffers(module: nn.Module, dtype: torch.dtype) -> None:
    """Compute the buffers that no file holds as the class does in this dtype, not from rounded
    ones.
    """
    if not isinstance(module, ModelMixin):
        return  # transformers computes them in float32 whatever the dtype
    with init_empty_weights(include_buffers=False), default_dtype(dtype):
        fresh: Any = type(module).from_config(dict(module.config))
    for path, part in fresh.named_modules():
        for name in part._non_persistent_buffers_set:
            new: Tensor | None = part._buffers[name]
            if new is not None:
                old = module.get_submodule(path)._buffers[name]
                module.get_submodule(path)._buffers[name] = new.to(old.device)
