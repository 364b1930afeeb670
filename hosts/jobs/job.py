"""One request on its way from HTTP to an image. Pure Python."""

import threading
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from backends.errors import HostError
from backends.request import Array, GenerateRequest, GenerateResult
from hosts.jobs.clock import now


class JobStatus(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(slots=True, kw_only=True, eq=False)
class Job:
    """One request. Only the queue's methods write it."""

    id: str
    """Names the job in the API."""
    request: GenerateRequest
    """What to make."""
    client: str = ""
    """Who asked, so that clients take turns."""
    is_kept: bool = False
    """Whether it can be asked for by id."""
    is_stored: bool = False
    """Whether it outlives the ranks, if the queue has a store."""
    key: str | None = None
    """The client's own name for it (Idempotency-Key)."""
    fingerprint: str = ""
    """What the client asked for under that name."""
    attempts: int = 0
    """How often it was begun."""
    deadline_s: float | None = None
    """When it is cancelled."""
    status: JobStatus = JobStatus.QUEUED
    """Where it is on its way."""
    step: int = 0
    """Steps that are done."""
    num_steps: int = 0
    """Steps in all, once that is known."""
    percent: float = 0.0
    """Share of the steps that are done."""
    ranks: int | None = None
    """How many ranks work on it."""
    batch: str = ""
    """Id of the first of the jobs that are generated in one batch with it."""
    result: GenerateResult | None = None
    """The images, once it is done."""
    spans: dict[int, Any] = field(default_factory=dict)
    """What each rank did when (hosts/jobs/trace.py)."""
    error: HostError | None = None
    """Why it failed or was cancelled."""
    cancel_requested: bool = False
    """Whether its client, or a limit, wants it to end."""
    cancel_reason: str = ""
    """What its client is told then."""
    is_interrupted: bool = False
    """Whether the host stops it, not its client."""
    wants_preview: bool = False
    """Whether somebody has asked for previews; without that none are made."""
    preview: Array | None = None
    """uint8 (h, w, 3) of the last step."""
    version: int = 0
    """Counts changes, for those who follow the job."""
    created_s: float = field(default_factory=now)
    """Its arrival, by hosts/jobs/clock.py, as all its times."""
    started_s: float | None = None
    """Its last beginning."""
    ended_s: float | None = None
    """Its end."""
    finished: threading.Event = field(default_factory=threading.Event)
    """Set at its end."""

    def wait(self, timeout_s: float | None = None) -> GenerateResult | None:
        """Block until the job is over; its result, or its error raised. None if it is not over
        after `timeout_s`.
        """
        if not self.finished.wait(timeout_s):
            return None
        if self.error is not None:
            raise self.error
        assert self.result is not None
        return self.result

    @property
    def must_stop(self) -> bool:
        """Whether the running job should end at its next step."""
        return self.cancel_requested or self.is_interrupted or self.is_late

    @property
    def is_late(self) -> bool:
        return self.deadline_s is not None and now() > self.deadline_s

    @property
    def num_bytes(self) -> int:
        """Of its images."""
        if self.result is None:
            return 0
        return self.result.frames.nbytes + (
            self.result.latents.nbytes if self.result.latents is not None else 0
        )
