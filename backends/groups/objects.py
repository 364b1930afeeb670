"""Python objects between ranks over a process group. A receiver unpickles nothing that a stranger
may have sent: every message is signed (backends/groups/message.py).

torch's own collectives for objects unpickle whatever arrives. gloo asks for no password, and its
ports can be reached by other users of the machine, or from the network between machines.
"""

from typing import Any

import torch
import torch.distributed as dist

from backends.groups.message import pack, unpack

MAX_BYTES = 2**33
"""Largest message, checked before memory is taken for it."""


def broadcast_object(value: object, *, source: int, group: dist.ProcessGroup) -> Any:
    """Return the value of rank `source` (of all ranks) on every rank of the group.

    UnsendableError on that rank, before anything is sent.
    """
    if dist.get_rank() == source:
        data = _tensor(pack(value), group)
        dist.broadcast(_length(len(data), group), src=source, group=group)
        dist.broadcast(data, src=source, group=group)
        return value
    length = _length(0, group)
    dist.broadcast(length, src=source, group=group)
    data = _room(int(length), group)
    dist.broadcast(data, src=source, group=group)
    return unpack(_bytes(data))


def gather_objects(value: object, *, group: dist.ProcessGroup) -> list[Any]:
    """Return the values of all ranks of the group on each of them, in rank order."""
    own = _tensor(pack(value), group)
    lengths = [_length(0, group) for _ in range(dist.get_world_size(group))]
    dist.all_gather(lengths, _length(len(own), group), group=group)
    longest = max(int(length) for length in lengths)
    padded = _room(longest, group)
    padded[: len(own)] = own
    arrived = [_room(longest, group) for _ in lengths]
    dist.all_gather(arrived, padded, group=group)
    return [
        unpack(_bytes(data[: int(length)])) for data, length in zip(arrived, lengths, strict=True)
    ]


def send_object(value: object, *, to: int, group: dist.ProcessGroup) -> None:
    """Send a value to rank `to` (of all ranks). UnsendableError before anything is sent."""
    data = _tensor(pack(value), group)
    dist.send(_length(len(data), group), dst=to, group=group)
    dist.send(data, dst=to, group=group)


def receive_object(*, source: int, group: dist.ProcessGroup) -> Any:
    """Return the next value from rank `source` (of all ranks)."""
    length = _length(0, group)
    dist.recv(length, src=source, group=group)
    data = _room(int(length), group)
    dist.recv(data, src=source, group=group)
    return unpack(_bytes(data))


def _device(group: dist.ProcessGroup) -> torch.device:
    """Where the group's backend takes tensors, as torch's own collectives for objects choose."""
    return dist.distributed_c10d._get_object_coll_device(group)


def _length(value: int, group: dist.ProcessGroup) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.int64, device=_device(group))


def _room(length: int, group: dist.ProcessGroup) -> torch.Tensor:
    if not 0 < length <= MAX_BYTES:
        raise RuntimeError(f"a message of {length} bytes is not from a rank of this host")
    return torch.empty(length, dtype=torch.uint8, device=_device(group))


def _tensor(data: bytes, group: dist.ProcessGroup) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(_device(group))


def _bytes(data: torch.Tensor) -> bytes:
    return data.cpu().numpy().tobytes()
