"""Where the rank loop's commands come from and its results go to.

The loop has no branch on its rank: what differs is its dispatcher. Rank 0's takes jobs from the
queue and answers them, a follower's does nothing. While the ranks are split into teams, the first
rank of each team has a dispatcher that asks rank 0 over a channel (hosts/ranks/remote_dispatch.py).
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Protocol

from backends.errors import CancelledError
from backends.groups.control_group import Channel
from backends.request import Array, GenerateResult, LoadRequest
from hosts.jobs.decision import Choice, Choose
from hosts.jobs.policy import Sharing, SplitPeriod
from hosts.jobs.queue import Job, JobQueue
from hosts.jobs.trace import spans_of, without_spans
from hosts.ranks.commands import (
    Command,
    Failure,
    Generate,
    Load,
    Outcome,
    Rejoin,
    SplitIntoTeams,
    Stop,
)
from hosts.ranks.model_control import ModelControl
from hosts.ranks.remote_dispatch import CANCEL, END, GO_ON, Check, DispatchServer, RemoteDispatcher
from hosts.supervision.host_state import HostState, Phase

logger = logging.getLogger(__name__)

PERCENT_LOADED = 100.0
"""What GET /progress shows of a loaded pipeline."""
Preview = Callable[[int], Array | None]
"""Return a small image of one row of the running batch."""


class TeamDispatcher(Protocol):
    """What a team of ranks needs."""

    def next_command(self, check: Check) -> Command | None:
        """Return the next command on the team's first rank, already checked; None on the others,
        which receive it.
        """

    def step_signal(self) -> int:
        """Return GO_ON, CANCEL or END, rank 0's signal for this step."""

    def step_done(self, step: int, num_steps: int, preview: Preview) -> None:
        """Record that all ranks of the team have done a step. `preview(row)` returns a small image
        of it, for clients that watch.
        """

    def generated(self, results: Sequence[GenerateResult], outcome: Outcome) -> None:
        """Answer the last Generate: a result for each of its requests, or none and the outcome's
        failure.
        """

    def leave(self) -> None:
        """Take no more jobs for this team, because its groups are broken: all ranks must rejoin."""


class Dispatcher(TeamDispatcher, Protocol):
    """What all ranks together need."""

    def loaded(self, failure: Failure | None) -> None:
        """Report that the pipeline is loaded, or why it is not."""

    def split(self, team_size: int) -> AbstractContextManager[TeamDispatcher]:
        """Return this rank's dispatcher while the ranks are split. Leaving the context waits until
        no other team uses its own.
        """


class FollowerDispatcher:
    """Of a rank without clients."""

    def __init__(self, *, rank: int = 0, channel: Channel | None = None) -> None:
        """channel: to rank 0, if this rank may lead a team."""
        self._rank = rank
        self._channel = channel

    def next_command(self, check: Check) -> Command | None:
        return None

    def step_signal(self) -> int:
        return GO_ON

    def step_done(self, step: int, num_steps: int, preview: Preview) -> None: ...

    def loaded(self, failure: Failure | None) -> None: ...

    def generated(self, results: Sequence[GenerateResult], outcome: Outcome) -> None: ...

    def leave(self) -> None: ...

    def split(self, team_size: int) -> AbstractContextManager[TeamDispatcher]:
        is_first = self._channel is not None and self._rank % team_size == 0
        return nullcontext(RemoteDispatcher(self._channel, rank=self._rank) if is_first else self)


