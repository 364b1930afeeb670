"""Keeps only this rank's part of a denoiser's weights in memory.

Tensors of other parts keep their shapes, which LoRA loaders read, but take no memory. A rank that
will keep a part does not read the others: `defer` leaves weights in their files until it is known
which part it is, and `settle` reads what has not been dropped by then.
"""

import ctypes
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from backends.groups.collectives import broadcast
from backends.groups.mesh import Axis

TRIM_EVERY_BYTES = 64_000_000
READ = "read_from_file"
"""Attribute of a deferred parameter: a function that returns its tensor."""


class Weight:
    """One tensor of modules, by where they hold it: moving a module to another device gives it new
    buffers.
    """

    def __init__(self) -> None:
        self._places: list[tuple[dict[str, Any], str]] = []

    def add(self, tensors: dict[str, Any], name: str) -> None:
        """tensors: the parameters or buffers of a module."""
        self._places.append((tensors, name))

    @property
    def tensor(self) -> Tensor:
        tensors, name = self._places[0]
        return tensors[name]

    def put(self, data: Tensor) -> None:
        for tensors, name in self._places:
            tensors[name].data = data


def weights_of(modules: Iterable[nn.Module]) -> list[Weight]:
    """Return each tensor once."""
    found: dict[int, Weight] = defaultdict(Weight)
    for part in (part for module in modules for part in module.modules()):
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    found[id(tensor)].add(tensors, name)
    return list(found.values())


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
        self._weights = [
            [weight for weight in weights_of(modules) if id(weight.tensor) not in shared]
            for modules in parts
        ]
        for part, weights in enumerate(self._weights):
            for weight in weights if part != kept else ():
                weight.tensor.__dict__.pop(READ, None)
                weight.put(placeholder(weight.tensor, weight.tensor.device))

    def restore(self, axis: Axis) -> None:
        """Fetch all weights, so that every rank holds the whole model again.

        Rank p of the axis keeps part p. RuntimeError if the mesh is closed.
        """
        for part, weights in enumerate(self._weights):
            for weight in weights:
                tensor = weight.tensor
                is_here = part == self._kept
                data = (
                    tensor.data.contiguous()
                    if is_here
                    else torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
                )
                broadcast(data, source=part, axis=axis)
                weight.put(data)


def defer(parameter: nn.Parameter, stand_in: Tensor, read: Callable[[], Tensor]) -> None:
    """Leave a weight where it is stored, with a placeholder in its place."""
    setattr(parameter, READ, read)
    parameter.data = stand_in


def settle(module: nn.Module) -> None:
    """Read the deferred weights of a module, one at a time, except those dropped since."""
    taken = 0
    for parameter in module.parameters():
        taken += settle_parameter(parameter)
        if taken > TRIM_EVERY_BYTES:
            taken = release_memory()


def settle_parameter(parameter: nn.Parameter) -> int:
    """Read one weight, if it is deferred. Return the bytes taken."""
    if (read := parameter.__dict__.pop(READ, None)) is None:
        return 0
    parameter.data = read()
    return _num_bytes(parameter)


def change_weight(parameter: nn.Parameter, change: Callable[[Tensor], Tensor]) -> None:
    """Replace a weight by `change` of it, in its dtype: now, or when a deferred one is read."""
    read = parameter.__dict__.get(READ)
    if read is None:
        parameter.data = change(parameter.data).to(parameter.dtype)
    else:
        setattr(parameter, READ, lambda: change(read()).to(parameter.dtype))


@contextmanager
def read_meanwhile(module: nn.Module) -> Iterator[None]:
    """Let code read a module's own deferred weights, which stay deferred."""
    deferred = [
        (parameter, parameter.data)
        for parameter in module.parameters(recurse=False)
        if READ in parameter.__dict__
    ]
    for parameter, _ in deferred:
        parameter.data = parameter.__dict__[READ]()
    try:
        yield
    finally:
        for parameter, stand_in in deferred:
            parameter.data = stand_in


def release_memory() -> int:
    """Give freed memory back to the system. Return 0, the bytes that are now in use for nothing.

    glibc keeps freed blocks below 32 MB, so that a rank would hold hundreds of MB that nobody uses.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return 0


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


def placeholder(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor of the same shape that takes no memory. dtype: None for the same."""
    return torch.zeros((), dtype=dtype or tensor.dtype, device=device).expand(tensor.shape)


def is_placeholder(tensor: Tensor | None) -> bool:
    """Return whether the tensor stands for one that this rank does not hold."""
    return tensor is not None and tensor.numel() > 1 and not any(tensor.stride())


def weight_bytes(module: nn.Module) -> int:
    """Return the bytes that this module's weights take on this rank."""
    return sum(_num_bytes(tensor) for tensor in _tensors([module]))


def full_bytes(module: nn.Module) -> int:
    """Return the bytes that this module's weights take on a rank that keeps all of them."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors([module]))


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
