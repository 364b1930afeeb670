"""The data groups of a plan on one rank: NCCL on CUDA, gloo on the CPU.

After a failure, a mesh can be closed and opened again within milliseconds (seconds with NCCL). That
neither touches the control group (control_group.py) nor reloads weights.
"""

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from backends.groups import links
from backends.groups.alarm import Alarm
from backends.groups.objects import broadcast_object
from backends.plan import ParallelPlan

if TYPE_CHECKING:
    from backends.groups.shared_memory import SharedMemory

logger = logging.getLogger(__name__)


DATA_TIMEOUT = timedelta(hours=3)
"""Limit for one operation of a data group. It exceeds the compile time that
hosts/supervision/progress.py allows, since the watch decides which rank hangs.
"""


BACKGROUND = ("background",)
"""Key of `background_axis`, which is no axis of a plan."""


@dataclass(slots=True)
class CommStats:
    """Traffic of this rank's data groups since the last reset."""

    sent_bytes: int = 0
    messages: int = 0
    wait_s: float = 0.0  # seconds that the host waited for other ranks

    def reset(self) -> None:
        self.sent_bytes, self.messages, self.wait_s = 0, 0, 0.0

    def add(self, *tensors: Tensor, peers: int = 1) -> None:
        """Count one message of these tensors, sent to `peers` other ranks."""
        self.messages += 1
        self.sent_bytes += peers * sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass(slots=True, kw_only=True, eq=False)
