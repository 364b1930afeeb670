"""Keeps only this rank's part of a denoiser's weights in memory.

Tensors of other parts keep their shapes, which LoRA loaders read, but take no memory.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from backends.groups.collectives import broadcast
from backends.groups.mesh import Axis


class KeptWeights:
    """Drops the weights of the other parts on creation; `restore` fetches them again.

    Both are collective: all ranks call them in the same order.
    """

    def __init__(
        self,
        parts: Sequence[Sequence[nn.Module]],
        *,
        kept: int,
        shared: Collection[int] = (),
    ) -> None:
        """parts: the modules of each part. kept: index of the part that this rank keeps. shared:
        `id` of each tensor that all ranks keep, because it is also read outside its module.
        """
        self._kept = kept
        self._tensors = [
            [tensor for tensor in _tensors(modules) if id(tensor) not in shared]
            for modules in parts
        ]
        for part, tensors in enumerate(self._tensors):
            if part != kept:
                for tensor in tensors:
                    tensor.data = placeholder(tensor, tensor.device)

    def restore(self, axis: Axis) -> None:
        """Fetch all weights, so that every rank holds the whole model again.

        Rank p of the axis keeps part p. RuntimeError if the mesh is closed.
        """
        for part, tensors in enumerate(self._tensors):
            for tensor in tensors:
                is_here = part == self._kept
                data = (
                    tensor.data.contiguous()
                    if is_here
                    else torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
                )
                broadcast(data, source=part, axis=axis)
                tensor.data = data


def move(pipe: Any, device: torch.device) -> None:
    """Move a whole pipeline to a device.

    Placeholder tensors of other parts are reduced to single numbers first: `.to()` would expand
    them to full size.
    """
    modules = [
        module
        for part in pipe.components.values()
        if isinstance(part, nn.Module)
        for module in part.modules()
    ]
    places = [
        (tensors, name)
        for module in modules
        for tensors in (module._parameters, module._buffers)
        for name in tensors
    ]
    found = [
        (tensors, name, tensors[name].shape)
        for tensors, name in places
        if is_placeholder(tensors[name])
    ]
    for tensors, name, shape in found:
        tensors[name].data = tensors[name].data[(0,) * len(shape)]
    pipe.to(device)
    torch.cuda.empty_cache()  # gives the freed memory to other processes
    for tensors, name, shape in found:
        tensors[name].data = tensors[name].data.expand(shape)


def placeholder(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the same shape and dtype that takes no memory."""
    return torch.zeros((), dtype=tensor.dtype, device=device).expand(tensor.shape)


def is_placeholder(tensor: Tensor | None) -> bool:
    """Return whether the tensor stands for one that this rank does not hold."""
    return tensor is not None and tensor.numel() > 1 and not any(tensor.stride())


def weight_bytes(module: nn.Module) -> int:
    """Return the bytes that this module's weights take on this rank."""
    return sum(_num_bytes(tensor) for tensor in _tensors([module]))


def _num_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor. Dims with stride 0 are stored once."""
    return tensor.element_size() * math.prod(
        size if stride else min(size, 1)
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )


def _tensors(modules: Sequence[nn.Module]) -> Iterator[Tensor]:
    for module in modules:
        yield from module.parameters()
        yield from module.buffers()
