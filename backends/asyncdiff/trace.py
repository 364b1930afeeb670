"""Learn a denoiser's units from real calls: their order, what they read from each other, and their
time.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from backends.asyncdiff.units import (
    INPUT,
    Layout,
    Source,
    Unit,
    UnitHooks,
    leaves,
    num_bytes,
    tensors,
)

TIMED_CALLS = 3


def trace(hooks: UnitHooks, call: Callable[[], Any], model_input: Tensor) -> tuple[Layout, Any]:
    """Run `call` once. Return the units that depend on `model_input`, with their order and the
    tensors between them, and the result of the call.

    Operations outside the units (additions, concatenations, reshapes) are followed tensor by
    tensor. Modules that do not depend on the input (time and text embeddings) or that run more than
    once are not units: every rank computes them.
    """
    repeated: frozenset[str] = frozenset()
    while True:
        tracer = _Tracer(model_input, ignored=repeated)
        with hooks.run_with(tracer.run), tracer.flow:
            result = call()
        again = frozenset(name for name, count in tracer.num_calls.items() if count > 1) - repeated
        if not again:
            layout = Layout(
                units=tuple(tracer.units),
                output_reads=tracer.flow.reads(result),
                has_changes=tracer.flow.has_changes,
                shared_weights=frozenset(tracer.flow.weights),
            )
            return layout, result
        repeated |= again


def time_units(
    hooks: UnitHooks, call: Callable[[], Any], layout: Layout, device: torch.device
) -> list[float]:
    """Return the seconds of each unit, in the layout's order: the fastest of three calls, so that
    the costs of a first call do not count.
    """
    fastest = dict.fromkeys((unit.name for unit in layout.units), float("inf"))

    def run(
        name: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        started = _now(device)
        result = forward(*args, **kwargs)
        if name in fastest:
            fastest[name] = min(fastest[name], _now(device) - started)
        return result

    with hooks.run_with(run):
        for _ in range(TIMED_CALLS):
            call()
    return list(fastest.values())


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class _Dataflow(TorchFunctionMode):
    """Follow tensors: the result of an operation depends on the sources of all its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self._sources: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self.has_changes = False
        self.weights: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.weights |= {
            id(tensor) for tensor in tensors((args, kwargs)) if isinstance(tensor, nn.Parameter)
        }
        with self.watched((args, kwargs)):
            result = func(*args, **(kwargs or {}))
        sources = self.sources((args, kwargs))
        if sources:
            changed = (
                tensors(result) if result is not None else tensors(args[:1])
            )  # x[...] = y returns None and changes x
            for tensor in changed:
                self.mark(tensor, sources)
        return result

    def mark(self, tensor: Tensor, sources: frozenset[Source]) -> None:
        self._sources[tensor] = sources

    def sources(self, value: Any) -> frozenset[Source]:
        return frozenset().union(
            *(self._sources.get(tensor, frozenset()) for tensor in tensors(value))
        )

    @contextmanager
    def watched(self, arguments: Any) -> Iterator[None]:
        """Note whether something that a unit returned changes in place, here or in a view of it."""
        before = [(tensor, tensor._version) for tensor in tensors(arguments) if self.reads(tensor)]
        yield
        self.has_changes |= any(tensor._version != version for tensor, version in before)

    def reads(self, value: Any) -> frozenset[Source]:
        return self.sources(value) - {INPUT}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Follow nothing inside a unit. A compiled unit must not see this mode."""
        self.__exit__(None, None, None)
        try:
            yield
        finally:
            self.__enter__()


class _Tracer:
    def __init__(self, model_input: Tensor, *, ignored: frozenset[str]) -> None:
        self.flow = _Dataflow()
        self.flow.mark(model_input, frozenset({INPUT}))
        self.units: list[Unit] = []
        self.num_calls: Counter[str] = Counter()
        self._ignored = ignored

    def run(
        self, name: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if name in self._ignored:
            return forward(*args, **kwargs)
        with self.flow.paused():
            sources = self.flow.sources((args, kwargs))
            with self.flow.watched((args, kwargs)):
                result = forward(*args, **kwargs)
            if sources:
                self._record(name, sources - {INPUT}, leaves(result))
        return result

    def _record(self, name: str, reads: frozenset[Source], results: list[Any]) -> None:
        index = len(self.units)
        self.num_calls[name] += 1
        self.units.append(
            Unit(name=name, reads=reads, leaf_bytes=tuple(num_bytes(leaf) for leaf in results))
        )
        for position, leaf in enumerate(results):
            if isinstance(leaf, Tensor):
                self.flow.mark(leaf, frozenset({(index, position)}))
