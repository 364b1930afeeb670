"""Process groups and thin collectives: the only shared file that imports torch.distributed.

There are two kinds of groups. The control group is torch's default group: gloo on every machine,
waits of any length, and carries only commands and outcomes. A Mesh holds the data groups of a plan
(NCCL on CUDA, gloo on CPU); it can be destroyed and rebuilt in milliseconds after a failure,
without touching the control group or reloading weights.
"""

import itertools
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as functional_collectives
from torch.overrides import handle_torch_function, has_torch_function_unary

from backends.parallel import links
from backends.parallel.alarm import Alarm
from backends.parallel.message import pack, unpack
from backends.plan import ParallelPlan

if TYPE_CHECKING:
    from backends.parallel.shared_memory import SharedMemory

logger = logging.getLogger(__name__)

IDLE_TIMEOUT = timedelta(days=3650)
"""Followers wait in a broadcast until somebody asks for an image, and nobody may for weeks. A dead
peer is noticed by its closed connection and a hanging one by hosts/supervision/heartbeat.py, so
this wait needs no end."""

DATA_TIMEOUT = timedelta(hours=3)
"""For one operation of a data group: longer than hosts/supervision/progress.py allows a rank to
compile, since the watch decides who hangs.
"""

MEET_WITHIN = timedelta(minutes=5)
"""From when all ranks are there until their connections stand."""


def select_device(local_rank: int) -> torch.device:
    """The device of this rank: its own CUDA device where there is one, else the CPU."""
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


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


@dataclass(slots=True)
class CommStats:
    """What the data groups of this rank carried since the last reset."""

    sent_bytes: int = 0
    messages: int = 0
    wait_s: float = 0.0

    def reset(self) -> None:
        self.sent_bytes, self.messages, self.wait_s = 0, 0, 0.0

    def add(self, *tensors: Tensor, peers: int = 1) -> None:
        """Count one message of these tensors, sent to `peers` other ranks."""
        self.messages += 1
        self.sent_bytes += peers * sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass(slots=True, kw_only=True, eq=False)
class Axis:
    """This rank's place along one axis of the mesh (or several, flattened). No groups when size is
    1, or while the mesh is closed.

    Only the mesh changes it: whoever keeps an axis must not keep a group open that others wait in,
    and has the new one after a rebuild.

    ranks: as the world counts them, which is how torch names peers, whatever the group. rank: this
    one's place among them.
    way_back: of an axis of stages, with those of the other half of guidance, a second group of the
    same ranks, for what goes against the stream. NCCL does what one group is asked in the order in
    which it is asked, so that in one group the ranks could wait for each other.
    memory: what backends/parallel/shared_memory.py keeps for as long as the group is open.
    """

    name: str
    ranks: tuple[int, ...]
    rank: int
    group: dist.ProcessGroup | None
    reverse_group: dist.ProcessGroup | None = None
    memory: "SharedMemory | None" = None

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def is_alone(self) -> bool:
        """Whether there is no other rank to ask. RuntimeError if there is and the mesh is closed:
        what came out would be wrong.
        """
        if self.group is None and self.size > 1:
            raise RuntimeError(
                f"axis {self.name!r} of {self.size} ranks was used while its mesh is closed"
            )
        return self.group is None


