"""The control group: torch's default group, always on gloo.

It carries only commands and outcomes, and waits as long as there are no requests.
"""

import logging
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

if TYPE_CHECKING:
    pass
from backends.groups.mesh import Axis, new_groups
from backends.groups.objects import (
    broadcast_object,
    gather_objects,
    receive_object,
    send_object,
)

logger = logging.getLogger(__name__)


IDLE_TIMEOUT = timedelta(days=3650)
"""Followers wait in a broadcast for the next request, perhaps for weeks. A closed connection
reveals a dead peer, and hosts/supervision/heartbeat.py detects a hanging one, so this wait needs no
limit.
"""


CONNECT_WITHIN = timedelta(minutes=5)
"""Limit for connecting the ranks, once all of them are running."""


def open_store(host: str, port: int, *, is_here: bool, timeout_s: float) -> dist.Store:
    """Return the store of several machines. The process with `is_here` hosts it.

    RuntimeError if the store cannot be reached within `timeout_s`.
    """
    return dist.TCPStore(
        host, port, is_master=is_here, timeout=timedelta(seconds=timeout_s), wait_for_workers=False
    )


def initialize(*, rank: int, world_size: int, store: dist.Store | Path | None = None) -> dist.Store:
    """Open the control group over `store`, or over torchelastic's rendezvous (env://) if None.

    A path means a FileStore, which opens no port. Returns a separate store client for the watch
    thread: a client is one connection, and a blocking call on it would hold up other threads.
    """
    if world_size == 1:
        store = dist.HashStore()
        dist.init_process_group("gloo", rank=0, world_size=1, store=store, timeout=IDLE_TIMEOUT)
        return store
    if isinstance(store, Path):
        store = dist.FileStore(str(store), world_size)
    if store is None:
        store, rank, world_size = next(dist.rendezvous("env://", rank, world_size))
    else:
        store.set_timeout(CONNECT_WITHIN)
    dist.init_process_group(
        "gloo",
        rank=rank,
        world_size=world_size,
        store=dist.PrefixStore("control", store),
        timeout=IDLE_TIMEOUT,
    )
    return dist.PrefixStore("watch", store.clone())


def shutdown() -> None:
    """Close the control group. Peers that still wait in it see a closed connection."""
    if dist.is_initialized():
        dist.destroy_process_group()


def control_axis() -> Axis:
    """Return the axis of all ranks on the control group."""
    if not dist.is_initialized():
        return Axis(name="control", ranks=(0,), rank=0, group=None)
    size, rank = dist.get_world_size(), dist.get_rank()
    return Axis(
        name="control",
        ranks=tuple(range(size)),
        rank=rank,
        group=dist.group.WORLD if size > 1 else None,
    )


def control_of_team(size: int) -> Axis:
    """Return the control axis of this rank's team of `size` neighbouring ranks.

    Collective: all ranks create the groups of all teams together.
    """
    world = control_axis()
    teams = [world.ranks[first : first + size] for first in range(0, world.size, size)]
    mine = teams[world.rank // size]
    group = new_groups(teams, world.rank, "gloo", IDLE_TIMEOUT) if size > 1 else None
    return Axis(name="control", ranks=mine, rank=mine.index(world.rank), group=group)


def close(axis: Axis) -> None:
    """Close the group of `control_of_team` on this rank."""
    if axis.group is not None:
        dist.destroy_process_group(axis.group)


def broadcast_command(command: object, among: Axis | None = None) -> object:
    """Return the first rank's command on every rank of a control group (default: all ranks).

    The value that other ranks pass is ignored. UnsendableError on the first rank, before anything
    is sent.
    """
    axis = among or control_axis()
    if axis.group is None:
        return command
    return broadcast_object(command, source=axis.ranks[0], group=axis.group)


def gather_outcomes(outcome: object, among: Axis | None = None) -> list[Any]:
    """Return the outcomes of a control group (default: all ranks) on each of its ranks, in rank
    order.
    """
    axis = among or control_axis()
    if axis.group is None:
        return [outcome]
    return gather_objects(outcome, group=axis.group)


class Channel:
    """A two-way connection for objects between rank 0 and one other rank, on a group of its own.

    Each end has one thread, which waits without limit.
    """

    def __init__(self, group: dist.ProcessGroup, *, other: int) -> None:
        self._group = group
        self._other = other

    def send(self, message: object) -> None:
        """Send a message. RuntimeError if the peer is gone; UnsendableError before anything is
        sent.
        """
        send_object(message, to=self._other, group=self._group)

    def receive(self) -> Any:
        """Return the next message. RuntimeError if the peer is gone."""
        return receive_object(source=self._other, group=self._group)


def open_channels() -> dict[int, Channel]:
    """Open a channel between rank 0 and each other rank. Collective.

    Returns peer rank -> channel: all of them on rank 0, only key 0 on the others.
    """
    world, channels = control_axis(), {}
    for rank in world.ranks[1:]:
        group = dist.new_group([0, rank], backend="gloo", timeout=IDLE_TIMEOUT)
        if world.rank in (0, rank):
            other = rank if world.rank == 0 else 0
            channels[other] = Channel(group, other=other)
    return channels
