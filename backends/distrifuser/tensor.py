"""parallelism=tensor: each rank holds a part of the weights of linear layers and attention heads.

Feed-forward: the first layer is cut by outputs, the second by inputs. Attention: queries, keys and
values are cut by heads, the output projection by inputs. One sum over the ranks follows each.
Convolutions, norms and layers whose heads or widths the number of ranks does not divide stay whole.
Source: Shoeybi et al., Megatron-LM, arXiv:1909.08053, section 3.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from diffusers.models.attention import AttentionModuleMixin, FeedForward
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from backends.errors import PlanError, UnsupportedError
from backends.groups.collectives import all_gather
from backends.groups.mesh import Mesh
from backends.parallel import hooks
from backends.parallel.weight_shards import settle

NAME = "weight shards"
AXIS = "tensor"


@dataclass(frozen=True, slots=True)
class WeightShard:
    """One linear layer's part."""

    linear: nn.Linear
    """The layer."""
    dim: int
    """Dim of its weight that is cut: 0 for outputs, 1 for inputs."""
    parts: int = 1
    """Number of equal blocks along `dim`, each of which is cut by itself."""


def attach_shards(network: nn.Module, mesh: Mesh) -> None:
    """Keep only this rank's part of the weights, and sum the ranks' results where they are joined.

    PlanError if nothing can be cut into this number of parts; UnsupportedError for layers that are
    not plain linear ones.
    """
    axis = mesh.axis(AXIS)
    if axis.size == 1:
        return
    shared = list(_shared_modules(network, axis.size))
    if not shared:
        raise PlanError(
            f"parallelism=tensor cannot cut this model into {axis.size} parts: neither its "
            "attention heads nor its feed-forward widths "
            f"divide by {axis.size}. Use another number of ranks, or parallelism=patch."
        )
    for module, shards in shared:
        for shard in shards:
            _require_plain(shard.linear)
            settle(shard.linear)
            _shrink(shard, axis.size, axis.rank)
        if hasattr(module, "heads"):
            module.heads //= axis.size
        hooks.attach(module, NAME, _summing(mesh))


def detach_shards(network: nn.Module, mesh: Mesh) -> None:
    """Gather the whole weights again, on every rank."""
    size = mesh.axis(AXIS).size
    for module in network.modules():
        if NAME in hooks.attached(module):
            hooks.detach(module, NAME)
            if hasattr(module, "heads"):
                module.heads *= size
            for shard in _shards(module):
                _restore(shard, mesh)


def _shared_modules(network: nn.Module, size: int) -> Iterator[tuple[nn.Module, list[WeightShard]]]:
    """Yield the modules that can be cut into `size` parts, with their layers."""
    for module in network.modules():
        is_attention = isinstance(module, Attention | AttentionModuleMixin) and _heads_divide(
            module, size
        )
        if is_attention or (
            isinstance(module, FeedForward) and module.net[2].in_features % size == 0
        ):
            yield module, _shards(module)


def _heads_divide(module: Any, size: int) -> bool:
    """Return whether the heads can be divided among `size` ranks and the module has its own output
    projection (flux's single blocks project elsewhere).
    """
    has_output = getattr(module, "to_out", None) is not None and not getattr(
        module, "pre_only", False
    )
    norms = [getattr(module, name, None) for name in ("norm_q", "norm_k")]
    spans_heads = any(
        norm is not None and norm.weight is not None and norm.weight.numel() != _head_width(module)
        for norm in norms
    )
    return (
        has_output
        and module.heads % size == 0
        and not spans_heads
        and not getattr(module, "residual_connection", False)
    )


def _head_width(module: Any) -> int:
    return module.to_q.out_features // module.heads


def _shards(module: Any) -> list[WeightShard]:
    if isinstance(module, FeedForward):
        first, last = module.net[0].proj, module.net[2]
        return [
            WeightShard(first, 0, parts=first.out_features // last.in_features),
            WeightShard(last, 1),
        ]
    if getattr(module, "fused_projections", False):
        raise UnsupportedError(
            "parallelism=tensor cannot cut fused query, key and value projections. Leave fusing "
            "out."
        )
    if any(True for _ in getattr(module.processor, "parameters", lambda: ())()):
        raise UnsupportedError(
            "parallelism=tensor cannot cut an IP-Adapter's attention. Use parallelism=patch with "
            "it."
        )
    columns = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
    rows = [module.to_out[0], getattr(module, "to_add_out", None)]
    shards = [
        WeightShard(getattr(module, name), 0)
        for name in columns
        if getattr(module, name, None) is not None
    ]
    return shards + [WeightShard(linear, 1) for linear in rows if linear is not None]


def _require_plain(linear: nn.Module) -> None:
    if type(linear) is not nn.Linear:
        raise UnsupportedError(
            f"parallelism=tensor cuts plain linear layers, not {type(linear).__name__}: quantised "
            "layers and loaded LoRAs cannot be cut. "
            "Load without them, or use parallelism=patch."
        )


def _shrink(shard: WeightShard, size: int, rank: int) -> None:
    linear = shard.linear
    linear.weight = nn.Parameter(_block(linear.weight.data, shard, size, rank), requires_grad=False)
    if linear.bias is not None and shard.dim == 0:
        linear.bias = nn.Parameter(_block(linear.bias.data, shard, size, rank), requires_grad=False)
    elif (
        linear.bias is not None and rank != 0
    ):  # added once: by rank 0, whose result is summed with the others'
        linear.bias = nn.Parameter(torch.zeros_like(linear.bias), requires_grad=False)
    _set_widths(linear)


def _block(tensor: Tensor, shard: WeightShard, size: int, rank: int) -> Tensor:
    blocks = tensor.unflatten(shard.dim, (shard.parts, size, -1))
    return blocks.select(shard.dim + 1, rank).flatten(shard.dim, shard.dim + 1).clone()


def _restore(shard: WeightShard, mesh: Mesh) -> None:
    linear, axis = shard.linear, mesh.axis(AXIS)
    linear.weight = nn.Parameter(_whole(linear.weight.data, shard, mesh), requires_grad=False)
    if linear.bias is not None and shard.dim == 0:
        linear.bias = nn.Parameter(_whole(linear.bias.data, shard, mesh), requires_grad=False)
    elif linear.bias is not None:
        bias = linear.bias.data.clone()
        dist.all_reduce(bias, group=axis.group)
        linear.bias = nn.Parameter(bias, requires_grad=False)
    _set_widths(linear)


def _whole(tensor: Tensor, shard: WeightShard, mesh: Mesh) -> Tensor:
    blocks = tensor.unflatten(shard.dim, (shard.parts, 1, -1))
    return all_gather(blocks, dim=shard.dim + 1, axis=mesh.axis(AXIS)).flatten(
        shard.dim, shard.dim + 2
    )


def _set_widths(linear: nn.Linear) -> None:
    linear.out_features, linear.in_features = linear.weight.shape


def _summing(mesh: Mesh) -> hooks.Around:
    def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        return (
            tuple(_sum(part, mesh) for part in output)
            if isinstance(output, tuple)
            else _sum(output, mesh)
        )

    return around


def _sum(part: Tensor, mesh: Mesh) -> Tensor:
    axis = mesh.axis(AXIS)
    part = part.contiguous()
    mesh.traffic.add(part, peers=axis.size - 1)
    dist.all_reduce(part, group=axis.group)
    return part
