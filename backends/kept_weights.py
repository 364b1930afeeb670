"""Each rank keeps the weights of its own part of a denoiser only. The others' tensors stay as objects without content."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from backends.distributed import Axis, broadcast


class KeptWeights:
    """Drops the other parts' weights when made; `restore` fetches them from the ranks that kept them. Both on all ranks alike."""

    def __init__(self, parts: Sequence[Sequence[nn.Module]], *, kept: int) -> None:
        """parts: the modules of each part. kept: the part that this rank keeps."""
        self._kept = kept
        self._tensors = [list(_tensors(modules)) for modules in parts]
        self._shapes = [[tensor.shape for tensor in tensors] for tensors in self._tensors]
        for part, tensors in enumerate(self._tensors):
            if part != kept:
                for tensor in tensors:
                    tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)

    def restore(self, axis: Axis) -> None:
        """Every rank holds everything again. Part p is kept by rank p of the axis."""
        for part, (tensors, shapes) in enumerate(zip(self._tensors, self._shapes, strict=True)):
            for tensor, shape in zip(tensors, shapes, strict=True):
                is_here = part == self._kept
                data = tensor.data.contiguous() if is_here else torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
                broadcast(data, source=part, axis=axis)
                tensor.data = data


def weight_bytes(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors([module]))


def _tensors(modules: Sequence[nn.Module]) -> Iterator[Tensor]:
    for module in modules:
        yield from module.parameters()
        yield from module.buffers()
