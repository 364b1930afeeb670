"""Passes one job at a time from the gateway's queue to a replica and the result back.

A replica has one slot for each job that it can run at once.
"""

import contextlib
import http.client
import logging
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from diffusion_client import HostError as RemoteError
from diffusion_client import Job as RemoteJob

from backends.errors import CancelledError, HostError
from hosts.cluster import messages
from hosts.http import media
from hosts.http.errors import error_of
from hosts.jobs.decision import Choice
from hosts.jobs.queue import Job, JobQueue

if TYPE_CHECKING:
    from hosts.cluster.replica import Replica

logger = logging.getLogger(__name__)

BROKEN = (OSError, http.client.HTTPException, ValueError, KeyError)
"""Errors that mean that the other side did not finish its answer."""


class ReplicaSlot:
    """A thread between the queue and its replica. job: its current job."""

    def __init__(self, replica: "Replica", queue: JobQueue) -> None:
        self._replica = replica
        self._queue = queue
        self.job: Job | None = None
        self._remote: RemoteJob | None = None
        self._thread = threading.Thread(target=self._run, name=f"slot-{replica.name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def cancel_unwanted(self) -> None:
        """Cancel the job on the replica if its client no longer wants it. Call it regularly."""
        job, remote = self.job, self._remote
        if job is None or remote is None or not job.must_stop:
            return
        self._remote = None
        try:
            remote.cancel()
        except RemoteError as error:
            logger.warning(
                "job %s could not be cancelled on %s: %s", job.id, self._replica.name, error
            )

    def _run(self) -> None:
        while (job := self._queue.next(self._choose, ranks=self._replica.ranks)) is not None:
            self._do(job)
            self.job = self._remote = None

    def _choose(self, waiting: Sequence[Job], running: Sequence[Job]) -> Choice:
        """Choose a job. The queue is locked, so that all slots see the same loads."""
        if self._replica.is_leaving:
            return Choice.LEAVE
        if not waiting or not self._replica.is_next():
            return Choice.WAIT
        self.job = waiting[0]
        self._replica.taken_s = time.monotonic()
        return Choice.TAKE

    def _do(self, job: Job) -> None:
        was_begun = False
        try:
            fields = messages.fields_of(job.request)
            self._remote = remote = self._replica.client.submit(
                idempotency_key=f"{job.id}-{job.attempts}", **fields
            )
            was_begun = True
            self._follow(remote, job)
            result = media.decode_whole(remote.result(media.WHOLE_TYPE))
        except RemoteError as error:
            if error.status in messages.ELSEWHERE:
                self._give_back(job, error, was_begun=was_begun)
            else:
                self._queue.finish(job, error=error_of(error.status, str(error)))
        except BROKEN as error:
            self._give_back(job, error, was_begun=was_begun)
        except Exception as error:  # every job must end, and the slot must go on
            logger.exception("job %s failed in the gateway", job.id)
            self._queue.finish(
                job,
                error=HostError(f"the gateway failed: {type(error).__name__}. Its log says more."),
            )
        else:
            self._replica.num_done += 1
            self._queue.finish(job, result=result)
            with contextlib.suppress(RemoteError, *BROKEN):  # no one waits for it
                job.spans = messages.spans_of(self._replica.client.trace(remote.id))

    def _follow(self, remote: RemoteJob, job: Job) -> None:
        """Record the job's steps until it is over. OSError if the events end early."""
        is_over, shown = False, None
        while not is_over:
            with_previews = job.wants_preview
            for state in remote.follow(previews=with_previews):
                small = state.preview if state.preview is not shown else None
                shown = state.preview
                if state.steps:
                    self._queue.record_step(
                        job,
                        state.step,
                        state.steps,
                        messages.preview(small) if small is not None else None,
                    )
                is_over = state.is_over
                if is_over or job.wants_preview != with_previews:
                    break
            else:
                raise ConnectionError("the events ended before the job")

    def _give_back(self, job: Job, error: Exception, *, was_begun: bool) -> None:
        """Return a job that the replica lost to the queue, to be started again on any replica."""
        logger.warning("job %s was lost with replica %s (%s)", job.id, self._replica.name, error)
        self._replica.suspect(str(error))
        if self._queue.retry(job, was_begun=was_begun):
            return
        if job.must_stop:
            self._queue.finish(job, error=CancelledError("the job was cancelled."))
        elif (
            not self._queue.is_closed
        ):  # else the next gateway runs it, or stopping this one answers it
            self._queue.finish(job, error=_gave_up(job, error))


def _gave_up(job: Job, error: Exception) -> HostError:
    return HostError(
        f"{job.attempts} replicas were lost while this job ran, so it is not tried again. The last "
        f"one: {error}. "
        "Ask for less (size, frames), or see the replicas' logs."
    )
