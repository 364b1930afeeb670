"""Progress of this rank's main thread, for the watch (hosts/supervision/heartbeat.py), whose own
thread sends heartbeats even while the work hangs.

A job hangs, in a kernel, a lock or a file system, when it makes no step for several times as long
as its steps take. The main thread writes, the watch reads. Imports no torch.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

PATIENCE = 10
"""Multiple of the job's longest step so far. Steps vary with filling caches and other programs."""
BEGIN_WITHIN_S = 900.0
"""Seconds for the parts of a job that are not steps: encoding, the first step with its
allocations, decoding.
"""
COMPILE_WITHIN_S = 3600.0
"""Seconds for any step of a compiled pipeline: a new shape compiles again."""
LOAD_WITHIN_S = 3600.0
"""Seconds for loading, which may read hundreds of gigabytes over a network."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """The work in progress."""

    what: str
    """Its name in the reason, such as 'job 7'."""
    since_s: float
    """When it made progress last."""
    within_s: float
    """Seconds within which it must make progress again."""
    least_s: float
    """Lower bound of `within_s`."""
    longest_s: float = 0.0
    """Its longest step, without the first."""
    num_steps: int = 0


class Activity:
    """One rank's progress. Nothing is expected while it rests."""

    def __init__(
        self,
        *,
        mark: Callable[[str], None] = lambda what: None,
        note_jobs: Callable[[Sequence[str]], None] = lambda jobs: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """mark: called once with 'ready' and once with 'served', when those are true first.
        note_jobs: called with the jobs in progress when they change.
        """
        self._mark = mark
        self._note_jobs = note_jobs
        self._clock = clock
        self._marked: set[str] = set()
        self._work: _Work | None = None

    def begin(
        self,
        what: str,
        *,
        within_s: float = BEGIN_WITHIN_S,
        least_s: float = 0.0,
        jobs: Sequence[str] = (),
    ) -> None:
        """Begin work such as 'loading'. within_s: limit until its first step and after its last.
        least_s: lower bound of the limit between steps. jobs: their ids, if it is of jobs.
        """
        self._note_jobs(jobs)
        self._work = _Work(what=what, since_s=self._clock(), within_s=within_s, least_s=least_s)

    def step(self, *, is_last: bool) -> None:
        """Record a step."""
        work = self._work
        if work is None:
            return
        now = self._clock()
        took_s = now - work.since_s
        longest_s = (
            # the first step allocates, and may compile
            max(work.longest_s, took_s) if work.num_steps != 1 else took_s
        )
        within_s = BEGIN_WITHIN_S if is_last else PATIENCE * longest_s
        self._work = replace(
            work,
            since_s=now,
            within_s=max(within_s, work.least_s),
            longest_s=longest_s,
            num_steps=work.num_steps + 1,
        )

    def rest(self) -> None:
        """End the work, however it went."""
        self._work = None
        self._note_jobs(())

    def mark(self, what: str) -> None:
        if what not in self._marked:
            self._marked.add(what)
            self._mark(what)

    def overdue(self, floor_s: float, *, awake_since_s: float = -math.inf) -> str | None:
        """Return which work has stopped making progress; None if all is well. floor_s: shortest
        limit. awake_since_s: when this process was last found to have been paused, by the same
        clock; nothing before counts.
        """
        work = self._work
        if work is None:
            return None
        idle_s = self._clock() - max(work.since_s, awake_since_s)
        if idle_s <= max(floor_s, work.within_s):
            return None
        at = f" after step {work.num_steps}" if work.num_steps else ""
        return f"made no step of {work.what}{at} for {idle_s:.0f} s"
