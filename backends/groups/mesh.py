"""The data groups of a plan on one rank: NCCL on CUDA, gloo on the CPU.

A mesh can be closed and opened again after a failure, within milliseconds (seconds, with NCCL),
without touching the control group (control_group.py) or loading weights again.
"""

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from backends.groups import links
from backends.groups.alarm import Alarm
from backends.plan import ParallelPlan

if TYPE_CHECKING:
    from backends.groups.shared_memory import SharedMemory

logger = logging.getLogger(__name__)


DATA_TIMEOUT = timedelta(hours=3)
"""For one operation of a data group: longer than hosts/supervision/progress.py allows a rank to
compile, since the watch decides who hangs.
"""


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
    """This rank's place along one axis of the mesh, or several axes flattened.

    Only the mesh changes it. Whoever keeps an axis keeps no group open that others wait in, and has
    the new group after a rebuild.
    """

    name: str
    ranks: tuple[int, ...]
    """Global ranks, by which torch names peers in every group."""
    rank: int
    """This rank's index in `ranks`."""
    group: dist.ProcessGroup | None
    """None when size is 1, and while the mesh is closed."""
    reverse_group: dist.ProcessGroup | None = None
    """A second group of the same ranks for predictions sent backwards. NCCL runs one group's calls
    in order, so one group for both directions could deadlock.
    """
    memory: "SharedMemory | None" = None
    """What shared_memory.py keeps for as long as the group is open."""

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
        if self.groups.step_group is None:
            return word
        if self._last_word is not None:
            self._last_word[0].wait()
        message = torch.tensor([word], dtype=torch.int64)
        work = dist.broadcast(message, src=self._first, group=self.groups.step_group, async_op=True)
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
            self.groups.watch(
                self._new_groups([tuple(range(self.plan.world_size))], backend="gloo")
            )
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
            is_reverse = "stage" in names and set(names) == {
                name for name in ("cfg", "stage") if self.plan.degree(name) > 1
            }
            reverse_group = self._new_groups(parts, backend=backend) if is_reverse else None
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
        group = new_groups(everybody, self._first + self.rank, backend, DATA_TIMEOUT)
        self.groups.add(group)
        return group


def new_groups(
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
