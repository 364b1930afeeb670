"""Jobs and their queue: what HTTP threads touch. Bounded, thread-safe, pure Python."""

import itertools
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from backends.errors import BusyError, CancelledError, HostError, NotFoundError
from backends.request import Array, GenerateRequest, GenerateResult

KEPT_BYTES = 256 * 1024 * 1024


class JobStatus(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(slots=True, kw_only=True, eq=False)
class Job:
    """One request on its way. Written by the queue's methods only.

    client: who asked, for fairness. deadline_s: wall clock after which it is cancelled. preview: uint8 (h, w, 3) of the last step, made
    only once somebody has asked (wants_preview). version: counts changes, for those who follow the job.
    """

    id: str
    request: GenerateRequest
    client: str = ""
    is_kept: bool = False
    deadline_s: float | None = None
    status: JobStatus = JobStatus.QUEUED
    step: int = 0
    num_steps: int = 0
    result: GenerateResult | None = None
    error: HostError | None = None
    cancel_requested: bool = False
    cancel_reason: str = ""
    wants_preview: bool = False
    preview: Array | None = None
    version: int = 0
    created_s: float = field(default_factory=time.time)
    started_s: float | None = None
    ended_s: float | None = None
    finished: threading.Event = field(default_factory=threading.Event)

    def wait(self, timeout_s: float | None = None) -> GenerateResult | None:
        """Block until the job is over; its result, or its error raised. None if it is not over after `timeout_s`."""
        if not self.finished.wait(timeout_s):
            return None
        if self.error is not None:
            raise self.error
        assert self.result is not None
        return self.result

    @property
    def must_stop(self) -> bool:
        """Whether the running job should end at its next step."""
        return self.cancel_requested or self.is_late

    @property
    def is_late(self) -> bool:
        return self.deadline_s is not None and time.time() > self.deadline_s

    @property
    def num_bytes(self) -> int:
        return self.result.frames.nbytes if self.result is not None else 0


class JobQueue:
    """Clients take turns, each client's jobs in the order they came; one job runs at a time.

    capacity: jobs that may wait; one more is a BusyError. max_seconds: from submission to the end of a job, 0 for any time.
    Finished jobs that were submitted with `is_kept` can be asked for by id until `num_kept` newer ones, or too many bytes, push them out.
    """

    def __init__(self, *, capacity: int = 48, max_seconds: float = 0, num_kept: int = 64) -> None:
        self._capacity = capacity
        self._max_seconds = max_seconds
        self._num_kept = num_kept
        self._changed = threading.Condition()
        self._waiting: list[Job] = []
        self._running: Job | None = None
        self._kept: dict[str, Job] = {}
        self._num_served: Counter[str] = Counter()
        self._closed: HostError | None = None
        self._percent = 0.0
        self._numbers = itertools.count(1)
        self._start_id = secrets.token_hex(4)
        self.on_end: list[Callable[[Job], None]] = []
        """Called with each job that is over, while the queue is locked: quick, and never back into the queue."""

    def submit(self, request: GenerateRequest, *, client: str = "", is_kept: bool = False) -> Job:
        """Queue a request. The seed is drawn here if it was left to us, so that a retried job makes the same picture."""
        seed = request.seed if request.seed is not None and request.seed >= 0 else secrets.randbelow(2**32)
        job = Job(id="", request=request.model_copy(update={"seed": seed}), client=client, is_kept=is_kept)
        job.deadline_s = job.created_s + self._max_seconds if self._max_seconds else None
        with self._changed:
            if self._closed is not None:
                raise self._closed
            if len(self._waiting) >= self._capacity:
                raise BusyError(f"the queue is full: {self._capacity} jobs are waiting. Try again when one is done.")
            job.id = f"{self._start_id}-{next(self._numbers)}"
            self._level(client)
            self._waiting.append(job)
            if is_kept:
                self._kept[job.id] = job
            self._tell(job)
        return job

    def next(self) -> Job | None:
        """The next job, now running; blocks until there is one. None once the queue is closed."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._waiting or self._closed is not None)
                if self._closed is not None:
                    return None
                job = self._order()[0]
                self._waiting.remove(job)
                if not job.is_late:
                    break
                self._settle(job, error=_too_late(job))
            job.status = JobStatus.RUNNING
            job.started_s = time.time()
            self._num_served[job.client] += 1
            self._running = job
            self._percent = 0.0
            self._tell(job)
            return job

    def record_step(self, job: Job, step: int, num_steps: int, preview: Array | None = None) -> None:
        """`step` of `num_steps` scheduler steps are done."""
        with self._changed:
            job.step, job.num_steps = step, num_steps
            job.preview = preview if preview is not None else job.preview
            self._percent = max(self._percent, 100.0 * step / num_steps)
            self._tell(job)

    def finish(self, job: Job, *, result: GenerateResult | None = None, error: HostError | None = None) -> None:
        """The job is over. A failed one leaves the progress at 0, not where it stood."""
        with self._changed:
            self._running = None
            self._percent = 100.0 if error is None else 0.0
            if isinstance(error, CancelledError):
                error = CancelledError(job.cancel_reason) if job.cancel_reason else _too_late(job) if job.is_late else error
            self._settle(job, result=result, error=error)

    def cancel(self, job: Job, reason: str = "") -> None:
        """A queued job ends here; a running one at its next step, on all ranks; one that is over stays as it is."""
        with self._changed:
            job.cancel_requested, job.cancel_reason = True, reason
            if job in self._waiting:
                self._waiting.remove(job)
                self._settle(job, error=CancelledError(reason or "the job was cancelled before it ran."))

    def find(self, job_id: str) -> Job:
        """A job that was submitted to be kept, at any stage. NotFoundError if it is not known, or not known any more."""
        with self._changed:
            if job_id not in self._kept:
                raise NotFoundError(
                    f"there is no job {job_id!r}. Jobs are known until {self._num_kept} newer ones are done, and not after a restart."
                )
            return self._kept[job_id]

    def jobs(self) -> list[Job]:
        """The running job, those that wait in the order in which they will run, and the kept ones that are over, newest first."""
        with self._changed:
            over = [job for job in self._kept.values() if job.finished.is_set()]
            return [*([self._running] if self._running else []), *self._order(), *reversed(over)]

    def position(self, job: Job) -> int:
        """How many jobs run before this one; 0 once it runs or is over."""
        with self._changed:
            return self._order().index(job) + (self._running is not None) if job in self._waiting else 0

    def wait_for_change(self, job: Job, version: int, timeout_s: float) -> int:
        """Block until the job has changed since `version` or the time is over; its version now."""
        with self._changed:
            self._changed.wait_for(lambda: job.version != version, timeout_s)
            return job.version

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

    def _order(self) -> list[Job]:
        """The waiting jobs in the order in which they will run: always the client that has been served least, then the oldest job."""
        served, left, order = Counter(self._num_served), list(self._waiting), []
        while left:
            job = min(left, key=lambda job: served[job.client])  # the first of equals: the oldest
            left.remove(job)
            served[job.client] += 1
            order.append(job)
        return order

    def _level(self, client: str) -> None:
        """A client that comes (back) starts level with those that wait, not with a lead for the time it was away."""
        if not self._waiting:
            self._num_served.clear()
        elif not any(job.client == client for job in self._waiting):
            least = min(self._num_served[job.client] for job in self._waiting)
            self._num_served[client] = max(self._num_served[client], least)

    def _settle(self, job: Job, *, result: GenerateResult | None = None, error: HostError | None = None) -> None:
        if job.finished.is_set():
            return
        job.result, job.error = result, error
        job.ended_s = time.time()
        ended = {True: JobStatus.CANCELLED, False: JobStatus.FAILED}[isinstance(error, CancelledError)]
        job.status = JobStatus.DONE if error is None else ended
        job.finished.set()
        for listener in self.on_end:
            listener(job)
        self._tell(job)
        self._forget_old()

    def _forget_old(self) -> None:
        over = [job for job in self._kept.values() if job.finished.is_set()]
        while len(over) > 1 and (len(over) > self._num_kept or sum(job.num_bytes for job in over) > KEPT_BYTES):
            del self._kept[over.pop(0).id]

    def _tell(self, job: Job) -> None:
        job.version += 1
        self._changed.notify_all()


def _too_late(job: Job) -> CancelledError:
    seconds = job.deadline_s - job.created_s
    return CancelledError(
        f"the job was not done {seconds:g} s after it was sent, which is this host's limit (--max_job_seconds). Ask for less."
    )