class Axis:
    """This rank's position on one axis of the mesh, or on several axes flattened into one.

    Only the mesh changes it. Code may keep an axis: that does not keep its group open after the
    mesh is closed, and a rebuild puts the new group in.
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
    late_group: dist.ProcessGroup | None = None
    """A second group of the same ranks for values of patches that are needed in the next step only.
    In one group with them, what this step needs would wait behind them.
    """
    object_group: dist.ProcessGroup | None = None
    """A CPU group of the same ranks for Python values, where the method exchanges any in a step.
    Over NCCL the host would wait for its device, which has all earlier work to do.
    """
    memory: "SharedMemory | None" = None
    """State of shared_memory.py for as long as the group is open."""

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def is_alone(self) -> bool:
        """Whether the axis has no other rank.

        RuntimeError if it has and the mesh is closed, because the result would be wrong.
        """
        if self.group is None and self.size > 1:
            raise RuntimeError(
                f"axis {self.name!r} of {self.size} ranks was used while its mesh is closed"
            )
        return self.group is None


class Mesh:
    """The data groups of a plan on this rank. All ranks build, use and rebuild theirs in the same
    order.

    The plan may be that of a team. The world's ranks then form `num_teams` teams of neighbours, and
    this rank belongs to team `team`. All ranks of all teams take part in creating groups, and in
    nothing else.
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
        """rank: index of this rank in its team. alarm: reports failures between ranks on GPUs.

        ConfigError if the GPUs cannot reach each other.
        """
        self.plan = plan
        self.rank = rank
        self.device = device
        self.groups = links.OpenGroups(device, alarm)
        self._first = team * plan.world_size
        self._num_teams = num_teams
        self.traffic = CommStats()
        self._axes: dict[tuple[str, ...], Axis] = {}
        self._last_signal: tuple[dist.Work, Tensor] | None = None
        self._open()

    def axis(self, *names: str) -> Axis:
        """Return one axis, or several flattened into one (outermost first).

        The first use of a combination is collective.
        """
        names = tuple(name for name in names if self.plan.degree(name) > 1)  # others add no rank
        key = tuple(sorted(names))
        if key not in self._axes:
            self._axes[key] = self._make_axis(names)
        return self._axes[key]

    def background_axis(self) -> Axis:
        """Return all ranks, with a group of their own for transfers that run behind others.

        NCCL runs one group's calls in order, so large transfers would hold up those of a step. The
        first use is collective.
        """
        if BACKGROUND not in self._axes:
            ranks = tuple(range(self.plan.world_size))
            axis = self._axes[BACKGROUND] = Axis(
                name="background",
                ranks=tuple(self._first + rank for rank in ranks),
                rank=self.rank,
                group=self._new_data_groups([ranks]) if len(ranks) > 1 else None,
            )
            self.groups.open_links(axis, num_stages=1)
        return self._axes[BACKGROUND]

    def prepare(self) -> None:
        """Create the groups of all combinations of axes now. Later the other teams are busy."""
        names = [name for name, degree in self.plan.axes if degree > 1]
        for count in range(2, len(names) + 1):
            for combination in itertools.combinations(names, count):
                self.axis(*combination)

    def broadcast_signal(self, signal: int) -> int:
        """Return the first rank's signal on all ranks: once per denoising step (go on, or cancel).

        It has a CPU group of its own. The first rank does not wait for the others to reach this
        point: in a pipeline of stages it is up to one step ahead.
        """
        if self.groups.step_group is None:
            return signal
        if self._last_signal is not None:
            self._last_signal[0].wait()
        message = torch.tensor([signal], dtype=torch.int64)
        work = dist.broadcast(message, src=self._first, group=self.groups.step_group, async_op=True)
        if self.rank == 0:
            self._last_signal = work, message
            return signal
        work.wait()
        return int(message.item())

    def broadcast_object(self, value: Any, *, source: int) -> Any:
        """Return rank `source`'s value on all ranks: plain values and CPU tensors.

        RuntimeError if the mesh is closed.
        """
        if self.plan.world_size == 1:
            return value
        if self.groups.step_group is None:
            raise RuntimeError("an object was sent while the mesh is closed")
        return broadcast_object(value, source=self._first + source, group=self.groups.step_group)

    def fail(self) -> None:
        """Close the data groups after a failure of this rank.

        The other ranks are notified first, since they may be waiting for their devices.
        """
        self.groups.sound_alarm()
        self.destroy()

    def destroy(self) -> None:
        """Close the data groups. Peers that wait in one fail at once (gloo: connection closed by
        peer).
        """
        self._last_signal = None
        self.groups.close()
        for axis in self._axes.values():
            if axis.memory is not None:
                axis.memory.close()
            axis.group = axis.reverse_group = axis.late_group = None
            axis.object_group = axis.memory = None

    def rebuild(self) -> None:
        """Close all data groups and open them again, on all ranks.

        Axes that were returned before get the new groups.
        """
        self.destroy()
        handed_out, self._axes = self._axes, {}
        self._open()
        for key, axis in handed_out.items():
            made = self.background_axis() if key == BACKGROUND else self.axis(*key)
            axis.group, axis.reverse_group = made.group, made.reverse_group
            axis.late_group, axis.object_group = made.late_group, made.object_group
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
        group = reverse_group = late_group = object_group = None
        if len(mine) > 1:
            parts = sorted(
                {self.plan.ranks(*names, of_rank=rank) for rank in range(self.plan.world_size)}
            )
            group = self._new_data_groups(parts)
            is_reverse = "stage" in names and set(names) == {
                name for name in ("cfg", "stage") if self.plan.degree(name) > 1
            }
            reverse_group = self._new_data_groups(parts) if is_reverse else None
            is_late = "patch" in names and self.plan.reads_previous_step
            late_group = self._new_data_groups(parts) if is_late else None
            if names == ("segment",):
                is_on_cpu = self.device.type == "cpu"
                object_group = group if is_on_cpu else self._new_groups(parts, backend="gloo")
        ranks = tuple(self._first + rank for rank in mine)
        axis = Axis(
            name="x".join(names),
            ranks=ranks,
            rank=mine.index(self.rank),
            group=group,
            reverse_group=reverse_group,
            late_group=late_group,
            object_group=object_group,
        )
        self.groups.open_links(axis, num_stages=self.plan.degree("stage"))
        return axis

    def _new_data_groups(self, parts: Sequence[tuple[int, ...]]) -> dist.ProcessGroup:
        return self._new_groups(parts, backend="nccl" if self.device.type == "cuda" else "gloo")

    def _new_groups(self, parts: Sequence[tuple[int, ...]], *, backend: str) -> dist.ProcessGroup:
        """Return this rank's group. All ranks of all teams create all groups.

        parts: the ranks of each group, numbered within a team.
        """
        teams = range(0, self._num_teams * self.plan.world_size, self.plan.world_size)
        everybody = [[first + rank for rank in part] for first in teams for part in parts]
        group = new_groups(everybody, self._first + self.rank, backend, DATA_TIMEOUT)
        self.groups.add(group)
        return group


def new_groups(
    parts: Sequence[Sequence[int]], rank: int, backend: str, timeout: timedelta | None = None
) -> dist.ProcessGroup:
    """Return the group of the part that contains `rank`.

    torch requires every rank to take part in creating every group, including those of other ranks.
    """
    mine = None
    for ranks in parts:
        made = dist.new_group(list(ranks), backend=backend, timeout=timeout)
        mine = made if rank in ranks else mine
    assert mine is not None
    return mine
