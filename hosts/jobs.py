"""Jobs and their queue: what HTTP threads touch. Bounded, thread-safe, pure Python."""

import itertools
import secrets
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum

from backends.errors import BusyError, CancelledError, HostError
from backends.request import GenerateRequest, GenerateResult


class JobStatus(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(slots=True, kw_only=True, eq=False)
class Job:
    """One request on its way. Written by the queue's methods only."""

    id: str
    request: GenerateRequest
    status: JobStatus = JobStatus.QUEUED
    step: int = 0
    num_steps: int = 0
    result: GenerateResult | None = None
    error: HostError | None = None
    cancel_requested: bool = False
    created_s: float = field(default_factory=time.time)
    finished: threading.Event = field(default_factory=threading.Event)

    def wait(self) -> GenerateResult:
        """Block until the job is over; its result, or its error raised."""
        self.finished.wait()
        if self.error is not None:
            raise self.error
        assert self.result is not None
        return self.result


class JobQueue:
    """First come, first served; one job runs at a time.

    capacity: jobs that may wait; one more is a BusyError.
    """

    def __init__(self, *, capacity: int = 48) -> None:
        self._capacity = capacity
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._closed: HostError | None = None
        self._percent = 0.0
        self._numbers = itertools.count(1)
        self._start_id = secrets.token_hex(4)

    def submit(self, request: GenerateRequest) -> Job:
        """Queue a request. The seed is drawn here if it was left to us, so that a retried job makes the same picture."""
        seed = request.seed if request.seed is not None and request.seed >= 0 else secrets.randbelow(2**32)
        job = Job(id="", request=request.model_copy(update={"seed": seed}))
        with self._changed:
            if self._closed is not None:
                raise self._closed
            if len(self._waiting) >= self._capacity:
                raise BusyError(f"the queue is full: {self._capacity} jobs are waiting. Try again when one is done.")
            job.id = f"{self._start_id}-{next(self._numbers)}"
            self._waiting.append(job)
            self._changed.notify_all()
        return job

    def next(self) -> Job | None:
        """The next job, now running; blocks until there is one. None once the queue is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed is not None)
            if self._closed is not None:
                return None
            job = self._waiting.popleft()
            job.status = JobStatus.RUNNING
            self._running = job
            self._percent = 0.0
            return job

    def record_step(self, job: Job, step: int, num_steps: int) -> None:
        """`step` of `num_steps` scheduler steps are done."""
        with self._changed:
            job.step, job.num_steps = step, num_steps
            self._percent = max(self._percent, 100.0 * step / num_steps)

    def finish(self, job: Job, *, result: GenerateResult | None = None, error: HostError | None = None) -> None:
        """The job is over. A failed one leaves the progress at 0, not where it stood."""
        with self._changed:
            self._running = None
            self._percent = 100.0 if error is None else 0.0
            self._settle(job, result=result, error=error)

    def cancel(self, job: Job) -> None:
        """A queued job ends here; a running one at its next step, on all ranks."""
        with self._changed:
            job.cancel_requested = True
            if job in self._waiting:
                self._waiting.remove(job)
                self._settle(job, error=CancelledError("the job was cancelled before it ran."))

    def close(self, reason: HostError) -> None:
        """Refuse what comes, fail what waits, and cancel what runs, with this reason."""
        with self._changed:
            self._closed = self._closed or reason
            for job in self._waiting:
                self._settle(job, error=reason)
            self._waiting.clear()
            if self._running is not None:
                self._running.cancel_requested = True
            self._changed.notify_all()

    def abandon(self, reason: HostError) -> None:
        """The rank loop is gone: close, and answer for the running job too."""
        self.close(reason)
        with self._changed:
            if self._running is not None:
                self._settle(self._running, error=reason)
                self._running = None

    @property
    def percent(self) -> float:
        """Progress of the running job, or of the last one: 0 to 100."""
        return self._percent

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def _settle(self, job: Job, *, result: GenerateResult | None = None, error: HostError | None = None) -> None:
        if job.finished.is_set():
            return
        job.result, job.error = result, error
        ended = {True: JobStatus.CANCELLED, False: JobStatus.FAILED}[isinstance(error, CancelledError)]
        job.status = JobStatus.DONE if error is None else ended
        job.finished.set()
