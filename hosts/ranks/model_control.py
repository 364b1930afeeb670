"""What HTTP threads ask of a host whose pipeline is chosen over HTTP: errands that all ranks run
between two jobs. Imports no torch.

The errands are commands like those for jobs (hosts/ranks/commands.py): rank 0 announces one, every
rank does it, all agree on the outcome.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from backends.errors import HostError, UnavailableError
from hosts.jobs.decision import Choice
from hosts.jobs.queue import Job, JobQueue
from hosts.launch.settings import Settings
from hosts.launch.start_plan import StartPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Apply:
    """Load the pipeline of these settings in the place of the one that is loaded, or none at
    all.
    """

    settings: Settings | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Offload:
    """Keep the weights in main memory until the next job."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sleep:
    """All ranks but the first do nothing for so long. A job that comes meanwhile waits for them."""

    seconds: float


ModelCommand = Apply | Offload | Sleep


@dataclass(slots=True, eq=False)
class PendingCommand:
    """An errand on its way, and how it ended."""

    command: ModelCommand
    error: HostError | None = None
    done: threading.Event = field(default_factory=threading.Event)


class ModelControl:
    """The list between HTTP threads, which give errands and wait, and rank 0's main thread, which
    takes them.

    base: the host's own settings. plan: what settings mean here, or why they cannot be. num_ranks:
    of the host.
    applied: the configuration of the loaded pipeline, as it was sent; written by HTTP threads, one
    at a time (`lock`).
    """

    def __init__(
        self,
        queue: JobQueue,
        *,
        base: Settings,
        plan: Callable[[Settings], StartPlan],
        num_ranks: int,
    ) -> None:
        self.base = base
        self.plan = plan
        self.num_ranks = num_ranks
        self.lock = threading.Lock()
        self.applied: dict[str, Any] | None = None
        self._queue = queue
        self._orders: deque[PendingCommand] = deque()
        self._now: PendingCommand | None = None

    def run(self, command: ModelCommand) -> None:
        """Give an errand and wait until all ranks are through with it. HostError if it failed."""
        if self._queue.is_closed:
            raise UnavailableError("the host is stopping.")
        order = PendingCommand(command)
        self._orders.append(order)
        self._queue.next(
            lambda waiting, running: Choice.LEAVE
        )  # wakes the main thread, which waits for a job
        order.done.wait()
        if order.error is not None:
            raise order.error

    def choose(self, waiting: Sequence[Job], running: Sequence[Job]) -> Choice:
        """For JobQueue.next where nothing is loaded: wait for an errand."""
        return Choice.LEAVE if self._orders else Choice.WAIT

    @property
    def is_waiting(self) -> bool:
        """Whether an errand should come before the next job."""
        return bool(self._orders)

    def take(self) -> ModelCommand | None:
        """The next errand, which `finish` must follow. Blocks until there is one; None once the
        host stops.
        """
        self._queue.next(self.choose)
        if self._queue.is_closed or not self._orders:
            return None
        self._now = self._orders.popleft()
        return self._now.command

    def finish(self, error: HostError | None) -> None:
        """The errand that was taken is over; does nothing if its end was told before."""
        if self._now is not None:
            order, self._now = self._now, None
            order.error = error
            order.done.set()

    def abandon(self, error: HostError) -> None:
        """The host stops: answer whoever waits."""
        self.finish(error)
        while self._orders:
            order = self._orders.popleft()
            order.error = error
            order.done.set()
