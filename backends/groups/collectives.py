"""Collectives on one axis of a mesh. Like torch's own, they are called by all its ranks."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as functional_collectives
from torch.overrides import handle_torch_function, has_torch_function_unary

if TYPE_CHECKING:
    pass
from backends.groups.mesh import Axis, CommStats

logger = logging.getLogger(__name__)


def all_gather(tensor: Tensor, *, dim: int, axis: Axis, traffic: CommStats | None = None) -> Tensor:
    """Concatenate equal shards along `dim` in rank order. Blocks until every rank of the axis has
    sent its shard.

    Like torch's own functions it leaves the work to a tensor whose class has a __torch_function__
    that knows better.
    """
    if has_torch_function_unary(tensor):
        return handle_torch_function(
            all_gather, (tensor,), tensor, dim=dim, axis=axis, traffic=traffic
        )
    if axis.is_alone:
        return tensor
    if traffic is not None:
        traffic.add(tensor, peers=axis.size - 1)
    tensor = tensor.contiguous()
    shards = [torch.empty_like(tensor) for _ in range(axis.size)]
    dist.all_gather(shards, tensor, group=axis.group)
    return torch.cat(shards, dim=dim)


def all_sum(tensor: Tensor, *, axis: Axis) -> Tensor:
    """The ranks' tensors of one shape, added up, on every rank."""
    if axis.is_alone:
        return tensor
    total = tensor.contiguous().clone()
    dist.all_reduce(total, group=axis.group)
    return total


def broadcast(tensor: Tensor, *, source: int, axis: Axis) -> None:
    """Rank `source` of the axis overwrites everyone's tensor with its own. Blocks until this rank's
    is complete.
    """
    if not axis.is_alone:
        dist.broadcast(tensor, src=axis.ranks[source], group=axis.group)


class AsyncAllToAll:
    """An exchange of byte strings among the ranks of an axis that runs in the background."""

    def __init__(self, sent: Tensor, received: Tensor, sizes: Sequence[int], *, axis: Axis) -> None:
        """Send the bytes `sent` to every other rank; theirs arrive in `received`, one after the
        other in rank order.

        sent, received: uint8, 1-D, not to be touched until `wait` returns. sizes: bytes that each
        rank of the axis sends.
        """
        copies = sent.repeat(axis.size - 1) if axis.size > 2 else sent
        to = [0 if rank == axis.rank else sent.numel() for rank in range(axis.size)]
        of = [0 if rank == axis.rank else size for rank, size in enumerate(sizes)]
        # far quicker than an all_gather on gloo, and a group of sends and receives on NCCL
        self._work = dist.all_to_all_single(
            received, copies, of, to, group=axis.group, async_op=True
        )
        self._held = (sent, copies, received)

    def wait(self, timeout: timedelta | None = None) -> None:
        """Until `received` is filled and `sent` may change. RuntimeError if a peer is gone (or,
        with a timeout, late).
        """
        if timeout is None:
            self._work.wait()
        else:
            self._work.wait(timeout)


def gather_pieces(
    piece: Tensor, shapes: Sequence[Sequence[int]], *, axis: Axis, traffic: CommStats
) -> list[Tensor]:
    """Every rank's piece, in rank order; shapes may differ, the dtype is one. Blocks until all have
    arrived.

    shapes: of the piece of each rank of the axis.
    """
    return begin_gather(piece, shapes, axis=axis, traffic=traffic)()


def begin_gather(
    piece: Tensor, shapes: Sequence[Sequence[int]], *, axis: Axis, traffic: CommStats
) -> Callable[[], list[Tensor]]:
    """The same in the background. What it returns waits for the pieces, and must be called."""
    if axis.is_alone:
        return lambda: [piece]
    if torch.compiler.is_compiling():
        pieces = _gather_padded(piece, shapes, axis)
        return lambda: pieces
    own = piece.contiguous()
    sizes = [math.prod(shape) * own.element_size() for shape in shapes]
    received = torch.empty(sum(sizes) - sizes[axis.rank], dtype=torch.uint8, device=own.device)
    swap = AsyncAllToAll(own.view(-1).view(torch.uint8), received, sizes, axis=axis)
    traffic.add(own, peers=axis.size - 1)

    def finish() -> list[Tensor]:
        started = time.perf_counter()
        swap.wait()
        traffic.wait_s += time.perf_counter() - started
        others = iter(
            received.split([size for rank, size in enumerate(sizes) if rank != axis.rank])
        )
        return [
            own if rank == axis.rank else next(others).view(own.dtype).view(*shape)
            for rank, shape in enumerate(shapes)
        ]

    return finish


def _gather_padded(piece: Tensor, shapes: Sequence[Sequence[int]], axis: Axis) -> list[Tensor]:
    """The same by one functional all-gather of equal lengths, which torch.compile can trace into
    its graph. Not counted.
    """
    lengths = [math.prod(shape) for shape in shapes]
    padded = torch.nn.functional.pad(piece.reshape(-1), (0, max(lengths) - piece.numel()))
    rows = functional_collectives.all_gather_tensor(padded[None], 0, axis.group)
    return [
        row[:length].view(*shape)
        for row, length, shape in zip(rows.unbind(0), lengths, shapes, strict=True)
    ]
