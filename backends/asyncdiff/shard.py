"""Each rank keeps the weights of its own segment only. The others' tensors stay as objects without content."""

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from backends.asyncdiff.segments import Segments
from backends.distributed import Axis


class ShardedWeights:
    """Drops the other segments' weights when made; `restore` fetches them from the ranks that kept them. Both on all ranks alike."""

    def __init__(self, modules: Mapping[str, nn.Module], segments: Segments, *, segment: int) -> None:
        self._segment = segment
        self._tensors = {
            number: list(_tensors(modules[segments.layout.units[unit].name] for unit in segments.units(number)))
            for number in range(segments.num_segments)
        }
        self._shapes = {number: [tensor.shape for tensor in tensors] for number, tensors in self._tensors.items()}
        for number, tensors in self._tensors.items():
            if number != segment:
                for tensor in tensors:
                    tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)

    def restore(self, axis: Axis) -> None:
        """Every rank holds everything again. Segment s is kept by rank s of the axis."""
        for number, tensors in self._tensors.items():
            for tensor, shape in zip(tensors, self._shapes[number], strict=True):
                is_here = number == self._segment
                data = tensor.data.contiguous() if is_here else torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
                dist.broadcast(data, src=axis.ranks[number], group=axis.group)
                tensor.data = data


def weight_bytes(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors([module]))


def _tensors(modules: Iterator[nn.Module] | list[nn.Module]) -> Iterator[Tensor]:
    for module in modules:
        yield from module.parameters()
        yield from module.buffers()
