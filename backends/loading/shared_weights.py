"""Weights that the ranks of a host hold for each other: divided blocks, and text encoders of which
each is on one rank.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from backends.groups.mesh import Mesh
from backends.loading.conversion import convert_layer, float32_parts, release_memory
from backends.loading.weights import DTYPES
from backends.model_table import ModelSpec
from backends.parallel.encoder_placement import PlacedEncoders
from backends.parallel.gathered_weights import GatheredWeights, blocks_of
from backends.request import LoadRequest

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
        if self._gathered is None:
            return
        names = {"denoiser": (self._spec.denoiser,), "encoders": TEXT_ENCODERS}
        dtype = DTYPES[self._load.variant]
        divided = [name for group in self._load.divided for name in names[group]]
        for _, model in self._models(divided):
            keeps = float32_parts(model, dtype)
            paths = {id(part): path for path, part in model.named_modules()}
            for block in blocks_of(model):
                for part in block.modules():
                    convert_layer(part, paths[id(part)], dtype, keeps)
                self._gathered.take(block, device=self._device)
                release_memory()

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

    def end(self, *, has_failed: bool) -> None:
        """End a generation."""
        if self._gathered is not None:
            self._gathered.end(has_failed=has_failed)

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
