"""The queue between HTTP threads and the rank loop. Bounded, thread-safe, pure Python; what must
outlive the ranks goes to its store.
"""

import itertools
import logging
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from backends.errors import BusyError, CancelledError, HostError, NotFoundError, RequestError
from backends.request import Array, GenerateRequest, GenerateResult
from hosts.jobs import serialization
from hosts.jobs.clock import now
from hosts.jobs.decision import LINGER_S, Choice, Choose, choose_or_take, count_or_none, take_first
from hosts.jobs.fair_share import Turns
from hosts.jobs.job import Job, JobStatus
from hosts.jobs.store import NoStore, Store
from hosts.launch.settings import Settings
from hosts.supervision.exit_reports import ExitReport

__all__ = ["Job", "JobQueue", "JobStatus"]

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 2
"""How often a job is begun, if what ended the attempt before was nothing that the client could
change.
"""


class JobQueue:
    """Clients take turns, each client's jobs in the order they came; as many jobs run as were asked
    for with `next`.

    capacity: jobs that may wait; one more is a BusyError. max_seconds: from submission to the end
    of a job, 0 for any time. Finished jobs that were submitted with `is_kept` can be asked for by
    id until `num_kept` newer ones or more than `kept_bytes` push them out, or until `kept_seconds`
    have gone by (0: any time).
    store: where jobs that were submitted with `is_stored` outlive this process. Those that an
    earlier one left are taken over at once: the one that ran is begun again, unless it was the
    second time.
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
        complete: Callable[[ExitReport], ExitReport] = lambda ending: ending,
    ) -> None:
        """complete: adds to the last words of an earlier process what else is known of its end."""
        self._capacity = capacity
        self._max_seconds = max_seconds
        self._num_kept = num_kept
        self._kept_bytes = kept_bytes
        self._kept_seconds = kept_seconds
        self._store = store or NoStore()
        self._outlives = store is not None
        self._complete = complete
        self._changed = threading.Condition()
        self._waiting: list[Job] = []
        self._running: list[Job] = []
        self._kept: dict[str, Job] = {}
        self._by_key: dict[tuple[str, str], Job] = {}
        self._turns = Turns()
        self._closed: HostError | None = None
        self._percent = 0.0
        self._numbers = itertools.count(1)
        self._start_id = secrets.token_hex(4)
        self.on_end: list[Callable[[Job], None]] = []
        """Called with each job that is over, while the queue is locked: quick, and never back into
        the queue.
        """
        with self._changed:
            self._take_over()

    def submit(
        self,
        request: GenerateRequest,
        *,
        client: str = "",
        is_kept: bool = False,
        is_stored: bool = False,
        key: str | None = None,
    ) -> Job:
        """Queue a request. The seed is drawn here if it was left to us, so that a retried job makes
        the same image.

        key: the client's own name for the job; the same client with the same key and request gets
        the job it has already.
        """
        mark = serialization.fingerprint(request) if key is not None else ""
        seed = (
            request.seed
            if request.seed is not None and request.seed >= 0
            else secrets.randbelow(2**32)
        )
        job = Job(
            id=f"{self._start_id}-{next(self._numbers)}",
            request=request.model_copy(update={"seed": seed}), client=client, key=key,
            fingerprint=mark, is_kept=is_kept or is_stored, is_stored=is_stored and self._outlives,
        )  # fmt: skip
        job.deadline_s = job.created_s + self._max_seconds if self._max_seconds else None
        with self._changed:
            if known := self._known(job):
                return known
            self._require_room()
        if job.is_stored:
            self._store.put_inputs(job)  # may be megabytes: not while the queue is locked
        try:
            with self._changed:
                if known := self._known(job):
                    return known
                self._require_room()
                if job.is_stored:
                    self._store.save(job, job.status)
                self._turns.join(client, self._waiting)
                self._waiting.append(job)
                self._keep(job)
                self._tell(job)
        finally:
            if (
                job.is_stored and job.version == 0
            ):  # not accepted: another one was quicker, or it cannot be written
                self._store.drop_inputs(job)
        return job

    @contextmanager
    def together(self) -> Iterator[None]:
        """Jobs that are submitted within become visible to the ranks all at once, so that these can
        share them out. Not for stored ones.
        """
        with self._changed:
            yield

    def next(self, choose: Choose = take_first, *, ranks: int | None = None) -> Job | None:
        """The next job, now running on so many ranks; blocks while `choose` says so. None once the
        queue is closed, or if it says LEAVE.
        """
        with self._changed:
            while (choice := self._choice(choose)) in (Choice.WAIT, Choice.LINGER):
                self._changed.wait(LINGER_S if choice is Choice.LINGER else None)
            if choice is Choice.LEAVE:
                self._changed.notify_all()  # whoever waits may have to leave too
                return None
            job = self._order()[0]
            self._begin(job, ranks=ranks, batch=job.id)
            return job

    def take_along(
        self, job: Job, count: Callable[[Sequence[Job], Sequence[Job]], int]
    ) -> list[Job]:
        """The jobs whose turn it is next, now running in one batch with this one: count(waiting,
        running) of them, arithmetic only.
        """
        with self._changed:
            waiting = self._order() if self._closed is None else []
            taken = waiting[: count_or_none(count, waiting, self._running)]
            for other in taken:
                self._begin(other, ranks=job.ranks, batch=job.batch)
            return taken

    def record_step(
        self, job: Job, step: int, num_steps: int, preview: Array | None = None
    ) -> None:
        """`step` of `num_steps` scheduler steps are done."""
        with self._changed:
            job.step, job.num_steps = step, num_steps
            job.percent = max(job.percent, 100.0 * step / num_steps)
            job.preview = preview if preview is not None else job.preview
            self._tell(job)

    def finish(
        self, job: Job, *, result: GenerateResult | None = None, error: HostError | None = None
    ) -> None:
        """The job is over, unless the host stops and leaves it to the next one. A failed one leaves
        the progress at 0.
        """
        if result is not None and job.is_stored:
            self._store.put_result(
                job, result
            )  # before anybody can see it, and not while the queue is locked
        with self._changed:
            self._runs_no_more(job)
            self._percent = 100.0 if error is None else 0.0
            if isinstance(error, CancelledError):
                if job.is_interrupted and not job.cancel_requested and not job.is_late:
                    return self._leave_to_next(job)
                error = (
                    CancelledError(job.cancel_reason)
                    if job.cancel_reason
                    else _too_late(job)
                    if job.is_late
                    else error
                )
            self._settle(job, result=result, error=error)

    def retry(self, job: Job, *, was_begun: bool = True) -> bool:
        """Put the running job back in front, to be begun once more; False if it has had its
        attempts, or is not wanted any more.

        was_begun: whether this attempt counts.
        """
        with self._changed:
            job.attempts -= not was_begun
            if job.attempts >= MAX_ATTEMPTS or job.must_stop or self._closed is not None:
                return False
            self._runs_no_more(job)
            self._turns.give_back(job)
            self._put_back(job)
            return True

    def cancel(self, job: Job, reason: str = "") -> None:
        """A queued job ends here; a running one at its next step, on all ranks; one that is over
        stays as it is.
        """
        with self._changed:
            if job.finished.is_set():
                return
            job.cancel_requested, job.cancel_reason = True, reason
            if job in self._waiting:
                self._waiting.remove(job)
                self._settle(job, error=_cancelled(job))
            else:
                self._save(job)

    def forget(self, job: Job) -> None:
        """Cancel the job, and forget it where it is over: a running one ends at its next step."""
        self.cancel(job)
        with self._changed:
            if job.finished.is_set():
                self._forget(job)

    def find(self, job_id: str) -> Job:
        """A job that was submitted to be kept, at any stage. NotFoundError if it is not known, or
        not known any more.
        """
        with self._changed:
            self._forget_old()
            if job_id not in self._kept:
                end = "." if self._outlives else ", and not after a restart."
                raise NotFoundError(
                    f"there is no job {job_id!r}. Jobs are known until {self._num_kept} newer ones "
                    f"are done{end}"
                )
            return self._kept[job_id]

    def jobs(self) -> list[Job]:
        """The running jobs, those that wait in the order in which they will run, and the kept ones
        that are over, newest first.
        """
        with self._changed:
            over = [job for job in self._kept.values() if job.finished.is_set()]
            return [*self._running, *self._order(), *reversed(over)]

    def position(self, job: Job) -> int:
        """How many jobs run before this one; 0 once it runs or is over."""
        with self._changed:
            return self._order().index(job) + len(self._running) if job in self._waiting else 0

    def wait_for_change(self, job: Job, version: int, timeout_s: float) -> int:
        """Block until the job has changed since `version` or the time is over; its version now."""
        with self._changed:
            self._changed.wait_for(lambda: job.version != version, timeout_s)
            return job.version

    def close(self, reason: HostError, *, finish_running: bool = False) -> None:
        """Refuse what comes and stop what runs. What waits fails with this reason, or is left to
        the next host where there is a store.
        """
        with self._changed:
            self._closed = self._closed or reason
            for job in [job for job in self._waiting if not job.is_stored]:
                self._waiting.remove(job)
                self._settle(job, error=reason)
            self._changed.notify_all()
        if not finish_running:
            self.interrupt()

    def interrupt(self) -> None:
        """End the running jobs at their next step because the host stops. It costs stored ones no
        attempt.
        """
        with self._changed:
            for job in self._running:
                if not job.is_interrupted:
                    job.is_interrupted = True
                    if job.is_stored:
                        job.status, job.attempts = JobStatus.QUEUED, job.attempts - 1
                        self._save(job)

    def wait_until_idle(self, timeout_s: float) -> bool:
        """Whether no job runs any more, at the latest after `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._running, timeout_s)

    def abandon(self, reason: HostError) -> None:
        """The rank loop is gone: close, and answer for the running jobs too. A stored one is the
        next host's to begin again.
        """
        self.close(reason, finish_running=True)
        with self._changed:
            for job in self._running:
                if not job.is_stored:
                    self._settle(job, error=reason)
            self._running.clear()

    @property
    def percent(self) -> float:
        """Progress of the oldest running job, or of the last one: 0 to 100."""
        running = self._running[:1]
        return running[0].percent if running else self._percent

    @property
    def is_closed(self) -> bool:
        return self._closed is not None

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def _choice(self, choose: Choose) -> Choice:
        for job in [job for job in self._waiting if job.is_late]:
            self._waiting.remove(job)
            self._settle(job, error=_too_late(job))
        return (
            Choice.LEAVE
            if self._closed is not None
            else choose_or_take(choose, self._order(), self._running)
        )

    def _begin(self, job: Job, *, ranks: int | None, batch: str) -> None:
        self._waiting.remove(job)
        job.ranks, job.batch = ranks, batch
        job.status, job.started_s = JobStatus.RUNNING, now()
        job.attempts += 1
        self._save(job)
        self._turns.begin(job)
        self._running.append(job)
        self._tell(job)

    def _runs_no_more(self, job: Job) -> None:
        if job in self._running:  # else the queue was abandoned meanwhile
            self._running.remove(job)

    def _take_over(self) -> None:
        """What an earlier process left in the store."""
        jobs = self._store.load()
        words = self._store.last_report()  # read in any case: another time they would be wrong
        if any(job.status is JobStatus.RUNNING for job in jobs):
            words = self._complete(words)
        for job in jobs:
            self._keep(job)
            if job.status is JobStatus.QUEUED and not job.cancel_requested:
                job.step, job.started_s = 0, None
                self._waiting.append(job)
            elif job.cancel_requested and not job.finished.is_set():
                self._settle(job, error=_cancelled(job))
            elif job.status is JobStatus.RUNNING and job.attempts >= MAX_ATTEMPTS:
                self._settle(job, error=_gave_up(job, words))
            elif job.status is JobStatus.RUNNING:
                logger.warning(
                    "job %s is begun again: the ranks ended while it ran (%s)", job.id, words.why
                )
                self._put_back(job)
        if self._waiting:
            logger.info("%d jobs were taken over from the store", len(self._waiting))
        self._forget_old()

    def _known(self, job: Job) -> Job | None:
        """The job that this client has already sent under this key. RequestError if it asked for
        something else.
        """
        known = self._by_key.get((job.client, job.key)) if job.key is not None else None
        if known is not None and known.fingerprint != job.fingerprint:
            raise RequestError(
                f"Idempotency-Key={job.key!r} belongs to job {known.id!r}, which asked for "
                "something else. Use a new key for a new job.",
                field="Idempotency-Key",
            )
        return known

    def _require_room(self) -> None:
        if self._closed is not None:
            raise self._closed
        if len(self._waiting) >= self._capacity:
            raise BusyError(
                f"the queue is full: {self._capacity} jobs are waiting. Try again when one is done."
            )

    def _keep(self, job: Job) -> None:
        if job.is_kept:
            self._kept[job.id] = job
        if job.is_kept and job.key is not None:
            self._by_key[job.client, job.key] = job

    def _put_back(self, job: Job) -> None:
        job.status, job.step, job.percent, job.started_s = JobStatus.QUEUED, 0, 0.0, None
        self._waiting.insert(0, job)
        self._save(job)
        self._tell(job)

    def _leave_to_next(self, job: Job) -> None:
        """The host stopped it: stored ones wait for the next host, others are answered."""
        if not job.is_stored:
            self._settle(job, error=self._closed)
        self._changed.notify_all()

    def _save(self, job: Job, status: JobStatus | None = None) -> None:
        """A change of a job that was accepted. If it cannot be written the job goes on: after a
        restart it may then run once more.
        """
        if not job.is_stored:
            return
        try:
            self._store.save(job, status or job.status)
        except HostError as error:
            logger.error("job %s: %s", job.id, error)

    def _order(self) -> list[Job]:
        return self._turns.order(self._waiting)

    def _settle(
        self, job: Job, *, result: GenerateResult | None = None, error: HostError | None = None
    ) -> None:
        if job.finished.is_set():
            return
        job.result, job.error = result, error
        job.ended_s = now()
        ended = {True: JobStatus.CANCELLED, False: JobStatus.FAILED}[
            isinstance(error, CancelledError)
        ]
        status = JobStatus.DONE if error is None else ended
        self._save(
            job, status
        )  # nobody is told of an outcome that could be another one after a restart
        job.status = status
        job.finished.set()
        for listener in self.on_end:
            listener(job)
        self._tell(job)
        self._forget_old()

    def _forget_old(self) -> None:
        over = [job for job in self._kept.values() if job.finished.is_set()]
        oldest = now() - self._kept_seconds if self._kept_seconds else 0.0
        while over and (over[0].ended_s < oldest or (len(over) > 1 and self._are_too_many(over))):
            self._forget(over.pop(0))

    def _are_too_many(self, over: list[Job]) -> bool:
        return len(over) > self._num_kept or sum(job.num_bytes for job in over) > self._kept_bytes

    def _forget(self, job: Job) -> None:
        self._kept.pop(job.id, None)
        self._by_key.pop((job.client, job.key), None)
        if not job.is_stored:
            return
        try:
            self._store.forget(job)
        except HostError as error:
            logger.error("job %s stays in the store: %s", job.id, error)

    def _tell(self, job: Job) -> None:
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


def _too_late(job: Job) -> CancelledError:
    seconds = job.deadline_s - job.created_s
    return CancelledError(
        f"the job was not done {seconds:g} s after it was sent, which is this host's limit "
        "(--max_job_seconds). Ask for less."
    )


def _cancelled(job: Job) -> CancelledError:
    return CancelledError(job.cancel_reason or "the job was cancelled before it ran.")


def _gave_up(job: Job, ending: ExitReport) -> HostError:
    return HostError(
        f"the ranks ended {job.attempts} times while this job ran, so it is not tried again. The "
        f"last time: {ending.why}. "
        f"Ask for less (size, frames), or see the host's log. {ending.last_lines(job.id)}".strip()
    )
