"""One request on its way from HTTP to an image. Pure Python."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from backends.errors import CancelledError, HostError
from backends.request import Array, GenerateRequest, GenerateResult

MAX_ATTEMPTS = 2
"""How often a job is started, if its client could do nothing about the failures before."""
_START = time.time() - time.monotonic()


def now() -> float:
    """Return the seconds since 1970 by a clock that agreed with the machine's when this process
    started, and never jumps.

    The machine's clock may be set at any time. A jump would make jobs late, or forget them.
    """
    return _START + time.monotonic()


class JobStatus(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(slots=True, kw_only=True, eq=False)
class Job:
    """One request. Only the queue writes to it."""

    id: str
    """Its name in the API."""
    request: GenerateRequest
    """What to generate."""
    client: str = ""
    """The sender, so that clients take turns."""
    owner: str = ""
    """Hash of the key that made it; empty if no key was needed."""
    is_kept: bool = False
    """Whether clients can look it up by id."""
    is_stored: bool = False
    """Whether it is in the store, and so outlives the ranks."""
    series: str = ""
    """Names the jobs of one HTTP request that made several."""
    key: str | None = None
    """The client's own name for it (Idempotency-Key)."""
    fingerprint: str = ""
    """Hash of the request, if there is a key."""
    attempts: int = 0
    """How often it was started."""
    deadline_s: float | None = None
    """When it is cancelled; None for never."""
    status: JobStatus = JobStatus.QUEUED
    """Its state in the API."""
    step: int = 0
    """Finished scheduler steps."""
    num_steps: int = 0
    """Scheduler steps in all; 0 until it is known."""
    percent: float = 0.0
    """Progress, 0 to 100."""
    ranks: int | None = None
    """Number of ranks that work on it."""
    batch: str = ""
    """Id of the first job of its batch."""
    result: GenerateResult | None = None
    """The images, once it is done."""
    spans: dict[int, Any] = field(default_factory=dict)
    """Rank -> its timed stages (hosts/jobs/trace.py)."""
    error: HostError | None = None
    """Why it failed or was cancelled."""
    cancel_requested: bool = False
    """Whether it was cancelled. A running job then ends at its next step."""
    cancel_reason: str = ""
    """The error text for its client, if it was cancelled for a special reason."""
    ends_early: bool = False
    """Whether a running job ends at its next step with what there is."""
    is_interrupted: bool = False
    """Whether it must end because the host stops."""
    wants_preview: bool = False
    """Whether a client has asked for previews. Otherwise none are computed."""
    preview: Array | None = None
    """uint8 (h, w, 3) of the last step."""
    version: int = 0
    """Number of changes so far, for clients that follow the job."""
    clock: Callable[[], float] = field(default=now, repr=False)
    """Returns the time in seconds since 1970. All times of the job are by this clock."""
    created_s: float = field(default_factory=now)
    """When it was submitted."""
    started_s: float | None = None
    """When it was started last."""
    ended_s: float | None = None
    """When it finished, failed or was cancelled."""
    finished: threading.Event = field(default_factory=threading.Event)
    """Set once it is done, failed or cancelled."""

    def wait(self, timeout_s: float | None = None) -> GenerateResult | None:
        """Block until the job is over. Return its result, or raise its error. Return None if it is
        not over after `timeout_s`.
        """
        if not self.finished.wait(timeout_s):
            return None
        if self.error is not None:
            raise self.error
        assert self.result is not None
        return self.result

    def is_seen_by(self, owner: str | None) -> bool:
        """Whether this owner may look it up and cancel it. None may see everybody's."""
        return owner is None or self.owner == owner

    @property
    def must_stop(self) -> bool:
        """Whether the running job must end at its next step."""
        return self.cancel_requested or self.is_interrupted or self.is_late

    @property
    def is_late(self) -> bool:
        return self.deadline_s is not None and self.clock() > self.deadline_s

    @property
    def may_start_again(self) -> bool:
        return self.attempts < MAX_ATTEMPTS

    @property
    def num_bytes(self) -> int:
        """Size of its result in memory."""
        if self.result is None:
            return 0
        sound = self.result.audio.samples if self.result.audio is not None else None
        arrays = (self.result.frames, self.result.latents, sound)
        return sum(array.nbytes for array in arrays if array is not None)


def cancelled_before_it_ran(job: Job) -> CancelledError:
    return CancelledError(job.cancel_reason or "the job was cancelled before it ran.")
