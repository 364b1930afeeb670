"""Ranks on one machine trade CPU tensors through memory that they all map; only a few numbers
travel by gloo, to say that it is there.

gloo carries a tensor through two sockets of the kernel and threads of its own, which take time of
the cores that compute. Here a tensor is copied once, into the sender's memory, and read where it
is. Used by backends whose ranks wait for each other's tensors (xdit's Ulysses).
"""

import logging
import math
import mmap
import os
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from backends.groups.collectives import AsyncAllToAll
from backends.groups.control_group import gather_outcomes
from backends.groups.mesh import Axis, CommStats

logger = logging.getLogger(__name__)

TURNS = 2
ALIGNMENT = 64
"""Bytes: a line of the processor's cache, so that no two ranks' tensors share one; a multiple of
every dtype's size.
"""
NO_ROOM = -1


class SharedFile:
    """Memory that other processes can map too. It has no name in any file system, so that it is
    gone with the last process that has it open, whatever ends that; and the size of /dev/shm does
    not limit it.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.close = weakref.finalize(self, os.close, descriptor)
        """No more views from now on. Those that exist keep what they map."""
        self._bytes = torch.empty(0, dtype=torch.uint8)

    @property
    def identity(self) -> tuple[int, int]:
        """The same for two descriptors of one file."""
        status = os.fstat(self.descriptor)
        return status.st_dev, status.st_ino

    def grow(self, num_bytes: int) -> None:
        """At least so many bytes from now on; earlier views stay good. OSError if the machine has
        not got them: it must give them now, since a page that it has not got when it is written is
        a SIGBUS.
        """
        if num_bytes > os.fstat(self.descriptor).st_size:
            os.posix_fallocate(self.descriptor, 0, num_bytes)

    def view(self, start: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The tensor that begins at byte `start`."""
        stop = start + math.prod(shape) * dtype.itemsize
        if stop > self._bytes.numel():
            with torch.inference_mode(
                False
            ):  # a tensor made in inference mode could be written nowhere else
                self._bytes = torch.frombuffer(mmap.mmap(self.descriptor, 0), dtype=torch.uint8)
        return self._bytes[start:stop].view(dtype).view(*shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where processes of the same machine find a rank's files. files: (descriptor, identity) of
    each turn's.
    """

    machine: str
    process: int
    files: tuple[tuple[int, tuple[int, int]], ...]


class SharedMemory:
    """What the ranks of one axis trade through. Every rank has a file for each of two turns, writes
    its own and reads the others'.

    Order: a rank writes, then sends where; it hears where, then reads. Both go through a socket,
    whose locks in the kernel see to it that what was written before the sending is there after the
    hearing.

    Why two turns are enough: for trade n + 2 a rank writes where it wrote for trade n. By then it
    has heard every rank in trade n + 1, and a rank speaks there after it is done with what trade n
    brought it (which the caller of `trade` promises).
    """

    def __init__(
        self, axis: Axis, own: Sequence[SharedFile], others: dict[int, list[SharedFile]]
    ) -> None:
        """The files of each turn: this rank's, and those of each other rank of the axis."""
        self._axis = axis
        self._own = own
        self._others = others
        self._turn = 0
        self.is_open = True

    def trade(
        self,
        outgoing: Sequence[Sequence[Tensor]],
        shapes: Sequence[tuple[int, ...]],
        *,
        traffic: CommStats,
    ) -> list[Sequence[Tensor]] | None:
        """Give the tensors outgoing[i] (of one shape) to rank i of the axis; get as many of
        shapes[i] from it. Our own are not copied.

        What is got may be read until this rank's next trade, and not be written. None, on every
        rank, if one of them cannot get the memory; now and from now on the tensors must go another
        way. RuntimeError if a peer is gone.
        """
        axis, mine = self._axis, outgoing[self._axis.rank]
        starts = self._write(outgoing)
        begun = time.perf_counter()
        table = _swap_rows(starts, axis=axis)
        traffic.wait_s += time.perf_counter() - begun
        if any(NO_ROOM in row for row in table):
            self.close()
            return None
        traffic.add(
            *(
                tensor
                for rank, tensors in enumerate(outgoing)
                if rank != axis.rank
                for tensor in tensors
            )
        )
        incoming: list[Sequence[Tensor]] = [mine] * axis.size
        for rank, files in self._others.items():
            incoming[rank] = (
                files[self._turn]
                .view(table[rank][axis.rank], (len(mine), *shapes[rank]), mine[0].dtype)
                .unbind(0)
            )
        self._turn = (self._turn + 1) % TURNS
        return incoming

    def _write(self, outgoing: Sequence[Sequence[Tensor]]) -> list[int]:
        """Copy the other ranks' tensors into this turn's file. Returns the byte at which each
        rank's begin.
        """
        starts, end = [], 0
        for rank, tensors in enumerate(outgoing):
            starts.append(end)
            if rank != self._axis.rank:
                end += math.ceil(sum(tensor.nbytes for tensor in tensors) / ALIGNMENT) * ALIGNMENT
        file = self._own[self._turn]
        try:
            file.grow(end)
        except OSError as error:
            logger.warning(
                "%s: no %.1f MB of shared memory, so tensors go by gloo from now on: %s",
                self._axis.name,
                end / 1e6,
                error,
            )
            return [NO_ROOM] * len(starts)
        for rank in self._others:
            places = file.view(
                starts[rank],
                (len(outgoing[rank]), *outgoing[rank][0].shape),
                outgoing[rank][0].dtype,
            )
            for place, tensor in zip(places, outgoing[rank], strict=True):
                place.copy_(tensor)
        return starts

    def close(self) -> None:
        """The kernel frees the memory when all ranks have closed theirs, and nothing got through it
        is left.
        """
        self.is_open = False
        for file in (*self._own, *(file for files in self._others.values() for file in files)):
            file.close()
        self._own, self._others = (), {}


def shared_memory(axis: Axis) -> SharedMemory | None:
    """What the ranks of the axis trade through; None, on every rank, where they cannot. The first
    call is collective.
    """
    if axis.memory is None:
        axis.memory = _meet(axis)
    return axis.memory if axis.memory.is_open else None


def _meet(axis: Axis) -> SharedMemory:
    """Make files and find the other ranks'. The outcomes are exchanged, so that either all ranks
    share or none does.
    """
    own, others, refusal = [], {}, ""
    try:
        own = [SharedFile(os.memfd_create(f"rank {axis.rank}")) for _ in range(TURNS)]
        address = Address(
            machine=_machine(),
            process=os.getpid(),
            files=tuple((file.descriptor, file.identity) for file in own),
        )
    except (OSError, AttributeError) as error:  # AttributeError: this system has no such call
        address, refusal = None, f"rank {axis.rank}: {error}"
    addresses = gather_outcomes(address, among=axis)
    try:
        others = {
            rank: _open(there)
            for rank, there in enumerate(addresses)
            if there is not None and rank != axis.rank
        }
    except OSError as error:
        refusal = refusal or f"rank {axis.rank}: {error}"
    memory = SharedMemory(axis, own, others)
    if refusals := [text for text in gather_outcomes(refusal, among=axis) if text]:
        memory.close()
        logger.info("%s: no memory is shared, so tensors go by gloo: %s", axis.name, refusals[0])
    return memory


def _open(address: Address) -> list[SharedFile]:
    """The files of a rank. OSError if it is on another machine, or this process may not have
    them.
    """
    if address.machine != _machine():
        raise OSError("another rank is on another machine, or in another container")
    files = [
        SharedFile(os.open(f"/proc/{address.process}/fd/{descriptor}", os.O_RDWR))
        for descriptor, _ in address.files
    ]
    if [file.identity for file in files] != [identity for _, identity in address.files]:
        raise OSError(f"process {address.process} has not the files that it said")
    return files


def _machine() -> str:
    """The same in processes that know each other by number: of one start of one kernel, and one
    name space of processes.
    """
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink(
        "/proc/self/ns/pid"
    )


def _swap_rows(row: Sequence[int], *, axis: Axis) -> list[list[int]]:
    """Every rank's row of as many numbers as there are ranks. Blocks until all ranks of the axis
    have given theirs.
    """
    sent = torch.tensor(row, dtype=torch.int64)
    received = torch.empty(axis.size - 1, axis.size, dtype=torch.int64)
    AsyncAllToAll(
        sent.view(torch.uint8),
        received.view(-1).view(torch.uint8),
        [sent.nbytes] * axis.size,
        axis=axis,
    ).wait()
    rows = received.tolist()
    return [*rows[: axis.rank], list(row), *rows[axis.rank :]]
