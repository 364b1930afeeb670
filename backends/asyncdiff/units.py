"""The units of a denoiser, the smallest pieces between which it can be cut, and the hooks on them.

A unit is a resnet, a sampler, a transformer block, or a layer beside such blocks (conv_in,
proj_out, ...). There is no list per model: a module is opened only if it contains a list of blocks,
and is otherwise one unit. Experts are no blocks: how many tokens each gets, or whether it runs at
all, changes with the values.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from backends.parallel import hooks

NAME = "segment unit"

EXPERTS = "experts"
"""Name of the list of which a mixture of experts runs some for each token."""

Source = tuple[int, int]
"""(unit, leaf): one of the tensors that a unit returns."""

INPUT: Source = (-1, 0)
"""The denoiser's own input. It is on every rank, so it is never sent."""

Executor = Callable[[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""executor(unit name, forward, args, kwargs): what a unit's call does on this rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """One unit, as seen in one call of the denoiser."""

    name: str
    reads: frozenset[Source]
    """Tensors of other units that reach its arguments."""
    leaf_bytes: tuple[int, ...]
    """Size of each leaf that it returns; 0 for a leaf that is no tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """All units in the order in which they run."""

    units: tuple[Unit, ...]
    output_reads: frozenset[Source]
    """Tensors of which the denoiser's result is made."""
    has_changes: bool = False
    """Whether something is changed in place that a unit returned: then units must not share it."""
    shared_weights: frozenset[int] = frozenset()
    """`id` of each parameter that is also read outside its unit, so that every rank needs it."""

    def num_bytes(self, source: Source) -> int:
        """Return the size of one tensor."""
        return self.units[source[0]].leaf_bytes[source[1]]


class UnitHooks:
    """One hook on each unit of a denoiser. It has no effect until an executor is set."""

    def __init__(self, denoiser: nn.Module) -> None:
        self._denoiser = denoiser
        self._modules = find_units(denoiser)
        self._executor: Executor | None = None
        for name, module in self._modules.items():
            hooks.attach(module, NAME, self._around(name))

    @property
    def modules(self) -> dict[str, nn.Module]:
        return self._modules

    @contextmanager
    def run_with(self, executor: Executor) -> Iterator[None]:
        """Pass every unit call inside the context to `executor`."""
        self._executor = executor
        try:
            yield
        finally:
            self._executor = None

    def is_current(self) -> bool:
        """Return False if modules were replaced since (peft replaces plain layers by LoRA layers).
        Attach again then.
        """
        found = find_units(self._denoiser)
        return found.keys() == self._modules.keys() and all(
            found[name] is module for name, module in self._modules.items()
        )

    def detach(self) -> None:
        """Remove all hooks."""
        for module in self._modules.values():
            hooks.detach(module, NAME)
        self._modules = {}

    def _around(self, name: str) -> hooks.Around:
        def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if self._executor is None:
                return forward(*args, **kwargs)
            return self._executor(name, forward, args, kwargs)

        return around


def find_units(denoiser: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that may be units, by name: every module outside the blocks, and every
    block that contains no list of blocks itself.
    """
    lists = (module for name, module in denoiser.named_modules() if not name.endswith(EXPERTS))
    blocks = {id(block) for module in lists for block in _blocks_of(module)}
    return dict(_visit(denoiser, "", blocks))


def _visit(module: nn.Module, prefix: str, blocks: set[int]) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if any(id(inner) in blocks for inner in child.modules() if inner is not child):
            yield from _visit(child, f"{prefix}{name}.", blocks)
        elif not isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield prefix + name, child


def _blocks_of(module: nn.Module) -> list[nn.Module]:
    """Return the elements of a list of blocks; nothing for a list of bare layers (`to_out` =
    Linear, Dropout).
    """
    if not isinstance(module, nn.ModuleList) or not all(
        any(element.children()) for element in module
    ):
        return []
    return list(module)


def leaves(value: Any) -> list[Any]:
    """Return everything inside nested tuples, lists, dicts and diffusers outputs."""
    return pytree.tree_leaves(value)


def tensors(value: Any) -> list[Tensor]:
    """Return the tensors among the leaves."""
    return [leaf for leaf in leaves(value) if isinstance(leaf, Tensor)]


def num_bytes(leaf: Any) -> int:
    """Return the bytes of a tensor; 0 for anything else."""
    return leaf.numel() * leaf.element_size() if isinstance(leaf, Tensor) else 0
