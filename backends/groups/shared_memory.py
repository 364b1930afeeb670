"""Exchange of CPU tensors between ranks on one machine through memory that all of them map.

gloo carries a tensor through two sockets and threads of its own, which take time from the cores
that compute. Here a tensor is copied once, into the sender's memory, and read in place. Only its
offset travels by gloo. For backends whose ranks wait for each other's tensors (xdit's Ulysses).
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
"""Bytes of a cache line, so that no two ranks' tensors share one. A multiple of every dtype's size.
"""
NO_ROOM = -1


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where processes on the same machine find a rank's files."""

    machine: str
    process: int
    files: tuple[tuple[int, tuple[int, int]], ...]  # (descriptor, identity) for each turn


class SharedMemory:
    """Shared memory of the ranks of one axis. Each rank has one file for each of two turns.

    A rank writes its own files and reads those of the others. It writes, then sends the offsets;
    the receiver gets the offsets, then reads. The offsets pass through a socket, whose kernel locks
    make sure that earlier writes are visible after the receive.

    Two turns are enough. For exchange n + 2 a rank overwrites its data of exchange n. By then it
    has received a message of exchange n + 1 from every rank, and a rank sends that only after it
    has read the data of exchange n (the caller of `trade` guarantees this).
    """

    def __init__(
        self, axis: Axis, own: Sequence[SharedFile], others: dict[int, list[SharedFile]]
    ) -> None:
        """own, others: the files of each turn, of this rank and of each other rank of the axis."""
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
        """Send the tensors outgoing[i] (all of one shape) to rank i; return those received from
        each.

        shapes[i]: shape of the tensors from rank i; their number is the same everywhere. This
        rank's own tensors are not copied. Received tensors are read-only and valid until this
        rank's next call. Returns None on every rank, from now on, if one rank cannot get the
        memory; use gloo then. RuntimeError if a peer is gone.
        """
        axis, mine = self._axis, outgoing[self._axis.rank]
        starts = self._write(outgoing)
        started = time.perf_counter()
        table = _swap_rows(starts, axis=axis)
        traffic.wait_s += time.perf_counter() - started
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
        """Copy the other ranks' tensors into this turn's file. Return the byte offset of each."""
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
                "%s: no %.1f MB of shared memory left, so tensors use gloo from now on: %s",
                self._axis.name,
                end / 1e6,
                error,
            )
            return [NO_ROOM] * len(starts)
        for rank in self._others:
            targets = file.view(
                starts[rank],
                (len(outgoing[rank]), *outgoing[rank][0].shape),
                outgoing[rank][0].dtype,
            )
            for target, tensor in zip(targets, outgoing[rank], strict=True):
                target.copy_(tensor)
        return starts

    def close(self) -> None:
        """Close this rank's files.

        The kernel frees the memory when all ranks have closed theirs and no received tensor is
        left.
        """
        self.is_open = False
        for file in (*self._own, *(file for files in self._others.values() for file in files)):
            file.close()
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
    own, others, refusal = [], {}, ""
    try:
        own = [SharedFile(os.memfd_create(f"rank {axis.rank}")) for _ in range(TURNS)]
        address = Address(
            machine=_machine(),
            process=os.getpid(),
            files=tuple((file.descriptor, file.identity) for file in own),
        )
    except (OSError, AttributeError) as error:  # AttributeError: no memfd_create on this system
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
        logger.info("%s: memory cannot be shared, so tensors use gloo: %s", axis.name, refusals[0])
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


def _swap_rows(row: Sequence[int], *, axis: Axis) -> list[list[int]]:
    """Return every rank's row of one number per rank. Blocks until all ranks have sent theirs."""
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
