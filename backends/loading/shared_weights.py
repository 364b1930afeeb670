"""Weights that the ranks of a host hold for each other: divided blocks, and text encoders of which
each is on one rank.
"""

import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from backends.errors import UnsupportedError
from backends.groups.mesh import Mesh
from backends.loading.conversion import convert_layer, float32_parts
from backends.loading.weights import DTYPES
from backends.model_table import ModelSpec
from backends.parallel import hooks
from backends.parallel.base import Backend
from backends.parallel.gathered_weights import GatheredWeights, blocks_of
from backends.parallel.weight_shards import Weight, placeholder, release_memory, weights_of
from backends.request import LoadRequest

logger = logging.getLogger(__name__)

PLACED = "encoder placement"
USED_BY_PIPELINES = "final_layer_norm"
"""The part of CLIP that pipelines call themselves, with clip_skip: every rank keeps it."""
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


class SharedWeights:
    """What this rank shares with the others. Does nothing where nothing is shared."""

    def __init__(
        self,
        pipe: Any,
        spec: ModelSpec,
        load: LoadRequest,
        *,
        share: tuple[int, int],
        device: torch.device,
    ) -> None:
        """Drop the encoders of other ranks, before anything reads their weights.

        share: (rank, number of ranks).
        """
        self._pipe, self._spec, self._load, self._device = pipe, spec, load, device
        rank, size = share
        self._gathered = (
            GatheredWeights(rank=rank, size=size) if load.divided and size > 1 else None
        )
        self._taken: set[nn.Module] = set()
        self._placed: PlacedEncoders | None = None
        if load.encoder_placement == "cpu" or (load.encoder_placement != "every" and size > 1):
            self._placed = PlacedEncoders(
                dict(self._models(TEXT_ENCODERS)),
                load.encoder_placement,
                rank=rank,
                size=size,
                device=device,
            )
            self._placed.drop()

    @property
    def in_main_memory(self) -> Collection[str]:
        """Names of the components that are not moved to the device."""
        return self._placed.in_main_memory if self._placed is not None else ()

    def divide(self) -> None:
        """Keep this rank's share of the blocks of `load.divided` on the device, block by block."""
        for name, model in self._divided():
            blocks = blocks_of(model)
            if not blocks:
                logger.warning("%s has no lists of blocks, so every rank keeps it whole", name)
            for block in blocks:
                self.divide_block(model, block)

    def divide_block(self, model: nn.Module, block: nn.Module) -> None:
        """Keep this rank's share of one block, if it is to be divided and is not yet."""
        if block in self._taken or all(model is not other for _, other in self._divided()):
            return
        dtype = DTYPES[self._load.variant]
        keeps = float32_parts(model, dtype)
        paths = {id(part): path for path, part in model.named_modules()}
        for part in block.modules():
            convert_layer(part, paths[id(part)], dtype, keeps)
        self._gathered.take(block, device=self._device)
        self._taken.add(block)
        release_memory()

    def _divided(self) -> list[tuple[str, nn.Module]]:
        names = {"denoiser": (self._spec.denoiser,), "encoders": TEXT_ENCODERS}
        groups = self._load.divided if self._gathered is not None else ()
        return self._models([name for group in groups for name in names[group]])

    def place(self) -> None:
        """Let the encoders run where their weights are, which have their final dtype now."""
        if self._placed is not None:
            self._placed.place()

    def use(self, mesh: Mesh) -> None:
        """Exchange with the ranks of this mesh from now on."""
        if self._gathered is not None:
            self._gathered.use(mesh.background_axis(), mesh.traffic)
        if self._placed is not None:
            self._placed.use(mesh)

    def begin(self) -> None:
        """Start a generation."""
        if self._gathered is not None:
            self._gathered.begin()

    def end(self, *, is_out_of_step: bool) -> None:
        """End a generation. is_out_of_step: ranks may have stopped at different places."""
        if self._gathered is not None:
            self._gathered.end(is_out_of_step=is_out_of_step)

    def move(self, device: torch.device) -> None:
        """Move the shares; weight_shards.move moves the rest."""
        if self._gathered is not None:
            self._gathered.move(device)

    @property
    def divided_bytes(self) -> int:
        """Bytes of the shares that this rank keeps."""
        return self._gathered.num_bytes if self._gathered is not None else 0

    def _models(self, names: Collection[str]) -> list[tuple[str, nn.Module]]:
        found = [(name, getattr(self._pipe, name, None)) for name in names]
        return [(name, model) for name, model in found if isinstance(model, nn.Module)]


class PlacedEncoders:
    """The text encoders of one pipeline, of which each is on one rank, which encodes and sends.

    An encoder works once per prompt, but its weights (9.5 GB for T5-XXL) would be on every device.
    On the other ranks its tensors keep their shapes and take no memory. Pipelines are not changed:
    they call the encoder on every rank, and get the same output on every rank. Call `drop`, then
    `place`, then `use` for each mesh.
    """

    def __init__(
        self,
        encoders: Mapping[str, nn.Module],
        kind: Literal["every", "one", "spread", "cpu"],
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
        self._kept: dict[str, list[tuple[Weight, Tensor]]] = {}
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
            tensors = set(map(id, _tensors(self._encoders[name])))
            weights = [
                weight
                for weight in weights_of([self._encoders[name]])
                if id(weight.tensor) in tensors
            ]
            self._kept[name] = [(weight, weight.tensor.data) for weight in weights]
            for weight in weights:
                weight.put(placeholder(weight.tensor, self._device))
            self._encoders[name].to(self._device)  # what pipelines call themselves
        for name, encoder in self._encoders.items():
            hooks.attach(encoder, PLACED, self._around(name))

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
        kept = {id(weight.tensor): data for weight, data in self._kept[name]}
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


def require_plain_weights(backend: Backend, load: LoadRequest) -> None:
    """Raise UnsupportedError for quantised weights that a method would cut."""
    is_packed = load.gguf_model is not None or not {"denoiser", "misc"}.isdisjoint(load.quantize)
    if is_packed and not backend.has_whole_weights:
        raise UnsupportedError(
            f"quantised weights are not available with {backend.plan.describe()} and sharded "
            "weights: packed weights cannot be cut. Leave out "
            f"{backend.plan.splits_weights_by}, or the quantisation."
        )