class Mesh:
    """The data groups of a plan on this rank. Every rank must build, use and rebuild its mesh in
    the same order.

    The plan may be that of a team: the world's ranks are then cut into `num_teams` such teams of
    neighbours, and this rank is one of team `team`. All ranks of all teams take part wherever
    groups are made, and nowhere else.
    """

    def __init__(
        self,
        plan: ParallelPlan,
        *,
        rank: int,
        device: torch.device,
        team: int = 0,
        num_teams: int = 1,
        alarm: Alarm | None = None,
    ) -> None:
        """rank: this rank's number within its team. alarm: by which ranks on GPUs hear of another's
        failure.

        ConfigError if the GPUs do not reach each other.
        """
        self.plan = plan
        self.rank = rank
        self.device = device
        self.groups = links.OpenGroups(device, alarm)
        self._first = team * plan.world_size
        self._num_teams = num_teams
        self.traffic = CommStats()
        self._axes: dict[tuple[str, ...], Axis] = {}
        self._step_group: dist.ProcessGroup | None = None
        self._last_word: tuple[dist.Work, Tensor] | None = None
        self._open()

    def axis(self, *names: str) -> Axis:
        """One axis, or several flattened into one (outermost first). The first use of a combination
        is collective.
        """
        names = tuple(name for name in names if self.plan.degree(name) > 1)  # others add no rank
        key = tuple(sorted(names))
        if key not in self._axes:
            self._axes[key] = self._make_axis(names)
        return self._axes[key]

    def prepare(self) -> None:
        """Make the groups of all combinations of axes now: later the other teams are busy."""
        names = [name for name, degree in self.plan.axes if degree > 1]
        for count in range(2, len(names) + 1):
            for combination in itertools.combinations(names, count):
                self.axis(*combination)

    def broadcast_signal(self, word: int) -> int:
        """The first rank's word to all ranks, on a CPU group of its own: once per denoising step
        (go on, or cancel).

        The first rank does not wait until the others have come so far: in a pipeline of stages it
        is ahead of them, by a step at most.
        """
        if self._step_group is None:
            return word
        if self._last_word is not None:
            self._last_word[0].wait()
        message = torch.tensor([word], dtype=torch.int64)
        work = dist.broadcast(message, src=self._first, group=self._step_group, async_op=True)
        if self.rank == 0:
            self._last_word = work, message
            return word
        work.wait()
        return int(message.item())

    def fail(self) -> None:
        """This rank has failed: close the data groups, and let the others know first, who may wait
        for their devices.
        """
        self.groups.sound_alarm()
        self.destroy()

    def destroy(self) -> None:
        """Close the data groups. Peers that wait in one of them fail at once (gloo: connection
        closed by peer).
        """
        self._last_word = None
        self.groups.close()
        for axis in self._axes.values():
            axis.group = axis.reverse_group = axis.memory = None
        self._step_group = None

    def rebuild(self) -> None:
        """Close and open all data groups again, on all ranks, for the axes that were handed out
        before too.
        """
        self.destroy()
        handed_out, self._axes = self._axes, {}
        self._open()
        for key, axis in handed_out.items():
            made = self.axis(*key)
            axis.group, axis.reverse_group = made.group, made.reverse_group
        self._axes.update(handed_out)

    def _open(self) -> None:
        if self.plan.world_size > 1:
            self._step_group = self._new_groups(
                [tuple(range(self.plan.world_size))], backend="gloo"
            )
            self.groups.watch(self._step_group)
        for name, _ in self.plan.axes:
            self.axis(name)

    def _make_axis(self, names: Sequence[str]) -> Axis:
        mine = self.plan.ranks(*names, of_rank=self.rank)
        group = reverse_group = None
        if len(mine) > 1:
            parts = sorted(
                {self.plan.ranks(*names, of_rank=rank) for rank in range(self.plan.world_size)}
            )
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            group = self._new_groups(parts, backend=backend)
            is_way_back = "stage" in names and set(names) == {
                name for name in ("cfg", "stage") if self.plan.degree(name) > 1
            }
            reverse_group = self._new_groups(parts, backend=backend) if is_way_back else None
        ranks = tuple(self._first + rank for rank in mine)
        axis = Axis(
            name="x".join(names),
            ranks=ranks,
            rank=mine.index(self.rank),
            group=group,
            reverse_group=reverse_group,
        )
        self.groups.open_links(axis, num_stages=self.plan.degree("stage"))
        return axis

    def _new_groups(self, parts: Sequence[tuple[int, ...]], *, backend: str) -> dist.ProcessGroup:
        """This rank's of the groups that the ranks of each team, numbered within it, are parted
        into.
        """
        teams = range(0, self._num_teams * self.plan.world_size, self.plan.world_size)
        everybody = [[first + rank for rank in part] for first in teams for part in parts]
        group = _new_groups(everybody, self._first + self.rank, backend, DATA_TIMEOUT)
        self.groups.add(group)
        return group


def _new_groups(
    parts: Sequence[Sequence[int]], rank: int, backend: str, timeout: timedelta | None = None
) -> dist.ProcessGroup:
    """The group of the part that holds `rank`. torch wants every rank to take part in the making of
    every group, its own or not.
    """
    mine = None
    for ranks in parts:
        made = dist.new_group(list(ranks), backend=backend, timeout=timeout)
        mine = made if rank in ranks else mine
    assert mine is not None
    return mine


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
    group = _new_groups(teams, world.rank, "gloo", IDLE_TIMEOUT) if size > 1 else None
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
