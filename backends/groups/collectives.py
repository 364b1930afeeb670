"""Collectives on one axis of a mesh. As with torch's own, all ranks of the axis must call them."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as functional_collectives
from torch.overrides import handle_torch_function, has_torch_function_unary

from backends.groups.mesh import Axis, CommStats
from backends.groups.shared_memory import SharedMemory, shared_memory

logger = logging.getLogger(__name__)


def all_gather(tensor: Tensor, *, dim: int, axis: Axis, traffic: CommStats | None = None) -> Tensor:
    """Concatenate equal shards along `dim` in rank order.

    Blocks until every rank of the axis has sent its shard. A tensor subclass can override it with
    __torch_function__.
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


def begin_gather_into(
    buffer: Tensor, share: Tensor, *, axis: Axis, traffic: CommStats
) -> Callable[[], None]:
    """Start to fill `buffer` with the equal shares of all ranks, in rank order.

    buffer, share: 1-D, of one dtype; do not touch them before the returned function, which must be
    called, has waited for the shares.
    """
    if axis.is_alone:
        buffer.copy_(share)
        return lambda: None
    traffic.add(share, peers=axis.size - 1)
    work = dist.all_gather_single(buffer, share, group=axis.group, async_op=True)

    def wait() -> None:
        started = time.perf_counter()
        work.wait()
        traffic.wait_s += time.perf_counter() - started

    return wait


def all_sum(tensor: Tensor, *, axis: Axis) -> Tensor:
    """Return the sum of the ranks' tensors, all of one shape, on every rank."""
    if axis.is_alone:
        return tensor
    total = tensor.contiguous().clone()
    dist.all_reduce(total, group=axis.group)
    return total


def broadcast(tensor: Tensor, *, source: int, axis: Axis) -> None:
    """Overwrite `tensor` on every rank with the one of rank `source` of the axis.

    Blocks until this rank has the data.
    """
    if not axis.is_alone:
        dist.broadcast(tensor, src=axis.ranks[source], group=axis.group)


class AsyncAllToAll:
    """A background exchange of bytes among the ranks of an axis."""

    def __init__(
        self,
        sent: Tensor,
        received: Tensor,
        sizes: Sequence[int],
        *,
        axis: Axis,
        is_late: bool = False,
    ) -> None:
        """Send `sent` to every other rank; `received` gets theirs, concatenated in rank order.

        sent, received: uint8, 1-D; do not touch them until `wait` returns. sizes: number of bytes
        that each rank of the axis sends. is_late: needed in the next step only.
        """
        group = axis.late_group if is_late else axis.group
        if group is None:  # torch would take the control group
            raise RuntimeError(
                f"axis {axis.name!r} of {axis.size} ranks was used while its mesh is closed"
            )
        copies = sent.repeat(axis.size - 1) if axis.size > 2 else sent
        to = [0 if rank == axis.rank else sent.numel() for rank in range(axis.size)]
        of = [0 if rank == axis.rank else size for rank, size in enumerate(sizes)]
        # much faster than all_gather on gloo; NCCL runs it as grouped sends and receives
        self._work = dist.all_to_all_single(received, copies, of, to, group=group, async_op=True)
        self._held = (sent, copies, received)

    def wait(self, timeout: timedelta | None = None) -> None:
        """Wait until `received` is filled and `sent` may change.

        RuntimeError if a peer is gone or the timeout passes.
        """
        if timeout is None:
            self._work.wait()
        else:
            self._work.wait(timeout)


def gather_pieces(
    piece: Tensor, shapes: Sequence[Sequence[int]], *, axis: Axis, traffic: CommStats
) -> list[Tensor]:
    """Return every rank's piece, in rank order. Blocks until all have arrived.

    shapes: the shape of each rank's piece. Shapes may differ, the dtype may not. Read or copy the
    pieces before the next exchange on this axis.
    """
    return begin_gather(piece, shapes, axis=axis, traffic=traffic)()


def begin_gather(
    piece: Tensor, shapes: Sequence[Sequence[int]], *, axis: Axis, traffic: CommStats
) -> Callable[[], list[Tensor]]:
    """Start `gather_pieces` in the background.

    Returns a function that waits for the pieces. The caller must call it before the next exchange
    on this axis, and read the pieces before that: they may be in the memory of other ranks.
    """
    if axis.is_alone:
        return lambda: [piece]
    if torch.compiler.is_compiling():
        pieces = _gather_padded(piece, shapes, axis)
        return lambda: pieces
    own = piece.contiguous()
    memory = shared_memory(axis) if own.device.type == "cpu" else None
    if memory is not None:
        return _gather_from_memory(own, shapes, memory, axis, traffic)
    return _gather_by_messages(own, shapes, axis, traffic)


def _gather_from_memory(
    own: Tensor,
    shapes: Sequence[Sequence[int]],
    memory: SharedMemory,
    axis: Axis,
    traffic: CommStats,
) -> Callable[[], list[Tensor]]:
    memory.send([(own,)] * axis.size)

    def finish() -> list[Tensor]:
        received = memory.receive([tuple(shape) for shape in shapes], traffic=traffic)
        if received is None:
            return _gather_by_messages(own, shapes, axis, traffic)()
        return [piece for (piece,) in received]

    return finish


def _gather_by_messages(
    own: Tensor, shapes: Sequence[Sequence[int]], axis: Axis, traffic: CommStats
) -> Callable[[], list[Tensor]]:
    sizes = [math.prod(shape) * own.element_size() for shape in shapes]
    received = torch.empty(sum(sizes) - sizes[axis.rank], dtype=torch.uint8, device=own.device)
    exchange = AsyncAllToAll(own.view(-1).view(torch.uint8), received, sizes, axis=axis)
    traffic.add(own, peers=axis.size - 1)

    def finish() -> list[Tensor]:
        started = time.perf_counter()
        exchange.wait()
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
    """Gather pieces with one functional all-gather of equal lengths.

    torch.compile can trace it into its graph. Its traffic is not counted.
    """
    lengths = [math.prod(shape) for shape in shapes]
    padded = torch.nn.functional.pad(piece.reshape(-1), (0, max(lengths) - piece.numel()))
    rows = functional_collectives.all_gather_tensor(padded[None], 0, axis.group)
    return [
        row[:length].view(*shape)
        for row, length, shape in zip(rows.unbind(0), lengths, shapes, strict=True)
    ]
