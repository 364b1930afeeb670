"""The control group: torch's default group, gloo on every machine. It carries commands and outcomes
only, and waits for as long as nobody asks for anything.
"""

import logging
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from backends.groups.message import pack, unpack

if TYPE_CHECKING:
    pass
from backends.groups.mesh import Axis, new_groups

logger = logging.getLogger(__name__)


IDLE_TIMEOUT = timedelta(days=3650)
"""Followers wait in a broadcast until somebody asks for an image, and nobody may for weeks. A dead
peer is noticed by its closed connection and a hanging one by hosts/supervision/heartbeat.py, so
this wait needs no end."""


MEET_WITHIN = timedelta(minutes=5)
"""From when all ranks are there until their connections stand."""


def open_store(host: str, port: int, *, is_here: bool, timeout_s: float) -> dist.Store:
    """The store of several machines; it lives in the process that says it is here. RuntimeError if
    it cannot be reached in time.
    """
    return dist.TCPStore(
        host, port, is_master=is_here, timeout=timedelta(seconds=timeout_s), wait_for_workers=False
    )


def initialize(*, rank: int, world_size: int, store: dist.Store | Path | None = None) -> dist.Store:
    """Open the control group over `store` (or a file, which opens no port), or else over
    torchelastic's rendezvous (env://).

    Returns a store client for the watch thread of its own: a client is one connection, and one that
    waits would hold up the other.
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
        store.set_timeout(MEET_WITHIN)
    dist.init_process_group(
        "gloo",
        rank=rank,
        world_size=world_size,
        store=dist.PrefixStore("control", store),
        timeout=IDLE_TIMEOUT,
    )
    return dist.PrefixStore("watch", store.clone())


def shutdown() -> None:
    """Close whatever is open. Peers that still wait see a closed connection."""
    if dist.is_initialized():
        dist.destroy_process_group()


def control_axis() -> Axis:
    """All ranks, on the control group."""
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
    """A control group for each team of `size` neighbours, made by all ranks together; this
    rank's.
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
    """The first rank's command to every rank of a control group (all ranks', if none is named);
    others pass anything and get that.

    UnsendableError on the first rank, before others hear of it.
    """
    axis = among or control_axis()
    if axis.group is None:
        return command
    box = [pack(command) if axis.rank == 0 else None]
    dist.broadcast_object_list(box, src=axis.ranks[0], group=axis.group)
    return command if axis.rank == 0 else unpack(box[0])


def gather_outcomes(outcome: object, among: Axis | None = None) -> list[Any]:
    """Every rank's outcome, in rank order, on every rank of a control group (all ranks', if none is
    named).
    """
    axis = among or control_axis()
    if axis.group is None:
        return [outcome]
    outcomes: list[Any] = [None] * axis.size
    dist.all_gather_object(outcomes, outcome, group=axis.group)
    return outcomes


class Channel:
    """Objects between rank 0 and one other rank, on a group of their own: one thread at each end,
    which waits as long as it takes.
    """

    def __init__(self, group: dist.ProcessGroup, *, other: int) -> None:
        self._group = group
        self._other = other

    def send(self, message: object) -> None:
        """RuntimeError if the other end is gone; UnsendableError before it hears of anything."""
        dist.send_object_list([pack(message)], dst=self._other, group=self._group)

    def receive(self) -> Any:
        """RuntimeError if the other end is gone."""
        box: list[Any] = [None]
        dist.recv_object_list(box, src=self._other, group=self._group)
        return unpack(box[0])


def open_channels() -> dict[int, Channel]:
    """A line between rank 0 and each other rank, made by all ranks together: rank 0 has all of
    them, another rank its own, called 0.
    """
    world, lines = control_axis(), {}
    for rank in world.ranks[1:]:
        group = dist.new_group([0, rank], backend="gloo", timeout=IDLE_TIMEOUT)
        if world.rank in (0, rank):
            other = rank if world.rank == 0 else 0
            lines[other] = Channel(group, other=other)
    return lines
