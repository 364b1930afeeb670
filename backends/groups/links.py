"""The links between the GPUs of a group: made and tried out when the group is opened, and ended all
at once. NCCL only; gloo needs neither.

torch makes NCCL's communicators at their first use, which is a meeting of hosts: in the middle of a
job it could wait for ranks that wait for something else, or that have failed.
"""

import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from backends.errors import ConfigError
from backends.groups.alarm import Alarm

if TYPE_CHECKING:
    from backends.groups.mesh import Axis

logger = logging.getLogger(__name__)

WITHIN_S = 60.0
ABORT_WITHIN_S = 30.0
LOOK_EVERY_S = 0.0005
"""While the host waits for its device."""
Pairs = Sequence[tuple[int, int]]
"""Places in a group of ranks that send to each other outside of collectives; the same order on all
ranks.
"""


class OpenGroups:
    """The groups of one mesh on this rank, and how they end together.

    is_aborted: a rank has failed, or the mesh is closed. failed_s: when this rank gave up
    (time.time), if it did.
    """

    def __init__(self, device: torch.device, alarm: Alarm | None) -> None:
        """alarm: by which ranks on GPUs hear of another's failure."""
        self.alarm = alarm
        self.is_aborted = False
        self.failed_s: float | None = None
        self._device = device
        self._groups: list[dist.ProcessGroup] = []
        self.step_group: dist.ProcessGroup | None = None
        self._lock = threading.Lock()
        self._have_worked = False

    def add(self, group: dist.ProcessGroup) -> None:
        self._groups.append(group)

    def watch(self, step_group: dist.ProcessGroup) -> None:
        """From now on a failure of another rank aborts the groups. step_group: on the CPU; its name
        is that of the mesh.
        """
        self.step_group, self.is_aborted, self.failed_s = step_group, False, None
        if self.alarm is not None and self._device.type == "cuda":
            self.alarm.watch(step_group.group_name, self.abort)

    def give_up(self) -> None:
        """This rank has failed on its GPU: tell the others, and end what is under way, so that
        nothing here waits for them.
        """
        if self._device.type == "cuda" and self.step_group is not None:
            self.failed_s = time.time()
            self.sound_alarm()
            self.abort()

    def sound_alarm(self) -> None:
        if self.alarm is not None and self.step_group is not None:
            self.alarm.sound(self.step_group.group_name)

    def abort(self) -> None:
        """End what waits in the data groups on this rank's GPU. From any thread. A rank by itself
        has none.
        """
        with self._lock:
            if self.step_group is None or self.is_aborted:
                return
            self.is_aborted = True
            if self._device.type == "cuda":
                abort_all([group for group in self._groups if group is not self.step_group])

    def close(self) -> None:
        """Peers that wait in a gloo group fail at once."""
        if self.alarm is not None and self.step_group is not None:
            self.alarm.forget(self.step_group.group_name)
        self.abort()
        # that of the words last: closing it waits for ranks that have not heard one
        for group in reversed(self._groups):
            try:
                dist.destroy_process_group(group)
            except (RuntimeError, ValueError) as error:
                logger.warning("closing a data group failed: %s", error)
        self._groups.clear()
        self.step_group = None

    def wait_for(self, event: torch.cuda.Event) -> None:
        """Until the device has come so far. RuntimeError once another rank has failed: then the
        rest of the work is for nothing.
        """
        while not event.query() and not self.is_aborted:
            time.sleep(LOOK_EVERY_S)
        if self.is_aborted:
            raise RuntimeError("another rank failed, and the data groups were aborted")

    def open_links(self, axis: "Axis", *, num_stages: int) -> None:
        """See below. Nothing to do on CPUs, or for an axis without groups."""
        pairs = pairs_of(axis.name, axis.size), pairs_to_last(axis.size, num_stages)
        for group, who in zip((axis.group, axis.reverse_group), pairs, strict=True):
            if group is not None and self._device.type == "cuda":
                self._open_group(group, axis, who)

    def _open_group(self, group: dist.ProcessGroup, axis: "Axis", pairs: Pairs) -> None:
        try:
            open_links(group, axis.ranks, axis.rank, device=self._device, pairs=pairs)
        except ConfigError as error:
            if self._have_worked:  # then starting again may help, and another configuration not
                raise RuntimeError(str(error)) from error
            raise
        self._have_worked = True


