"""Keeps what the last prompts were encoded to: most jobs of a host differ in their seed alone."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

NUM_PROMPTS = 16
MAX_BYTES = 64_000_000
"""Of the device's memory."""


class PromptCache:
    """Stands in front of one pipeline's `encode_prompt`. Ranks that encode together must forget
    together.
    """

    def __init__(self, pipe: Any, *, facts: Callable[[], object]) -> None:
        """facts: what an encoding depends on besides the arguments."""
        self._facts = facts
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()
        self.num_hits = 0
        if hasattr(pipe, "encode_prompt"):
            self._encode = pipe.encode_prompt
            pipe.encode_prompt = self._encoded

    def forget(self) -> None:
        """Drop everything."""
        self._kept.clear()

    def _encoded(self, *args: Any, **kwargs: Any) -> Any:
        """Return the encoding of these arguments. Arguments that hold tensors are not kept."""
        try:
            key = _frozen([args, sorted(kwargs.items()), self._facts()])
        except TypeError:
            return self._encode(*args, **kwargs)
        if key in self._kept:
            self.num_hits += 1
            self._kept.move_to_end(key)
        else:
            self._kept[key] = self._encode(*args, **kwargs)
            while len(self._kept) > NUM_PROMPTS or self._num_bytes() > MAX_BYTES:
                last = self._kept.popitem(last=False)
                if not self._kept:
                    return last[1]
        return pytree.tree_map(
            lambda value: value.clone() if isinstance(value, Tensor) else value, self._kept[key]
        )

    def _num_bytes(self) -> int:
        return sum(
            value.numel() * value.element_size()
            for value in pytree.tree_leaves(list(self._kept.values()))
            if isinstance(value, Tensor)
        )


def _frozen(value: Any) -> Hashable:
    """Return a key. TypeError for what may change or cannot be compared."""
    if isinstance(value, list | tuple):
        return (type(value).__name__, *map(_frozen, value))
    if isinstance(value, dict):
        return ("dict", *((key, _frozen(item)) for key, item in value.items()))
    if value is None or isinstance(value, str | int | float | bool | torch.device | torch.dtype):
        return (type(value).__name__, value)
    raise TypeError(type(value).__name__)
