"""The phase of the host, for HTTP threads to read: waiting for other machines, loading, empty,
ready, failed or stopping. Pure Python.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Phase(StrEnum):
    WAITING = "waiting"
    LOADING = "loading"
    EMPTY = "empty"
    READY = "ready"
    FAILED = "failed"
    STOPPING = "stopping"


@dataclass(slots=True)
class HostState:
    """The state that rank 0 shows."""

    phase: Phase = Phase.LOADING
    reason: str = ""
    """Why the host waits, failed, stops or has no pipeline."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What GET /settings shows."""
    loading_percent: float = 0.0
    """Progress of loading, for hosts that load their pipeline over HTTP."""
    measure: Callable[[], None] | None = None
    """Let the ranks measure their methods, and wait for that; None where there are no ranks."""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stopping: threading.Event = field(default_factory=threading.Event)

    def become(self, phase: Phase, reason: str = "") -> None:
        """Change the phase; stopping is final."""
        with self._lock:
            if self.phase is not Phase.STOPPING:
                self.phase, self.reason = phase, reason
        if phase is Phase.STOPPING:
            self._stopping.set()

    def wait_for_stop(self) -> None:
        self._stopping.wait()

    def tell(self, facts: Mapping[str, Any]) -> None:
        with self._lock:
            self.facts = {**self.facts, **facts}

    def tell_ranks(self, figures: Sequence[Mapping[str, Any]]) -> None:
        """Replace the figures of the ranks that report their last job; the others' stay."""
        with self._lock:
            known = {rank["rank"]: rank for rank in [*self.facts.get("ranks_now", []), *figures]}
            self.facts = {**self.facts, "ranks_now": [known[rank] for rank in sorted(known)]}
