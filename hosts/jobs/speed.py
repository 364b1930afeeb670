"""How many ranks should work on each job, decided from measured times. Pure arithmetic; imports no
torch.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence

from hosts.jobs.work import Work

ASSUMED_GAIN = 1.7
"""Speed-up with twice as many ranks, until both sizes are measured."""
ASSUMED_SECONDS = 1e-5
"""Per pixel step on one rank, until anything is measured. Only ratios of times decide, so the value
hardly matters.
"""
NUM_REMEMBERED = 4
"""Jobs of one team size whose times are kept."""
WAIT_COUNTS = 1e-4
"""Weight of one second of one job's wait against the total time. It decides between plans that are
equally fast in favour of shorter waits.
"""
DRIFT = 1.3
"""Jobs that take longer or shorter by more than this factor than their method was measured to take
say that the measurement no longer holds.
"""
NUM_DRIFTING = 5
"""Jobs in a row that must say so: another program may have disturbed one."""
WORTH_GATHERING = 0.98
"""Teams gather only if the work then ends in less than this share of the time: gathering and
splitting cost a little too.
"""


class Speed:
    """Measured times for teams of each size: of the steps, in seconds per pixel step, and of the
    rest of a job (encoding, decoding), in seconds per pixel. They are kept apart because a job of
    few steps spends much of its time on the rest, which more ranks need not make faster.

    The best of the last few jobs counts: the first one fills caches, and another program may have
    slowed one down.
    """

    def __init__(self) -> None:
        self._steps: dict[int, deque[float]] = {}
        self._rest: dict[int, deque[float]] = {}

    def learn(self, *, ranks: int, work: Work, seconds: float, step_seconds: float) -> None:
        """Record the time of one job. step_seconds: of `seconds`, those of its steps."""
        rest = max(0.0, seconds - step_seconds)
        for measured, figure in (
            (self._steps, step_seconds / work.pixel_steps),
            (self._rest, rest / work.pixels),
        ):
            measured.setdefault(ranks, deque(maxlen=NUM_REMEMBERED)).append(figure)

    def seconds(self, ranks: int, work: Work) -> float:
        """Return how long `ranks` ranks take: as measured, else estimated from the nearest measured
        size with ASSUMED_GAIN.
        """
        if not self._steps:
            return work.pixel_steps * ASSUMED_SECONDS / ASSUMED_GAIN ** math.log2(ranks)
        nearest = min(list(self._steps), key=lambda size: abs(math.log2(size / ranks)))
        measured = work.pixel_steps * min(self._steps[nearest]) + work.pixels * min(
            self._rest[nearest]
        )
        return measured * ASSUMED_GAIN ** math.log2(nearest / ranks)

    def measured(self) -> dict[int, float]:
        """Return team size -> seconds per million pixel steps."""
        return {size: round(1e6 * min(found), 4) for size, found in sorted(self._steps.items())}


class Drift:
    """Compares the last few jobs with what was measured."""

    def __init__(self) -> None:
        self._ratios: deque[float] = deque(maxlen=NUM_DRIFTING)

    def learn(self, seconds: float, *, expected_s: float) -> None:
        """Record a job's seconds, and those that its method was measured to take."""
        self._ratios.append(seconds / expected_s)

    @property
    def has_drifted(self) -> bool:
        """Whether all of the last jobs differ by more than DRIFT, in the same direction."""
        return len(self._ratios) == NUM_DRIFTING and (
            min(self._ratios) > DRIFT or max(self._ratios) < 1 / DRIFT
        )


def best_size(num_jobs: int, seconds: Mapping[int, float]) -> int:
    """Return the team size with which `num_jobs` equal jobs are done soonest, if none has started.

    seconds: team size -> time for one job. The largest size is all ranks, and a single job always
    gets all of them.
    """
    return _plan(num_jobs, seconds)[num_jobs][1] if num_jobs > 1 else max(seconds)


def gathering_is_quicker(
    waiting: Sequence[Mapping[int, float]], busy: Sequence[float], *, team_size: int
) -> bool:
    """Return whether a free team should leave the next job, so that all ranks gather when the busy
    teams are done and then share the rest.

    waiting: team size -> seconds, for each waiting job in order.
    busy: seconds that each busy team still needs.
    The alternative is that the teams take some of the jobs before all gather; the best number of
    them is compared.
    """
    world = max(waiting[0])
    mean = {size: sum(job[size] for job in waiting) / len(waiting) for size in waiting[0]}
    rests = [seconds for seconds, _ in _plan(len(waiting), mean)]
    ends = sorted([*busy, *[0.0] * (world // team_size - len(busy))])
    gathered = ends[-1] + rests[len(waiting)]
    taken = math.inf
    for number, job in enumerate(waiting, start=1):
        ends[0] += job[team_size]
        ends.sort()
        taken = min(taken, ends[-1] + rests[len(waiting) - number])
    return gathered < WORTH_GATHERING * taken


def _plan(num_jobs: int, seconds: Mapping[int, float]) -> list[tuple[float, int]]:
    """Return for 0, 1, ... `num_jobs` equal jobs the time of them all and the first team size. The
    size is chosen anew for each round.
    """
    world = max(seconds)
    plan = [(0.0, world)]
    for number in range(1, num_jobs + 1):
        weight = 1 + WAIT_COUNTS * number
        plan.append(
            min(
                (weight * needed + plan[max(0, number - world // size)][0], size)
                for size, needed in seconds.items()
            )
        )
    return plan
