"""Links between the GPUs of a group: opened and tested with the group, and aborted together.

For NCCL only; gloo needs neither. torch creates NCCL communicators at first use, which blocks until
all hosts take part. In the middle of a job a host could wait there for ranks that are busy
elsewhere or have failed.
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
POLL_EVERY_S = 0.0005
"""Interval at which the host polls its device."""
Pairs = Sequence[tuple[int, int]]
"""Pairs of positions in a group whose ranks send to each other outside of collectives. All ranks
list them in the same order.
"""


class OpenGroups:
    """The groups of one mesh on this rank, which are aborted together."""

    def __init__(self, device: torch.device, alarm: Alarm | None) -> None:
        """alarm: notifies ranks on GPUs of failures on other ranks."""
        self.alarm = alarm
        self.is_aborted = False  # a rank failed, or the mesh is closed
        self.failed_s: float | None = None  # time.time() at which this rank gave up
        self._device = device
        self._groups: list[dist.ProcessGroup] = []
        self.step_group: dist.ProcessGroup | None = None
        self._lock = threading.Lock()
        self._have_worked = False

    def add(self, group: dist.ProcessGroup) -> None:
        self._groups.append(group)

    def watch(self, step_group: dist.ProcessGroup) -> None:
        """Abort the groups from now on when another rank fails.

        step_group: a CPU group, whose name identifies the mesh.
        """
        self.step_group, self.is_aborted, self.failed_s = step_group, False, None
        if self.alarm is not None and self._device.type == "cuda":
            self.alarm.watch(step_group.group_name, self.abort)

    def give_up(self) -> None:
        """Report that this rank failed on its GPU, and abort pending work.

        Nothing on this rank then waits for the others.
        """
        if self._device.type == "cuda" and self.step_group is not None:
            self.failed_s = time.time()
            self.sound_alarm()
            self.abort()

    def sound_alarm(self) -> None:
        if self.alarm is not None and self.step_group is not None:
            self.alarm.sound(self.step_group.group_name)

    def abort(self) -> None:
        """Abort pending work of the data groups on this rank's GPU. Callable from any thread.

        A single rank has no groups.
        """
        with self._lock:
            if self.step_group is None or self.is_aborted:
                return
            self.is_aborted = True
            if self._device.type == "cuda":
                abort_all([group for group in self._groups if group is not self.step_group])

    def close(self) -> None:
        """Close all groups. Peers that wait in a gloo group fail at once."""
        if self.alarm is not None and self.step_group is not None:
            self.alarm.forget(self.step_group.group_name)
        self.abort()
        # the step group last: closing it waits for ranks that have not received a signal
        for group in reversed(self._groups):
            try:
                dist.destroy_process_group(group)
            except (RuntimeError, ValueError) as error:
                logger.warning("closing a data group failed: %s", error)
        self._groups.clear()
        self.step_group = None

    def wait_for(self, event: torch.cuda.Event) -> None:
        """Wait until the device has reached `event`.

        RuntimeError once another rank has failed: the rest of the work is then useless.
        """
        while not event.query() and not self.is_aborted:
            time.sleep(POLL_EVERY_S)
        if self.is_aborted:
            raise RuntimeError("another rank failed, and the data groups were aborted")

    def open_links(self, axis: "Axis", *, num_stages: int) -> None:
        """Open the links of an axis. Does nothing on CPUs or for an axis without groups."""
        groups = (
            (axis.group, pairs_of(axis.name, axis.size)),
            (axis.reverse_group, pairs_to_last(axis.size, num_stages)),
            (axis.late_group, []),
        )
        for group, who in groups:
            if group is not None and self._device.type == "cuda":
                self._open_group(group, axis, who)

    def _open_group(self, group: dist.ProcessGroup, axis: "Axis", pairs: Pairs) -> None:
        try:
            open_links(group, axis.ranks, axis.rank, device=self._device, pairs=pairs)
        except ConfigError as error:
            if (
                self._have_worked
            ):  # it worked before, so a restart may help; a configuration change would not
                raise RuntimeError(str(error)) from error
            raise
        self._have_worked = True


def pairs_of(name: str, size: int) -> Pairs:
    """Return the pairs of an axis: any two segments, or a stage and the next one."""
    if name == "segment":
        return list(itertools.combinations(range(size), 2))
    return list(itertools.pairwise(range(size))) if name == "stage" else []


def pairs_to_last(size: int, num_stages: int) -> Pairs:
    """Return the pairs of the reverse group.

    The last stage of each half of guidance sends predictions to all stages but the last ones.
    """
    last = range(num_stages - 1, size, num_stages)
    return sorted(
        (min(one, other), max(one, other))
        for one in last
        for other in range(size)
        if other not in last
    )


def is_busy(device: torch.device) -> bool:
    """Whether the device has unfinished work, including waits for other ranks.

    Callable from any thread. Always false for a CPU.
    """
    try:
        return device.type == "cuda" and not torch.cuda.default_stream(device).query()
    except RuntimeError:  # a kernel failed; the code that launched it reports the error
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
    """Create all communicators of a group and use each one once. Collective.

    rank: position of this rank in `ranks`. ConfigError with advice if it fails or exceeds
    `within_s`.
    """
    ones, byte = torch.ones(1, device=device), torch.zeros(1, dtype=torch.uint8, device=device)

    def use() -> None:
        torch.cuda.set_device(device)  # per thread
        dist.all_reduce(ones, group=group)
        for low, high in pairs:
            if rank == low:
                dist.isend(byte, ranks[high], group=group).wait()
            elif rank == high:
                dist.irecv(byte, ranks[low], group=group).wait()
        torch.cuda.synchronize(device)

    problem = _problem_of(use, within_s)
    if problem is None and ones.item() != len(ranks):
        problem = f"the sum of {len(ranks)} ones was {ones.item():g}"
    if problem is not None:
        raise ConfigError(
            f"the GPUs of ranks {', '.join(map(str, ranks))} cannot reach each other: "
            f"{problem}. "
            "Try NCCL_P2P_DISABLE=1 (for boards with broken peer-to-peer access), --ipc=host or "
            "--shm-size=8g in a container, and NCCL_DEBUG=WARN for the reasons that NCCL gives."
        )


def _problem_of(use: Callable[[], None], within_s: float) -> str | None:
    """Return why `use` failed, or None.

    It runs in a thread of its own, because neither a kernel nor a communicator set-up has a time
    limit.
    """
    errors: list[Exception] = []

    def run() -> None:
        try:
            use()
        # torch and NCCL raise many types; all are reported
        except Exception as error:  # noqa: BLE001
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
    """Abort whatever runs or waits in these groups. Callable from any thread.

    All groups at once: NCCL ends a communicator only after earlier work on the device, which may be
    a kernel of another group.
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
