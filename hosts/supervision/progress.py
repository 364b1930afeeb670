"""What this rank's main thread is at, for the watch thread (hosts/supervision/heartbeat.py): a
thread can give signs of life while the work hangs.

A job that makes no step for several times as long as its steps take hangs, in a kernel, a lock or a
file system. Written by the main thread, read by the watch. Imports no torch.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

PATIENCE = 10
"""Times the longest step of this job so far: steps differ, by caches that fill, by other
programs.
"""
BEGIN_WITHIN_S = 900.0
"""For everything of a job that is no step: encoding, the first step with what it allocates,
decoding.
"""
COMPILE_WITHIN_S = 3600.0
"""For any step of a compiled pipeline: a new shape compiles again."""
LOAD_WITHIN_S = 3600.0
"""For loading, which may read hundreds of gigabytes over a network."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """what: for the reason. since_s: of its last sign. within_s: until the next one. longest_s: of
    its steps but the first.
    """

    what: str
    since_s: float
    within_s: float
    least_s: float
    longest_s: float = 0.0
    num_steps: int = 0


class Activity:
    """One rank's. Nothing is expected while it rests."""

    def __init__(
        self,
        *,
        mark: Callable[[str], None] = lambda what: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """mark: is told once that the pipeline is 'ready', and once that a job was 'served'."""
        self._mark = mark
        self._clock = clock
        self._marked: set[str] = set()
        self._work: _Work | None = None

    def begin(self, what: str, *, within_s: float = BEGIN_WITHIN_S, least_s: float = 0.0) -> None:
        """what: such as 'loading'. within_s: until its first step, and after its last. least_s:
        between steps, at least.
        """
        self._work = _Work(what=what, since_s=self._clock(), within_s=within_s, least_s=least_s)

    def step(self, *, is_last: bool) -> None:
        """A step is done."""
        work = self._work
        if work is None:
            return
        now = self._clock()
        took_s = now - work.since_s
        longest_s = (
            max(work.longest_s, took_s) if work.num_steps != 1 else took_s
        )  # the first one allocates, and may compile
        within_s = BEGIN_WITHIN_S if is_last else PATIENCE * longest_s
        self._work = replace(
            work,
            since_s=now,
            within_s=max(within_s, work.least_s),
            longest_s=longest_s,
            num_steps=work.num_steps + 1,
        )

    def rest(self) -> None:
        """It is over, whatever its end."""
        self._work = None

    def mark(self, what: str) -> None:
        if what not in self._marked:
            self._marked.add(what)
            self._mark(what)

    def overdue(self, floor_s: float) -> str | None:
        """What the main thread should have got on with by now, and did not; None if all is well.
        floor_s: never sooner than that.
        """
        work = self._work
        if work is None:
            return None
        idle_s = self._clock() - work.since_s
        if idle_s <= max(floor_s, work.within_s):
            return None
        at = f" after step {work.num_steps}" if work.num_steps else ""
        return f"made no step of {work.what}{at} for {idle_s:.0f} s"
