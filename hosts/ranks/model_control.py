"""Commands about the model, which all ranks run between two jobs: load, change, unload, offload or
pause. HTTP threads give them. Imports no torch.

They work like the commands for jobs (hosts/ranks/commands.py): rank 0 broadcasts one, every rank
runs it, and all agree on the outcome.
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
    """Unload the pipeline, and load another."""

    settings: Settings | None
    """Of the pipeline to load; None loads none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offload:
    """Keep the weights in main memory until the next job."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sleep:
    """Pause all ranks but the first. A job that arrives meanwhile waits for them."""

    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """Time the methods again, and choose by the new figures."""

    with_closeness: bool = True
    """Whether to compare an image of each approximate method with one rank's, too. Else the trials
    also end as soon as a job waits.
    """


ModelCommand = Apply | Offload | Sleep | Measure


@dataclass(slots=True, eq=False)
class PendingCommand:
    """A command that an HTTP thread waits for."""

    command: ModelCommand
    error: HostError | None = None
    """Why it failed, once `done` is set."""
    done: threading.Event = field(default_factory=threading.Event)


class ModelControl:
    """The queue of commands between HTTP threads and rank 0's main thread."""

    def __init__(
        self,
        queue: JobQueue,
        *,
        base: Settings,
        plan: Callable[[Settings], StartPlan],
        num_ranks: int,
    ) -> None:
        """base: the host's own settings. plan: what settings mean here; HostError if they cannot
        be. num_ranks: of the host.
        """
        self.base = base
        self.plan = plan
        self.num_ranks = num_ranks
        self.lock = threading.Lock()
        self.applied: dict[str, Any] | None = None
        """The configuration of the loaded pipeline, as it was sent. HTTP threads write it under
        `lock`.
        """
        self._queue = queue
        self._pending: deque[PendingCommand] = deque()
        self._current: PendingCommand | None = None

    def give(self, command: ModelCommand) -> PendingCommand:
        """Give a command without waiting for it."""
        self._pending.append(pending := PendingCommand(command))
        return pending

    def run(self, command: ModelCommand) -> None:
        """Give a command and wait until all ranks have run it. HostError if it failed."""
        if self._queue.is_closed:
            raise UnavailableError("the host is stopping. Try again when it has started.")
        pending = self.give(command)
        # wakes the main thread, which waits for a job
        self._queue.next(lambda waiting, running: Choice.LEAVE)
        pending.done.wait()
        if pending.error is not None:
            raise pending.error

    def choose(self, waiting: Sequence[Job], running: Sequence[Job]) -> Choice:
        """For JobQueue.next while no pipeline is loaded: wait for a command."""
        return Choice.LEAVE if self._pending else Choice.WAIT

    @property
    def is_waiting(self) -> bool:
        """Whether a command should run before the next job."""
        return bool(self._pending)

    def take(self) -> ModelCommand | None:
        """Take the next command, which `finish` must answer. Block until there is one; None once
        the host stops.
        """
        self._queue.next(self.choose)
        if self._queue.is_closed or not self._pending:
            return None
        self._current = self._pending.popleft()
        return self._current.command

    def finish(self, error: HostError | None) -> None:
        """Answer the command that was taken last, unless it has been answered."""
        if self._current is not None:
            current, self._current = self._current, None
            current.error = error
            current.done.set()

    def abandon(self, error: HostError) -> None:
        """Answer all commands with an error, because the host stops."""
        self.finish(error)
        while self._pending:
            pending = self._pending.popleft()
            pending.error = error
            pending.done.set()
