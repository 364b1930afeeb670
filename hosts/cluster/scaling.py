"""Number of replicas of a model: raised at once when jobs wait, lowered one by one. Pure Python."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """When to add and remove replicas."""

    minimum: int
    maximum: int
    jobs_per_replica: int  # waiting and running; more jobs need another replica
    idle_s: float  # how long fewer must have been enough before one is removed

    def enough(self, num_jobs: int) -> int:
        """Return the number of replicas for this number of jobs."""
        return min(self.maximum, max(self.minimum, math.ceil(num_jobs / self.jobs_per_replica)))


class Scale:
    """Scaling of one model. `target` is the wanted number of replicas."""

    def __init__(self, rule: Rule, *, first: int, now_s: float) -> None:
        self._rule = rule
        self.target = first
        self._needed_s = now_s

    def look(self, *, num_jobs: int, now_s: float) -> int:
        """Return the target for this number of waiting and running jobs.

        now_s: from any monotonic clock.
        """
        enough = self._rule.enough(num_jobs)
        if enough >= self.target:
            self.target, self._needed_s = enough, now_s
        elif now_s - self._needed_s >= self._rule.idle_s:
            self.target, self._needed_s = self.target - 1, now_s
        return self.target
