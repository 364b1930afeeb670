"""Keep the constants of GGUF layers on the device.

diffusers creates the constants of its unpacking again in every call of every layer. Each is a copy
from pageable memory, which blocks the host until all enqueued work is done.
"""

from typing import Any

import torch
from diffusers.quantizers.gguf.utils import GGUFLinear
from torch import nn
from torch.overrides import TorchFunctionMode

from backends.parallel import hooks

NAME = "kept constants"
MAKES_CONSTANTS = torch.tensor


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
    """Keep the constants of all GGUF layers in a network that is on its device and not compiled."""
    constants = _Constants()

    def around(forward: Any, *args: Any, **kwargs: Any) -> Any:
        with constants:
            return forward(*args, **kwargs)

    for module in network.modules():
        if isinstance(module, GGUFLinear):
            hooks.attach(module, NAME, around)
