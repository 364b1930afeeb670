"""Each rank keeps the weights of its own part of a denoiser only. The others' tensors keep their
shapes and take no memory.

The shapes are what loaders of LoRAs look at.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from backends.groups.collectives import broadcast
from backends.groups.mesh import Axis


class KeptWeights:
    """Drops the other parts' weights when made; `restore` fetches them from the ranks that kept
    them. Both on all ranks alike.
    """

    def __init__(self, parts: Sequence[Sequence[nn.Module]], *, kept: int) -> None:
        """parts: the modules of each part. kept: the part that this rank keeps."""
        self._kept = kept
        self._tensors = [list(_tensors(modules)) for modules in parts]
        for part, tensors in enumerate(self._tensors):
            if part != kept:
                for tensor in tensors:
                    tensor.data = torch.zeros((), dtype=tensor.dtype, device=tensor.device).expand(
                        tensor.shape
                    )

    def restore(self, axis: Axis) -> None:
        """Every rank holds everything again. Part p is kept by rank p of the axis. RuntimeError if
        the mesh is closed.
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
    """A whole pipeline. Meanwhile the tensors of other parts are single numbers: moved as they are
    they would become whole tensors.
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
        if _is_stand_in(tensors[name])
    ]
    for tensors, name, shape in found:
        tensors[name].data = tensors[name].data[(0,) * len(shape)]
    pipe.to(device)
    torch.cuda.empty_cache()  # for others, of what has left it
    for tensors, name, shape in found:
        tensors[name].data = tensors[name].data.expand(shape)


def _is_stand_in(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.numel() > 1 and not any(tensor.stride())


def weight_bytes(module: nn.Module) -> int:
    """Memory of this module's weights on this rank."""
    return sum(_num_bytes(tensor) for tensor in _tensors([module]))


def _num_bytes(tensor: Tensor) -> int:
    """What is repeated along a dim (stride 0) is there once."""
    return tensor.element_size() * math.prod(
        size if stride else min(size, 1)
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )


def _tensors(modules: Sequence[nn.Module]) -> Iterator[Tensor]:
    for module in modules:
        yield from module.parameters()
        yield from module.buffers()
