"""Commands about the model, which all ranks run between two jobs: load, change, unload, offload or
pause. HTTP threads give them. Imports no torch.

They work like the commands for jobs (hosts/ranks/commands.py): rank 0 broadcasts one, every rank
runs it, and all agree on the outcome.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from types import MappingProxyType
from typing import Any

from backends.errors import CancelledError, HostError, NotFoundError, UnavailableError
from hosts.jobs.decision import Choice
from hosts.jobs.job import now
from hosts.jobs.queue import Job, JobQueue
from hosts.launch.settings import Settings
from hosts.launch.start_plan import StartPlan

logger = logging.getLogger(__name__)

MEASURE_EVERY_S = 1800.0
"""Without being asked, methods are measured again no more often: a machine that is always busy
would do little else.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Apply:
    """Unload the pipeline, and load another."""

    settings: Settings | None
    """Of the pipeline to load; None loads none."""
    name: str = ""
    """Of several models: the pipeline stays in main memory when another is loaded. Else empty."""


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
        models: Mapping[str, Settings] = MappingProxyType({}),
    ) -> None:
        """base: the host's own settings. plan: what settings mean here; HostError if they cannot
        be. num_ranks: of the host. models: among which requests choose; none on a host of one.
        """
        self.base = base
        self.plan = plan
        self.num_ranks = num_ranks
        self.lock = threading.Lock()
        self.applied: dict[str, Any] | None = None
        """The configuration of the loaded pipeline, as it was sent. HTTP threads write it under
        `lock`.
        """
        self.models = models
        self._loaded = ""
        self._asking: Job | None = None
        """Runs while the model that it asked for is loaded."""
        self._queue = queue
        self._pending: deque[PendingCommand] = deque()
        self._current: PendingCommand | None = None
        self._measured_s = -MEASURE_EVERY_S

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

    def measure_again(self) -> None:
        """Time the methods again between two jobs, unless that was done lately. The main thread
        calls this.
        """
        if now() - self._measured_s >= MEASURE_EVERY_S:
            self._measured_s = now()
            logger.info("jobs take other times than were measured: the methods are measured again")
            self.give(Measure(with_closeness=False))

    def choose(self, waiting: Sequence[Job], running: Sequence[Job]) -> Choice:
        """For JobQueue.next while no pipeline is loaded: wait for a command, or where jobs choose
        the model also for a job.
        """
        if self._pending:
            return Choice.LEAVE
        return Choice.TAKE if waiting and self.models else Choice.WAIT

    def served(self, waiting: Sequence[Job]) -> Sequence[Job] | None:
        """Return the first of the waiting jobs, as far as the loaded pipeline can do them; None if
        a command comes first, or the next job needs another model.
        """
        if self._pending:
            return None
        if not self.models:
            return waiting
        found = list(takewhile(lambda job: job.request.model == self._loaded, waiting))
        return found if found or not waiting else None

    def take(self) -> ModelCommand | None:
        """Take the next command, which `finish` must answer. Block until there is one; None once
        the host stops.

        A job whose model is not loaded is a command to load it.
        """
        while (job := self._queue.next(self.choose)) is not None:
            if (name := job.request.model) in self.models:
                self._asking, self._loaded = job, name
                return Apply(settings=self.models[name], name=name)
            self._queue.finish(job, error=self._unknown(name))
        if self._queue.is_closed or not self._pending:
            return None
        self._current = self._pending.popleft()
        return self._current.command

    @property
    def loaded(self) -> dict[str, str]:
        """Return the fact which of several models is loaded."""
        return {"model": self._loaded} if self.models else {}

    def _unknown(self, name: str | None) -> NotFoundError:
        """The error of a job that an earlier host has left in the store."""
        return NotFoundError(
            f"there is no model {name!r} any more. Allowed: {', '.join(self.models)}."
        )

    def finish(self, error: HostError | None) -> None:
        """Answer the command that was taken last, unless it has been answered. The job that asked
        for a model is the next one, or fails; while the host stops it is left to the queue.
        """
        job, self._asking = self._asking, None
        if job is not None and not self._queue.is_closed:
            self._end_or_retry(job, error)
        self._answer(error)

    def _end_or_retry(self, job: Job, error: HostError | None) -> None:
        if error is not None or not self._queue.retry(job, was_begun=False):
            cancelled = CancelledError("the job was cancelled while its model was loaded.")
            self._queue.finish(job, error=error or cancelled)

    def _answer(self, error: HostError | None) -> None:
        if self._current is not None:
            current, self._current = self._current, None
            current.error = error
            current.done.set()

    def abandon(self, error: HostError) -> None:
        """Answer all commands with an error, because the host stops."""
        self._answer(error)
        while self._pending:
            pending = self._pending.popleft()
            pending.error = error
            pending.done.set()
