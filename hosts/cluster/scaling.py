"""How many replicas a model should have: up at once when jobs wait, down one by one when fewer were
enough for a while. Pure Python.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """jobs_per_replica: waiting and running, above which there should be one more. idle_s: for
    which fewer must have been enough.
    """

    minimum: int
    maximum: int
    jobs_per_replica: int
    idle_s: float

    def enough(self, num_jobs: int) -> int:
        """Replicas for so many jobs."""
        return min(self.maximum, max(self.minimum, math.ceil(num_jobs / self.jobs_per_replica)))


class Scale:
    """One model's. `target` is the number of replicas there should be."""

    def __init__(self, rule: Rule, *, first: int, now_s: float) -> None:
        self._rule = rule
        self.target = first
        self._needed_s = now_s

    def look(self, *, num_jobs: int, now_s: float) -> int:
        """The target, now that so many jobs wait or run. now_s: of any clock that only goes
        forward.
        """
        enough = self._rule.enough(num_jobs)
        if enough >= self.target:
            self.target, self._needed_s = enough, now_s
        elif now_s - self._needed_s >= self._rule.idle_s:
            self.target, self._needed_s = self.target - 1, now_s
        return self.target