class JobDispatcher:
    """Takes jobs from the queue for a number of ranks, and answers them."""

    def __init__(
        self, *, queue: JobQueue, state: HostState, sharing: Sharing, ranks: int, choose: Choose
    ) -> None:
        """choose: whether to take a job; see JobQueue.next."""
        self._queue = queue
        self._state = state
        self._sharing = sharing
        self._ranks = ranks
        self._choose = choose
        self._rows: dict[int, Job] = {}
        self._batch = 0

    def next_command(self, check: Check) -> Command:
        """Return Generate, or Rejoin when there is no job to take."""
        while (job := self._queue.next(self._choose, ranks=self._ranks)) is not None:
            taken = [job, *self._queue.take_along(job, partial(self._sharing.num_companions, job))]
            if jobs := [job for job in taken if self._passes(job, check)]:
                self._rows, self._batch = dict(enumerate(jobs)), len(jobs)
                return Generate(
                    job_ids=tuple(job.id for job in jobs),
                    requests=tuple(job.request for job in jobs),
                    methods=self._sharing.methods(jobs[0].request, ranks=self._ranks),
                )
        return Rejoin()

    def step_signal(self) -> int:
        """Return CANCEL once no job of the batch is wanted. An unwanted job among others ends here,
        and its row is computed to the end. Return END once all others are to end early.
        """
        unwanted = [row for row, job in self._rows.items() if job.must_stop]
        if len(unwanted) == len(self._rows):
            return CANCEL if unwanted else GO_ON  # none of a throw-away image
        for row in unwanted:
            job = self._rows.pop(row)
            self._queue.finish(
                job,
                error=CancelledError(
                    f"the job was cancelled after step {job.step} of {job.num_steps}."
                ),
            )
        return END if all(job.ends_early for job in self._rows.values()) else GO_ON

    @property
    def rows_in_view(self) -> tuple[int, ...]:
        return tuple(row for row, job in self._rows.items() if job.wants_preview)

    def step_done(self, step: int, num_steps: int, preview: Preview) -> None:
        for row, job in self._rows.items():
            self._queue.record_step(
                job, step, num_steps, preview(row) if job.wants_preview else None
            )

    def generated(self, results: Sequence[GenerateResult], outcome: Outcome) -> None:
        rows, self._rows = self._rows, {}
        self._state.tell_ranks(without_spans(outcome.figures))
        for job in rows.values():
            job.spans = spans_of(outcome.figures)
        if outcome.failure is not None:
            return self._failed(rows, outcome.failure)
        results = [
            replace(result, report={**result.report, "ranks": self._ranks, "batch": self._batch})
            for result in results
        ]
        if "ended_early" not in results[0].report:
            self._learn(next(iter(rows.values())), results[0])
        for row, job in rows.items():
            self._queue.finish(job, result=results[row])

    def _passes(self, job: Job, check: Check) -> bool:
        try:
            check(job.request, self._sharing.methods(job.request, ranks=self._ranks))
        # the other ranks never see a request that is refused here
        except Exception as error:  # noqa: BLE001
            self._queue.finish(job, error=Failure.of(error, rank=0).as_error())
            return False
        return True

    def _learn(self, job: Job, result: GenerateResult) -> None:
        self._sharing.learn(
            job,
            ranks=self._ranks,
            seconds=result.seconds,
            step_seconds=result.report["stages"].get("step", 0.0),
            batch=self._batch,
            method=result.report.get("method", ""),
        )
        facts = {"seconds": result.seconds, "num_steps": result.num_steps, **result.report}
        self._state.tell({"last_report": facts, **self._sharing.measured()})

    def _failed(self, rows: Mapping[int, Job], failure: Failure) -> None:
        """Retry the jobs of a batch one by one, whatever ended it: a fault of one job must not fail
        the others.
        """
        is_of_batch = self._batch > 1 and not isinstance(failure.error, CancelledError)
        if is_of_batch:
            self._sharing.batch_failed(next(iter(rows.values())), batch=self._batch)
        for job in reversed(rows.values()):  # so that the first is in front again
            if (is_of_batch or failure.is_retryable) and self._queue.retry(job):
                logger.warning("job %s is retried", job.id)
            else:
                self._queue.finish(job, error=failure.as_error())

    def leave(self) -> None:
        # wakes the teams that wait for a job
        self._queue.next(lambda waiting, running: Choice.LEAVE)


class LeaderDispatcher(JobDispatcher):
    """Rank 0's: first the load, then jobs for all ranks or the command to split. Stop when the host
    stops or the pipeline is to be changed.
    """

    def __init__(
        self,
        *,
        load: LoadRequest,
        queue: JobQueue,
        state: HostState,
        sharing: Sharing,
        control: ModelControl,
        channels: Mapping[int, Channel] = MappingProxyType({}),
    ) -> None:
        """control: its commands come before the next job. channels: to each other rank, where the
        ranks may split.
        """
        super().__init__(
            queue=queue,
            state=state,
            sharing=sharing,
            ranks=sharing.world_size,
            choose=self._choose_size,
        )
        self._load: LoadRequest | None = load
        self._control = control
        self._channels = channels
        self._team_size: int | None = sharing.world_size
        """Ranks for the next job; None if the pipeline is to be changed."""

    def next_command(self, check: Check) -> Command:
        if self._load is not None:
            load, self._load = self._load, None
            return Load(request=load)
        command = super().next_command(check)
        if not isinstance(command, Rejoin):
            return command
        if self._queue.is_closed or self._team_size is None:
            return Stop()
        return SplitIntoTeams(team_size=self._team_size)

    def loaded(self, failure: Failure | None) -> None:
        """A failure is the model loop's to answer (hosts/ranks/model_loop.py)."""
        if failure is None:
            self._state.loading_percent = PERCENT_LOADED
            self._state.become(Phase.READY)
            self._control.finish(None)

    def generated(self, results: Sequence[GenerateResult], outcome: Outcome) -> None:
        super().generated(results, outcome)
        if self._sharing.has_drifted and not self._queue.num_waiting:
            self._control.measure_again()

    @contextmanager
    def split(self, team_size: int) -> Iterator[TeamDispatcher]:
        """Serve each other team in a thread of its own, and raise the error of any of them."""
        period = SplitPeriod(self._sharing, team_size=team_size)
        services = [
            DispatchServer(channel, self._dispatcher_of(period, team_size), on_loss=period.end)
            for rank, channel in self._channels.items()
            if rank % team_size == 0
        ]
        yield self._dispatcher_of(period, team_size)
        for service in services:
            service.join()

    def _dispatcher_of(self, period: SplitPeriod, team_size: int) -> JobDispatcher:
        return JobDispatcher(
            queue=self._queue,
            state=self._state,
            sharing=self._sharing,
            ranks=team_size,
            choose=self._choose_in(period),
        )

    def _choose_in(self, period: SplitPeriod) -> Choose:
        """What a free team does: the period's choice, unless all ranks are needed for a command or
        another model.
        """

        def choose(waiting: Sequence[Job], running: Sequence[Job]) -> Choice:
            served = self._control.served(waiting)
            if served is None:
                period.end()
            return period.choose(served or (), running)

        return choose

    def _choose_size(self, waiting: Sequence[Job], running: Sequence[Job]) -> Choice:
        served = self._control.served(waiting)
        if served is None:
            self._team_size = None
            return Choice.LEAVE
        if not served:
            return Choice.WAIT
        if self._sharing.may_get_company(served):
            return Choice.LINGER
        self._team_size = self._sharing.team_size(served)
        return Choice.TAKE if self._team_size == self._sharing.world_size else Choice.LEAVE
