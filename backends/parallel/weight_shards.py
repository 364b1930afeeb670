"""Each rank keeps the weights of its own part of a denoiser only. The others' tensors keep their
shapes and take no memory.

The shapes are what loaders of LoRAs look at.
"""

import math
from collections.abc import Iterator, Sequence

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
        """Every rank holds everything again. Part p is kept by rank p of the axis."""
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
