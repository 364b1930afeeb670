"""Exchange of CPU tensors between ranks on one machine through memory that all of them map.

gloo carries a tensor through two sockets and threads of its own, which take time from the cores
that compute. Here a tensor is copied once, into the sender's memory, and read in place. Only its
offset travels, through a pipe. For ranks that wait for each other's tensors (xdit's Ulysses, and
the patches of a synchronous step).
"""

import logging
import math
import mmap
import os
import select
import struct
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from backends.groups.control_group import gather_outcomes
from backends.groups.mesh import DATA_TIMEOUT, Axis, CommStats

logger = logging.getLogger(__name__)

TURNS = 2
ALIGNMENT = 64
"""Bytes of a cache line, so that no two ranks' tensors share one. A multiple of every dtype's size.
"""
NO_ROOM = -1
OFFSET = struct.Struct("q")
SPIN_S = 5e-5
"""Time for which a rank asks again before it sleeps: about as long as waking up takes."""


class SharedFile:
    """Memory that other processes can map.

    It has no name in any file system, so it disappears with the last process that has it open, even
    after a crash. The size of /dev/shm does not limit it.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.close = weakref.finalize(self, os.close, descriptor)
        """Closes the file. Existing views stay valid; new ones are impossible."""
        self._bytes = torch.empty(0, dtype=torch.uint8)

    @property
    def identity(self) -> tuple[int, int]:
        """Device and inode: equal for two descriptors of one file."""
        status = os.fstat(self.descriptor)
        return status.st_dev, status.st_ino

    def grow(self, num_bytes: int) -> None:
        """Make the file at least `num_bytes` long. Earlier views stay valid.

        OSError if there is not enough memory. Pages are allocated here, because writing to a page
        that the machine cannot supply raises SIGBUS.
        """
        if num_bytes > os.fstat(self.descriptor).st_size:
            os.posix_fallocate(self.descriptor, 0, num_bytes)

    def view(self, start: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a tensor of this shape and dtype that starts at byte `start`."""
        stop = start + math.prod(shape) * dtype.itemsize
        if stop > self._bytes.numel():
            # A tensor created in inference mode could not be written outside of it.
            with torch.inference_mode(False):
                self._bytes = torch.frombuffer(mmap.mmap(self.descriptor, 0), dtype=torch.uint8)
        return self._bytes[start:stop].view(dtype).view(*shape)


class Doorbells:
    """Pipes to and from the other ranks of an axis, each for one number at a time.

    gloo would pass a number through two threads of each rank. A pipe passes it from the thread that
    writes to the one that waits, and ends with either process.
    """

    def __init__(self, others: Sequence[int]) -> None:
        """Create this rank's pipes, one from each other rank."""
        pipes = {rank: os.pipe() for rank in others}
        self._from = {rank: read for rank, (read, _) in pipes.items()}
        self._to: dict[int, int] = {}
        self.offered = {rank: write for rank, (_, write) in pipes.items()}
        """Rank -> descriptor by which that rank opens its end, until `open` has been called."""
        for descriptor in self._from.values():
            os.set_blocking(descriptor, False)
        self._open_descriptors = [*self._from.values(), *self.offered.values()]
        self.close = weakref.finalize(self, _close_all, self._open_descriptors)

    def open(self, addresses: Mapping[int, "Address"], rank: int) -> None:
        """Open the ends at the other ranks. rank: this one. OSError if they cannot be reached."""
        for other, there in addresses.items():
            descriptor = os.open(f"/proc/{there.process}/fd/{there.doorbells[rank]}", os.O_WRONLY)
            self._open_descriptors.append(descriptor)
            self._to[other] = descriptor

    def keep_own_ends(self) -> None:
        """Close the ends that the other ranks have opened by now, so that a pipe ends with them."""
        for descriptor in self.offered.values():
            self._open_descriptors.remove(descriptor)
            os.close(descriptor)
        self.offered = {}

    def ring(self, rank: int, number: int) -> None:
        """Send a number to a rank. RuntimeError if it is gone."""
        try:
            os.write(self._to[rank], OFFSET.pack(number))
        except OSError as error:
            raise RuntimeError(f"connection closed by peer {rank} of the axis") from error

    def wait(self, rank: int) -> int:
        """Return the next number of a rank. RuntimeError if it is gone."""
        descriptor, asleep_at = self._from[rank], time.perf_counter() + SPIN_S
        while True:
            try:
                number = os.read(descriptor, OFFSET.size)
            except BlockingIOError:
                if time.perf_counter() > asleep_at:
                    _sleep_until_readable(descriptor)
                continue
            if not number:
                raise RuntimeError(f"connection closed by peer {rank} of the axis")
            return OFFSET.unpack(number)[0]