def pairs_of(name: str, size: int) -> Pairs:
    """Of an axis: segments may read from any other, a stage sends to the next."""
    if name == "segment":
        return list(itertools.combinations(range(size), 2))
    return list(itertools.pairwise(range(size))) if name == "stage" else []


def pairs_to_last(size: int, num_stages: int) -> Pairs:
    """Of the group for predictions: the last stage of each half of guidance sends to all stages but
    the last ones.
    """
    last = range(num_stages - 1, size, num_stages)
    return sorted(
        (min(one, other), max(one, other))
        for one in last
        for other in range(size)
        if other not in last
    )


def is_busy(device: torch.device) -> bool:
    """Whether the device has work that is not done: its own, or waiting for other ranks. From any
    thread; never of a CPU.
    """
    try:
        return device.type == "cuda" and not torch.cuda.default_stream(device).query()
    except RuntimeError:  # an error of some kernel, which is told where it was started
        return False


def open_links(
    group: dist.ProcessGroup,
    ranks: Sequence[int],
    rank: int,
    *,
    device: torch.device,
    pairs: Pairs,
    within_s: float = WITHIN_S,
) -> None:
    """Make all communicators of a group and use each once. ConfigError with advice if that fails or
    does not end in time.

    rank: this one's place among `ranks`. Collective.
    """
    ones, byte = torch.ones(1, device=device), torch.zeros(1, dtype=torch.uint8, device=device)

    def use() -> None:
        torch.cuda.set_device(device)  # of this thread
        dist.all_reduce(ones, group=group)
        for low, high in pairs:
            if rank == low:
                dist.isend(byte, ranks[high], group=group).wait()
            elif rank == high:
                dist.irecv(byte, ranks[low], group=group).wait()
        torch.cuda.synchronize(device)

    problem = _problem_of(use, within_s)
    if problem is None and ones.item() != len(ranks):
        problem = f"a sum of {len(ranks)} ones was {ones.item():g}"
    if problem is not None:
        raise ConfigError(
            f"the GPUs of ranks {', '.join(map(str, ranks))} do not reach each other: {problem}. "
            "Try NCCL_P2P_DISABLE=1 (boards whose "
            "peer-to-peer access does not work), in a container --ipc=host or --shm-size=8g, and "
            "NCCL_DEBUG=WARN for NCCL's own reasons."
        )


def _problem_of(use: Callable[[], None], within_s: float) -> str | None:
    """Why it failed. In a thread of its own: neither a kernel nor a meeting of hosts can be given a
    time limit.
    """
    errors: list[Exception] = []

    def run() -> None:
        try:
            use()
        except Exception as error:  # noqa: BLE001  NCCL's and torch's kinds; each is told
            errors.append(error)

    thread = threading.Thread(target=run, name="trying links", daemon=True)
    thread.start()
    thread.join(within_s)
    if thread.is_alive():
        return f"a message of a few bytes did not arrive within {within_s:g} s"
    return (
        f"{type(errors[0]).__name__}: {' '.join(str(errors[0]).split())[:300]}" if errors else None
    )


def abort_all(groups: Sequence[dist.ProcessGroup]) -> None:
    """End whatever runs or waits in these groups, from any thread.

    All at once: NCCL ends a communicator only when what is before it on the device has ended, which
    may be another group's kernel.
    """
    threads = [
        threading.Thread(target=_abort, args=(group,), name="abort", daemon=True)
        for group in groups
    ]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + ABORT_WITHIN_S
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    if any(thread.is_alive() for thread in threads):
        logger.error("the data groups could not be aborted within %g s", ABORT_WITHIN_S)


def _abort(group: dist.ProcessGroup) -> None:
    try:
        group.abort()
    except RuntimeError as error:
        logger.warning("aborting a data group failed: %s", error)
