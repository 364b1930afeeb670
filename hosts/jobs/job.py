"""One request on its way from HTTP to an image. Pure Python."""

import threading
import time
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from backends.errors import HostError
from backends.request import Array, GenerateRequest, GenerateResult


class JobStatus(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(slots=True, kw_only=True, eq=False)
class Job:
    """One request. Written by the queue's methods only.

    client: who asked, for fairness. is_kept: can be asked for by id. is_stored: outlives the ranks,
    if the queue has a store.
    key, fingerprint: the client's own name for the job, and what it asked for under that name.
    attempts: how often it was begun.
    percent: of its steps that are done. ranks: how many work on it. batch: the first of the jobs
    that are made together, by its id.
    deadline_s: wall clock after which it is cancelled.
    preview: uint8 (h, w, 3) of the last step, made only once somebody has asked (wants_preview).
    is_interrupted: the host stops it, not its client.
    spans: what each rank did when (hosts/jobs/trace.py). version: counts changes, for those who
    follow the job.
    """

    id: str
    request: GenerateRequest
    client: str = ""
    is_kept: bool = False
    is_stored: bool = False
    key: str | None = None
    fingerprint: str = ""
    attempts: int = 0
    deadline_s: float | None = None
    status: JobStatus = JobStatus.QUEUED
    step: int = 0
    num_steps: int = 0
    percent: float = 0.0
    ranks: int | None = None
    batch: str = ""
    result: GenerateResult | None = None
    spans: dict[int, Any] = field(default_factory=dict)
    error: HostError | None = None
    cancel_requested: bool = False
    cancel_reason: str = ""
    is_interrupted: bool = False
    wants_preview: bool = False
    preview: Array | None = None
    version: int = 0
    created_s: float = field(default_factory=time.time)
    started_s: float | None = None
    ended_s: float | None = None
    finished: threading.Event = field(default_factory=threading.Event)

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
        return self.deadline_s is not None and time.time() > self.deadline_s

    @property
    def num_bytes(self) -> int:
        """Of its images."""
        if self.result is None:
            return 0
        return self.result.frames.nbytes + (
            self.result.latents.nbytes if self.result.latents is not None else 0
        )