def _sleep_until_readable(descriptor: int) -> None:
    waiting = select.poll()
    waiting.register(descriptor, select.POLLIN)
    if not waiting.poll(1e3 * DATA_TIMEOUT.total_seconds()):
        raise RuntimeError(f"no answer of a peer within {DATA_TIMEOUT}")


def _close_all(descriptors: list[int]) -> None:
    while descriptors:
        os.close(descriptors.pop())


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where processes on the same machine find a rank's files and pipes."""

    machine: str
    process: int
    files: tuple[tuple[int, tuple[int, int]], ...]  # (descriptor, identity) for each turn
    doorbells: Mapping[int, int]  # rank that rings -> descriptor


class SharedMemory:
    """Shared memory of the ranks of one axis. Each rank has one file for each of two turns.

    A rank writes its own files and reads those of the others. It writes, then sends the offsets;
    the receiver gets the offsets, then reads. The offsets pass through pipes, whose kernel locks
    make sure that earlier writes are visible after the receive.

    Two turns are enough. For exchange n + 2 a rank overwrites its data of exchange n. By then it
    has received a message of exchange n + 1 from every rank, and a rank sends that only after it
    has read the data of exchange n (the caller guarantees this).
    """

    def __init__(
        self,
        axis: Axis,
        own: Sequence[SharedFile],
        others: dict[int, list[SharedFile]],
        doorbells: Doorbells | None,
    ) -> None:
        """own, others: the files of each turn, of this rank and of each other rank of the axis."""
        self._axis = axis
        self._own = own
        self._others = others
        self._doorbells = doorbells
        self._has_room = True
        self._sent: Sequence[Sequence[Tensor]] = ()
        self._turn = 0
        self.is_open = True

    def trade(
        self,
        outgoing: Sequence[Sequence[Tensor]],
        shapes: Sequence[tuple[int, ...]],
        *,
        traffic: CommStats,
    ) -> list[Sequence[Tensor]] | None:
        """Send the tensors outgoing[i] (all of one shape) to rank i; return those received from
        each.

        shapes[i]: shape of the tensors from rank i; their number is the same everywhere. This
        rank's own tensors are not copied. Received tensors are read-only and valid until this
        rank's next call. Returns None on every rank, from now on, if one rank cannot get the
        memory; use gloo then. RuntimeError if a peer is gone.
        """
        self.send(outgoing)
        return self.receive(shapes, traffic=traffic)

    def send(self, outgoing: Sequence[Sequence[Tensor]]) -> None:
        """Send as `trade` does. `receive` must be called before the next exchange."""
        starts = self._write(outgoing)
        self._has_room = NO_ROOM not in starts.values()
        for rank, start in starts.items():
            self._doorbells.ring(rank, start)
        self._sent = outgoing

    def receive(
        self, shapes: Sequence[tuple[int, ...]], *, traffic: CommStats
    ) -> list[Sequence[Tensor]] | None:
        """Receive as `trade` does."""
        outgoing, self._sent = self._sent, ()
        mine = outgoing[self._axis.rank]
        started = time.perf_counter()
        starts = {rank: self._doorbells.wait(rank) for rank in self._others}
        traffic.wait_s += time.perf_counter() - started
        if not self._has_room or NO_ROOM in starts.values():
            self.close()
            return None
        traffic.add(*(tensor for rank in self._others for tensor in outgoing[rank]))
        incoming: list[Sequence[Tensor]] = [mine] * self._axis.size
        for rank, files in self._others.items():
            shape = (len(mine), *shapes[rank])
            incoming[rank] = files[self._turn].view(starts[rank], shape, mine[0].dtype).unbind(0)
        self._turn = (self._turn + 1) % TURNS
        return incoming

    def _write(self, outgoing: Sequence[Sequence[Tensor]]) -> dict[int, int]:
        """Copy the other ranks' tensors into this turn's file. Return the byte offset of each.

        What several ranks are sent is written once.
        """
        starts: dict[int, int] = {}
        end = 0
        distinct = {id(outgoing[rank]): outgoing[rank] for rank in self._others}
        for key, tensors in distinct.items():
            starts[key] = end
            end += math.ceil(sum(tensor.nbytes for tensor in tensors) / ALIGNMENT) * ALIGNMENT
        file = self._own[self._turn]
        try:
            file.grow(end)
        except OSError as error:
            logger.warning(
                "%s: no %.1f MB of shared memory left, so tensors use gloo from now on: %s",
                self._axis.name,
                end / 1e6,
                error,
            )
            return dict.fromkeys(self._others, NO_ROOM)
        for key, tensors in distinct.items():
            shape = (len(tensors), *tensors[0].shape)
            targets = file.view(starts[key], shape, tensors[0].dtype)
            for target, tensor in zip(targets, tensors, strict=True):
                target.copy_(tensor)
        return {rank: starts[id(outgoing[rank])] for rank in self._others}

    def close(self) -> None:
        """Close this rank's files.

        The kernel frees the memory when all ranks have closed theirs and no received tensor is
        left.
        """
        self.is_open = False
        for file in (*self._own, *(file for files in self._others.values() for file in files)):
            file.close()
        if self._doorbells is not None:
            self._doorbells.close()
        self._own, self._others = (), {}


