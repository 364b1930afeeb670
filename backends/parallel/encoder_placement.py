"""Text encoders on some of the ranks: their rank encodes, and sends what the encoder returns.

An encoder works once per prompt, but its weights (9.5 GB for T5-XXL) would be on every device. On
the other ranks its tensors keep their shapes and take no memory. Pipelines are not changed: they
call the encoder on every rank, and get the same output on every rank.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from backends.groups.mesh import Mesh
from backends.parallel import hooks
from backends.parallel.weight_shards import placeholder

Placement = Literal["every", "one", "spread", "cpu"]
NAME = "encoder placement"
USED_BY_PIPELINES = "final_layer_norm"
"""The part of CLIP that pipelines call themselves, with clip_skip: every rank keeps it."""


class PlacedEncoders:
    """The text encoders of one pipeline. Call `drop`, then `place`, then `use` for each mesh."""

    def __init__(
        self,
        encoders: Mapping[str, nn.Module],
        kind: Placement,
        *,
        rank: int,
        size: int,
        device: torch.device,
    ) -> None:
        """kind: `one`: all on rank 0; `spread`: one on each rank in turn; `cpu`: in rank 0's main
        memory, where they also run.
        """
        self._encoders = dict(encoders)
        self._owner = {
            name: index % size if kind == "spread" else 0 for index, name in enumerate(encoders)
        }
        self._is_on_cpu = kind == "cpu"
        self._rank, self._device = rank, device
        self._kept: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._mesh: Mesh | None = None

    @property
    def in_main_memory(self) -> frozenset[str]:
        """Names of the encoders that stay where they are read."""
        return frozenset(name for name in self._encoders if self._is_on_cpu and self._is_mine(name))

    def drop(self) -> None:
        """Drop the encoders of other ranks, before anything reads their weights."""
        for name, encoder in self._encoders.items():
            if not self._is_mine(name):
                for tensor in _tensors(encoder):
                    tensor.data = placeholder(tensor, self._device)

    def place(self) -> None:
        """Hook the encoders, whose weights have their final dtype."""
        for name in self.in_main_memory:
            tensors = _tensors(self._encoders[name])
            self._kept[name] = [(tensor, tensor.data) for tensor in tensors]
            for tensor in tensors:
                tensor.data = placeholder(tensor, self._device)
            self._encoders[name].to(self._device)  # what pipelines call themselves
        for name, encoder in self._encoders.items():
            hooks.attach(encoder, NAME, self._around(name))

    def use(self, mesh: Mesh) -> None:
        """Exchange among the ranks of this mesh from now on."""
        self._mesh = mesh

    def _is_mine(self, name: str) -> bool:
        return self._owner[name] == self._rank

    def _around(self, name: str) -> hooks.Around:
        def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            output = None
            if self._is_mine(name):
                run = self._run_on_cpu if self._is_on_cpu else lambda _, call, a, k: call(*a, **k)
                output = run(name, forward, args, kwargs)
            return self._shared(name, output)

        return around

    def _shared(self, name: str, output: Any) -> Any:
        """Return the owner's output on every rank."""
        if self._mesh is None or self._mesh.plan.world_size == 1:
            return output
        sent = _moved(_plain(output), torch.device("cpu")) if self._is_mine(name) else None
        received = self._mesh.broadcast_object(sent, source=self._owner[name])
        return output if self._is_mine(name) else _moved(received, self._device)

    def _run_on_cpu(
        self, name: str, forward: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]
    ) -> Any:
        """Run an encoder whose weights are in main memory."""
        cpu, encoder = torch.device("cpu"), self._encoders[name]
        before = [(tensor, tensor.data) for tensor in encoder.parameters()]
        before += [(tensor, tensor.data) for tensor in encoder.buffers()]
        kept = {id(tensor): data for tensor, data in self._kept[name]}
        for tensor, data in before:
            tensor.data = kept[id(tensor)] if id(tensor) in kept else data.to(cpu)
        try:
            output = forward(*_moved(args, cpu), **_moved(kwargs, cpu))
        finally:
            for tensor, data in before:
                tensor.data = data
        return _moved(_plain(output), self._device)


def _plain(output: Any) -> Any:
    """Return an encoder's output without its cache, which nobody reads and which is large."""
    if isinstance(output, dict) and "past_key_values" in output:
        output["past_key_values"] = None
    return output


def _moved(values: Any, device: torch.device) -> Any:
    return pytree.tree_map(
        lambda value: value.to(device) if isinstance(value, Tensor) else value, values
    )


def _tensors(encoder: nn.Module) -> list[Tensor]:
    return [
        tensor
        for name, tensor in (*encoder.named_parameters(), *encoder.named_buffers())
        if USED_BY_PIPELINES not in name and tensor.numel() > 1
    ]
