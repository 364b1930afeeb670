"""Tensor parallelism for the transformers that diffusers has a plan for: each rank has a part of
every planned linear layer.

The plan (`_tp_plan` of the class) says which layers are cut by outputs and which by inputs. One sum
over the ranks follows each of the latter. diffusers' own `enable_parallelism` is not used: it
cannot be undone, and runs on accelerators only. Source: Megatron-LM, arXiv:1909.08053, section 3.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from diffusers.hooks.tensor_parallel import TPShardSpec, resolve_tp_shard_specs
from torch import Tensor, nn

from backends.errors import PlanError, UnsupportedError
from backends.groups.collectives import gather_pieces
from backends.groups.mesh import Mesh
from backends.parallel import hooks
from backends.parallel.weight_shards import settle

NAME = "xdit weight shards"


@dataclass(slots=True)
class _Cut:
    """A parameter that was cut along `spec.dim`, each of its blocks by itself. With dim None only
    rank 0 has it, and the others have zeros.
    """

    parameter: nn.Parameter
    spec: TPShardSpec


class TensorParallel:
    """Attached to one denoiser, which keeps 1 / degree of the planned weights and attention heads
    until it is detached.
    """

    def __init__(self, denoiser: nn.Module, mesh: Mesh) -> None:
        self._denoiser = denoiser
        self._mesh = mesh
        self._cuts: list[_Cut] = []
        self._summing: list[nn.Module] = []

    def attach(self) -> None:
        """Cut the planned parameters and hook the layers that need a sum. UnsupportedError for
        layers that are not plain linear ones, PlanError for a degree that does not fit.
        """
        axis = self._mesh.axis("tensor")
        specs = self._specs(axis.size)
        for name in specs:
            _require_plain(name, self._denoiser.get_submodule(name.rpartition(".")[0]))
        for name, spec in specs.items():
            path, _, kind = name.rpartition(".")
            linear = self._denoiser.get_submodule(path)
            parameter = getattr(linear, kind)
            settle(linear)
            parameter.data = _shard(parameter.data, spec, axis.size, axis.rank)
            self._cuts.append(_Cut(parameter, spec))
            if kind == "weight" and spec.dim == 1:
                hooks.attach(linear, NAME, self._sum)
                self._summing.append(linear)

    def detach(self) -> None:
        """Remove the hooks and gather the whole weights again. Collective, like attach."""
        while self._summing:
            hooks.detach(self._summing.pop(), NAME)
        for cut in self._cuts:
            cut.parameter.data = self._whole(cut.parameter.data, cut.spec)
        self._cuts.clear()

    def _specs(self, degree: int) -> dict[str, TPShardSpec]:
        plan = getattr(self._denoiser, "_tp_plan", None)
        if plan is None:
            raise UnsupportedError(
                f"tensor_parallel_degree is not available for {type(self._denoiser).__name__}: "
                "diffusers has no tensor plan for it. "
                "Use --ulysses_degree or --ring_degree."
            )
        for path, module in self._denoiser.named_modules():
            if list(getattr(getattr(module, "processor", None), "parameters", lambda: ())()):
                raise UnsupportedError(
                    f"tensor_parallel_degree cannot cut the IP-Adapter in {path}. Use "
                    "--ulysses_degree with an IP-Adapter."
                )
        try:
            return resolve_tp_shard_specs(self._denoiser, plan, degree)
        except ValueError as error:
            raise PlanError(
                f"tensor_parallel_degree={degree} does not fit this model: {error}"
            ) from error

    def _sum(self, forward: Callable[..., Any], tokens: Tensor) -> Tensor:
        """Sum the ranks' parts of a layer that is cut by inputs."""
        part = forward(tokens).contiguous()
        axis = self._mesh.axis("tensor")
        self._mesh.traffic.add(part, peers=axis.size - 1)
        dist.all_reduce(part, group=axis.group)
        return part

    def _whole(self, own: Tensor, spec: TPShardSpec) -> Tensor:
        axis = self._mesh.axis("tensor")
        shards = gather_pieces(own, [own.shape] * axis.size, axis=axis, traffic=self._mesh.traffic)
        if spec.dim is None:
            return shards[0].clone()
        widths = [size // axis.size for size in spec.block_sizes]
        blocks = zip(*(shard.split(widths, dim=spec.dim) for shard in shards), strict=True)
        return torch.cat([part for block in blocks for part in block], dim=spec.dim)


def _require_plain(name: str, linear: nn.Module) -> None:
    if type(linear) is not nn.Linear:
        raise UnsupportedError(
            f"tensor_parallel_degree cuts plain linear layers, but {name} is of a "
            f"{type(linear).__name__}: quantised layers and LoRAs "
            "cannot be cut. Load without them, or use --ulysses_degree."
        )


def _shard(tensor: Tensor, spec: TPShardSpec, size: int, rank: int) -> Tensor:
    """Return this rank's part of every block, in its own memory. What is added after the sum counts
    on rank 0 only.
    """
    if spec.dim is None:
        return tensor.clone() if rank == 0 else torch.zeros_like(tensor)
    blocks = tensor.split(list(spec.block_sizes), dim=spec.dim)
    return torch.cat(
        [block.chunk(size, dim=spec.dim)[rank] for block in blocks], dim=spec.dim
    ).contiguous()
