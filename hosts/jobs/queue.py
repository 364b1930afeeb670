"""The queue between HTTP threads and the rank loop: what waits and what runs. Bounded, thread-safe,
pure Python.

Jobs that can be looked up are in hosts/jobs/archive.py. Jobs that must outlive the ranks are also
in hosts/jobs/store.py, and hosts/jobs/recovery.py finds them after a restart.
"""

import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from backends.errors import BusyError, CancelledError, HostError
from backends.request import Array, GenerateRequest, GenerateResult
from hosts.jobs import serialization
from hosts.jobs.archive import Archive
from hosts.jobs.decision import LINGER_S, Choice, Choose, choose_or_take, count_or_none, take_first
from hosts.jobs.fair_share import WaitingJobs
from hosts.jobs.job import Job, JobStatus, cancelled_before_it_ran, now
from hosts.jobs.recovery import Recovery, recover
from hosts.jobs.store import NoStore, Store
from hosts.launch.settings import Settings
from hosts.supervision.exit_reports import ExitReport

__all__ = ["Job", "JobQueue", "JobStatus", "queue_within"]

ID_BYTES = 12
"""Random bytes of an id, which nobody can guess. Links and logs show ids, so they are no secret."""


class JobQueue:
    """Clients take turns, and each client's jobs run in their order. As many jobs run at once as
    were taken with `next`.
    """

    def __init__(
        self,
        *,
        capacity: int = 48,
        max_seconds: float = 0,
        num_kept: int = 64,
        kept_bytes: int = 256 * 2**20,
        kept_seconds: float = 0,
        store: Store | None = None,
        complete: Callable[[ExitReport], ExitReport] = lambda report: report,
        now: Callable[[], float] = now,
    ) -> None:
        """Open a queue with the jobs that an earlier process left in the store.

        capacity: jobs that may wait; one more is a BusyError. A client of which none waits gets one
        of further places, half as many: others cannot shut it out.
        max_seconds: from submission to the end of a job; 0 for no limit.
        num_kept, kept_bytes, kept_seconds: which finished jobs are kept; see Archive.
        store: where jobs that are submitted with `is_stored` outlive this process.
        complete: see `recover`.
        now: the clock of all its jobs.
        """
        self._capacity = capacity
        self._max_seconds = max_seconds
        self._store = store or NoStore()
        self._now = now
        self._archive = Archive(
            store=self._store,
            num_kept=num_kept,
            kept_bytes=kept_bytes,
            kept_seconds=kept_seconds,
            now=now,
        )
        self._changed = threading.Condition()
        """The lock of all that follows, notified at each change."""
        self._waiting = WaitingJobs()
        self._running: list[Job] = []
        self._closed: HostError | None = None
        """Why nothing is accepted any more."""
        self._percents: dict[str, float] = {}
        """Owner -> progress of the last job that ended. The latest is last."""
        self.on_end: list[Callable[[Job], None]] = []
        """Called with each job that is over, while the queue is locked. They must be quick and not
        call the queue.
        """
        with self._changed:
            self._take_over(recover(self._store, complete))

    def submit(
        self,
        request: GenerateRequest,
        *,
        client: str = "",
        owner: str = "",
        is_kept: bool = False,
        is_stored: bool = False,
        key: str | None = None,
        series: str = "",
    ) -> Job:
        """Queue a request and return its job. BusyError if the queue is full.

        client: takes turns with the others.
        owner: whose job it is; see `find`.
        is_kept: whether the job can be looked up by id.
        is_stored: whether it outlives this process, if there is a store. It is kept in any case.
        key: the client's own name for the job. The same client with the same key and the same
        request gets the job that it already has.
        series: names the jobs of one HTTP request; see `end_early`.
        """
        job = self._new_job(
            request,
            client=client,
            owner=owner,
            is_kept=is_kept or is_stored,
            is_stored=is_stored and self._store.is_durable,
            key=key,
        )
        job.series = series
        with self._changed:
            if known := self._archive.same_key(job):
                return known
            self._require_room(job)
        if job.is_stored:
            self._store.put_inputs(job)  # perhaps megabytes, so not while the queue is locked
        try:
            with self._changed:
                return self._accept(job)
        finally:
            if job.is_stored and job.version == 0:  # another was faster, or the row failed
                self._store.drop_inputs(job)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Make the jobs that are submitted inside visible to the ranks all at once, so that the
        ranks can share them out. Not for stored jobs.
        """
        with self._changed:
            yield

    def next(self, choose: Choose = take_first, *, ranks: int | None = None) -> Job | None:
        """Start the next job and return it. Block while `choose` says so. Return None once the
        queue is closed, or if `choose` says LEAVE. ranks: how many will work on it.
        """
        with self._changed:
            while (choice := self._choice(choose)) in (Choice.WAIT, Choice.LINGER):
                self._changed.wait(LINGER_S if choice is Choice.LINGER else None)
            if choice is Choice.LEAVE:
                self._changed.notify_all()  # other teams may have to leave too
                return None
            job = self._waiting.in_order()[0]
            self._begin(job, ranks=ranks, batch=job.id)
            return job

    def take_along(
        self, job: Job, count: Callable[[Sequence[Job], Sequence[Job]], int]
    ) -> list[Job]:
        """Start the next jobs in one batch with this one and return them. count(waiting, running):
        how many; arithmetic only, since the queue is locked.
        """
        with self._changed:
            waiting = self._waiting.in_order() if self._closed is None else []
            taken = waiting[: count_or_none(count, waiting, self._running)]
            for other in taken:
                self._begin(other, ranks=job.ranks, batch=job.batch)
            return taken

    def record_step(
        self, job: Job, step: int, num_steps: int, preview: Array | None = None
    ) -> None:
        """Record that `step` of `num_steps` scheduler steps are done."""
        with self._changed:
            job.step, job.num_steps = step, num_steps
            job.percent = max(job.percent, 100.0 * step / num_steps)
            job.preview = preview if preview is not None else job.preview
            self._notify(job)

    def finish(
        self, job: Job, *, result: GenerateResult | None = None, error: HostError | None = None
    ) -> None:
        """End the running job. If the host stops, a stored job is left to the next process instead.
        The progress of a failed job is 0.
        """
        if result is not None and job.is_stored:
            # before any client can see it, and not while the queue is locked
            self._store.put_result(job, result)
        with self._changed:
            self._remove_running(job)
            self._percents.pop(job.owner, None)
            self._percents[job.owner] = 100.0 if error is None else 0.0
            if isinstance(error, CancelledError):
                if job.is_interrupted and not job.cancel_requested and not job.is_late:
                    return self._leave_to_next_process(job)
                error = _why_cancelled(job, error)
            self._end(job, result=result, error=error)

    def retry(self, job: Job, *, was_begun: bool = True) -> bool:
        """Put the running job back to the front and return True. Return False if it has had its
        attempts, was cancelled, or the queue is closed. was_begun: whether this attempt counts.
        """
        with self._changed:
            job.attempts -= not was_begun
            if not job.may_start_again or job.must_stop or self._closed is not None:
                return False
            self._remove_running(job)
            self._waiting.give_back_turn(job)
            self._put_back(job)
            return True

    def cancel(self, job: Job, reason: str = "") -> None:
        """Cancel the job: a waiting one ends now, a running one at its next step on all ranks. A
        job that is over does not change.
        """
        with self._changed:
            if job.finished.is_set():
                return
            job.cancel_requested, job.cancel_reason = True, reason
            if job in self._waiting:
                self._waiting.remove(job)
                self._end(job, error=cancelled_before_it_ran(job))
            else:
                self._save(job)

    def end_early(self, job: Job, *, with_series: bool) -> None:
        """End a running job at its next step, with an image. with_series: cancel the others of its
        series, which wait.
        """
        with self._changed:
            job.ends_early = job in self._running
            for other in self._waiting if job.ends_early and with_series else ():
                if job.series and other.series == job.series:
                    self.cancel(other, "the request was interrupted before it ran.")

    def forget(self, job: Job) -> None:
        """Cancel the job. If it is over then, forget it."""
        self.cancel(job)
        with self._changed:
            if job.finished.is_set():
                self._archive.forget(job)

    def find(self, job_id: str, *, owner: str | None = None) -> Job:
        """Return a kept job, at any stage. NotFoundError if it is unknown, forgotten or another
        owner's. owner: None for anybody's job.
        """
        with self._changed:
            return self._archive.find(job_id, owner=owner)

    def jobs(self, *, owner: str | None = None) -> list[Job]:
        """Return this owner's or all jobs: those left to the next process, the running, the
        waiting (in the order in which they will run), and the finished ones, newest first.
        """
        with self._changed:
            active = [*self._running, *self._waiting.in_order()]
            left = [job for job in self._archive.unfinished() if job not in active]
            found = [*left, *active, *reversed(self._archive.finished())]
            return [job for job in found if job.is_seen_by(owner)]

    def position(self, job: Job) -> int:
        """Return how many jobs are ahead of this one; 0 once it runs or is over."""
        with self._changed:
            if job not in self._waiting:
                return 0
            return len(self._running) + self._waiting.in_order().index(job)

    def wait_for_change(self, job: Job, version: int, timeout_s: float) -> int:
        """Block until the job's version is no longer `version`, or until the timeout. Return it."""
        with self._changed:
            self._changed.wait_for(lambda: job.version != version, timeout_s)
            return job.version

    def close(self, reason: HostError, *, finish_running: bool = False) -> None:
        """Accept no more jobs, and interrupt the running ones. Waiting jobs fail with this reason,
        but stored ones are left to the next process.
        """
        with self._changed:
            self._closed = self._closed or reason
            for job in self._waiting:
                if not job.is_stored:
                    self._waiting.remove(job)
                    self._end(job, error=reason)
            self._changed.notify_all()
        if not finish_running:
            self.interrupt()

    def interrupt(self) -> None:
        """End the running jobs at their next step because the host stops. For stored jobs this
        attempt does not count.
        """
        with self._changed:
            for job in self._running:
                if not job.is_interrupted:
                    job.is_interrupted = True
                    if job.is_stored:
                        job.status, job.attempts = JobStatus.QUEUED, job.attempts - 1
                        self._save(job)

    def wait_until_idle(self, timeout_s: float) -> bool:
        """Block until no job runs, or until the timeout. Return whether none runs."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._running, timeout_s)

    def abandon(self, reason: HostError) -> None:
        """Close the queue when the rank loop has ended: running jobs fail too. Stored ones are
        started again by the next process.
        """
        self.close(reason, finish_running=True)
        with self._changed:
            for job in self._running:
                if not job.is_stored:
                    self._end(job, error=reason)
            self._running.clear()

    def percent(self, *, owner: str | None = None) -> float:
        """Return the progress of the owner's oldest running job, or of the last one: 0 to 100."""
        with self._changed:
            for job in self._running:
                if job.is_seen_by(owner):
                    return job.percent
            ended = self._percents
            return ended.get(owner, 0.0) if owner is not None else [0.0, *ended.values()][-1]

    @property
    def is_closed(self) -> bool:
        return self._closed is not None

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def _new_job(
        self,
        request: GenerateRequest,
        *,
        client: str,
        owner: str,
        is_kept: bool,
        is_stored: bool,
        key: str | None,
    ) -> Job:
        """Return a job that is not queued yet. The seed is chosen here if the client left it open,
        so that a second attempt generates the same image.
        """
        created_s = self._now()
        seed = request.seed
        if seed is None or seed < 0:
            seed = secrets.randbelow(2**32)
        return Job(
            id=secrets.token_hex(ID_BYTES),
            request=request.model_copy(update={"seed": seed}),
            client=client,
            owner=owner,
            key=key,
            fingerprint=serialization.fingerprint(request) if key is not None else "",
            is_kept=is_kept,
            is_stored=is_stored,
            clock=self._now,
            created_s=created_s,
            deadline_s=created_s + self._max_seconds if self._max_seconds else None,
        )

    def _accept(self, job: Job) -> Job:
        """Queue the job and return it, or return the one that was sent under its key meanwhile."""
        if known := self._archive.same_key(job):
            return known
        self._require_room(job)
        if job.is_stored:
            self._store.add(job)
        self._waiting.add(job)
        self._archive.add(job)
        self._notify(job)
        return job

    def _require_room(self, job: Job) -> None:
        """The reason for closing, or BusyError, if the job cannot be accepted."""
        if self._closed is not None:
            raise self._closed
        num_waiting, extra = len(self._waiting), -(-self._capacity // 2)
        is_first = self._waiting.num_of(job.client) == 0
        if num_waiting >= self._capacity + (extra if is_first else 0):
            raise BusyError(
                f"the queue is full: {num_waiting} jobs are waiting. Try again when one is done."
            )

    def _choice(self, choose: Choose) -> Choice:
        """Return what a rank does now, after the late jobs are cancelled."""
        for job in self._waiting:
            if job.is_late:
                self._waiting.remove(job)
                self._end(job, error=_too_late(job))
        if self._closed is not None:
            return Choice.LEAVE
        return choose_or_take(choose, self._waiting.in_order(), self._running)

    def _begin(self, job: Job, *, ranks: int | None, batch: str) -> None:
        self._waiting.begin(job)
        job.ranks, job.batch = ranks, batch
        job.status, job.started_s = JobStatus.RUNNING, self._now()
        job.attempts += 1
        self._save(job)
        self._running.append(job)
        self._notify(job)

    def _remove_running(self, job: Job) -> None:
        if job in self._running:  # else the queue was abandoned meanwhile
            self._running.remove(job)

    def _put_back(self, job: Job) -> None:
        """Let the job wait in front of all others, with its progress at 0."""
        job.status, job.step, job.percent, job.started_s = JobStatus.QUEUED, 0, 0.0, None
        self._waiting.put_in_front(job)
        self._save(job)
        self._notify(job)

    def _leave_to_next_process(self, job: Job) -> None:
        """Keep a stored job as it is in the store. Others fail, because the host stops."""
        if not job.is_stored:
            self._end(job, error=self._closed)
        self._changed.notify_all()

    def _take_over(self, found: Recovery) -> None:
        for job in found.jobs:
            job.clock = self._now
            self._archive.add(job)
        for job in found.queued:
            job.step, job.started_s = 0, None
            self._waiting.add(job)
        for job in reversed(found.interrupted):  # so that the first is in front
            self._put_back(job)
        for job, error in found.failed:
            self._end(job, error=error)
        self._archive.forget_old()

    def _end(
        self, job: Job, *, result: GenerateResult | None = None, error: HostError | None = None
    ) -> None:
        """Set the outcome of a job. The first outcome stays."""
        if job.finished.is_set():
            return
        job.result, job.error = result, error
        job.ended_s = self._now()
        status = _final_status(error)
        self._save(job, status)  # before any client sees it: after a restart it must be the same
        job.status = status
        job.finished.set()
        for listener in self.on_end:
            listener(job)
        self._notify(job)
        self._archive.forget_old()

    def _save(self, job: Job, status: JobStatus | None = None) -> None:
        """Write a change of an accepted job to the store."""
        if job.is_stored:
            self._store.save(job, status or job.status)

    def _notify(self, job: Job) -> None:
        job.version += 1
        self._changed.notify_all()


def queue_within(
    settings: Settings,
    store: Store | None,
    *,
    complete: Callable[[ExitReport], ExitReport] = lambda report: report,
) -> JobQueue:
    """Return a queue with the operator's limits. complete: see JobQueue."""
    return JobQueue(
        capacity=settings.queue_size,
        max_seconds=settings.max_job_seconds,
        num_kept=settings.keep_results,
        kept_bytes=settings.keep_results_mb * 10**6,
        kept_seconds=settings.keep_results_hours * 3600,
        store=store,
        complete=complete,
    )


def _final_status(error: HostError | None) -> JobStatus:
    if error is None:
        return JobStatus.DONE
    return JobStatus.CANCELLED if isinstance(error, CancelledError) else JobStatus.FAILED


def _why_cancelled(job: Job, error: CancelledError) -> CancelledError:
    """Return the reason why a running job was cancelled. error: what the ranks say of it."""
    if job.cancel_reason:
        return CancelledError(job.cancel_reason)
    return _too_late(job) if job.is_late else error


def _too_late(job: Job) -> CancelledError:
    seconds = (job.deadline_s or 0.0) - job.created_s
    return CancelledError(
        f"the job was not done {seconds:g} s after it was sent, which is this host's limit "
        "(--max_job_seconds). Ask for fewer steps or a smaller size."
    )