def shared_memory(axis: Axis) -> SharedMemory | None:
    """Return the shared memory of the axis; None, on every rank, if there is none.

    The first call is collective.
    """
    if axis.memory is None:
        axis.memory = _share(axis)
    return axis.memory if axis.memory.is_open else None


def _share(axis: Axis) -> SharedMemory:
    """Create this rank's files and open those of the others.

    The outcomes are exchanged, so that either all ranks share memory or none does.
    """
    own, others, doorbells, refusal = [], {}, None, ""
    try:
        own = [SharedFile(os.memfd_create(f"rank {axis.rank}")) for _ in range(TURNS)]
        doorbells = Doorbells([rank for rank in range(axis.size) if rank != axis.rank])
        address = Address(
            machine=_machine(),
            process=os.getpid(),
            files=tuple((file.descriptor, file.identity) for file in own),
            doorbells=doorbells.offered,
        )
    except (OSError, AttributeError) as error:  # AttributeError: no memfd_create on this system
        address, refusal = None, f"rank {axis.rank}: {error}"
    addresses = {
        rank: there
        for rank, there in enumerate(gather_outcomes(address, among=axis))
        if there is not None and rank != axis.rank
    }
    try:
        others = {rank: _open(there) for rank, there in addresses.items()}
        if doorbells is not None:
            doorbells.open(addresses, axis.rank)
    except OSError as error:
        refusal = refusal or f"rank {axis.rank}: {error}"
    memory = SharedMemory(axis, own, others, doorbells)
    if refusals := [text for text in gather_outcomes(refusal, among=axis) if text]:
        memory.close()
        logger.info("%s: memory cannot be shared, so tensors use gloo: %s", axis.name, refusals[0])
    else:
        doorbells.keep_own_ends()
    return memory


def _open(address: Address) -> list[SharedFile]:
    """Return the files of another rank.

    OSError if it runs on another machine or this process may not open them.
    """
    if address.machine != _machine():
        raise OSError("another rank is on another machine, or in another container")
    files = [
        SharedFile(os.open(f"/proc/{address.process}/fd/{descriptor}", os.O_RDWR))
        for descriptor, _ in address.files
    ]
    if [file.identity for file in files] != [identity for _, identity in address.files]:
        raise OSError(f"process {address.process} does not have the files of its address")
    return files


def _machine() -> str:
    """Return an id that is equal in processes which see each other's process ids.

    It combines the boot of the kernel and the PID namespace.
    """
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink(
        "/proc/self/ns/pid"
    )
