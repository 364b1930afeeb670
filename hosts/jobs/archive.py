"""The jobs that clients can look up, by id or by their own key: what is kept and what is
forgotten. Pure Python.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from backends.errors import NotFoundError, RequestError
from hosts.jobs.job import Job
from hosts.jobs.store import Store


@dataclass(slots=True, kw_only=True, eq=False)
class Archive:
    """The kept jobs at any stage. Only finished ones are forgotten. The queue calls this with its
    lock held.
    """

    store: Store
    """What is forgotten here is removed there."""
    num_kept: int
    """Finished jobs to keep. Beyond that the oldest is forgotten."""
    kept_bytes: int
    """Bytes of their images. Beyond that the oldest are forgotten, but never the newest."""
    kept_seconds: float
    """How long to keep a job after its end; 0 for no limit."""
    now: Callable[[], float]
    """The clock by which `Job.ended_s` was set."""
    _by_id: dict[str, Job] = field(default_factory=dict, init=False)
    _by_key: dict[tuple[str, str], Job] = field(default_factory=dict, init=False)
    """(client, key) -> job."""

    def add(self, job: Job) -> None:
        """Make the job known, if it was submitted to be kept."""
        if not job.is_kept:
            return
        self._by_id[job.id] = job
        if job.key is not None:
            self._by_key[job.client, job.key] = job

    def find(self, job_id: str, *, owner: str | None) -> Job:
        """Return the job of this id. NotFoundError if it is unknown, forgotten or another's."""
        self.forget_old()
        found = self._by_id.get(job_id)
        if found is None or not found.is_seen_by(owner):
            end = "." if self.store.is_durable else ", and not after a restart."
            raise NotFoundError(
                f"there is no job {job_id[:80]!r}. Jobs are known until {self.num_kept} newer ones "
                f"are done{end} Send the request again."
            )
        return found

    def same_key(self, job: Job) -> Job | None:
        """Return the job that this client sent under the same key. RequestError if that one asked
        for something else.
        """
        known = self._by_key.get((job.client, job.key)) if job.key is not None else None
        if known is not None and known.fingerprint != job.fingerprint:
            raise RequestError(
                f"Idempotency-Key={job.key!r} belongs to job {known.id!r}, which asked for "
                "something else. Use a new key for a new job.",
                field="Idempotency-Key",
            )
        return known

    def finished(self) -> list[Job]:
        """Return the finished jobs, in the order in which they were accepted."""
        return [job for job in self._by_id.values() if job.finished.is_set()]

    def unfinished(self) -> list[Job]:
        """Return the others, in the order in which they were accepted."""
        return [job for job in self._by_id.values() if not job.finished.is_set()]

    def forget_old(self) -> None:
        """Forget the jobs that are beyond a bound, oldest first."""
        finished = self.finished()
        while finished and self._is_beyond_bounds(finished):
            self.forget(finished.pop(0))

    def forget(self, job: Job) -> None:
        """Forget the job and remove it from the store."""
        self._by_id.pop(job.id, None)
        if job.key is not None:
            self._by_key.pop((job.client, job.key), None)
        if job.is_stored:
            self.store.forget(job)

    def _is_beyond_bounds(self, finished: list[Job]) -> bool:
        """Return whether the first of these jobs must go."""
        if self.kept_seconds and finished[0].ended_s < self.now() - self.kept_seconds:
            return True
        num_bytes = sum(job.num_bytes for job in finished)
        return len(finished) > 1 and (len(finished) > self.num_kept or num_bytes > self.kept_bytes)
